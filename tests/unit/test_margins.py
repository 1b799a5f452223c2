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
PREPARED = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]


def problem(seed=0, dtype=torch.float64):
    case = testing.Case.random(N, D, C, torch.float64, bias=True, seed=seed)
    return case.x.to(dtype), case.w.to(dtype), case.labels, case.bias.to(dtype)


def stepped(make):
    """A formula whose state advances once from the start, given the problem."""
    return make(*problem()[:3])


FORMULAS = {
    "softmax": (lambda: mk.Softmax(), lambda: f.softmax),
    "w-norm": (lambda: mk.Softmax(normalize_weight=True), lambda: f.w_norm_softmax),
    "normface": (lambda: mk.NormFace(20.0), lambda: f.normface(20.0)),
    "l2": (lambda: mk.L2Softmax(12.0), lambda: f.l2_softmax(12.0)),
    "l2-bound": (lambda: mk.L2Softmax(num_classes=C), lambda: f.l2_softmax(f.l2_bound(C))),
    "l2-bound-from-head": (lambda: mk.L2Softmax(), lambda: f.l2_softmax(f.l2_bound(C))),
    **{f"sphereface-{m}": (lambda m=m: mk.SphereFace(margin=m), lambda m=m: f.sphereface(m)) for m in (1, 2, 3, 4, 5)},
    "sphereface-fnorm": (lambda: mk.SphereFace(margin=4, scale=30.0), lambda: f.sphereface(4, 30.0)),
    "sphereface-annealed": (lambda: mk.SphereFace(annealing=True), lambda: f.sphereface(4, None, f.annealing(1))),
    "sphereface-annealed-own": (
        lambda: mk.SphereFace(annealing=mk.Annealing(base=20.0, gamma=1.0, power=2.0, minimum=0.5)),
        lambda: f.sphereface(4, None, f.annealing(1, 20.0, 1.0, 2.0, 0.5)),
    ),
    "cosface": (lambda: mk.CosFace(), lambda: f.cosface(64.0, 0.35)),
    **{
        f"arcface-{b}-{m}": (lambda b=b, m=m: mk.ArcFace(20.0, m, beyond_pi=b), lambda b=b, m=m: f.arcface(20.0, m, b))
        for b in ("linear", "none", "easy", "continuous", "clip")
        for m in (0.0, 0.5, 1.7)
    },
    "arcface-detached": (lambda: mk.ArcFace(20.0, gradient="detached"), lambda: f.arcface(20.0, 0.5, detached=True)),
    "arcface-detached-easy": (
        lambda: mk.ArcFace(20.0, 1.2, "easy", "detached"),
        lambda: f.arcface(20.0, 1.2, "easy", detached=True),
    ),
    "combined-arc": (lambda: mk.CombinedMargin(30.0, 1.0, 0.5, 0.0), lambda: f.arcface(30.0, 0.5)),
    "combined-cos": (lambda: mk.CombinedMargin(30.0, 1.0, 0.0, 0.35), lambda: f.cosface(30.0, 0.35)),
    "combined-m1": (lambda: mk.CombinedMargin(30.0, 1.35, 0.0, 0.0), lambda: f.combined(30.0, 1.35, 0.0, 0.0)),
    "combined-all": (lambda: mk.CombinedMargin(30.0, 1.1, 0.3, 0.2), lambda: f.combined(30.0, 1.1, 0.3, 0.2)),
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
}
OPTIONS = [{}, {"bias": True}, {"smoothing": 0.1}, {"gamma": 2.0}, {"bias": True, "smoothing": 0.2, "gamma": 0.7}]


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
    for reduction in ("mean", "sum", "none"):
        for options in OPTIONS:
            want = run_formula(formula(), reduction, **options)
            got = run_package(make(), backend, reduction, **options)
            for g, v in zip(got, want, strict=True):
                assert (g - v).norm() <= 1e-9 * v.norm(), (reduction, options, testing.relative_error(g, v))


def test_problem_reaches_every_branch():
    """The problem above has angles on both sides of pi - m, and hard and easy non-target classes; else the test proves little."""
    x, w, y, _ = problem()
    kept = y >= 0
    c = f.cosines(x, w)
    theta = torch.acos(c[kept].gather(1, y[kept, None]))
    assert (theta + 1.7 > math.pi).any()
    assert (theta + 1.7 < math.pi).any()
    hard = c[kept] > torch.cos(theta + 0.5)
    assert hard.any()
    assert not hard.all()
    assert {int(t * 5 / math.pi) for t in theta} >= {0, 1, 2}


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
    x, w, b = x[:4].clone().requires_grad_(), w[:7].clone().requires_grad_(), b[:7].clone().requires_grad_()
    y = torch.tensor([0, 3, 3, -100])
    for name, make in testing.HEADS.items():
        if name == "arcface-detached":  # its gradient is not its derivative: that is what it is
            continue
        margin = make(7).eval()
        assert gradcheck(
            lambda x, w, b, margin=margin: mk.margin_cross_entropy(
                x, w, y, margin=margin, bias=b, reduction="none", label_smoothing=0.1, backend="reference"
            ),
            (x, w, b),
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


def test_adacos_follows_the_paper_for_steps():
    margin, s = mk.AdaCos(C), f.adacos_fixed(C)
    for seed in range(5):
        x, w, y, _ = problem(seed)
        s = f.adacos_step(s, x, w, y)
        mk.margin_cross_entropy(x, w, y, margin=margin)
        assert float(margin.s) == pytest.approx(s, rel=1e-12)


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
