"""The margins: the reference against formulas written from the papers, slopes against autograd, state, and a margin of one's own."""

import copy
import math

import pytest
import torch
from helpers import formulas as f
from torch.autograd import gradcheck

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

N, D, C = 24, 13, 37
BEYOND = ("linear", "none", "easy", "continuous", "clip")
PREPARED = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]


def at_angles(theta, w, labels, seed=0):
    """Embeddings (N, D) of random norms at the angles ``theta`` (N,) to the centers ``w`` of their labels."""
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(w[labels.clamp_min(0)])
    side = torch.randn(unit.shape, generator=g, dtype=w.dtype)
    side = torch.nn.functional.normalize(side - (side * unit).sum(1, keepdim=True) * unit)
    norm = 0.5 + 4 * torch.rand(len(theta), 1, generator=g, dtype=w.dtype)
    return norm * (theta.cos()[:, None] * unit + theta.sin()[:, None] * side)


def problem(seed=0, dtype=torch.float64, low=0.05, high=math.pi - 0.05):
    """Target angles evenly from ``low`` to ``high``, in random order; one row is ignored."""
    case = testing.Case.random(N, D, C, torch.float64, bias=True, seed=seed)
    theta = torch.linspace(low, high, N, dtype=torch.float64)[torch.randperm(N, generator=torch.Generator().manual_seed(seed))]
    x = at_angles(theta, case.w, case.labels, seed)
    return x.to(dtype), case.w.to(dtype), case.labels, case.bias.to(dtype)


def stepped(make):
    """A formula whose state advances once from the start, given the problem."""
    return make(*problem()[:3])


#: A margin for each class, in no order; float32 holds them.
OWN = [(7 * i % C) / 32 for i in range(C)]
FORMULAS = {
    "softmax": (lambda: mk.Softmax(), lambda: f.softmax),
    "w-norm": (lambda: mk.Softmax(normalize_weight=True), lambda: f.w_norm_softmax),
    "normface": (lambda: mk.NormFace(20.0), lambda: f.normface(20.0)),
    "l2": (lambda: mk.L2Softmax(12.0), lambda: f.l2_softmax(12.0)),
    "l2-bound": (lambda: mk.L2Softmax(num_classes=C), lambda: f.l2_softmax(f.l2_bound(C))),
    "l2-bound-from-head": (lambda: mk.L2Softmax(), lambda: f.l2_softmax(f.l2_bound(C))),
    **{f"sphereface-{m}": (lambda m=m: mk.SphereFace(margin=m), lambda m=m: f.sphereface(m)) for m in (1, 2, 3, 4, 5)},
    **{f"lsoftmax-{m}": (lambda m=m: mk.LSoftmax(m, 3.0), lambda m=m: f.lsoftmax(m, 3.0)) for m in (1, 2, 3, 4, 5)},
    "sphereface-fnorm": (lambda: mk.SphereFace(margin=4, scale=30.0), lambda: f.sphereface(4, 30.0)),
    "sphereface-annealed": (lambda: mk.SphereFace(annealing=True), lambda: f.sphereface(4, None, f.annealing(1))),
    "sphereface-annealed-own": (
        lambda: mk.SphereFace(annealing=mk.Annealing(base=20.0, gamma=1.0, power=2.0, minimum=0.5)),
        lambda: f.sphereface(4, None, f.annealing(1, 20.0, 1.0, 2.0, 0.5)),
    ),
    "cosface": (lambda: mk.CosFace(), lambda: f.cosface(64.0, 0.35)),
    **{
        f"arcface-{b}-{m}": (lambda b=b, m=m: mk.ArcFace(20.0, m, beyond_pi=b), lambda b=b, m=m: f.arcface(20.0, m, b))
        for b in BEYOND
        for m in (0.0, 0.5, 1.7)
    },
    "arcface-detached": (lambda: mk.ArcFace(20.0, gradient="detached"), lambda: f.arcface(20.0, 0.5, detached=True)),
    "arcface-detached-easy": (
        lambda: mk.ArcFace(20.0, 1.2, "easy", "detached"),
        lambda: f.arcface(20.0, 1.2, "easy", detached=True),
    ),
    "combined-arc": (lambda: mk.CombinedMargin(30.0, 1.0, 0.5, 0.0), lambda: f.arcface(30.0, 0.5)),
    "combined-cos": (lambda: mk.CombinedMargin(30.0, 1.0, 0.0, 0.35), lambda: f.cosface(30.0, 0.35)),
    **{
        f"combined-{b}-{m1}": (
            lambda b=b, m1=m1: mk.CombinedMargin(30.0, m1, 0.3, 0.2, b),
            lambda b=b, m1=m1: f.combined(30.0, m1, 0.3, 0.2, b),
        )
        for b in BEYOND
        for m1 in (0.9, 1.0, 1.35, 4.0)
    },
    "combined-detached": (
        lambda: mk.CombinedMargin(30.0, 1.35, 0.3, 0.2, gradient="detached"),
        lambda: f.combined(30.0, 1.35, 0.3, 0.2, detached=True),
    ),
    "adacos-fixed": (lambda: mk.AdaCos(C, dynamic=False), lambda: f.normface(f.adacos_fixed(C))),
    "adacos": (lambda: mk.AdaCos(C), lambda: stepped(lambda x, w, y: f.normface(f.adacos_step(f.adacos_fixed(C), x, w, y)))),
    "mv-arc": (lambda: mk.MVSoftmax(), lambda: f.mv_softmax("arc", 32.0, 0.5, 0.2)),
    "mv-am": (lambda: mk.MVSoftmax("am", 32.0, 0.35, 0.4), lambda: f.mv_softmax("am", 32.0, 0.35, 0.4)),
    "curricularface": (
        lambda: mk.CurricularFace(20.0),
        lambda: stepped(lambda x, w, y: f.curricularface(20.0, 0.5, f.curricular_step(0.0, x, w, y))),
    ),
    "curricularface-fast": (
        lambda: mk.CurricularFace(20.0, 0.3, momentum=0.2),
        lambda: stepped(lambda x, w, y: f.curricularface(20.0, 0.3, f.curricular_step(0.0, x, w, y, 0.2))),
    ),
    "cosface-per-class": (lambda: mk.CosFace(20.0, torch.tensor(OWN).double()), lambda: f.cosface_per_class(20.0, OWN)),
    **{
        f"arcface-per-class-{b}-{g}": (
            lambda b=b, g=g: mk.ArcFace(20.0, torch.tensor(OWN, dtype=torch.float64), b, g),
            lambda b=b, g=g: f.arcface_per_class(20.0, OWN, b, g == "detached"),
        )
        for b, g in (("linear", "exact"), ("easy", "exact"), ("none", "exact"), ("continuous", "exact"), ("clip", "detached"))
    },
    "cosface-filtered": (lambda: mk.CosFace(20.0, 0.2, filter_above=0.1), lambda: f.filtered(f.cosface(20.0, 0.2), 20.0, 0.1)),
    "arcface-filtered": (
        lambda: mk.ArcFace(20.0, 0.3, "easy", filter_above=-0.05),
        lambda: f.filtered(f.arcface(20.0, 0.3, "easy"), 20.0, -0.05),
    ),
    "combined-filtered": (
        lambda: mk.CombinedMargin(30.0, 1.35, 0.3, 0.2, filter_above=0.2),
        lambda: f.filtered(f.combined(30.0, 1.35, 0.3, 0.2), 30.0, 0.2),
    ),
    **{f"circle-{m}": (lambda m=m: mk.Circle(25.0, m), lambda m=m: f.circle(25.0, m)) for m in (0.0, 0.1, 0.25)},
    **{
        f"sphereface-r-{v}-{g}-{m}": (
            lambda v=v, g=g, m=m: mk.SphereFaceR(v, 20.0, m, gradient=g),
            lambda v=v, g=g, m=m: f.sphereface_r(v, m, 20.0, g == "exact"),
        )
        for v in ("v0", "v1", "v2")
        for g in ("detached", "exact")
        for m in (1.0, 1.4, 3.0)
    },
    **{
        f"sphereface-r-{v}-norm-{g}": (
            lambda v=v, g=g: mk.SphereFaceR(v, margin=1.5, normalization="none", gradient=g),
            lambda v=v, g=g: f.sphereface_r(v, 1.5, None, g == "exact"),
        )
        for v in ("v0", "v1", "v2")
        for g in ("detached", "exact")
    },
    "adaface": (lambda: mk.AdaFace(20.0), lambda: stepped(lambda x, w, y: f.adaface(20.0, 0.4, *f.adaface_step(20.0, 100.0, x, y)))),
    "adaface-steep": (
        lambda: mk.AdaFace(20.0, 0.7, h=2.0, momentum=0.0),
        lambda: stepped(lambda x, w, y: f.adaface(20.0, 0.7, *f.adaface_step(20.0, 100.0, x, y, 0.0), h=2.0)),
    ),
}
OPTIONS = [
    ("none", {}),
    ("none", {"gamma": 2.0}),
    ("none", {"bias": True, "smoothing": 0.2, "gamma": 0.7}),
    ("mean", {"smoothing": 0.1}),
    ("sum", {"bias": True}),
]


def run_formula(logits, reduction, bias=False, smoothing=0.0, gamma=0.0):
    x, w, y, b = (v.clone() for v in problem())
    leaves = [v.requires_grad_() for v in ((x, w, b) if bias else (x, w))]
    z = logits(x, w, y)
    loss = f.cross_entropy(z + b if bias else z, y, reduction=reduction, smoothing=smoothing, gamma=gamma)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weights_like(loss))]


def run_package(margin, backend, reduction, bias=False, smoothing=0.0, gamma=0.0):
    x, w, y, b = (v.clone() for v in problem())
    leaves = [v.requires_grad_() for v in ((x, w, b) if bias else (x, w))]
    margin.focal_gamma = gamma
    loss = mk.margin_cross_entropy(
        x, w, y, margin=margin, bias=b if bias else None, reduction=reduction, label_smoothing=smoothing, backend=backend
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weights_like(loss))]


def weights_like(loss):
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.ndim else torch.ones_like(loss)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_agrees_with_the_papers(name, backend):
    make, formula = FORMULAS[name]
    for reduction, options in OPTIONS:
        want = run_formula(formula(), reduction, **options)
        got = run_package(make(), backend, reduction, **options)
        for g, v in zip(got, want, strict=True):
            assert (g - v).norm() <= 1e-9 * v.norm(), (reduction, options, testing.relative_error(g, v))


def test_problem_reaches_every_branch():
    """The problem above has angles on both sides of every bend, and hard and easy non-target classes; else the test proves little."""
    x, w, y, _ = problem()
    kept = y >= 0
    c = f.cosines(x, w)
    theta = torch.acos(c[kept].gather(1, y[kept, None]))
    for m1, m2 in ((1.0, 0.5), (1.0, 1.7), (1.0, 0.3), (1.35, 0.3), (4.0, 0.3)):
        past = theta > f.past_pi(m1, m2)
        assert past.sum() >= 2
        assert (~past).sum() >= 2
    hard = c[kept] > torch.cos(theta + 0.5)
    assert hard.any()
    assert not hard.all()
    for m in (1, 2, 3, 4, 5):
        assert {int(t * m / math.pi) for t in theta} == set(range(m))
    assert (theta < 0.1).any()
    assert (theta > math.pi - 0.1).any()


THETA = [math.pi * (i + 0.5) / 500 for i in range(500)]


def values_and_slopes(margin):
    """Of a margin at ``THETA``; in eval mode, in which state stands still."""
    cos = torch.tensor([math.cos(t) for t in THETA], dtype=torch.float64)
    batch = mk.BatchInfo(torch.ones(len(cos), 3, dtype=torch.float64), torch.zeros(len(cos), dtype=torch.int64), C)
    value, slope = margin.eval().target(cos, batch)
    return value.tolist(), slope.tolist()


def near(got, want):
    """To 1e-11, relative to what is larger: a slope near an end is a quotient of small numbers."""
    assert len(got) == len(want) > 0
    for theta, g, v in zip(THETA, got, want, strict=True):
        assert abs(g - v) <= 1e-11 * max(1, abs(v)) / min(1, math.sin(theta) ** 2 * 30), (theta, g, v)


@pytest.mark.parametrize("beyond", BEYOND)
@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_value_and_slope_of_angular_margins(beyond, gradient):
    cases = [(mk.ArcFace(20.0, m, beyond, gradient), 1.0, m, 0.0) for m in (0.0, 0.5, 1.7, 3.0)]
    shapes = [(m1, m2, m3) for m1 in (0.9, 1.0, 1.35, 4.0) for m2 in (0.0, 0.3, 2.0) for m3 in (0.0, 0.2)]
    cases += [(mk.CombinedMargin(20.0, *shape, beyond, gradient), *shape) for shape in shapes]
    past = 0
    for margin, m1, m2, m3 in cases:
        past += sum(t > f.past_pi(m1, m2) for t in THETA)
        value, slope = values_and_slopes(margin)
        near(value, [float(f.combined_target(torch.tensor(t, dtype=torch.float64), m1, m2, m3, beyond)) for t in THETA])
        near(slope, [1.0 if gradient == "detached" else f.combined_slope(t, m1, m2, beyond) for t in THETA])
    assert past > len(THETA)


def test_value_and_slope_of_the_other_margins():
    cos = [math.cos(t) for t in THETA]
    for margin, value, slope in (
        (mk.Softmax(), lambda c: c, 1.0),
        (mk.NormFace(20.0), lambda c: c, 1.0),
        (mk.L2Softmax(9.0), lambda c: c, 1.0),
        (mk.AdaCos(C), lambda c: c, 1.0),
        (mk.CosFace(20.0, 0.35), lambda c: c - 0.35, 1.0),
        (mk.MVSoftmax("am", 20.0, 0.35), lambda c: c - 0.35, 1.0),
    ):
        got = values_and_slopes(margin)
        near(got[0], [value(c) for c in cos])
        near(got[1], [slope] * len(cos))
    for m in (0.0, 0.5, 1.7):
        for margin, beyond in ((mk.MVSoftmax("arc", 20.0, m), "none"), (mk.CurricularFace(20.0, m), "linear")):
            got = values_and_slopes(margin)
            near(got[0], [float(f.arc_target(torch.tensor(t, dtype=torch.float64), m, beyond)) for t in THETA])
            near(got[1], [f.combined_slope(t, 1.0, m, beyond) for t in THETA])
            limit = margin.threshold(torch.tensor(cos, dtype=torch.float64), None)
            near(limit.tolist(), [math.cos(t + m) for t in THETA])
    near(mk.MVSoftmax("am", 20.0, 0.35).threshold(torch.tensor(cos, dtype=torch.float64), None).tolist(), [c - 0.35 for c in cos])
    for m in (1, 2, 3, 4, 5):
        for steps in (None, 0, 1, 3000):
            margin, lam = mk.SphereFace(m, annealing=None if steps is None else mk.Annealing(500.0, 0.3, 1.5, 4.0)), 0.0
            if steps is not None:
                margin.iteration.fill_(steps)
                lam = f.annealing(steps, 500.0, 0.3, 1.5, 4.0)
            got = values_and_slopes(margin)
            psi = [float(f.psi(torch.tensor(t, dtype=torch.float64), m)) for t in THETA]
            near(got[0], [(lam * c + v) / (1 + lam) for c, v in zip(cos, psi, strict=True)])
            near(got[1], [(lam + f.psi_slope(t, m)) / (1 + lam) for t in THETA])
    assert f.annealing(1, 500.0, 0.3, 1.5, 4.0) > f.annealing(3000, 500.0, 0.3, 1.5, 4.0) == 4.0


@pytest.mark.parametrize("m1", [1.0, 1.35])
def test_ends_of_the_range(m1):
    """At theta = 0 and pi the value is that of the formula, and the slope that of a constant sine: finite, however steep beside it."""
    m2 = 0.4
    value, slope = mk.CombinedMargin(20.0, m1, m2, 0.1, "none").target(torch.tensor([1.0, -1.0], dtype=torch.float64), None)
    assert value.tolist() == pytest.approx([math.cos(m2) - 0.1, math.cos(m1 * math.pi + m2) - 0.1], abs=1e-7)
    assert slope.tolist() == pytest.approx([math.cos(m2)] * 2 if m1 == 1 else [0.0, 0.0], abs=1e-7)
    theta = 1e-7
    value, slope = mk.ArcFace(20.0, m2).target(torch.tensor([1 - theta**2 / 2], dtype=torch.float64), None)
    assert float(slope) == pytest.approx(math.sin(m2) / theta, rel=1e-2)


@pytest.mark.parametrize("name", testing.HEADS)
def test_slope_is_the_derivative_of_the_value(name):
    margin = testing.HEADS[name](C).eval()
    margin.bind(C)
    cos = torch.cat([torch.linspace(-0.9999, 0.9999, 997, dtype=torch.float64), torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)])
    cos.requires_grad_()
    batch = mk.BatchInfo(torch.randn(len(cos), 4, dtype=torch.float64), torch.zeros(len(cos), dtype=torch.int64), C)
    value, slope = margin.target(cos, batch)
    (want,) = torch.autograd.grad(value.sum(), cos)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope.detach(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", *(name for name in PREPARED if name != "triton")])
def test_lsoftmax_differentiates_the_norm_of_the_center(backend):
    """Rows of one class and of a class of its own, ignored rows, rows and centers of zero; each row of dw by itself."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    x, w, y, _ = problem(5, dtype)
    y[:9], y[10] = 3, -100
    w = w * torch.logspace(-1, 1.5, C, dtype=dtype)[:, None]
    leaves, wide = [[v.to(d).requires_grad_() for v in (x, w)] for d in (dtype, torch.float64)]
    got = mk.margin_cross_entropy(*leaves, y, margin=mk.LSoftmax(3), backend=backend)
    want = f.cross_entropy(f.lsoftmax(3)(*wide, y), y)
    for g, v in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide), strict=True):
        off, size = (g.double() - v).norm(dim=1), v.norm(dim=1)
        assert (off <= (1e-9 if dtype == torch.float64 else 1e-4) * (size + 1e-3 * size.max())).all()
    with torch.no_grad():
        leaves[0][4], leaves[1][3] = 0, 0
    loss = mk.margin_cross_entropy(*leaves, y, margin=mk.LSoftmax(3), backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert all(v.grad.isfinite().all() for v in leaves)


def test_lsoftmax_at_every_angle():
    for m in (1, 2, 3, 4, 5):
        theta = torch.tensor(THETA, dtype=torch.float64)
        rows, labels = torch.full((len(THETA), 4), 1.5, dtype=torch.float64), torch.zeros(len(THETA), dtype=torch.int64)
        batch = mk.BatchInfo(rows, labels, C, center_norm=torch.full_like(theta, 0.25))
        value, slope = mk.LSoftmax(m).target(0.75 * theta.cos(), batch)
        near((value / 0.75).tolist(), [float(f.psi(t, m)) for t in theta])
        near(slope.tolist(), [f.psi_slope(t, m) for t in THETA])
        value, slope = mk.LSoftmax(m).target(
            0.75 * torch.tensor([1.0, -1.0], dtype=torch.float64), mk.BatchInfo(rows[:2] / 4, labels[:2], C)
        )
        assert value.tolist() == pytest.approx([0.75, 0.75 * (1 - 2 * m)])
        assert slope.tolist() == pytest.approx([m * m] * 2)


def test_sphereface_is_monotone():
    theta = torch.linspace(0, math.pi, 10001, dtype=torch.float64)
    for m in range(1, 7):
        value, _ = mk.SphereFace(margin=m).target(torch.cos(theta), None)
        assert (value.diff() <= 1e-12).all()
        assert value[-1] == pytest.approx(1 - 2 * m, abs=1e-9)


@pytest.mark.parametrize("m", [0.2, 0.5, 1.0, 2.0])
def test_past_pi(m):
    """The documented jump of each rule at theta = pi - m."""
    eps = 1e-7
    ends = torch.cos(torch.tensor([math.pi - m - eps, math.pi - m + eps], dtype=torch.float64))
    jump = {b: float(mk.ArcFace(1.0, m, b).target(ends, None)[0].diff()) for b in ("linear", "none", "continuous", "clip")}
    assert jump["linear"] == pytest.approx(1 - math.cos(m) - m * math.sin(m), abs=1e-6)
    for b in ("none", "continuous", "clip"):
        assert jump[b] == pytest.approx(0, abs=1e-6)


def test_reference_passes_gradcheck():
    x, w, y, b = problem()
    x, w, b = (v.clone().requires_grad_() for v in (x[:4, :5], w[:7, :5], b[:7]))
    y = torch.tensor([0, 3, 3, -100])
    for name, make in testing.HEADS.items():
        margin = make(7).eval()
        if margin.straight_through or getattr(margin, "gradient", None) == "detached":  # its gradient is by intention another
            continue
        options = testing.accepted(name, label_smoothing=0.1)
        assert gradcheck(
            lambda x, w, b, margin=margin, options=options: mk.margin_cross_entropy(
                x, w, y, margin=margin, bias=b, reduction="none", backend="reference", **options
            ),
            (x, w, b),
            fast_mode=True,
        ), name


def test_trainable_alpha():
    x, w, y, _ = problem()
    for backend in ("reference", *PREPARED):
        if torch.float32 not in getattr(FUSED.get(backend), "dtypes", (torch.float32,)):
            continue
        margin = mk.L2Softmax(alpha=9.0, trainable=True)
        mk.margin_cross_entropy(x.float(), w.float(), y, margin=margin, backend=backend).backward()
        alpha = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        f.cross_entropy(f.l2_softmax(alpha)(x, w, y), y).backward()
        assert float(margin.alpha.grad) == pytest.approx(float(alpha.grad), rel=2e-4)
    assert [n for n, _ in mk.MarginHead(4, 10, mk.L2Softmax(trainable=True)).named_parameters()] == ["weight", "margin.alpha"]


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_adacos_follows_the_paper_for_steps(backend):
    """Its scale over steps whose median target angle lies below pi/4, above it, and past pi/2; then it stands still."""
    margin, s, medians, seen = mk.AdaCos(C), f.adacos_fixed(C), [], []
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    assert float(margin.s) == pytest.approx(math.sqrt(2) * math.log(C - 1), rel=1e-12)
    for step, (low, high) in enumerate(((0.05, 0.9), (0.3, 2.0), (1.5, 3.0), (0.1, 0.5), (0.05, 3.0))):
        x, w, y, _ = problem(step, dtype, low, high)
        y[step] = -100
        kept = y >= 0
        medians.append(float(torch.acos(f.cosines(x.double(), w.double())[kept].gather(1, y[kept, None])).median()))
        s = f.adacos_step(s, x.double(), w.double(), y)
        mk.margin_cross_entropy(x, w, y, margin=margin, backend=backend)
        assert float(margin.s) == pytest.approx(s, rel=1e-11 if dtype == torch.float64 else 1e-6)
        seen.append(float(margin.s))
    assert min(medians) < math.pi / 4 - 0.1
    assert max(medians) > math.pi / 2
    assert len({round(v, 6) for v in seen}) == len(seen)
    mk.margin_cross_entropy(x, w, y, margin=margin.eval(), backend=backend)
    assert float(margin.s) == seen[-1]
    fixed = mk.AdaCos(C, dynamic=False)
    mk.margin_cross_entropy(x, w, y, margin=fixed, backend=backend)
    assert float(fixed.s) == f.adacos_fixed(C)


def test_annealing_by_a_flag():
    assert mk.SphereFace(annealing=False).annealing is mk.SphereFace().annealing is None
    assert mk.SphereFace(annealing=True).annealing == mk.Annealing()


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_curricularface_and_annealing_for_steps(backend):
    """t and lambda over several steps and the losses that they give, with ignored rows; in eval mode they are used, not moved."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    curricular, sphere, t = mk.CurricularFace(16.0, 0.5, momentum=0.7), mk.SphereFace(4, 16.0, mk.Annealing(20.0, 1.0, 1.0, 4.0)), 0.0
    lambdas = []
    for step in range(7):
        evaluating = step == 4
        x, w, y, _ = problem(step, dtype, *((0.05, 1.2), (0.05, 3.0))[step % 2])
        y[: step + 1] = -100
        if step == 5:
            y[:] = -100
        wide = x.double(), w.double()
        if not evaluating and step != 5:
            t = f.curricular_step(t, *wide, y, 0.7)
        lambdas.append(f.annealing(step + 1 - (step >= 4), 20.0, 1.0, 1.0, 4.0))
        for margin, logits in ((curricular, f.curricularface(16.0, 0.5, t)), (sphere, f.sphereface(4, 16.0, lambdas[-1]))):
            got = mk.margin_cross_entropy(x, w, y, margin=margin.train(not evaluating), backend=backend)
            assert float(got) == pytest.approx(float(f.cross_entropy(logits(*wide, y), y)), rel=1e-9 if dtype == torch.float64 else 1e-4)
        assert float(curricular.t) == pytest.approx(t, rel=1e-9 if dtype == torch.float64 else 1e-6)
        assert int(sphere.iteration) == step + 1 - (step >= 4)
    assert abs(t) > 0.1
    assert lambdas[0] > lambdas[2] > lambdas[-1] == 4.0
    curricular.reset_parameters()
    sphere.reset_parameters()
    assert float(curricular.t) == int(sphere.iteration) == 0


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
@pytest.mark.parametrize("name", testing.HEADS)
def test_eval_mode_uses_the_state_as_it_is(name, backend):
    """The loss of a head in eval mode is that of its formula at the state that training left."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    margin = testing.HEADS[name](C)
    x, w, y, _ = problem(1, dtype)
    mk.margin_cross_entropy(x, w, y, margin=margin, backend=backend)
    margin.eval()
    state = {k: v.clone() for k, v in margin.state_dict().items()}
    formula = {
        "adacos": lambda: f.normface(float(margin.s)),
        "curricularface": lambda: f.curricularface(64.0, 0.5, float(margin.t)),
        "adaface": lambda: f.adaface(64.0, 0.4, float(margin.norm_mean), float(margin.norm_std)),
        "sphereface-annealed": lambda: f.sphereface(4, None, f.annealing(1)),
    }.get(name)
    x, w, y, _ = problem(2, dtype)
    first, again = (mk.margin_cross_entropy(x, w, y, margin=margin, backend=backend) for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(v, state[k]) for k, v in margin.state_dict().items())
    if formula is not None:
        want = f.cross_entropy(formula()(x.double(), w.double(), y), y)
        assert float(first) == pytest.approx(float(want), rel=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_reductions_and_smoothing_longhand(backend):
    """Each row's loss in plain numbers; mean and sum over the rows that are not ignored, also where all are."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    x, w, y, b = problem(3, dtype)
    y[[0, 5, 6]] = -100
    z = (12 * f.cosines(x.double(), w.double()) + b.double()).tolist()
    for smoothing in (0.0, 0.1, 1.0):
        rows = [0.0 if own < 0 else f.smoothed_loss(z[i], own, smoothing) for i, own in enumerate(y.tolist())]
        kept = sum(own >= 0 for own in y.tolist())
        assert 0 < kept < N
        for reduction, want in (("none", rows), ("sum", sum(rows)), ("mean", sum(rows) / kept)):
            got = mk.margin_cross_entropy(
                x, w, y, margin=mk.NormFace(12.0), bias=b, reduction=reduction, label_smoothing=smoothing, backend=backend
            )
            assert got.tolist() == pytest.approx(want, rel=1e-11 if dtype == torch.float64 else 2e-5)
        for reduction, want in (("none", [0.0] * N), ("sum", 0.0), ("mean", 0.0)):
            options = {"bias": b, "reduction": reduction, "label_smoothing": smoothing, "backend": backend}
            assert mk.margin_cross_entropy(x, w, y * 0 - 100, margin=mk.NormFace(12.0), **options).tolist() == want
            none = mk.margin_cross_entropy(x[:0], w, y[:0], margin=mk.NormFace(12.0), **options).tolist()
            assert none == ([] if reduction == "none" else want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_statistics_longhand(backend, bias):
    """What a head reports, for every margin: with ignored rows, own classes that are the top one and that are not, and without any row."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    x, w, y, b = problem(4, dtype)
    y[[1, 7]] = -100
    b = b if bias else None
    share = set()
    for name, make in testing.HEADS.items():
        margin = make(C)
        _, valid, found = mk.head_losses(x, w, y, margin=margin, bias=b, backend=backend)
        assert torch.equal(valid, y >= 0)
        if name in ("sphereface", "sphereface-annealed", "sphereface-r-soft"):
            scale = x.double().norm(dim=1).tolist()
        else:
            scale = [float(margin.row_scale(mk.BatchInfo(x, y, C)))] * N
        want = f.statistics(x.double(), w.double(), y, b, scale, margin.normalize_embedding, margin.normalize_weight)
        share.add(want["top1"])
        for key, value in want.items():
            assert float(found.pop(key)) == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
        assert 0 <= float(found.pop("beyond_margin")) <= 1
        assert {k: float(v) for k, v in found.items()} == pytest.approx(
            {k: float(v) for k, v in margin.named_buffers() if v.numel() == 1}, rel=1e-6
        ), name
        for rows, labels in ((x[:0], y[:0]), (x, y * 0 - 100)):
            none = mk.head_losses(rows, w, labels, margin=make(C), bias=b, backend=backend)[2]
            assert [float(none[k]) for k in (*want, "beyond_margin")] == [0.0] * 5, name
    assert 0.1 < max(share) < 1


@pytest.mark.parametrize("name", FORMULAS)
def test_the_share_beyond_the_margin_longhand(name):
    """For every formula of a paper: the own logit against that of the nearest other class, as the loss has both; not against the highest,
    which is another where a filter or a transform turns the order around."""
    make, formula = FORMULAS[name]
    x, w, y, _ = problem()
    margin = make()
    want = f.beyond_margin(formula()(x, w, y), x, w, y, margin.normalize_weight)
    for backend in ("reference", "torch"):
        stats = mk.head_losses(x, w, y, margin=make(), backend=backend)[2]
        assert float(stats["beyond_margin"]) == pytest.approx(want), backend


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_the_share_beyond_the_margin_with_biases(backend):
    """One center at a right angle to the other, rows at the first: the bias of the other class and the margin move the line."""
    w = torch.eye(2)
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9])
    x, y = torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(4, dtype=torch.int64)
    for margin, bias, want in ((0.0, 0.0, 3), (0.3, 0.0, 2), (0.3, 4.0, 1), (0.0, 4.0, 2), (0.9, 4.0, 0)):
        given = torch.tensor([0.0, bias]) if bias else None
        stats = mk.head_losses(x, w, y, margin=mk.CosFace(10.0, margin), bias=given, backend=backend)[2]
        assert sum(10 * (a.cos() - margin) > 10 * a.sin() + bias for a in angles) == want
        assert float(stats["beyond_margin"]) == want / 4
        # a margin of the other class's own, on a bias that all classes share: SphereFace2
        binary = mk.SphereFace2(2, 10.0, margin)
        g = lambda a: 2 * ((a + 1) / 2) ** 3 - 1  # noqa: E731
        stats = mk.head_losses(x, w, y, margin=binary, backend=backend)[2]
        want = sum(g(a.cos()) - margin > g(a.sin()) + margin for a in angles)
        assert float(stats["beyond_margin"]) == pytest.approx(float(want) / 4)


@pytest.mark.parametrize("backend", ["reference", *PREPARED])
def test_a_tie_is_not_the_top_class(backend):
    """Two centers alike: the own class is not above the other, whichever comes first. A class of bias -inf is no rival."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    w, y = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1, 2])
    for bias, want in ((None, 1 / 3), (torch.tensor([0.0, -math.inf, 0.0]), 1 / 3), (torch.tensor([0.5, 0.0, 0.0]), 2 / 3)):
        stats = mk.head_losses(x, w, y, margin=mk.CosFace(4.0), bias=bias, backend=backend)[2]
        assert float(stats["top1"]) == pytest.approx(want + (bias is not None and bias[1] == -math.inf) * (1 / 3))


def test_adacos_does_not_overflow():
    margin = mk.AdaCos(C)
    margin.s.fill_(5000.0)
    x, w, y, _ = problem()
    assert math.isfinite(mk.margin_cross_entropy(x.float(), w.float(), y, margin=margin))
    assert math.isfinite(margin.s)


def test_state_stands_still_in_eval():
    x, w, y, _ = problem()
    for name in ("adacos", "curricularface", "sphereface-annealed"):
        margin = testing.HEADS[name](C).eval()
        before = copy.deepcopy(margin.state_dict())
        for backend in ("reference", "torch"):
            mk.margin_cross_entropy(x, w, y, margin=margin, backend=backend)
        assert all(torch.equal(v, margin.state_dict()[k]) for k, v in before.items())
        margin.train()
        mk.margin_cross_entropy(x, w, y, margin=margin)
        assert any(not torch.equal(v, margin.state_dict()[k]) for k, v in before.items())
        margin.half()
        assert all(v.dtype in (torch.float64, torch.int64) for v in margin.state_dict().values())


class Quadratic(mk.Margin):
    def target(self, cos, batch):
        return cos - 0.3 * (1 - cos) ** 2, 1 + 0.6 * (1 - cos)


class PerRow(mk.Margin):
    """A margin per row from norm and identity, with a parameter of its own: what AdaFace, MagFace and per-class margins need."""

    def __init__(self):
        super().__init__(16.0)
        self.strength = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def target(self, cos, batch):
        m = self.strength * batch.norm + 0.01 * (batch.labels % 3)
        return cos - m, torch.ones_like(cos)


@pytest.mark.parametrize("backend", PREPARED)
@pytest.mark.parametrize("own", [Quadratic, PerRow])
def test_own_margin(backend, own):
    case = testing.Case.random(12, 40, 101)
    for gamma in (0.0, 2.0):
        margin = own()
        margin.focal_gamma = gamma
        assert max(testing.errors(case, margin, backend).values()) <= testing.TOLERANCE[torch.float32]


def test_pytorch_metric_learning_agrees():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, w, y, _ = problem()
    x, w, y = x[y >= 0], w, y[y >= 0]
    degrees = math.degrees(0.5)
    pairs = [
        (losses.ArcFaceLoss(C, D, margin=degrees, scale=64), mk.ArcFace(64.0, 0.5), 1.0),
        (losses.CosFaceLoss(C, D, margin=0.35, scale=64), mk.CosFace(64.0, 0.35), 1.0),
        (losses.LargeMarginSoftmaxLoss(C, D, margin=4, scale=1), mk.LSoftmax(4), 1.0),
        (losses.SphereFaceLoss(C, D, margin=4, scale=1), mk.SphereFace(margin=4), 1.0),
        (losses.NormalizedSoftmaxLoss(C, D, temperature=1 / 32), mk.NormFace(32.0), 1.0),
    ]
    for theirs, margin, _ in pairs:
        theirs.W.data = w.T.clone()
        theirs = theirs.double()
        xt = x.clone().requires_grad_()
        theirs(xt, y).backward()
        for backend in ("reference", "torch"):
            xo, wo = x.clone().requires_grad_(), w.clone().requires_grad_()
            loss = mk.margin_cross_entropy(xo, wo, y, margin=margin, backend=backend)
            loss.backward()
            name = f"{type(margin).__name__} {backend}"
            assert float(loss) == pytest.approx(float(theirs(x, y)), rel=1e-6), name
            assert testing.relative_error(xo.grad, xt.grad) < 1e-5, name
            assert testing.relative_error(wo.grad, theirs.W.grad.T) < 1e-5, name
