"""The benchmarks: their reference, their measurements, and that failures are recorded."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("tqdm")

from benchmarks import cases, compare, gpu_report, measure, plot, records, report, run, worker
from benchmarks.__main__ import main
from benchmarks.cases import Case, inputs
from benchmarks.heads import HEADS
from benchmarks.peers import PEERS, providers
from benchmarks.peers.base import Provider, Work
from benchmarks.peers.eager import eager_loss
from benchmarks.reference import Expected, expected
from marginkernels import testing
from marginkernels.margins import ArcFace

ROOT = Path(__file__).parents[2]
SMALL = Case("arcface", 9, 24, 130, "fp32")


# The float64 reference


@pytest.mark.parametrize("head", HEADS)
def test_streamed_reference_is_the_packages_reference(head):
    case = Case(head, 21, 24, 9001, "fp32")  # more classes than one chunk
    x, w, labels = inputs(case, "cpu")
    got = testing.run(testing.Case(x, w, labels, None), HEADS[head].margin(), "reference", dtype=torch.float64)
    found = expected(x, w, labels, head).errors(got["loss"], got["dx"], got["dw"])
    assert max(found.values()) < 1e-11, found


def test_detached_reference():
    x, w, labels = inputs(SMALL, "cpu")
    margin = ArcFace(scale=64.0, margin=0.5, gradient="detached")
    got = testing.run(testing.Case(x, w, labels, None), margin, "reference", dtype=torch.float64)
    found = expected(x, w, labels, "arcface", detached=True).errors(got["loss"], got["dx"], got["dw"])
    assert max(found.values()) < 1e-11, found
    assert expected(x, w, labels, "arcface").errors(got["loss"], got["dx"], got["dw"])["dx"] > 1e-3


def test_reference_looks_at_the_last_class_and_at_many(monkeypatch):
    monkeypatch.setattr("benchmarks.reference.CLASSES", 16)
    x, w, labels = inputs(SMALL, "cpu")
    labels[:] = labels.clamp_max(SMALL.C - 2)
    rest = expected(x, w, labels, "arcface").rest
    assert rest[0] == SMALL.C - 1
    assert 8 <= len(rest) <= 32


# Providers


def _leaves(case):
    x, w, labels = inputs(case, "cpu")
    return x.requires_grad_(), w.requires_grad_(), labels


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [name for name in providers() if name != "torch.compile"])
def test_every_provider_does_the_same_work(name, head, dtype):
    case = Case(head, 16, 256, 136, dtype)  # D such that no row's loss reaches 69, where PartialFC's saturates
    provider = providers()[name]
    reason = provider.unavailable_reason("cpu") or provider.unsupported_reason(case, "cpu")
    if reason is not None:
        pytest.skip(reason)
    x, w, labels = _leaves(case)
    work = provider.build(case, w)
    loss = work.loss(x, labels)
    loss.backward()
    assert work.weight.grad.dtype == torch.float32
    assert x.grad.dtype == x.dtype
    found = expected(x, w, labels, head, head in provider.detached_heads).errors(loss.detach(), x.grad, work.weight_gradient())
    tolerance = testing.TOLERANCE[cases.DTYPES[dtype]]
    assert max(found.values()) < tolerance, found


def test_no_peer_is_silent():
    """A peer that cannot run here says why, and one without a margin does not claim to support ArcFace."""
    for p in PEERS:
        for device in ("cpu", "cuda"):
            if device not in p.device_types:
                assert p.device_types[0] in p.unavailable_reason(device)
        if p.heads == ("normface",):
            assert "no margin" in p.unsupported_reason(Case("arcface", 8, 8, 8, "bf16"), "cuda")
    by_name = {p.name: p for p in PEERS}
    assert {"eager", "torch.compile", "pytorch-metric-learning", "partialfc-sequence"} < by_name.keys()
    assert "divisible" in by_name["quack"].unsupported_reason(Case("normface", 9, 24, 130, "bf16"), "cuda")


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(Provider, "package", "no-such-package-anywhere")
    assert "no-such-package-anywhere is not installed" in providers()["eager"].unavailable_reason("cpu")


# The worker


class Fake(Provider):
    """Eager with a flaw."""

    def __init__(self, name, flaw):
        self.name, self.flaw = name, flaw

    def build(self, case, w):
        run = eager_loss(case.head, cases.DTYPES[case.dtype])
        return Work(lambda x, labels: self.flaw(run, x, w, labels), w)


def _work(monkeypatch, capsys, case=SMALL, **flaws):
    return _run_worker(
        monkeypatch, capsys, case, {"eager": providers()["eager"], **{name: Fake(name, flaw) for name, flaw in flaws.items()}}
    )


def _run_worker(monkeypatch, capsys, case, known):
    monkeypatch.setattr(worker, "providers", lambda: known)
    monkeypatch.setattr(measure, "PEAK_SIDE", {"cpu": 256})  # nothing here depends on the machine's peak
    worker.run(case, "cpu", list(known), 0.01, None)
    events = [json.loads(line[len(worker.EVENT) :]) for line in capsys.readouterr().out.splitlines() if line.startswith(worker.EVENT)]
    return {(e["record"]["provider"], e["record"]["phase"]): e["record"] for e in events if "record" in e}


def test_wrong_gradient_has_no_figure(monkeypatch, capsys):
    """The small gradients, those of classes that are no row's label, are dropped: nearly all of the gradient's norm is still right."""

    class Filtered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, labels):
            ctx.save_for_backward(labels)
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            (labels,) = ctx.saved_tensors
            return torch.zeros_like(g).index_copy(0, labels.unique(), g[labels.unique()]), None

    found = _work(monkeypatch, capsys, filtered=lambda run, x, w, labels: run(x, Filtered.apply(w, labels), labels))
    assert found["eager", "step"]["status"] == "ok"
    for phase in SMALL.phases:
        assert found["filtered", phase]["status"] == "failed check"
        assert found["filtered", phase]["ms_p50"] is None
        assert "dw_rest" in found["filtered", phase]["reason"]


def test_nan_fails_the_check(monkeypatch, capsys):
    found = _work(monkeypatch, capsys, nan=lambda run, x, w, labels: run(x, w, labels) * float("nan"))
    assert found["nan", "step"]["status"] == "failed check"


def test_nan_in_one_output_alone_fails_the_check(monkeypatch, capsys):
    """The loss, one element of dx, or of the gradient of one class, is NaN; everything else is right."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, row):
            ctx.row = row
            return v.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g[ctx.row, 0] = torch.nan
            return g, None

    def spoiled_class(own):
        def run_(run, x, w, labels):
            inside = torch.isin(torch.arange(len(w)), labels)
            return run(x, Spoiled.apply(w, int((inside if own else ~inside).nonzero()[-1])), labels)

        return run_

    flaws = {
        "loss": lambda run, x, w, labels: (loss := run(x, w, labels)) + (torch.nan - loss).detach(),
        "dx": lambda run, x, w, labels: run(Spoiled.apply(x, 3), w, labels),
        "dw_own": spoiled_class(True),
        "dw_rest": spoiled_class(False),
    }
    found = _work(monkeypatch, capsys, **flaws)
    assert found["eager", "step"]["status"] == "ok"
    for name in flaws:
        for phase in SMALL.phases:
            record = found[name, phase]
            assert record["status"] == "failed check"
            assert record["error_in"] == name
            assert record["error"] is None
            assert record["ms_p50"] is None
            assert f"nan in {name}" in record["reason"]


def test_tolerance_follows_eager_but_never_falls(monkeypatch, capsys):
    """Three times eager's error where that is more than the table's: twice eager's error passes, four times does not."""
    base = testing.TOLERANCE[torch.float32]

    def off(by):
        return lambda run, x, w, labels: run(x, w, labels) * (1 + by)

    known = {name: Fake(name, off(by)) for name, by in {"eager": 10 * base, "twice": 20 * base, "four": 40 * base}.items()}
    status = {name: r["status"] for (name, _), r in _run_worker(monkeypatch, capsys, SMALL, known).items()}
    # eager is judged by its own error, as three times that is allowed
    assert status == {"eager": "ok", "twice": "ok", "four": "failed check"}
    assert _work(monkeypatch, capsys, small=off(0.9 * base))["small", "step"]["status"] == "ok"
    assert _work(monkeypatch, capsys, large=off(1.5 * base))["large", "step"]["status"] == "failed check"


def test_figures_of_a_record_are_plain():
    assert [worker._rounded(v) for v in (1.23456789, math.nan, math.inf, -math.inf, 7, None, "x")] == [
        1.2346,
        None,
        None,
        None,
        7,
        None,
        "x",
    ]


def test_errors_longhand():
    """|got - want| / |want| of each output; classes of a label and others apart, each by their own norm."""
    want = Expected(
        torch.tensor(2.0),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([1]),
        torch.tensor([[6.0, 8.0]]),
        torch.tensor([2, 0]),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    )
    dw = torch.tensor([[0.0, 0.5], [6.0, 9.0], [0.0, 1.0]])
    found = want.errors(torch.tensor(2.5), torch.tensor([[3.0, 3.0]]), dw)
    assert found == pytest.approx({"loss": 0.25, "dx": 0.2, "dw_own": 0.1, "dw_rest": 0.5})


def test_counts_of_a_case():
    case = Case("arcface", 3, 5, 7, "bf16")
    assert case.product == 105
    assert (case.flop("forward"), case.flop("step"), case.flop("train")) == (210, 840, 840)
    assert case.gradient_bytes() == 7 * 5 * 4 + 3 * 5 * 2
    assert case.phases == ("forward", "step")
    assert Case("arcface", 3, 5, 7, "bf16", train=True).phases == ("forward", "step", "train")
    eager = providers()["eager"]
    assert eager.expected_bytes(case) == int(4 * 7 * max(eager.logit_copies * 3 + 5, eager.weight_copies * 5))


@pytest.mark.parametrize("head", HEADS)
def test_targets_of_the_peers(head):
    """The formula that peers use is the margin that is timed, over all angles, past pi - m too; value and slope."""
    theta = torch.linspace(0.01, math.pi - 0.01, 301, dtype=torch.float64)
    cos = theta.cos().requires_grad_()
    m = {"arcface": 0.5, "cosface": 0.35, "normface": 0.0}[head]
    if head == "arcface":
        past = theta > math.pi - m
        assert past.any()
        want = torch.where(past, theta.cos() - m * math.sin(m), (theta + m).cos())
        slope = torch.where(past, 1, (theta + m).sin() / theta.sin())
    else:
        want, slope = theta.cos() - m, torch.ones_like(theta)
    value = HEADS[head].target(cos)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), cos)[0], slope, rtol=1e-8, atol=1e-8)
    ours = HEADS[head].margin()
    assert ours.scale == 64.0
    torch.testing.assert_close(ours.target(cos.detach(), None)[0], want, rtol=1e-9, atol=1e-9)


def test_out_of_memory_and_errors_are_results(monkeypatch, capsys):
    def oom(run, x, w, labels):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    def broken(run, x, w, labels):
        raise ValueError("no such kernel")

    found = _work(monkeypatch, capsys, oom=oom, broken=broken)
    assert found["oom", "step"]["status"] == "oom"
    assert found["broken", "forward"]["status"] == "failed"
    assert "no such kernel" in found["broken", "forward"]["reason"]
    assert found["eager", "step"]["ms_p50"] > 0


def test_fails_after_its_check(monkeypatch, capsys):
    calls = []

    def later(run, x, w, labels):
        calls.append(1)
        if len(calls) > 6:  # check, warm-up and memory of both phases, one round
            raise MemoryError("now it is full")
        return run(x, w, labels)

    found = _work(monkeypatch, capsys, later=later)
    assert {found["later", phase]["status"] for phase in SMALL.phases} == {"oom"}
    assert found["eager", "step"]["status"] == "ok"


def test_record_fields(monkeypatch, capsys):
    case = Case("arcface", 64, 64, 4096, "fp32", train=True)
    found = _work(monkeypatch, capsys, case)
    for phase in ("forward", "step", "train"):
        r = found["eager", phase]
        assert 0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"]
        assert r["tflops"] == pytest.approx((2 if phase == "forward" else 8) * 64 * 64 * 4096 / (1e9 * r["ms_p50"]), rel=1e-3)
        assert r["share"] == pytest.approx(r["tflops"] / r["mm_tflops"], rel=1e-3)
        assert r["error"] <= r["tolerance"]
        assert r["samples"] >= 3
        assert {"provider", "head", "phase", "N", "D", "C", "dtype", "peak_mb", "status"} <= r.keys()
    assert found["eager", "train"]["ms_p20"] > 0


def test_training_leaves_the_centers_where_they_are(monkeypatch):
    x, w, labels = _leaves(SMALL)
    before = w.detach().clone()
    runner = worker.Runner(providers()["eager"], SMALL, measure.Device("cpu"), x, w, labels, {})
    runner.train()
    assert runner._optimizer().state[w]["momentum_buffer"].abs().sum() > 0
    assert torch.equal(w, before)


def test_records_name_no_folder():
    error = ImportError("cannot import name '_cpu' from 'marginkernels' (/home/someone/work dir/marginkernels/__init__.py)")
    assert "someone" not in worker.reason_of(error)[1]
    assert worker.without_folders("nvcc at /usr/local/cuda/bin/nvcc: 3 / 4") == "nvcc at nvcc: 3 / 4"


# Measuring


def test_peak_memory_is_what_was_taken():
    device = measure.Device("cpu")
    megabytes = 96

    def take():
        torch.ones(megabytes << 20, dtype=torch.uint8)

    take()
    found = device.peak_bytes(take) / 2**20
    assert megabytes - 2 < found < megabytes + 12


def test_peak_leaves_out_the_gradients(monkeypatch):
    """Gradients of 64 MB and nothing else: the peak beyond them is small."""
    case = Case("arcface", 4, 256, 65536, "fp32")
    x, w, labels = _leaves(case)

    class Plain(Provider):
        name = "plain"

        def build(self, case, w):
            class Ones(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x, w):
                    return x.new_zeros(())

                @staticmethod
                def backward(ctx, g):
                    return torch.ones(case.N, case.D), torch.ones(case.C, case.D)

            return Work(lambda x, labels: Ones.apply(x, w), w)

    runner = worker.Runner(Plain(), case, measure.Device("cpu"), x, w, labels, {})
    runner.step()
    runner.release()
    assert runner.peak_mb("step") < 12


def test_first_samples_are_dropped():
    """A call that has to fill its caches first is not what a loop sees; the others go on meanwhile."""
    taken = []
    series = {"cold": measure.Series(lambda: taken.append(0) or (100.0 if len(taken) == 1 else 1.0), 3.0, dropped=1)}
    series["other"] = measure.Series(lambda: 2.0, 6.0)
    measure.in_turn(series)
    assert series["cold"].ms == [1.0, 1.0, 1.0]
    assert len(taken) == 4
    assert series["other"].ms == [2.0, 2.0, 2.0]


def test_rounds_are_in_turn():
    order = []
    ms = {"a": 5.0, "b": 1.0, "c": 50.0}
    series = {k: measure.Series(lambda k=k: order.append(k) or ms[k], budget_ms=20.0, least=2) for k in ms}
    measure.in_turn(series)
    assert {k: len(s.ms) for k, s in series.items()} == {"a": 4, "b": 20, "c": 2}
    assert sorted(order[:3]) == sorted(order[3:6]) == ["a", "b", "c"]
    assert order[:3] != order[3:6]


def test_a_series_that_raises_is_left_out():
    seen = {}

    def bad():
        raise RuntimeError("gone")

    series = {"bad": measure.Series(bad, 1.0), "good": measure.Series(lambda: 1.0, 3.0)}
    measure.in_turn(series, lambda name, error: seen.update({name: str(error)}))
    assert seen == {"bad": "gone"}
    assert len(series["good"].ms) == 3


def test_a_series_takes_its_least_and_its_most():
    for ms, budget, count in ((50.0, 20.0, 4), (1.0, 6.0, 6), (0.1, 1e9, 9)):
        series = {"one": measure.Series(lambda ms=ms: ms, budget, least=4, most=9)}
        measure.in_turn(series)
        assert len(series["one"].ms) == count


def test_bandwidth_counts_reading_and_writing(monkeypatch):
    device = measure.Device("cpu")
    times = iter([5.0, 2.0, 9.0, 4.0, 3.0])
    monkeypatch.setattr(device, "milliseconds", lambda call: next(times))
    assert measure.copy_bandwidth(device) == 2 * 2**28 / 2e-3


def test_percentiles():
    s = measure.Series(lambda: 0.0, 0.0, ms=[float(v) for v in range(101)])
    assert (s.percentile(20), s.percentile(50), s.percentile(80)) == (20.0, 50.0, 80.0)


# The runner


class Bar:
    def set_postfix_str(self, text):
        pass


def _run_case(
    monkeypatch, answers, available=1 << 40, earlier=(), case=SMALL, names=("eager", "partialfc-sequence", "marginkernels-torch")
):
    """``run_case`` with a worker that answers as told; gives the records and what the worker was asked."""
    asked = []

    def spawn(job, limit, bar):
        asked.append(job["providers"])
        return answers[len(asked) - 1](job)

    monkeypatch.setattr(run, "_spawn", spawn)
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=available))
    known = providers()
    return run.run_case(case, "cpu", [known[n] for n in names], list(earlier), "quick", Bar()), asked


def _fine(job):
    return [{"provider": name, "status": "ok"} for name in job["providers"]], None, ""


def test_a_killed_process_costs_one_provider(monkeypatch):
    found, asked = _run_case(monkeypatch, [lambda job: ([], "eager", "ended by signal 9"), _fine])
    assert asked == [["eager", "partialfc-sequence", "marginkernels-torch"], ["partialfc-sequence", "marginkernels-torch"]]
    status = {r["provider"]: r["status"] for r in found}
    assert status == {"eager": "oom", "partialfc-sequence": "ok", "marginkernels-torch": "ok"}


def test_a_process_killed_between_providers_ends_the_case(monkeypatch):
    found, asked = _run_case(monkeypatch, [lambda job: ([], "rounds", "ended after 5 s")])
    assert len(asked) == 1
    assert {r["status"] for r in found} == {"failed"}


def test_what_cannot_fit_is_not_tried(monkeypatch):
    case = Case("arcface", 4096, 512, 1_000_000, "fp32")
    found, asked = _run_case(monkeypatch, [_fine], available=20 << 30, case=case)
    assert asked == [["marginkernels-torch"]]
    lost = [r for r in found if r["provider"] == "eager"]
    assert {r["status"] for r in lost} == {"oom"}
    assert "GB free" in lost[0]["reason"]


def test_what_would_take_too_long_is_not_tried(monkeypatch):
    smaller = {"provider": "eager", "head": "arcface", "dtype": "fp32", "phase": "step", "status": "ok", "N": 256, "D": 512, "C": 10_000}
    case = Case("arcface", 256, 512, 100_000, "fp32")
    for ms, status in ((1_000.0, "too slow"), (100.0, "ok")):
        found, _ = _run_case(monkeypatch, [_fine], earlier=[smaller | {"ms_p50": ms}], case=case)
        assert {r["status"] for r in found if r["provider"] == "eager"} == {status}


def test_a_step_is_estimated_from_the_largest_case():
    """By NDC from the largest timed case, and never as less than that case took."""
    one = {"provider": "eager", "head": "arcface", "dtype": "fp32", "phase": "step", "status": "ok", "N": 256, "D": 512, "C": 10_000}
    earlier = [one | {"ms_p50": 100.0}, one | {"C": 40_000, "ms_p50": 500.0}, one | {"C": 80_000, "ms_p50": 9.0, "status": "failed"}]

    def estimate(c, **changes):
        return run.expected_seconds(earlier, "eager", Case(**({"head": "arcface", "N": 256, "D": 512, "C": c, "dtype": "fp32"} | changes)))

    assert estimate(80_000) == pytest.approx(1.0)
    assert estimate(10_000) == pytest.approx(0.5)
    assert estimate(80_000, dtype="bf16") is None
    assert estimate(80_000, head="normface") is None


def test_memory_that_a_case_needs(monkeypatch):
    """Centers and gradient, the momentum where it is timed, and a gigabyte: at the limit it is tried, below it is not."""
    for training, copies in ((False, 2), (True, 3)):
        case = Case("arcface", 8, 512, 1_000_000, "fp32", training)
        need = copies * 4 * 512 * 10**6 + (1 << 30)
        for more, status in ((1.001, "ok"), (0.999, "oom")):
            found, _ = _run_case(monkeypatch, [_fine], int(need * more / run.MEMORY_SHARE), case=case, names=("marginkernels-torch",))
            assert {r["status"] for r in found} == {status}


def test_tiny_cases_predict_nothing():
    tiny = {"provider": "eager", "head": "arcface", "dtype": "fp32", "phase": "step", "status": "ok", "N": 32, "D": 512, "C": 1_000}
    assert run.expected_seconds([tiny | {"ms_p50": 300.0}], "eager", Case("arcface", 256, 512, 10_000, "fp32")) is None


def test_presets_hold_the_promised_cases():
    full = {(c.head, c.dtype, c.N, c.D, c.C) for c in cases.preset("cpu", "full")}
    for dtype in cases.DTYPES:
        assert {("arcface", dtype, 256, 512, c) for c in (10_000, 100_000, 1_000_000)} <= full
        assert ("arcface", dtype, 32, 512, 1_000) in full
    sweep = {(c.N, c.D, c.C) for c in cases.preset("cuda", "full") if c.head == "arcface"}
    assert len(sweep) == 5 * 4 * 3
    for device, name in cases.PRESETS:
        listed = cases.preset(device, name)
        assert len({(c.head, c.N, c.D, c.C, c.dtype) for c in listed}) == len(listed)
    assert any(c.train for c in cases.preset("cpu", "full"))


# The command line and the report


def test_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "tiny.json"
    shapes = [word for n in (4, 8, 16) for word in ("--case", f"arcface,fp32,{n},16,100")]
    chosen = "eager,F.linear_cross_entropy,marginkernels-torch"
    words = [sys.executable, "-m", "benchmarks", "run", "--device", "cpu", "--json", path, "--providers", chosen, *shapes]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = path.read_text()
    assert str(ROOT) not in text
    loaded = json.loads(text)
    assert loaded["environment"]["device"] == "cpu"
    assert loaded["environment"]["torch"] == torch.__version__
    good = [r for r in loaded["records"] if r["status"] == "ok"]
    assert {r["provider"] for r in good} == {"eager", "marginkernels-torch"}
    assert len(good) == 2 * 2 * 3
    assert main(["plot", str(path), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"tiny-batch.png", "tiny-roofline.png"}
    assert main(["report", str(path), "--out", str(tmp_path / "R.md")]) == 0
    assert "tiny.json" in (tmp_path / "R.md").read_text()
    assert main(["compare", str(path), str(path)]) == 0
    assert main(["peers", "--device", "cpu"]) == 0
    assert "partialfc-sequence: available" in capsys.readouterr().out


def test_unknown_provider_and_bad_case(tmp_path, capsys):
    path = tmp_path / "x.json"
    for words, said in (
        (["--providers", "eagre"], "got eagre"),
        (["--case", "arcface,fp8,1,2,3"], "got 'arcface,fp8,1,2,3'"),
        (["--case", "arcface"], "expected HEAD,DTYPE,N,D,C"),
        (["--case", "arcface,fp32,0,2,3"], "sizes >= 1"),
        (["--case", "arcface,fp32,1,2,x"], "sizes >= 1"),
        (["--time-limit", "nan"], "--time-limit: expected a finite number"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["run", "--device", "cpu", "--json", str(path), *words])
        assert raised.value.code == 2
        assert said in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("command", ["plot", "report", "compare"])
def test_files_that_are_no_records(tmp_path, capsys, command):
    """Missing, a folder, no JSON, JSON of something else, and a record without its environment: argparse says so."""
    (tmp_path / "text.json").write_text("not JSON")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"records": [{"a": 1}], "environment": {"providers": {}}}')
    for name in ("missing.json", "", "text.json", "list.json", "other.json"):
        with pytest.raises(SystemExit) as raised:
            main([command, *[str(tmp_path / name)] * (2 if command == "compare" else 1)])
        assert raised.value.code == 2, name
        assert "expected a record file" in capsys.readouterr().err, name


@pytest.mark.parametrize("words", [["run", "--device", "cpu", "--json"], ["resources", "--json"], ["report", "--out"], ["plot", "--out"]])
def test_paths_that_cannot_be_written(capsys, words):
    """Refused before the minutes of a measurement."""
    with pytest.raises(SystemExit) as raised:
        main([*words, "/dev/null/x"])
    assert raised.value.code == 2
    assert f"argument {words[-1]}: expected a f" in capsys.readouterr().err


def _records(tmp_path, name, medians, **changes):
    """A file of one case, provider -> median ms, or a status."""
    rows = []
    for provider, ms in medians.items():
        for phase in ("forward", "step"):
            r = worker._record(Case("arcface", 256, 512, 100_000, "fp32"), providers()[provider], phase)
            if isinstance(ms, str):
                r |= {"status": ms, "reason": "because"}
            else:
                r |= {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "tflops": 1.0, "share": 0.5, "mm_tflops": 2.0, "peak_mb": 10.0}
            rows.append(r | changes)
    path = tmp_path / name
    environment = {
        "device": "cpu",
        "cpu": "A CPU",
        "cpu_features": [],
        "threads": 2,
        "memory_gb": 1,
        "system": "Linux",
        "python": "3",
        "torch": "2",
        "commit": "abc",
        "time": "now",
        "copy_gb_s": 10.0,
        "preset": "quick",
        "providers": {"liger": {"version": None, "unavailable": "GPU"}},
    }
    run.write(path, {"environment": environment, "records": rows})
    return path


@pytest.mark.parametrize(
    ("medians", "status"),
    [
        ({"marginkernels-torch": 100.0, "eager": 300.0, "torch.compile": 150.0}, 0),
        ({"marginkernels-torch": 109.0, "eager": 300.0, "torch.compile": 150.0}, 0),
        ({"marginkernels-torch": 112.0, "eager": 300.0, "torch.compile": 150.0}, 1),
        ({"marginkernels-torch": 200.0, "eager": 600.0, "torch.compile": 300.0}, 0),  # a machine half as fast
        ({"marginkernels-torch": 50.0, "eager": 100.0, "torch.compile": 50.0}, 1),  # a machine that hides a regression
        ({"marginkernels-torch": "failed check", "eager": 300.0, "torch.compile": 150.0}, 1),
        ({"eager": 300.0, "torch.compile": 150.0}, 1),  # nothing of ours left to compare
    ],
)
def test_compare(tmp_path, medians, status):
    base = _records(tmp_path, "base.json", {"marginkernels-torch": 100.0, "eager": 300.0, "torch.compile": 150.0})
    new = _records(tmp_path, "new.json", medians)
    assert compare.run(types.SimpleNamespace(base=base, new=new, peer=None, limit=0.10)) == status


def test_change_is_the_median_over_peers(tmp_path):
    """Two of three peers say 1.1, one disturbed says 2.2; a peer that is named decides alone."""
    old = _records(tmp_path, "a.json", {"marginkernels-torch": 100.0, "eager": 300.0, "torch.compile": 150.0, "quack": 50.0})
    new = _records(tmp_path, "b.json", {"marginkernels-torch": 110.0, "eager": 300.0, "torch.compile": 150.0, "quack": 100.0})
    a, b = (records.Records.read(path) for path in (old, new))
    for peer, change in ((None, 1.1), ("eager", 1.1), ("quack", 0.55)):
        changes, lost = compare.compare(a, b, peer)
        assert list(changes.values()) == pytest.approx([change] * 2)
        assert not lost
    assert list(compare.compare(b, a)[0].values()) == pytest.approx([1 / 1.1] * 2)


def test_the_fastest_of_a_case(tmp_path):
    medians = {"marginkernels-torch": 100.0, "marginkernels-cpu": 40.0, "eager": 300.0, "torch.compile": 30.0, "quack": "oom"}
    found = records.Records.read(_records(tmp_path, "r.json", medians))
    case = found.cases["arcface", "fp32", "step", 256, 512, 100_000]
    fastest = [records.fastest(case, ours)["provider"] for ours in (None, True, False)]
    assert fastest == ["torch.compile", "marginkernels-cpu", "torch.compile"]
    assert records.fastest({"quack": case["quack"]}) is None
    assert records.timed(case).keys() == medians.keys() - {"quack"}
    assert found.providers()[:2] == ["marginkernels-torch", "marginkernels-cpu"]


def test_records_from_before_a_rename(tmp_path):
    """Old and new names of a provider are one provider, in comparisons and in the report."""
    new = _records(tmp_path, "new.json", {"marginkernels-torch": 100.0, "eager": 300.0})
    old = tmp_path / "old.json"
    old.write_text(new.read_text().replace("marginkernels-torch", "marginkernels-slab").replace('"liger":', '"marginkernels-slab":'))
    assert "marginkernels-slab" in old.read_text()
    changes, lost = compare.compare(*(records.Records.read(path) for path in (old, new)))
    assert {key[0] for key in changes} == {"marginkernels-torch"}
    assert set(changes.values()) == {1.0}
    assert not lost
    text = report.render([records.Records.read(old)])
    assert "marginkernels-torch" in text
    assert "slab" not in text
    for name, today in records.RENAMED.items():
        assert name not in providers()
        assert today in providers()


def test_report_shows_where_a_peer_wins(tmp_path):
    path = _records(tmp_path, "r.json", {"marginkernels-torch": 100.0, "eager": 80.0, "torch.compile": "oom"})
    text = report.render([records.Records.read(path)])
    row = next(line for line in text.splitlines() if line.startswith("| arcface") and "peer wins" in line)
    assert "**80**" in row
    assert "0.80x, eager: peer wins" in row
    assert "out of memory" in row
    first, last = map(int, row.split("|")[-2].split("-"))
    named = [json.loads(line.strip().rstrip(",")) for line in path.read_text().splitlines()[first - 1 : last]]
    assert {"marginkernels-torch", "eager", "torch.compile"} == {r["provider"] for r in named}
    assert "liger (GPU)" in text


def test_report_of_the_committed_records_is_current():
    """RESULTS.md is generated: the committed page is what the committed records give."""
    files = records.committed()
    if not files:
        pytest.skip("no records are committed")
    assert report.render([records.Records.read(p) for p in files]) == report.TARGET.read_text()
    for path in files:
        for picture in plot.pictures(records.Records.read(path)):
            assert picture.path.exists(), picture.path


# The GPU report


def test_gpu_report_steps_survive_each_other(tmp_path):
    def script(text):
        return lambda out: [sys.executable, "-c", text]

    steps = (
        gpu_report.Step("fails", 20, "fails.txt", script("print('so far'); raise SystemExit(3)"), lambda: None),
        gpu_report.Step("hangs", 1, "hangs.txt", script("import time; print('here', flush=True); time.sleep(60)"), lambda: None),
        gpu_report.Step("absent", 20, "absent.txt", lambda out: ["/no/such/program"], lambda: None),
        gpu_report.Step("cannot", 20, "cannot.txt", script("print('never')"), lambda: "there is no such device"),
        gpu_report.Step("works", 20, "works.txt", script("print('well')"), lambda: None),
    )
    found = gpu_report.report(tmp_path, steps)
    assert found["fails"] == "failed: exit status 3"
    assert "limit of 1 s" in found["hangs"]
    assert found["absent"].startswith("failed")
    assert found["cannot"] == "skipped: there is no such device"
    assert found["works"] == "ok"
    assert (tmp_path / "hangs.txt").read_text() == "==== hangs\nhere\n"
    assert (tmp_path / "works.txt").read_text() == "==== works\nwell\n"
    assert "there is no such device" in (tmp_path / "summary.md").read_text()


def test_gpu_report_fits_its_limits():
    """The correctness steps fit into one call, the measurements into another."""
    measured = [step.name for step in gpu_report.STEPS].index("benchmark")
    for steps in (gpu_report.STEPS[:measured], gpu_report.STEPS[measured:]):
        assert sum(step.seconds for step in steps) <= gpu_report.SECONDS < 9.5 * 60
    # The logs, the summary, two record files and the temporary file of the one that is being written.
    assert len({step.file for step in gpu_report.STEPS}) + 4 <= gpu_report.MOST_FILES


def test_gpu_report_leaves_what_does_not_fit(tmp_path):
    step = gpu_report.Step("long", 20, "log.txt", lambda out: [sys.executable, "-c", "pass"], lambda: None)
    assert gpu_report.report(tmp_path, (step,), 10) == {"long": "skipped: its limit of 20 s exceeds what is left of 10 s"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the real steps where there is a GPU")
def test_gpu_report_says_why_not(tmp_path):
    assert all("no GPU" in outcome for outcome in gpu_report.report(tmp_path).values())
