"""The command line: doctor, verify, and errors."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import marginkernels as mk
from marginkernels.__main__ import COMMANDS, main
from marginkernels.backend.chunked import ChunkedBackend


def verify(capsys, *arguments):
    """Exit status, the words of each backend's first row in the table of errors, and everything that was printed."""
    status = main(["verify", "--head", "arcface", *arguments])
    out = capsys.readouterr().out
    rows = {}
    for line in out.splitlines():
        if line.startswith(("reference", "torch", "cpu")):
            rows.setdefault(line.split()[0], line.split())
    return status, rows, out


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


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_verify_passes(capsys, threads):
    status, rows, out = verify(capsys, "--dtype", "float32", "--dtype", "float64")
    assert status == 0
    assert "All errors are within tolerance" in out
    assert {"reference", "torch"} <= rows.keys()
    assert all("pass" in row or "has no" in " ".join(row) for row in rows.values())


def off_by_a_little(found):
    return dataclasses.replace(found, lse=found.lse + 0.1)


def not_a_number(found):
    return dataclasses.replace(found, mean_center=torch.full_like(found.mean_center, torch.nan))


def crash(found):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("change", "said"), [(off_by_a_little, "loss is off by"), (not_a_number, "dx is off by nan"), (crash, "out of luck")]
)
def test_verify_fails_with_a_wrong_backend(capsys, monkeypatch, change, said):
    right = ChunkedBackend.row_pass
    monkeypatch.setattr(ChunkedBackend, "row_pass", lambda *a, **k: change(right(*a, **k)))
    status, rows, out = verify(capsys, "--dtype", "float32", "--backend", "torch", "--backend", "reference")
    assert status == 1
    assert "FAIL" in rows["torch"]
    assert "pass" in rows["reference"]
    assert said in out


def test_verify_fails_where_nothing_can_be_verified(capsys):
    status, _, out = verify(capsys, "--dtype", "float64", "--backend", "cpu")
    assert status == 1
    assert "Nothing could be verified" in out


def test_names_from_before(capsys):
    """The command and the backend by their names before 0.1."""
    with pytest.warns(DeprecationWarning, match="'torch'"):
        assert main(["check", "--head", "arcface", "--dtype", "float32", "--backend", "slab"]) == 0
    out, err = capsys.readouterr()
    assert "use verify" in err
    assert "torch" in out


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
