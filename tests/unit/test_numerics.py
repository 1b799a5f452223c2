"""The arithmetic that the layers share, against plain numbers: chunks, unit rows, inverse norms, transforms, sums over all classes."""

import math

import pytest
import torch
from helpers.chunks import chunks_of

import marginkernels as mk
from marginkernels import ops
from marginkernels.core import nontarget, numerics
from marginkernels.core.labels import checked_labels
from marginkernels.core.numerics import TINY


@pytest.mark.parametrize("width", [1, 7, 256, None])
@pytest.mark.parametrize(("n", "c"), [(1, 1), (5, 7), (64, 20), (300, 1000), (0, 30), (2**15, 70_000)])
def test_chunks_take_each_class_once(n, c, width):
    with chunks_of(width):
        found = list(numerics.chunks(torch.empty(n, 3), c))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == c
    wide = width or max(256, (1 << 22) // max(n, 3))
    assert all(stop - start == wide for start, stop in found[:-1])
    assert 0 < found[-1][1] - found[-1][0] <= wide


def test_chunks_hold_what_they_should():
    for shape in ((1 << 12, 3), (3, 1 << 12)):
        assert list(numerics.chunks(torch.empty(shape), 3000)) == [(0, 1024), (1024, 2048), (2048, 3000)]
    assert list(numerics.chunks(torch.empty(1 << 20, 1), 600)) == [(0, 256), (256, 512), (512, 600)]
    assert list(numerics.chunks(torch.empty(4, 2), 0)) == []


def test_chunks_on_a_gpu_grow_with_its_memory():
    """All of its memory, which is the same in every run."""
    assert [numerics.chunk_elements(gigabytes << 30) >> 20 for gigabytes in (0, 2, 24, 80)] == [4, 4, 12, 40]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_rows_and_inverse_norms(dtype):
    """Norms from 1e-37 to 1e37, of which the squares are no float32, and a zero row."""
    v = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-37, 37, 9)[:, None]
    v[4] = 0
    v = v.to(dtype)
    norms = [math.sqrt(sum(float(u) ** 2 for u in row)) for row in v]
    assert min(n for n in norms if n) < TINY < 1e30 < max(norms)
    inverse = [1 / n if n >= TINY else 0.0 for n in norms]
    unit, norm, inv = numerics.unit_rows(v)
    assert unit.dtype == norm.dtype == inv.dtype == torch.float64
    assert norm.tolist() == pytest.approx(norms, rel=1e-12)
    assert inv.tolist() == pytest.approx(inverse, rel=1e-12)
    for row, want, factor in zip(unit, v, inverse, strict=True):
        assert row.tolist() == pytest.approx([float(u) * factor for u in want], rel=1e-12)
    wide = v.to(numerics.accumulation_dtype(dtype))
    found = numerics.inverse_norm(wide)
    assert found.dtype == wide.dtype
    assert found.tolist() == pytest.approx(inverse, rel=1e-6 if wide.dtype == torch.float32 else 1e-12)


def test_a_norm_just_at_the_limit():
    v = torch.tensor([[TINY * 1.01, 0.0], [TINY * 0.99, 0.0]])
    assert (numerics.inverse_norm(v) > 0).tolist() == [True, False]
    assert (numerics.unit_rows(v)[2] > 0).tolist() == [True, False]
    from marginkernels.reference import normalize

    assert normalize(v * 10)[0].tolist() == pytest.approx([1.0, 0.0])
    assert normalize(v / 10).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_centers_and_biases_of_labels():
    w, labels = torch.arange(12.0).reshape(4, 3), torch.tensor([3, 0, -1, 4, 2, 2**40])
    rows = [[9, 10, 11], [0, 1, 2], [0, 0, 0], [0, 0, 0], [6, 7, 8], [0, 0, 0]]
    assert numerics.target_centers(w, labels).tolist() == rows
    assert numerics.target_centers(w[:0], labels).tolist() == [[0, 0, 0]] * 6
    assert numerics.target_biases(w[:, 1], labels).tolist() == [10, 1, 0, 0, 7, 0]
    assert numerics.target_biases(None, labels).tolist() == [0] * 6
    assert numerics.target_biases(w[:, 1], labels).dtype == torch.float64


def test_per_row_and_reductions():
    like = torch.zeros(3, 2)
    for value, want in (
        (2, [2, 2, 2]),
        (torch.tensor([1.0, 2.0, 3.0]), [1, 2, 3]),
        (torch.tensor(4.0), [4] * 3),
        (torch.tensor([5.0]), [5] * 3),
    ):
        got = numerics.per_row(value, like, torch.float64)
        assert got.tolist() == want
        assert got.dtype == torch.float64
    losses, valid = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([True, False, True])
    assert [numerics.reduce_losses(losses, valid, r).tolist() for r in ("none", "sum", "mean")] == [[1, 0, 5], 6, 3]
    assert numerics.reduce_losses(losses * 0, valid & False, "mean").tolist() == 0
    many = torch.rand(10_001, generator=torch.Generator().manual_seed(0)) ** 4 * 30
    for seed in range(8):  # the order of the rows does not show
        mixed = many[torch.randperm(len(many), generator=torch.Generator().manual_seed(seed))]
        for r in ("sum", "mean"):
            assert torch.equal(numerics.reduce_losses(mixed, mixed >= 0, r), numerics.reduce_losses(many, many >= 0, r))
    assert numerics.reduce_losses(losses, valid, "mean").dtype == torch.float32


def test_transforms_in_plain_numbers():
    """A cosine at the threshold itself is not hard."""
    cos = torch.tensor([[-0.5, 0.1, 0.25, 0.9], [-0.5, 0.1, 0.25, 0.9]], dtype=torch.float64)
    threshold, t = torch.tensor([0.1, -0.6], dtype=torch.float64), torch.tensor([0.5, 0.25])
    hard = [[False, False, True, True], [True] * 4]
    formulas = {
        mk.NonTarget.IDENTITY: (lambda c, t: c, lambda c, t: 1.0),
        mk.NonTarget.HARD_LINEAR: (lambda c, t: c + t * c + t, lambda c, t: 1 + t),
        mk.NonTarget.HARD_QUADRATIC: (lambda c, t: t * c + c * c, lambda c, t: t + c + c),
        mk.NonTarget.FILTERED: (lambda c, t: 0.0, lambda c, t: 0.0),
        mk.NonTarget.LIFTED: (lambda c, t: c + t, lambda c, t: 1.0),
        mk.NonTarget.LIFTED_ANGLE: (
            lambda c, t: math.cos(math.acos(c) - t),
            lambda c, t: math.sin(math.acos(c) - t) / math.sin(math.acos(c)),
        ),
    }
    for kind, (value, slope) in formulas.items():
        for got, formula, else_ in (
            (nontarget.value(kind, cos, threshold, t), value, lambda c: c),
            (nontarget.slope(kind, cos, threshold, t), slope, lambda c: 1.0),
        ):
            for i in range(2):
                want = [formula(c, float(t[i])) if h else else_(c) for c, h in zip(cos[i].tolist(), hard[i], strict=True)]
                assert got[i].tolist() == pytest.approx(want, rel=1e-12)
    everywhere = {
        mk.NonTarget.HINGE: (lambda c, t: (c + t) * (c - t) if c > -t else 0.0, lambda c, t: max(c + t, 0.0)),
        mk.NonTarget.ANGLE_PART: (
            lambda c, t: math.cos(t * math.acos(c)),
            lambda c, t: t * math.sin(t * math.acos(c)) / math.sin(math.acos(c)),
        ),
        mk.NonTarget.ANGLE_PART_DETACHED: (lambda c, t: math.cos(t * math.acos(c)), lambda c, t: 1.0),
    }
    both = {
        mk.NonTarget.CLIPPED: (lambda c, low, high: min(max(c, low), high), lambda c, low, high: float(low <= c <= high)),
        mk.NonTarget.POWER: (
            lambda c, m, t: 2 * math.pow((1 + c) / 2, t) - 1 + m,
            lambda c, m, t: t * math.pow((1 + c) / 2, t - 1),
        ),
        mk.NonTarget.POWER_DETACHED: (lambda c, m, t: 2 * math.pow((1 + c) / 2, t) - 1 + m, lambda c, m, t: 1.0),
    }
    assert {*formulas, *everywhere, *both} == {*mk.NonTarget}
    for kind, (value, slope) in everywhere.items():
        for got, formula in ((nontarget.value(kind, cos, threshold, t), value), (nontarget.slope(kind, cos, threshold, t), slope)):
            for i in range(2):
                assert got[i].tolist() == pytest.approx([formula(c, float(t[i])) for c in cos[i].tolist()], rel=1e-12), kind
    for kind, (value, slope) in both.items():
        t = torch.tensor([0.25, 0.75]) if kind == mk.NonTarget.CLIPPED else torch.tensor([1.0, 3.5])
        for got, formula in ((nontarget.value(kind, cos, threshold, t), value), (nontarget.slope(kind, cos, threshold, t), slope)):
            for i in range(2):
                want = [formula(c, threshold[i].item(), t[i].item()) for c in cos[i].tolist()]
                assert got[i].tolist() == pytest.approx(want, rel=1e-12), kind
        moves = nontarget.moves(kind, cos, threshold, t)
        if kind == mk.NonTarget.CLIPPED:
            assert moves.tolist() == [[False, True, True, False], [True, True, True, False]]
        else:
            assert moves is None


@pytest.mark.parametrize("kind", mk.NonTarget)
def test_transforms_have_the_slope_that_autograd_gives(kind):
    """Within [-1, 1] and at the ends; and no value is farther from 0 than is said."""
    cos = torch.cat([torch.linspace(-1, 1, 2001, dtype=torch.float64), torch.tensor([1 - 1e-9, 1 - 1e-12, 1e-12 - 1, 1e-7 - 1])])
    cos = cos.repeat(3, 1).requires_grad_()
    threshold, t = torch.tensor([-0.4, 0.0003, 0.7]), torch.tensor([0.1, 0.7, 1.0])
    if kind in (mk.NonTarget.POWER, mk.NonTarget.POWER_DETACHED):
        t = torch.tensor([1.0, 1.7, 10.0])
    value = nontarget.value(kind, cos, threshold, t)
    (slope,) = torch.autograd.grad(value.sum(), cos)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(nontarget.slope(kind, cos.detach(), threshold, t), slope, rtol=1e-7, atol=1e-9)
    assert torch.equal(nontarget.value(kind, cos.detach(), threshold, t), value.detach())
    reach = nontarget.reach(kind, torch.ones(3), threshold, t).double()
    assert (value.detach().abs().amax(1) <= reach * (1 + 1e-7)).all()
    if kind in (mk.NonTarget.HINGE, mk.NonTarget.ANGLE_PART, mk.NonTarget.ANGLE_PART_DETACHED):
        assert (value.detach().abs().amax(1) >= reach * (1 - 1e-7)).all()


def test_the_slope_is_held_back_beside_the_opposite_of_a_center():
    """Of the part of an angle: it would be infinite there. Beside the center itself it is t^2, and not held back."""
    t = torch.tensor([0.7], dtype=torch.float64)
    least = math.asin(nontarget.LEAST_SINE)
    for off in (0.0, 1e-9, 1e-3, 0.99 * least, 1.01 * least, 0.5):
        theta = math.pi - off
        slope = nontarget.slope(mk.NonTarget.ANGLE_PART, torch.tensor([[math.cos(theta)]], dtype=torch.float64), t, t)
        assert slope.item() == pytest.approx(0.7 * math.sin(0.7 * theta) / max(math.sin(off), nontarget.LEAST_SINE), rel=1e-6)
    near = nontarget.slope(mk.NonTarget.ANGLE_PART, torch.tensor([[math.cos(0.01)]], dtype=torch.float64), t, t)
    assert near.item() == pytest.approx(0.49, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 8192, 8193, 20_000])
def test_sum_of_centers_over_chunks(c, dtype):
    w = (torch.arange(c)[:, None] % 101 - torch.tensor([40, 50, 70])).to(dtype)
    factor = 0.5 + torch.arange(c) % 7
    for a in (factor, factor[:0]):
        got = ops.center_sum(w, a, "torch")
        want = (w.double() * (a.double()[:, None] if a.numel() else 1)).sum(0)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(want.tolist(), rel=1e-12)


def test_no_rows_and_no_classes():
    """What the passes give for an empty problem: log-sums of nothing, sums of nothing, and the factors of the centers that are there."""
    from helpers.passes import pass_inputs, request, upstream_of

    from marginkernels.core.types import Reduction

    for n, c in ((0, 6), (5, 0)):
        p = pass_inputs(4, (torch.float32, torch.float32), bias=True, n=8, c=6)
        rows = {k: getattr(p, k)[:n] for k in ("x", "row_factor", "labels", "scale")}
        p = type(p)(**(vars(p) | rows | {"w": p.w[:c], "bias": p.bias[:c]}))
        out = ops.row_pass(p, request(Reduction.LOG_SUM_EXP, need_center=True, need_cos=True), "torch")
        assert out.lse.tolist() == out.max_logit.tolist() == [-math.inf] * n
        assert out.mean_cos.tolist() == [0.0] * n
        assert out.mean_center.tolist() == [[0.0] * 4] * n
        assert out.class_factor.tolist() == pytest.approx((1 / p.w.norm(dim=1)).tolist())
        assert ops.row_pass(p, request(Reduction.LOGIT_SUM, need_center=True, need_cos=True), "torch").logit_sum.tolist() == [0.0] * n
        found = ops.class_pass(p, upstream_of(p, out.lse, Reduction.LOG_SUM_EXP), out.class_factor, out.saved, True, True, "torch")
        assert found.d_weight.tolist() == [[0.0] * 4] * c
        assert found.d_bias.tolist() == [0.0] * c


def test_labels():
    """Ignored rows become -1, whatever the ignored label is: also one that is a class, or beyond all of them."""
    y = torch.tensor([0, 3, 2, 3])
    assert checked_labels(y, 4, -100).tolist() == [0, 3, 2, 3]
    assert checked_labels(y, 4, 0).tolist() == [-1, 3, 2, 3]
    assert checked_labels(y, 4, 3).tolist() == [0, -1, 2, -1]
    assert checked_labels(y, 3, 3).tolist() == [0, -1, 2, -1]
    assert checked_labels(torch.tensor([-1, 0]), 4, -1).tolist() == [-1, 0]
    assert checked_labels(y[:0], 4, -1).tolist() == []
    for labels, c, ignore in (([0, 4], 4, -100), ([0, -1], 4, -100), ([4, -100, 1], 4, -100), ([-100], 4, 0)):
        with pytest.raises(ValueError, match="labels: expected values in"):
            checked_labels(torch.tensor(labels), c, ignore)
