"""A few hundred random problems of fixed seeds, and that the fuzz finds and shrinks what is wrong."""

import dataclasses
import json

import pytest
import torch

from fuzz.__main__ import BACKENDS, all_right, main
from fuzz.measure import check
from fuzz.problem import Problem
from marginkernels.backend.chunked import ChunkedBackend


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, 300, 75))
def test_random_problems(first):
    assert all_right(range(first, first + 75), BACKENDS) == []


def test_a_seed_is_a_problem():
    assert Problem.draw(7, BACKENDS) == Problem.draw(7, BACKENDS)
    assert len({str(Problem.draw(seed, BACKENDS)) for seed in range(50)}) == 50
    one = Problem.draw(7, BACKENDS)
    assert all(torch.equal(v, w) for v, w in zip(one.tensors().values(), one.tensors().values(), strict=True))


def _wrong(change):
    right = ChunkedBackend.row_pass
    return lambda *a, **k: change(right(*a, **k))


def test_a_fault_is_found_shrunk_and_recorded(monkeypatch, tmp_path, capsys):
    """A log-sum-exp that is off by a thousandth: found in the first few problems, shrunk to one row, and counted."""
    monkeypatch.setattr(ChunkedBackend, "row_pass", _wrong(lambda out: dataclasses.replace(out, lse=out.lse + 1e-3)))
    path = tmp_path / "fuzz.json"
    words = ["--backend", "torch", "--record", str(path), "--commit", "abc"]
    assert main([*words, "--cases", "8", "--seed", "0"]) == 1
    out, err = capsys.readouterr()
    assert "python -m fuzz --seed" in out + err
    assert "shrunk: torch" in out + err
    assert " N=1 " in (out + err).partition("shrunk:")[2]
    monkeypatch.undo()
    assert main([*words, "--cases", "2"]) == 0
    found = json.loads(path.read_text())
    assert [(run["first_seed"], run["last_seed"], run["cases"], run["commit"]) for run in found["runs"]] == [
        (0, 7, 8, "abc"),
        (8, 9, 2, "abc"),
    ]
    assert found["total"]["torch"]["cases"] == 10
    assert found["total"]["torch"]["failures"] == found["runs"][0]["failures"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda out: dataclasses.replace(out, mean_center=torch.full_like(out.mean_center, torch.nan)),
        lambda out: dataclasses.replace(out, mean_center=0.99 * out.mean_center),
        lambda out: dataclasses.replace(out, class_factor=1.001 * out.class_factor),
    ],
)
def test_gross_and_small_faults_are_seen(monkeypatch, change):
    monkeypatch.setattr(ChunkedBackend, "row_pass", _wrong(change))
    plain = Problem.draw(0, ("torch",))
    plain = dataclasses.replace(plain, head="arcface", n=7, d=9, c=20, dtype="float32", weight_dtype="float32", values="normal")
    plain = dataclasses.replace(plain, weight_values="normal", smoothing=0.0, ignored=0.0, workspace_mb=0.0, bias="", reduction="sum")
    assert check(plain).fault


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "0"], "--cases: expected an integer from 1"),
        (["--backend", "hopper"], "--backend: expected one that serves CPU tensors here, got 'hopper'"),
        (["--record", "/dev/null/x"], "--record: expected a file that can be written"),
    ],
)
def test_bad_arguments(words, said, capsys):
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_a_foreign_record_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"records": []}')
    with pytest.raises(SystemExit):
        main(["--record", str(path), "--cases", "1"])
    assert "expected a record of `python -m fuzz`" in capsys.readouterr().err
    assert path.read_text() == '{"records": []}'
