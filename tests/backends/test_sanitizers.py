"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over small and ragged problems, on every level of this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """The program, built by setup.py with the flags of the module."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_selftest", f"--output={folder / 'selftest'}", f"--flags={SANITIZE}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "selftest"


def test_no_error_and_all_levels_agree(build):
    done = subprocess.run([build], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


def test_an_error_would_show(build):
    """With the buffer of the weight's gradient one byte too short."""
    done = subprocess.run([build, "short"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
