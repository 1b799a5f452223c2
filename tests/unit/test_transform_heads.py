"""Heads whose margin is on the other classes too: the filter, Circle, SphereFace-R. At the ends of the cosine, for long and short
embeddings, in each dtype, and in plain numbers."""

import math

import pytest
import torch
from helpers import formulas as f
from torch.nn.functional import cross_entropy, normalize

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
QUICK = [name for name in BACKENDS if name != "triton"]
MADE = {
    "filtered": lambda: mk.ArcFace(filter_above=0.0),
    "circle": lambda: mk.Circle(),
    "v0": lambda: mk.SphereFaceR("v0", gradient="exact"),
    "v1": lambda: mk.SphereFaceR("v1", gradient="exact", loss_weight=50.0),
    "v2": lambda: mk.SphereFaceR("v2", 60.0, 1.4),
    "v2-exact": lambda: mk.SphereFaceR("v2", 60.0, 1.4, gradient="exact"),
    "v2-none": lambda: mk.SphereFaceR("v2", margin=3.0, normalization="none", gradient="exact"),
    "v0-soft": lambda: mk.SphereFaceR("v0", 20.0, 1.4, "soft"),
}


@pytest.mark.parametrize("head", MADE)
@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends_of_the_cosine(head, backend, dtype):
    """Rows on their own center, opposite of it, on another center and opposite of another; two classes, one row; norms from 1e-3 to 200."""
    w = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    w = torch.cat([w, -w[:1]])
    for classes in (len(w), 2):
        w = w[-classes:]
        for own, at, sign, norm in (
            (0, 0, 1, 1e-3),
            (0, 0, -1, 200.0),
            (0, 1, 1, 30.0),
            (0, 1, -1, 1.0),
            (1, 0, 1, 200.0),
            (1, 0, -1, 1e-3),
        ):
            norm = max(norm, 0.1) if dtype == torch.float16 else norm  # the gradient of a shorter row is past float16's end
            case = testing.Case((sign * norm * w[at : at + 1]).to(dtype), w.to(dtype), torch.tensor([own]), None)
            for name, v in testing.run(case, MADE[head](), backend).items():
                assert torch.isfinite(v).all(), (name, classes, own, at, sign)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("scale", [40.0, 86.0, 256.0])
def test_circle_at_the_papers_scale(backend, scale):
    """Logits reach scale (1 + m) (1 - m), and the target -scale (2 + m) (2 - m): exponentials stay finite, without and with a running
    maximum."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    case = testing.Case.random(14, 24, 90, torch.float64, seed=2, ignored=False)
    x, w, y = case.x.clone(), case.w.clone(), case.labels
    x[0], x[1] = 3 * w[(y[0] + 1) % 90], -w[y[1]]
    x, w = (v.to(dtype).double().requires_grad_() for v in (x, w))
    want = cross_entropy(f.circle(scale, 0.25)(x, w, y), y, reduction="sum")
    want = [want.detach(), *torch.autograd.grad(want, (x, w))]
    got = testing.run(testing.Case(x.detach().to(dtype), w.detach().to(dtype), y, None), mk.Circle(scale), backend, reduction="sum")
    for g, v in zip(got.values(), want, strict=True):
        assert testing.relative_error(g, v) <= (1e-9 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("backend", QUICK)
def test_a_filtered_class_has_no_gradient_and_counts_as_zero(backend):
    """A class above the threshold adds exp(0) to the sum. The row's own class is never filtered, however near."""
    w = torch.eye(4)
    x = torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0]])
    for margin in (mk.CosFace(8.0, 0.1, filter_above=0.7), mk.CombinedMargin(8.0, 1.0, 0.0, 0.1, filter_above=0.7)):
        got = testing.run(testing.Case(x, w, torch.tensor([1, 0]), None), margin, backend, reduction="none")
        first = math.log(math.exp(4.0) + 3) - 4.0  # the class at 0.8 counts as 0, as the two at 0 do
        second = math.log(math.exp(5.6) + math.exp(4.8) + 2) - 5.6
        assert got["loss"].tolist() == pytest.approx([first, second], rel=1e-5)
        alone = testing.run(testing.Case(x[:1], w, torch.tensor([1]), None), margin, backend)
        assert alone["dw"][0].abs().max() == 0
        assert alone["dw"][1].abs().max() > 0.01
    assert mk.CosFace(filter_above=0.7).non_target is mk.NonTarget.FILTERED
    assert mk.CosFace().non_target is mk.NonTarget.IDENTITY


@pytest.mark.parametrize("backend", QUICK)
def test_weight_of_the_loss_and_the_term_of_the_norm(backend):
    """The term is not weighted, and comes after focal factor and smoothing."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    case = testing.Case.random(14, 24, 40, dtype, seed=2)
    norms = torch.logspace(-3, math.log10(200), 14, dtype=torch.float64)[:, None]
    x = (normalize(case.x.double()) * norms).to(dtype)
    for kind, weight, factor in (("hard", 50.0, 2.5), ("none", 50.0, 50.0), ("soft", 50.0, 2.5), ("soft", None, 1.0)):
        for smoothing, gamma in ((0.0, 0.0), (0.1, 1.5)):
            leaves = [v.double().requires_grad_() for v in (x, case.w)]
            logits = f.sphereface_r("v2", 1.4, 20.0 if kind == "hard" else None, exact=True)(*leaves, case.labels)
            want = factor * f.cross_entropy(logits, case.labels, reduction="none", smoothing=smoothing, gamma=gamma)
            if kind == "soft":
                want = want + torch.where(case.labels >= 0, 0.3 * (leaves[0].norm(dim=1) - 20.0).abs(), 0)
            margin = mk.SphereFaceR("v2", 20.0, 1.4, kind, weight, 0.3, "exact", focal_gamma=gamma)
            given = testing.Case(x, case.w, case.labels, None)
            got = testing.run(given, margin, backend, reduction="none", label_smoothing=smoothing)
            for g, v in zip(got.values(), (want.detach(), *torch.autograd.grad(want.sum(), leaves)), strict=True):
                assert testing.relative_error(g, v) <= (1e-9 if dtype == torch.float64 else 2e-4)


def test_arguments():
    for make, name in (
        (lambda: mk.Circle(margin=1.1), "margin"),
        (lambda: mk.Circle(scale=0.0), "scale"),
        (lambda: mk.CosFace(filter_above=1.5), "filter_above"),
        (lambda: mk.SphereFaceR("v3"), "version"),
        (lambda: mk.SphereFaceR(margin=0.9), "margin"),
        (lambda: mk.SphereFaceR(normalization="off"), "normalization"),
        (lambda: mk.SphereFaceR(loss_weight=0.0), "loss_weight"),
        (lambda: mk.SphereFaceR(t=-1.0), "t"),
        (lambda: mk.SphereFaceR(gradient="none"), "gradient"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            make()
    with pytest.raises(TypeError, match="filter_above: expected a number"):
        mk.ArcFace(filter_above="0.4")
    assert repr(mk.ArcFace(filter_above=0.4)).endswith("gradient='exact', filter_above=0.4)")
    assert "filter" not in repr(mk.ArcFace()) + repr(mk.CosFace()) + repr(mk.CombinedMargin())
    assert "filter_above=0.4" in repr(mk.CombinedMargin(filter_above=0.4))
    shown = repr(mk.SphereFaceR("v2", loss_weight=50.0, t=0.5))
    assert shown == "SphereFaceR(version='v2', scale=30.0, margin=1.5, normalization='hard', loss_weight=50.0, t=0.5, gradient='detached')"
