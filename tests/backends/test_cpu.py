"""The C++ backend: every instruction set, determinism, hostile numbers, memory."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED, cpu
from marginkernels.backend.base import Backend
from marginkernels.cli import doctor
from marginkernels.core.numerics import target_centers, unit_rows
from marginkernels.core.types import HeadInputs, PassInputs, Request, Upstream

pytestmark = pytest.mark.skipif(FUSED["cpu"].unavailable_reason() is not None, reason=f"{FUSED['cpu'].unavailable_reason()}")
SERVES = {
    "avx512_bf16": (torch.bfloat16,),
    "amx": (torch.bfloat16,),
    "amx_split": (torch.float32, torch.float16),
}
LEVELS = [(level, dtype) for level in cpu.levels() for dtype in SERVES.get(level, cpu.CpuBackend.dtypes)]
HEADS = ("softmax", "arcface", "sphereface", "mv-am", "curricularface", "l2-softmax-trainable", "adacos", "arcface-focal")


@pytest.fixture
def level(monkeypatch):
    """Set the instruction set of this test."""
    return lambda name: monkeypatch.setattr(FUSED["cpu"], "level", name)


def test_auto_prefers_it():
    assert FUSED["cpu"].unsupported_reason("cpu", torch.float32, torch.float32, 8) is None
    assert next(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.tested_on) == "cpu"


def test_levels_here_are_among_those_that_were_built():
    built = cpu.levels(here=False)
    assert built[0] == "plain"
    assert [level for level in built if level in cpu.levels()] == cpu.levels()  # in the same order
    state = doctor.report()["extensions"]["marginkernels._cpu"]
    assert state.endswith(f"for {' '.join(built)}")


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
@pytest.mark.parametrize("shape", [(7, 33, 101), (300, 40, 333), (33, 1, 5), (3, 129, 130)])
def test_every_instruction_set(level, name, dtype, shape):
    level(name)
    for head in HEADS if shape[0] < 100 else ("arcface", "curricularface"):
        smoothing = 0.1 if head in ("arcface", "curricularface", "softmax") else 0.0
        found = testing.errors(
            testing.Case.random(*shape, dtype, bias=True), testing.HEADS[head](shape[2]), "cpu", label_smoothing=smoothing
        )
        if shape[1] == 1:  # one dimension leaves a normalized center no direction to move in: its gradient is rounding over rounding
            del found["dw"], found["dx"]
        assert max(found.values()) <= testing.TOLERANCE[dtype], (head, found)


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
def test_no_worse_than_eager(level, name, dtype):
    """At most 3x the error that eager makes, which does the same in the inputs' dtype (in float32 at the least)."""
    level(name)
    shape = (64, 128, 700)
    for head in ("softmax", "arcface", "curricularface"):
        case = testing.Case.random(*shape, dtype)
        eager, ours = (testing.errors(case, testing.HEADS[head](shape[2]), b) for b in ("reference", "cpu"))
        for output in ("loss", "dx", "dw"):
            assert ours[output] <= 3 * max(eager[output], 1e-7), (head, output, ours, eager)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_mixed_dtypes(dtype, weight_dtype):
    case = testing.Case.random(65, 96, 700, dtype, weight_dtype=weight_dtype)
    for head in ("arcface", "softmax", "curricularface"):
        found = testing.errors(case, testing.HEADS[head](700), "cpu")
        assert max(found.values()) <= max(testing.TOLERANCE[dtype], testing.TOLERANCE[weight_dtype]), (head, found)
    assert testing.run(case, mk.ArcFace(), "cpu")["dw"].dtype == weight_dtype


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        mk.margin_cross_entropy(
            torch.ones(2, 3).double(), torch.ones(4, 3).double(), torch.zeros(2, dtype=torch.int64), margin=mk.ArcFace(), backend="cpu"
        )


@pytest.mark.parametrize("head", ["arcface", "curricularface"])
@pytest.mark.parametrize("dtype", cpu.CpuBackend.dtypes)
def test_same_bits_for_a_thread_count(dtype, head):
    case = testing.Case.random(290, 64, 2500, dtype)
    margin = testing.HEADS[head](2500)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, again = (testing.run(case, margin, "cpu", label_smoothing=0.1) for _ in range(2))
            for output in first:
                assert torch.equal(first[output], again[output]), (threads, output)
            found[threads] = first
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for output, want in found[1].items():
            assert testing.relative_error(found[threads][output], want) <= (1e-5 if dtype == torch.float32 else 1e-2), (threads, output)


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
@pytest.mark.parametrize("head", ["arcface", "softmax", "curricularface"])
def test_hostile_numbers(level, name, dtype, head):
    """Norms of 1e18 and 1e-18, zero rows and centers, cosines of +-1, one class, one row, everything ignored: finite, and right where the
    reference in float64 is."""
    level(name)
    big = 1e18 if dtype != torch.float16 else 100.0
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 20, generator=g), torch.randn(11, 20, generator=g)
    labels = torch.arange(9)
    if head != "softmax":  # whose logits would be 1e36
        x[0] *= big
        w[1] *= big
        x[2] /= big
        w[3] /= big
    x[4] = 0
    w[5] = 0
    x[6], x[7] = w[6], -w[7]
    case = testing.Case(x.to(dtype), w.to(dtype), labels, None)
    got = testing.run(case, testing.HEADS[head](11), "cpu")
    assert all(v.isfinite().all() for v in got.values())
    want = testing.run(case, testing.HEADS[head](11), "reference", dtype=torch.float64)
    assert testing.relative_error(got["loss"], want["loss"]) <= testing.TOLERANCE[dtype]
    for name in ("dx", "dw"):
        rows = torch.tensor([i for i in range(len(want[name])) if i not in (6, 7)])  # at the ends the slope is what dtype resolves
        least = torch.finfo(dtype).smallest_normal
        for a, b in zip(got[name][rows].double(), want[name][rows], strict=True):
            assert (a - b).norm() <= 3 * testing.TOLERANCE[dtype] * b.norm() + least, (name, a, b)
    for rows in (x[:1], x[4:5]):
        for classes in (w[:1], w):
            for label in (0, -100):
                one = testing.Case(rows.to(dtype), classes.to(dtype), torch.tensor([label]), None)
                found = testing.run(one, testing.HEADS[head](3), "cpu")
                assert all(v.isfinite().all() for v in found.values())
                right = testing.run(one, testing.HEADS[head](3), "reference", dtype=torch.float64)["loss"]
                assert abs(float(found["loss"]) - float(right)) <= testing.TOLERANCE[dtype] * abs(float(right))


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
@pytest.mark.parametrize("scale", [1.0, 64.0, 1024.0])
def test_scales(level, name, dtype, scale):
    level(name)
    case = testing.Case.random(40, 48, 300, dtype)
    found = testing.errors(case, mk.CosFace(scale=scale), "cpu")
    if dtype == torch.float32 or scale <= 64:
        assert max(found.values()) <= testing.TOLERANCE[dtype] * max(1, scale / 64), found
    want = testing.run(case, mk.CosFace(scale=scale), "reference", dtype=torch.float64)
    fair = testing.eager(case, mk.CosFace(scale=scale))
    for name, v in want.items():  # one rounding of the result is nobody's error
        assert found[name] <= 3 * testing.relative_error(fair[name], v) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("name", [name for name, dtype in LEVELS if dtype == torch.float32])
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e8])
@pytest.mark.parametrize("workspace", [0, None])
def test_huge_logits(level, name, scale, workspace):
    """Where float32 cannot hold the log-sum-exp's fraction: still at most 3x the error of eager, whose softmax does not need it."""
    level(name)
    case = testing.Case.random(40, 48, 300, bias=True)
    large = testing.Case(case.x * math.sqrt(scale), case.w * math.sqrt(scale), case.labels, None)
    for problem, margin in ((case, mk.CosFace(scale=scale)), (case, mk.CurricularFace(scale=scale)), (large, mk.Softmax())):
        want = testing.run(problem, margin, "reference", dtype=torch.float64)
        eager = testing.eager(problem, margin)
        got = testing.run(problem, margin, "cpu", workspace_mb=workspace)
        for output in ("loss", "dx", "dw"):
            ours, theirs = (testing.relative_error(v[output], want[output]) for v in (got, eager))
            assert ours <= 3 * max(theirs, 1e-7), (type(margin).__name__, output, ours, theirs)


SCALES = (1.0, 16.0, 64.0, 128.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6, 1e7, 1e8)
SCALED = {
    "normface": lambda s: mk.NormFace(scale=s),
    "arcface": lambda s: mk.ArcFace(scale=s),
    "cosface": lambda s: mk.CosFace(scale=s),
    "mv": lambda s: mk.MVSoftmax(scale=s),
    "curricularface": lambda s: mk.CurricularFace(scale=s),
    "softmax": lambda s: mk.Softmax(),
}


def root_mean_square(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


@pytest.mark.parametrize("head", SCALED)
def test_accuracy_at_every_scale(level, head):
    """Over a few draws, at most 3x the error of eager, or of the float64 reference with logits that are off by one rounding of the scale.
    Of one draw neither is a measure: from scales of some hundreds on a single row with two near classes makes nearly all of the error."""
    unit, levels = torch.finfo(torch.float32).eps / 2, [name for name, dtype in LEVELS if dtype == torch.float32]
    for scale in SCALES:
        fair, ours = {}, {}
        for seed, bias in enumerate((False, True, True, False)):
            case, margin = testing.Case.random(48, 64, 300, bias=bias, seed=seed), SCALED[head](scale)
            if head == "softmax":
                longer = math.sqrt(scale / float(case.x.norm(dim=1).mean() * case.w.norm(dim=1).mean()))
                case = replace(case, x=case.x * longer, w=case.w * longer)
            g = torch.Generator().manual_seed(seed)
            bias64 = torch.zeros(300).double() if case.bias is None else case.bias.double()
            noise = scale * unit * (2 * torch.rand(3, 300, generator=g, dtype=torch.float64) - 1)
            moved = [testing.Case(case.x.double(), case.w.double(), case.labels, bias64 + v) for v in noise]
            want = testing.run(case, margin, "reference", dtype=torch.float64)
            others = [testing.eager(case, margin), *(testing.run(m, margin, "reference") for m in moved)]
            for output in want:
                theirs = (testing.relative_error(v[output], want[output]) for v in others)
                fair.setdefault(output, []).append(max(*theirs, 2 * unit))
            for name in levels:
                level(name)
                got = testing.run(case, margin, "cpu", workspace_mb=0 if seed % 2 else None)
                for output in want:
                    ours.setdefault((name, output), []).append(testing.relative_error(got[output], want[output]))
        for (name, output), found in ours.items():
            assert root_mean_square(found) <= 3 * root_mean_square(fair[output]), (scale, name, output, found, fair[output])


@pytest.mark.parametrize("name", [name for name, dtype in LEVELS if dtype == torch.float32])
@pytest.mark.parametrize(("d", "limit"), [(128, 1.4e-7), (512, 1.2e-7)])
def test_cosines_are_summed_in_short_chains(level, name, d, limit):
    """The root mean square of the relative error of a cosine near 1: 1.0e-7 and 0.85e-7; one chain of sums makes 1.75e-7 and 3.3e-7."""
    level(name)
    g, errors, backend = torch.Generator().manual_seed(0), [], FUSED["cpu"]
    labels = torch.zeros(64, dtype=torch.int64)
    for _ in range(20):
        w = torch.randn(2, d, generator=g) * 0.1
        x = 0.6 * torch.randn(64, d, generator=g) + 12 * w[1]
        rows = backend.prepare_inputs(HeadInputs(x, w, labels, True, True))
        inputs = PassInputs(rows.x, rows.row_factor, w, None, labels, torch.ones(64), None, None, mk.NonTarget.IDENTITY, True)
        want = torch.nn.functional.cosine_similarity(x.double(), w[1:].double())
        errors.append(backend.row_pass(inputs, Request.log_sum_exp()).lse / want - 1)
    assert torch.cat(errors).square().mean().sqrt() <= limit


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["sphereface", "w-norm-softmax", "arcface", "curricularface"])
@pytest.mark.parametrize("side", ["x", "w"])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_ends_of_the_dtype(backend, dtype, head, side, end):
    """An entry near the largest number of its dtype, or a row of the smallest, as the reference in float64 has it; a loss that float32
    does not hold is infinite, not NaN."""
    info = torch.finfo(dtype)
    case = testing.Case.random(6, 16, 9, ignored=False)
    v = {"x": case.x.clone(), "w": case.w.clone()}
    if end == "largest":
        v[side][1, 3] = 0.99 * info.max
    else:
        v[side][1] = info.tiny * info.eps * v[side][1].sign()
    case = replace(case, **{k: t.to(dtype) for k, t in v.items()})
    want = testing.run(case, testing.HEADS[head](9), "reference", dtype=torch.float64)
    plain, got = (testing.run(case, testing.HEADS[head](9), b) for b in ("reference", backend))
    for output, value in want.items():
        held = plain[output].isfinite()  # the numbers that float32 arithmetic gets and the dtype holds
        assert not got[output].isnan().any(), output
        assert testing.relative_error(got[output][held], value[held]) <= testing.TOLERANCE[dtype], (output, got[output], value)


@pytest.mark.parametrize("exponent", [-100, -40, 40])
def test_loss_scaling(exponent):
    """Gradients of a loss times a power of two are the gradients times it: nothing vanishes on the way."""
    for dtype in (torch.float32, torch.bfloat16):
        case = testing.Case.random(33, 64, 200, dtype, weight_dtype=torch.float32)
        plain, scaled = (testing.run(case, mk.ArcFace(), "cpu", upstream=torch.tensor(2.0**e)) for e in (0, exponent))
        assert testing.relative_error(scaled["dw"].double() / 2.0**exponent, plain["dw"]) <= 1e-6


def test_nan_shows():
    x, w = torch.randn(4, 8), torch.randn(5, 8)
    x[1, 3] = torch.nan
    losses = mk.margin_cross_entropy(x, w, torch.arange(4), margin=mk.CosFace(), reduction="none", backend="cpu")
    assert losses.isnan().tolist() == [False, True, False, False]


def test_strided_inputs():
    case = testing.Case.random(21, 30, 64)
    wide_w, wide_x = torch.randn(64, 37), torch.randn(30, 42)
    wide_w[:, 3:33], wide_x.T[::2] = case.w, case.x
    want = testing.run(case, mk.ArcFace(), "cpu")
    got = testing.run(testing.Case(wide_x.T[::2], wide_w[:, 3:33], case.labels, None), mk.ArcFace(), "cpu")
    transposed = testing.run(testing.Case(case.x, case.w.T.contiguous().T, case.labels, None), mk.ArcFace(), "cpu")
    for output in want:
        assert torch.equal(got[output], want[output])
        assert torch.equal(transposed[output], want[output])


MEMORY = """
import resource, sys, torch, marginkernels as mk
n, d, c = 256, 32, int(sys.argv[1])
x, w = torch.randn(n, d, requires_grad=True), torch.full((c, d), 0.1)
w[:, 0] = torch.arange(c) % 7
w.requires_grad_()
w.grad = torch.zeros_like(w)
warm = mk.margin_cross_entropy(x, w[:1000], torch.zeros(n, dtype=torch.int64), margin=mk.ArcFace(), backend="cpu").backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = mk.margin_cross_entropy(x, w, torch.zeros(n, dtype=torch.int64), margin=mk.ArcFace(), backend="cpu", workspace_mb=eval(sys.argv[2]))
torch.autograd.grad(loss, (x, w))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - c * d * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")
@pytest.mark.parametrize("classes", [100_000, 1_000_000])
@pytest.mark.parametrize("workspace", [0, None])
def test_flat_memory(classes, workspace):
    """MiB above inputs and gradients; the logits alone would be 98 and 977."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(classes), str(workspace)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64 + (workspace is None) * FUSED["cpu"].workspace_mb


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
def test_workspace(level, name, dtype):
    """What is saved is within the limit, changes nothing but rounding, and the bits repeat."""
    level(name)
    backend, n, c = FUSED["cpu"], 70, 1001
    chunk = backend.workspace_bytes(n, 1, dtype, 10**9)
    assert [backend.workspace_bytes(n, c, dtype, k) for k in (0, chunk - 1, chunk, 3 * chunk + 5, 10**9)] == [
        0,
        0,
        chunk,
        3 * chunk,
        8 * chunk,
    ]
    # One for each transform and kind of scale: more these passes do not see of a head.
    heads = ("softmax", "arcface", "mv-am", "curricularface", "l2-softmax-trainable") if dtype == torch.float32 else ("arcface", "mv-am")
    for head in heads:
        for options in ({}, {"label_smoothing": 0.1}):
            for bias in (False, True):
                case = testing.Case.random(n, 33, c, dtype, bias=bias)
                for chunks in (0, 2.5, 8, math.inf):
                    options["workspace_mb"] = chunks * chunk / 2**20
                    found = testing.errors(case, testing.HEADS[head](c), "cpu", **options)
                    assert max(found.values()) <= testing.TOLERANCE[dtype], (head, bias, options, found)
                    if chunks == 2.5 and not bias:
                        one, two = (testing.run(case, testing.HEADS[head](c), "cpu", **options) for _ in range(2))
                        assert all(torch.equal(one[k], two[k]) for k in one), (head, options)


@pytest.mark.parametrize(("name", "dtype"), LEVELS)
def test_saved_weights_are_not_computed_again(level, name, dtype):
    """Told another scale, the class pass gives another dw only where it must compute the logits."""
    level(name)
    backend, (n, d, c) = FUSED["cpu"], (40, 24, 700)
    g = torch.Generator().manual_seed(0)
    x, w = torch.nn.functional.normalize(torch.randn(n, d, generator=g)).mul(0.75).to(dtype), torch.randn(c, d, generator=g)
    inputs = PassInputs(
        x=x,
        row_factor=torch.full((n,), 4 / 3),
        w=w,
        bias=None,
        labels=torch.arange(n),
        scale=torch.full((n,), 8.0),
        threshold=None,
        t=None,
        non_target=mk.NonTarget.IDENTITY,
        normalize_weight=True,
    )
    size = backend.workspace_bytes(n, 256, dtype, 10**9)
    out = backend.row_pass(inputs, Request.log_sum_exp(need_center=True, workspace_bytes=size))
    upstream = Upstream(lse=out.lse, d_lse=torch.ones(n), d_logit_sum=None, d_target_cos=-torch.ones(n), d_target_bias=None)
    first, other = (
        backend.class_pass(p, upstream, out.class_factor, out.saved, True, False).d_weight
        for p in (inputs, replace(inputs, scale=inputs.scale * 2))
    )
    same = (first == other).all(1)
    assert same[:256].all()
    assert not same[256:].any()


@pytest.mark.parametrize("dtype", cpu.CpuBackend.dtypes)
@pytest.mark.parametrize("weight_dtype", cpu.CpuBackend.dtypes)
def test_row_arithmetic_as_in_pytorch(dtype, weight_dtype):
    """The rows' arithmetic in C++ is that with PyTorch's operators in float64: sums of D products agree within what any order of summing
    them may differ by, and gradients are the nearest numbers of their dtype."""
    backend, g, kind = FUSED["cpu"], torch.Generator().manual_seed(0), torch.finfo(dtype)
    for n, d, c in ((1, 2, 1), (2, 2, 2), (7, 33, 101), (100, 512, 40), (3, 8, 0)):
        x, w = torch.randn(n, d, generator=g).to(dtype), torch.randn(c, d + 1, generator=g).to(weight_dtype)[:, :d]
        labels = torch.randint(-1, c + 2, (n,), generator=g)
        x[0], x[-1] = 0, x[-1] * 1e-3
        center, d_lse, d_target_cos = (torch.randn(*shape, generator=g) for shape in ((n, d), (n,), (n,)))
        upstream = Upstream(lse=d_lse, d_lse=d_lse, d_logit_sum=None, d_target_cos=d_target_cos, d_target_bias=None)
        wide = {"x": x.double(), "w": w.double()}
        own = target_centers(w, labels)
        order = (d + 8) * 2.0**-52
        for sides in itertools.product((False, True), repeat=2):
            inputs = HeadInputs(x, w, labels, *sides)
            found, want = backend.prepare_inputs(inputs), Backend.prepare_inputs(backend, inputs)
            assert torch.equal(found.x, want.x)
            assert torch.equal(found.row_factor, want.row_factor)
            length = (1 if sides[0] else x.double().norm(dim=1)) * (1 if sides[1] else own.norm(dim=1))
            assert ((found.target_similarity - want.target_similarity).abs() <= order * length).all()
            assert ((found.target_cos - want.target_cos).abs() <= order).all()
            found = backend.row_gradient(inputs, upstream, center, None).double()
            exact = Backend.row_gradient(backend, replace(inputs, **wide), upstream, center, None)
            unit = own / own.norm(dim=1, keepdim=True).clamp_min(1e-300) if sides[1] else own
            size = (d_lse[:, None] * center).double().norm(dim=1) + (d_target_cos[:, None] * unit).norm(dim=1)
            if sides[0]:
                size = size * unit_rows(x)[2]
            largest = order * size[:, None] + kind.eps / 2 * (1 + 1e-6) * exact.abs() + kind.smallest_normal * kind.eps
            assert ((found - exact).abs() <= largest).all()


def test_memory_is_cached_for_the_next_step():
    """Large buffers are the same ones step after step, never two at once, and are given back on request."""
    cpu.release_memory()
    block = cpu._cpu.Block
    x, w, y = torch.randn(8, 64), torch.randn(40_000, 64, requires_grad=True), torch.arange(8)

    def gradient():
        loss = mk.margin_cross_entropy(x, w, y, margin=mk.CosFace(), backend="cpu", workspace_mb=math.inf)
        return torch.autograd.grad(loss, w)[0]

    first = gradient()
    saved = block.cached()
    assert 0 < saved <= FUSED["cpu"].workspace_bytes(8, 40_000, torch.float32, 2**40) + (2 << 20)
    second = gradient()
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(second, first)
    assert block.cached() == saved
    where = first.data_ptr()
    del first
    assert block.cached() > saved
    assert gradient().data_ptr() == where
    cpu.release_memory()
    assert block.cached() == 0
    held = [block(200 << 20, "a test") for _ in range(4)]
    del held
    assert block.cached() == 400 << 20
    cpu.release_memory()


FORK = """
import os, sys, torch, marginkernels as mk
x, w, y = torch.randn(64, 64), torch.randn(20_000, 64), torch.arange(64)
call = lambda: mk.margin_cross_entropy(x, w, y, margin=mk.CosFace(), backend="cpu")
with torch.no_grad():
    if sys.argv[1] == "used":
        want = call()
    else:  # the parent has used the threads, but not through us
        torch.randn(2000, 2000) + 1
    child = os.fork()
    if child == 0:
        found = call()
        os._exit(1 if sys.argv[1] == "used" and not torch.equal(found, want) else 0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["used", "unused"])
def test_survives_a_fork(before):
    """The threads of the parent do not live on in a forked process: it must not wait for them."""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, before], timeout=120).returncode == 0


def test_builds_without_a_compiler(tmp_path):
    """The package installs, and says why the kernels are not there."""
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    nothing = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME")} | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=nothing, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in (tmp_path / "lib" / "marginkernels" / "_cpu.txt").read_text()
    assert "no nvcc" in (tmp_path / "lib" / "marginkernels" / "_cuda.txt").read_text()


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """C D past 2^31: the last classes' loss and gradient are what they are alone."""
    c, d = (1 << 31) // 256 + 300, 256
    w = torch.empty(c, d, dtype=torch.bfloat16)
    w.view(torch.int16).random_(0x3C00, 0x3E00, generator=torch.Generator().manual_seed(0))
    tail = torch.randn(200, d, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    w[-200:] = tail
    x = tail[:8].float().mul(1.01).to(torch.bfloat16).requires_grad_()
    w.requires_grad_()
    labels = torch.arange(c - 200, c - 192)
    margin = mk.CosFace(scale=64.0, margin=0.1)
    losses = mk.margin_cross_entropy(x, w, labels, margin=margin, reduction="none", backend="cpu")
    losses.sum().backward()
    with torch.no_grad():
        unit = torch.nn.functional.normalize
        parts = [torch.logsumexp(64 * unit(x.double()) @ unit(p.double()).T, 1) for p in w[:-200].split(1 << 16)]
        own = 64 * unit(x.double()) @ unit(tail.double()).T
        own[torch.arange(8), torch.arange(8)] -= 6.4
        whole = torch.logsumexp(torch.stack([*parts, torch.logsumexp(own, 1)]), 0)
        want = whole - own[torch.arange(8), torch.arange(8)]
    torch.testing.assert_close(losses.double(), want, rtol=1e-2, atol=1e-3)
    assert w.grad[-200:-192].float().norm() > 0
    assert w.grad[: 1 << 16].isfinite().all()
    assert w.grad[-(1 << 16) :].isfinite().all()


SIGNALS = """
import os, signal, sys, threading, time, torch, marginkernels as mk
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
torch.set_num_threads(2)
n, d, c = 4096, 256, 400_000
x, w = torch.randn(n, d, requires_grad=True), torch.randn(1, d).expand(c, d)
if sys.argv[1] == "class pass":
    n = 512
    x, w = torch.randn(n, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True)
    from marginkernels.backend import FUSED
    inner, wide = FUSED["cpu"].class_pass, []
    import dataclasses
    def class_pass(inputs, upstream, class_factor, saved, *needs):
        # The gradient of some rows, but as a pass over many times as many.
        def more(v):
            return v.repeat(100, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) and v.shape[:1] == (n,) else v
        grown = [dataclasses.replace(r, **{f.name: more(getattr(r, f.name)) for f in dataclasses.fields(r)}) for r in (inputs, upstream)]
        timer.start()
        return inner(*grown, class_factor, saved[:0], *needs)
    FUSED["cpu"].class_pass = class_pass
def interrupt():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(0.5, interrupt)
y = torch.arange(n)
small = lambda: mk.margin_cross_entropy(x[:64], w[:1000], y[:64], margin=mk.CosFace(), backend="cpu").item()
before = small()
try:
    if sys.argv[1] == "row pass":
        timer.start()
    loss = mk.margin_cross_entropy(x, w, y, margin=mk.CosFace(), backend="cpu", workspace_mb=0)
    loss.backward()
    print("finished")
except KeyboardInterrupt:
    print(time.monotonic() - sent)
    assert small() == before  # the threads and their memory are as they were
"""


@pytest.mark.parametrize("where", ["row pass", "class pass"])
def test_interrupt(where):
    """Ctrl-C in the middle of a pass of many seconds: KeyboardInterrupt at once, and the next call is as ever."""
    done = subprocess.run([sys.executable, "-c", SIGNALS, where], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5  # seconds


OUT_OF_MEMORY = """
import resource, torch, marginkernels as mk
x, w, y = torch.randn(8, 64), torch.randn(400_000, 64, requires_grad=True), torch.arange(8)
mk.margin_cross_entropy(x, w[:1000], y, margin=mk.CosFace(), backend="cpu").backward()
w.grad = None
loss = mk.margin_cross_entropy(x, w, y, margin=mk.CosFace(), backend="cpu", workspace_mb=0)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (40 << 20), -1))
try:
    loss.backward()
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory as Linux counts it")
def test_out_of_memory_says_what_for():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "memory: expected 102400000 bytes for the gradient of weight, got none from the system", done.stderr
    with pytest.raises(MemoryError, match=rf"^memory: expected {1 << 60} bytes for a test, got"):
        cpu._cpu.Block(1 << 60, "a test")
