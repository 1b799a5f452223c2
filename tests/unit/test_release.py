"""What is released: what the sdist and the wheels must hold, what the checks of them notice, and the workflow that runs them."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from backends.test_cuda_build import load

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
wheels = load("wheels", ROOT / "release" / "wheels.py")


def held() -> set[str]:
    """What a good wheel holds."""
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "marginkernels").rglob("*.py")}
    built = {f"_{part}.{end}" for part in ("cpu", "cuda") for end in ("cpython-311-x86_64-linux-gnu.so", "sha256")}
    info = {f"marginkernels-{wheels.version()}.dist-info/{name}" for name in ("METADATA", "RECORD", "licenses/LICENSE")}
    return package | info | {f"marginkernels/{name}" for name in (*built, "py.typed", "backend/shipped/README.md")}


def faults(folder: Path, names: set[str], tag: str = "cp311-cp311-manylinux_2_28_x86_64") -> list[str]:
    path = folder / f"marginkernels-{wheels.version()}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return wheels.faults_of_wheel(path)


def test_a_wheel_with_all_that_it_needs(tmp_path):
    assert faults(tmp_path, held()) == []


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("marginkernels/_cuda.cpython-311-x86_64-linux-gnu.so", "0 files like"),
        ("marginkernels/_cpu.sha256", "0 files like"),
        ("marginkernels/py.typed", "0 files like"),
        ("marginkernels/backend/triton/class_kernel.py", "lacks marginkernels/backend/triton/class_kernel.py"),
        (f"marginkernels-{wheels.version()}.dist-info/licenses/LICENSE", "lacks marginkernels-"),
    ],
)
def test_what_a_wheel_lacks_is_noticed(lost, said, tmp_path):
    assert lost in held()
    found = faults(tmp_path, held() - {lost})
    assert len(found) == 1
    assert found[0].startswith(said)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("marginkernels/_cuda.txt", "has marginkernels/_cuda.txt"),  # the reason why an extension was left out
        ("marginkernels/_cpu.cpython-310-x86_64-linux-gnu.so", "2 files like"),
        ("csrc/scalar.h", "has csrc/scalar.h"),
        ("tests/conftest.py", "has tests/conftest.py"),
        ("marginkernels.libs/libgomp.so", "has marginkernels.libs/libgomp.so"),
    ],
)
def test_what_a_wheel_should_not_have_is_noticed(more, said, tmp_path):
    found = faults(tmp_path, held() | {more})
    assert any(fault.startswith(said) for fault in found), found


def test_a_wheel_for_this_machine_alone_is_noticed(tmp_path):
    assert faults(tmp_path, held(), "cp311-cp311-linux_x86_64") == ["has no manylinux tag"]
    with pytest.raises(SystemExit, match="no manylinux tag"):
        wheels.refuse_faults(Path("some.whl"), ["has no manylinux tag"])
    wheels.refuse_faults(Path("some.whl"), [])


def test_the_sdist_holds_what_is_kept(tmp_path):
    """Sources, tests with their data, docs and what builds it: all that git keeps; and nothing that was built."""
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode or "setup.py" not in kept.stdout.split():
        pytest.skip("no checkout")
    for name in kept.stdout.splitlines():
        if (ROOT / name).exists():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "copy" / name)
    made = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", made], cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.name == f"marginkernels-{wheels.version()}.tar.gz"
    assert wheels.faults_of_sdist(sdist) == []
    source = wheels.unpack(sdist, tmp_path / "source")
    for name in ("csrc/cpu/level_amx.cpp", "tests/mutants/core.toml", "tests/helpers/insightface.json", "release/nvcc.txt", "setup.py"):
        assert (source / name).is_file(), name
    assert not list(source.rglob("*.so"))


def test_the_workflow_makes_what_is_supported():
    supported = wheels.supported()
    release = (WORKFLOWS / "release.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", release)[0]) == supported
    low, high = re.search(r"cp31\[(\d)-(\d)\]-cp31\[\1-\2\]", release).groups()
    assert [f"3.1{i}" for i in range(int(low), int(high) + 1)] == supported
    assert f"""_x86_64')" = {len(supported)}""" in release
    assert f'requires-python = ">={supported[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert wheels.tag(Path("marginkernels-1-cp310-cp310-manylinux_2_28_x86_64.whl")) == "3.10"


@pytest.mark.parametrize("workflow", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_actions_have_versions_and_jobs_end(workflow):
    text = workflow.read_text()
    for used in re.findall(r"uses: (.*)", text):
        assert re.search(r"@(v\d+|release/v\d+)$", used), used
    assert text.count("runs-on:") == text.count("timeout-minutes:")
    assert re.search(r"^permissions:\n  contents: read$", text, re.M)


def test_tools_are_pinned_and_agree_with_the_lock():
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    for name in ("requirements.txt", "nvcc.txt"):
        lines = [line for line in (ROOT / "release" / name).read_text().splitlines() if not line.startswith("#")]
        assert lines
        for line in lines:
            package, version = re.match(r"([\w.-]+)==(\S+)", line).groups()
            assert locked.get(package, version) == version, line
