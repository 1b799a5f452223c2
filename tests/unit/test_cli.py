"""The command line: doctor, names from before, and errors. ``verify`` is tested in test_verify.py."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import marginkernels as mk
from marginkernels.__main__ import COMMANDS, main
from marginkernels.cli import _text

ROOT = Path(__file__).parents[2]


def test_doctor_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, backend in mk.backends().items():
        line = next(line for line in out.splitlines() if line.startswith(name + " "))
        assert ("yes" if backend["available"] else "no") in line
    assert torch.__version__ in out


def test_doctor_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"] == torch.__version__
    assert found["backends"].keys() == mk.backends().keys()
    for name, backend in mk.backends().items():
        assert found["backends"][name]["available"] == backend["available"]
        assert found["backends"][name]["reason"] == backend["reason"]


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "marginkernels", "doctor", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["marginkernels"] == mk.__version__


def test_names_from_before(capsys):
    """The command and the backend by their names before 0.1."""
    with pytest.warns(DeprecationWarning, match="'torch'"):
        assert main(["check", "--head", "arcface", "--dtype", "float32", "--backend", "slab"]) == 0
    out, err = capsys.readouterr()
    assert "use verify" in err
    assert "torch" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--classes", "1e400"], "--classes: expected an integer from 1 to"),
        (["plan", "--classes", "nan"], "--classes: expected an integer from 1 to"),
        (["plan", "--classes", "0"], "--classes: expected an integer from 1 to"),
        (["plan", "--classes=-1"], "--classes: expected an integer from 1 to"),
        (["plan", "--classes", "1.5"], "got '1.5'"),
        (["plan", "--classes", "1e6", "--memory", "inf"], "--memory: expected a finite number"),
        (["plan", "--classes", "1e6", "--workspace-mb", "inf"], "--workspace-mb: expected a finite number"),
        (["plan", "--classes", "1e6", "--sample-rate", "nan"], "--sample-rate: expected a finite number > 0 and <= 1"),
        (["plan", "--classes", "1e6", "--batch", "-4"], "--batch: expected an integer"),
        (["tune", "--dim", "5000"], "--dim: expected an integer from 1 to 1024"),
        (["tune", "--workspace-mb", "inf"], "--workspace-mb: expected a finite number"),
        (["tune", "--compile-only", "hopper"], "--compile-only: expected an architecture such as sm_90, got 'hopper'"),
        (["tune", "--json", "/dev/null/tiles.json"], "--json: expected a file that can be written"),
        (["verify", "--minutes", "0"], "--minutes: expected a finite number > 0"),
        (["verify", "--limit", "nan"], "--limit: expected a finite number > 0"),
        (["verify", "--tiles", "/no/such/tiles.json"], "--tiles: expected a file of tiles that tune wrote"),
        (["verify", "--seed", "-1"], "--seed: expected an integer from 0"),
        (["verify", "--device", "vulkan"], "--device: expected a device that PyTorch can use here, got 'vulkan'"),
        (["verify", "--device", "xla"], "--device: expected a device that PyTorch can use here, got 'xla'"),
        (["demo", "--steps", "0"], "--steps: expected an integer from 1"),
        (["demo", "--epochs", "-1"], "--epochs: expected a finite number > 0"),
        (["demo", "--epochs", "nan"], "--epochs: expected a finite number > 0"),
        (["demo", "--batch-size", "-8"], "--batch-size: expected an integer from 2"),
        (["demo", "--seed", "-1"], "--seed: expected an integer from 0"),
        (["demo", "--fonts", "/no/such/folder"], "--fonts: expected a folder that exists"),
        (["demo", "--out", "/dev/null/out"], "--out: expected a folder that can be written"),
    ],
)
def test_bad_values(capsys, arguments, said):
    """Each is refused by argparse, before any work, with what was expected and what came."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert "error: argument " in err
    assert said in err


def test_values_that_contradict_each_other(tmp_path, capsys):
    assert main(["plan", "--classes", "1e6", "--memory", "10", "--reserve", "10"]) == 2
    assert "--reserve: expected" in capsys.readouterr().err


def test_an_architecture_that_triton_cannot_compile_for(capsys):
    """LLVM would end the process: status 2 and a message come from one of its own."""
    pytest.importorskip("triton")
    with pytest.raises(SystemExit) as raised:
        main(["tune", "--compile-only", "sm_99"])
    assert raised.value.code == 2
    assert "--compile-only: expected an architecture that Triton can compile for" in capsys.readouterr().err


def test_counts_and_files(tmp_path):
    assert [_text.integer()(text) for text in ("7", "30e6", "1e0")] == [7, 30_000_000, 1]
    assert _text.number(0)("1e-3") == 1e-3
    assert _text.writable_file(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"
    assert not (tmp_path / "new").exists(), "a check that creates what it checks"
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file that can be written"):
        _text.writable_file(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="expected a folder that can be written"):
        _text.writable_folder(str(tmp_path / "file"))


@pytest.mark.parametrize("module", ["marginkernels", "benchmarks"])
def test_version(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == mk.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["verify", "--head", "nonsense"],
        ["verify", "--dtype", "int8"],
        ["verify", "--device", "nonsense"],
        ["demo", "--head", "x"],
    ],
)
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    assert command in capsys.readouterr().out
