"""``python -m marginkernels verify``: what each planted backend ends as, on a CPU; the plan, the record and the command."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import planted_backends

from marginkernels import NonTarget, testing
from marginkernels.__main__ import main
from marginkernels.backend import FUSED, cpu, records, registry, resolve
from marginkernels.backend.records import RIGHT, UNFINISHED, Time
from marginkernels.cli import verify as command
from marginkernels.cli.verify import plan, processes, worker
from marginkernels.cli.verify.plan import Candidate, Check
from marginkernels.core.types import Reduction

TESTS = Path(__file__).parents[1]
PAIR = ("float32", "float32")
VALUES = Check("values", PAIR, (5, 24, 19))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(TESTS), *sys.path])  # which the workers get, to find the planted ones
    registry.forget()
    yield tmp_path / "cache" / "marginkernels" / "verified"
    registry.forget()


@pytest.fixture
def registered():
    """The registry, for a test to change."""
    before = dict(FUSED)
    yield FUSED
    FUSED.clear()
    FUSED.update(before)


def planted(kind):
    return Candidate(f"planted-{kind}", "planted", source=f"helpers.planted_backends:{kind}")


def settings(limit=300.0):
    return processes.Settings("cpu", limit)


# -- in this process: what each check finds ----------------------------------------------------------------------------------------


def check(monkeypatch, kind, *checks):
    """What a worker says of a planted backend."""
    monkeypatch.setitem(FUSED, "planted", None)
    asked = {"candidate": vars(planted(kind)), "device": "cpu", "checks": [c.as_dict() for c in checks], "until": math.inf}
    out = io.StringIO()
    worker.Worker({**asked, "seed": 0, "threads": torch.get_num_threads(), "tiles": []}, out).run()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (said[0]["event"], said[-1]["event"]) == ("ready", "end")
    return [one for one in said if one["event"] == "done"]


@pytest.mark.parametrize(
    ("kind", "checked", "word", "why"),
    [
        ("right", VALUES, RIGHT, ""),
        ("right", Check("values", PAIR, (33, 67, 259), "curricularface", True, -1.0), RIGHT, ""),
        ("right", Check("bits", ("bfloat16", "float32"), (5, 24, 19)), RIGHT, ""),
        ("right", Check("values", PAIR, (33, 67, 259), "sphereface2", True, -1.0), RIGHT, ""),
        ("right", Check("values", PAIR, (5, 24, 19), "uniface-clamped"), RIGHT, ""),
        ("right", Check("values", ("bfloat16", "float32"), (33, 128, 517), "inter-topk", True, sub_centers=3), RIGHT, ""),
        ("right", Check("bits", PAIR, (5, 24, 19), "inter-topk", sub_centers=5), RIGHT, ""),
        ("right", Check("topk", PAIR, (33, 67, 259)), RIGHT, ""),
        ("right", Check("topk", PAIR, (33, 67, 259), sub_centers=5), RIGHT, ""),
        ("right", Check("size", PAIR, (6, 24, 40), size="medium, wide", sub_centers=3), RIGHT, ""),
        ("first_center", VALUES, RIGHT, ""),
        ("first_center", Check("values", PAIR, (5, 24, 19), sub_centers=3), "wrong value", "is off by"),
        ("first_center", Check("topk", PAIR, (33, 67, 259), sub_centers=3), "wrong value", "scores is off by"),
        ("right", Check("size", PAIR, (6, 24, 40), size="small, narrow"), RIGHT, ""),
        ("wrong", VALUES, "wrong value", "loss is off by"),
        ("wrong", Check("bits", PAIR, (5, 24, 19)), "wrong value", "loss is off by"),
        ("wrong", Check("size", PAIR, (6, 24, 40), size="small, narrow"), "wrong value", "loss is off by"),
        ("not_a_number", VALUES, "not finite", "dx is off by nan"),
        ("not_a_number", Check("bits", PAIR, (5, 24, 19)), "not finite", "dx is off by nan"),
        ("unwritten", VALUES, "not finite", "dx is off by nan"),
        ("restless", VALUES, RIGHT, ""),
        ("restless", Check("bits", PAIR, (5, 24, 19)), "unequal bits", "dx has other bits in another run"),
        ("restless", Check("size", PAIR, (6, 24, 40), size="small, narrow"), "unequal bits", "dx has other bits"),
        ("wrong_search", Check("topk", PAIR, (33, 67, 259)), "wrong value", "classes is off by"),
        ("raising", VALUES, "error", "RuntimeError: out of luck"),
        ("out_of_memory", VALUES, "error", "MemoryError"),
        ("out_of_memory", Check("size", PAIR, (6, 24, 40), size="small, narrow"), UNFINISHED, "not enough memory"),
    ],
)
def test_what_a_check_finds(monkeypatch, kind, checked, word, why):
    (found,) = check(monkeypatch, kind, checked)
    assert found["verdict"] == word, found
    assert why in found.get("why", "")
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_whose_nearest_hang_on_rounding_are_not_settled():
    """Ten thousand classes in bfloat16: some rows have the last class that is lifted within rounding of the next."""
    margin, case = testing.HEADS["inter-topk"](10_000), testing.Case.random(65, 64, 10_000, torch.bfloat16)
    left = testing.settled(case, margin).labels
    gone = (left < 0) & (case.labels >= 0)
    assert 5 < gone.sum() < 60
    assert torch.equal(left[~gone], case.labels[~gone])
    assert testing.settled(case, testing.HEADS["arcface"](10_000)) is case
    exact = testing.Case(case.x.double(), case.w.double(), case.labels, None)
    assert torch.equal(testing.settled(exact, margin).labels, case.labels)
    near = torch.nn.functional.normalize(exact.x) @ torch.nn.functional.normalize(exact.w).T
    near.scatter_(1, case.labels.clamp_min(0)[:, None], -1.0)
    top = near.topk(margin.k + 1, 1).values
    gaps = top[:, -2] - top[:, -1]
    valid = case.labels >= 0
    assert gaps[gone].max() < gaps[valid & ~gone].min()
    twice = testing.Case(case.x, case.w.repeat_interleave(2, 0), case.labels, None)
    assert torch.equal(testing.settled(twice, margin, 2).labels, left)


def test_times_are_taken_in_turn_with_torch(monkeypatch):
    monkeypatch.setattr(worker, "ROUND_SECONDS", {"cpu": 0.0})
    (found,) = check(monkeypatch, "right", Check("time", PAIR, (6, 24, 40), size="small, narrow"))
    assert found["ms"] > 0
    assert found["torch_ms"] > 0
    assert found["ms"] != found["torch_ms"]


def test_a_backend_that_fails_everything_is_given_up(monkeypatch):
    monkeypatch.setattr(worker, "MOST_FAILURES", 3)
    assert len(check(monkeypatch, "raising", *[VALUES] * 9)) == 3


def test_the_peer_is_arcface():
    """What the compiled one is timed at, uncompiled: the loss and gradients of the others."""
    case = testing.Case.random(9, 16, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: f)
        step = worker.compiled_step(case)
    step()
    x, w = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.Tensor))
    want = testing.run(case, testing.HEADS["arcface"](30), "torch")
    found = {tuple(v.shape): v.grad for v in (x, w)}
    assert testing.relative_error(found[9, 16], want["dx"]) < 1e-4
    assert testing.relative_error(found[30, 16], want["dw"]) < 1e-4


# -- in processes of their own -----------------------------------------------------------------------------------------------------


def test_planted_backends_end_as_verdicts_and_are_never_chosen(monkeypatch, registered):
    """A wrong one, one that crashes, one that hangs and a right one, each in its process; then what ``auto`` takes."""
    asked = [(planted(kind), [VALUES, Check("topk", PAIR, (5, 24, 19))]) for kind in ("wrong", "crashing", "right")]
    monkeypatch.setattr(command, "answers", lambda settings: True)
    found, _ = command.verify(asked, settings(), 600.0)
    found += command.verify([(planted("hanging"), [VALUES])], settings(limit=2.0), 600.0)[0]
    got = {f.candidate.name.removeprefix("planted-"): f.verdict for f in found}
    assert {name: v.verdict for name, v in got.items()} == {"wrong": "wrong value", "crashing": "crash", "hanging": "hang", "right": RIGHT}
    assert "SIGABRT at values, arcface, float32/float32, N=5 D=24 C=19" in got["crashing"].why
    assert "at values, arcface" in got["hanging"].why
    assert got["hanging"].seconds < 120
    assert got["right"].pairs == ("float32/float32",)
    assert got["right"].checks == {"values": 1, "topk": 1, "graph": "not run: needs a GPU", "sync": "not run: needs a GPU"}
    assert all(not v.pairs for name, v in got.items() if name != "right")

    # All of them where they would be preferred: auto takes the one that is right, and without it what is below.
    for f in found:
        backend = getattr(planted_backends, f.candidate.source.partition(":")[2])
        monkeypatch.setattr(backend, "name", f.candidate.name)
        registered[f.candidate.name] = backend
    bad = [f.candidate.name for f in found if f.verdict.verdict != RIGHT]
    order = {name: registered[name] for name in (*bad, "planted-right", "torch")}
    registered.clear()
    registered.update(order)
    assert resolve("auto", "cpu", torch.float32, torch.float32, 24) == bad[0]  # without a record
    records.write(command.record_of(found, {}, settings(), 60.0))
    registry.forget()
    assert resolve("auto", "cpu", torch.float32, torch.float32, 24) == "planted-right"
    del registered["planted-right"]
    assert resolve("auto", "cpu", torch.float32, torch.float32, 24) == "torch"


def test_nothing_is_blamed_on_others_where_the_device_is_lost(monkeypatch):
    """After a crash a probe tells whether the device still answers; else the rest stays unfinished."""

    def crash(candidate, checks, *_):
        assert candidate.name == "first"
        return processes.Outcome(fault=("crash", "as planted"))

    monkeypatch.setattr(command, "supervise", crash)
    monkeypatch.setattr(command, "answers", lambda settings: False)
    asked = [(Candidate(name, "torch"), [VALUES]) for name in ("first", "second")]
    first, second = (f.verdict for f in command.verify(asked, settings(), 60.0, [VALUES])[0])
    assert first.verdict == "crash"
    assert (second.verdict, second.why) == (UNFINISHED, "the device did not answer after the crash of first")


def test_no_time_is_no_verdict():
    (found,), _ = command.verify([(Candidate("torch", "torch"), [VALUES])], settings(), 0.0)
    assert (found.verdict.verdict, found.verdict.pairs) == (UNFINISHED, ())


# -- from what was found to the verdict --------------------------------------------------------------------------------------------

SIZED = [Check("values", PAIR, (5, 24, 19)), Check("values", ("float16",) * 2, (5, 24, 19))]
SIZED += [Check(kind, PAIR, (64, 128, 10_007), size="small, narrow") for kind in ("size", "time")]


def judged(*said, **outcome):
    results = {number: {"verdict": word, "why": "so", "ms": 2.0, "torch_ms": 4.0} for number, word in enumerate(said) if word}
    found = processes.Outcome(results=results, **outcome)
    return processes.verdict(SIZED, found, "cuda"), processes.times(SIZED, found)


def test_verdicts():
    whole, times = judged(RIGHT, RIGHT, RIGHT, RIGHT)
    assert (whole.verdict, whole.pairs) == (RIGHT, ("float32/float32", "float16/float16"))
    assert times == {"small, narrow": {"float32": Time(2.0, 4.0)}}
    assert times["small, narrow"]["float32"].ratio == 0.5

    partly, times = judged(RIGHT, RIGHT, UNFINISHED, RIGHT)  # it does not fit: nothing against it, and it is not chosen at that size
    assert (partly.verdict, times) == (RIGHT, {})

    unfinished, _ = judged(RIGHT, None, RIGHT, RIGHT)
    assert (unfinished.verdict, unfinished.pairs) == (UNFINISHED, ("float32/float32",))

    wrong, times = judged(RIGHT, "wrong value", RIGHT, RIGHT)
    assert (wrong.verdict, wrong.pairs) == ("wrong value", ())
    assert wrong.why.endswith("values, arcface, float16/float16, N=5 D=24 C=19: so")

    assert judged(RIGHT, RIGHT, "unequal bits", RIGHT)[0].verdict == "unequal bits"
    assert judged(RIGHT, "error", "not finite")[0].verdict == "error"  # the first, of which the others may follow
    assert judged(RIGHT, "error", fault=("hang", "silent"))[0].verdict == "hang"
    assert judged()[0].verdict == UNFINISHED


def test_a_record_names_what_every_dtype_was_tried_with():
    def features(*checks):
        results = {number: {"verdict": RIGHT} for number in range(len(checks))}
        return set(processes.verdict(checks, processes.Outcome(results=results), "cuda").features)

    plain, half = {"identity", "log-sum-exp"}, ("float16",) * 2
    binary = [Check("values", pair, (5, 24, 19), "sphereface2", sub_centers=3) for pair in (PAIR, half)]
    assert features(VALUES) == plain
    assert features(VALUES, Check("bits", PAIR, (5, 24, 19), "mv-arc", sub_centers=3)) == plain  # which compares with no more
    assert features(VALUES, binary[0]) == plain | {"power-detached", "softplus-sum", "sub-centers"}
    assert features(VALUES, *binary) == {"power-detached", "softplus-sum", "sub-centers"}
    assert features(VALUES, Check("values", half, (5, 24, 19)), binary[0]) == plain
    assert features(Check("topk", PAIR, (5, 24, 19), sub_centers=3)) == {"search of sub-centers"}
    assert not judged(RIGHT, "wrong value")[0].features


def test_the_record_has_the_largest_error_of_each_output():
    errors = ({"loss": 2e-7, "dw": 1e-7}, {"loss": 1e-3}, {"loss": 1e-7, "dw": 3e-7})
    found = processes.Outcome(results={number: {"verdict": RIGHT, "errors": one} for number, one in enumerate(errors)})
    assert processes.verdict(SIZED, found, "cuda").errors == {
        "float32/float32": {"loss": 2e-7, "dw": 3e-7},
        "float16/float16": {"loss": 1e-3},
    }


# -- the plan ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_covers(device):
    every = plan.checks(Candidate("any", "any", source="serves everything"), device)
    values = [c for c in every if c.kind == "values"]
    pairs = {c.pair for c in values}
    assert {(x, x) for x in plan.DTYPES} | {(x, "float32") for x in ("float16", "bfloat16")} == pairs
    assert {(c.head, c.pair) for c in values} == {(head, pair) for head in plan.HEADS for pair in pairs}
    assert plan.HEADS.keys() > testing.HEADS.keys()
    asked = {one.label for one in (*NonTarget, Reduction.LOG_SUM_EXP, Reduction.SOFTPLUS_SUM)} | {"sub-centers", *records.SEARCH}
    assert all({one for c in every if c.pair == pair for one in c.features} == asked for pair in pairs)
    several = {(c.pair, c.head, c.sub_centers) for c in values if c.sub_centers > 1}
    assert several >= {(pair, head, 3) for pair in pairs for head in plan.WITH_SUB_CENTERS}
    assert {c.sub_centers for c in every if c.kind == "topk"} == {1, 3, 5}
    kinds = {((x, x), *kind) for x in plan.DTYPES for kind in ((True, -1.0), (False, 0.0))}
    assert {(c.pair, c.extras, c.workspace_mb) for c in values} >= kinds
    repeated = {(c.pair, c.head, c.workspace_mb) for c in every if c.kind == "bits"}
    assert {c.pair for c in every if c.kind == "bits" and c.sub_centers > 1} == pairs
    assert repeated == {(pair, head, mb) for pair in pairs for head in plan.FAMILIES for mb in (0.0, -1.0)}
    assert {c.pair for c in every if c.kind == "topk"} == pairs
    gpu = {(c.kind, c.pair) for c in every if c.kind in plan.GPU_ONLY}
    assert gpu == ({(kind, pair) for kind in plan.GPU_ONLY for pair in pairs} if device == "cuda" else set())
    timed = {s.name for s in records.SIZE_CLASSES if device in s.timed}
    assert {c.size for c in every if c.kind == "size"} == {c.size for c in every if c.kind == "time"} == timed
    assert [c.kind for c in every].index("size") > max(i for i, c in enumerate(every) if c.kind in ("values", "bits", "topk"))
    if device == "cuda":
        assert {c.shape for c in values} == set(plan.SHAPES)
        assert timed == {s.name for s in records.SIZE_CLASSES}
        assert {c.pair[0] for c in every if c.kind == "time"} == {"float16", "bfloat16", "float32"}


def test_what_a_backend_refuses_is_not_in_its_plan():
    assert all(c.sub_centers == 1 for c in plan.checks(Candidate("cuda", "cuda"), "cuda"))


def test_checks_survive_json():
    one = Check("values", PAIR, (5, 24, 19), "softmax", True, -1.0, "small, wide", 3)
    assert Check.of(json.loads(json.dumps(one.as_dict()))) == one


def test_candidates():
    """torch first, since the others are timed against it; every instruction set of cpu by itself."""
    found = plan.candidates("cpu", None)
    assert found[0].name == "torch"
    levels = [c for c in found if c.level]
    assert [c.name for c in levels] == [f"cpu:{level}" for level in cpu.levels()]
    assert {c.name for c in plan.candidates("cuda", None)} == {"torch", "hopper", "cuda", "triton"}
    assert [c.name for c in plan.candidates("cpu", ["cpu", "reference"])] == ["cpu", "reference"]
    assert all(not c.size for one in levels for c in plan.checks(one, "cpu"))


# -- the command -------------------------------------------------------------------------------------------------------------------


def test_a_part_passes_and_writes_no_record(capsys, cache):
    assert main(["verify", "--head", "arcface", "--dtype", "float32", "--backend", "torch"]) == 0
    out = capsys.readouterr().out
    assert "All errors are within tolerance" in out
    assert "No record is written" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("torch "))
    assert (row[1], row[-1]) == ("float32/float32", "pass")
    assert not cache.exists()


def test_a_wrong_backend_fails(capsys, monkeypatch):
    monkeypatch.setattr(command, "candidates", lambda device, names: [planted("raising")])
    assert main(["verify", "--head", "arcface", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "out of luck" in out
    assert "FAIL" in out
    assert "FAILED: planted-raising (error)" in out


def test_nothing_that_can_be_verified_fails(capsys):
    assert main(["verify", "--dtype", "float64", "--backend", "cpu"]) == 1
    assert "Nothing could be verified" in capsys.readouterr().out


def test_the_record_is_written_and_doctor_shows_it(capsys, monkeypatch, cache):
    """What the whole command does, with the checks of one backend cut short; then the record that ``doctor`` reads."""
    monkeypatch.setattr(command, "checks", lambda *a, **k: [VALUES])
    monkeypatch.setattr(command, "candidates", lambda *a: [Candidate("torch", "torch")])
    monkeypatch.setattr(command, "compiled_checks", lambda device: [])
    assert main(["verify", "--device", "cpu", "--minutes", "9"]) == 0
    (path,) = cache.glob("*.json")
    assert f"The record is in {path}" in capsys.readouterr().out
    found = records.Record.of_json(path.read_text())
    assert found.machine == records.here(torch.device("cpu"))
    assert found.backends["torch"].verdict == RIGHT
    assert found.about["minutes"] == 9
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"Verified on cpu, by {path} of {found.made}" in out
    assert "  torch: right" in out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"][0]["backends"] == {"torch": "right"}
    path.write_text("{")
    registry.forget()
    assert main(["doctor"]) == 0
    assert f"ignored: {path}: cannot be read" in capsys.readouterr().out


def test_a_record_that_cannot_be_written(capsys, monkeypatch):
    found = command.Found(Candidate("torch", "torch"), [], processes.Outcome(), records.Verdict(RIGHT, checks={"values": 1}))

    def refuse(record):
        raise OSError("read-only file system")

    monkeypatch.setattr(command, "verify", lambda *a: ([found], {}))
    monkeypatch.setattr(records, "write", refuse)
    assert main(["verify"]) == 1
    assert "cannot be written: read-only file system" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command_in_three_minutes(capsys, cache):
    assert main(["verify", "--device", "cpu", "--minutes", "3"]) == 0
    (path,) = cache.glob("*.json")
    found = records.Record.of_json(path.read_text())
    assert {"torch", "cpu"} <= found.backends.keys()
    assert all(v.verdict not in records.BAD for v in found.backends.values())
