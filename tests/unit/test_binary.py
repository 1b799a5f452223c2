"""The heads that are a binary classifier for each class, SphereFace2 and UniFace: against formulas written from the papers, at the ends of
the cosine, with logits of any size; where their bias starts, and what they refuse."""

import copy
import itertools
import math

import pytest
import torch
from helpers import formulas as f
from torch.nn.functional import normalize

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
QUICK = [name for name in BACKENDS if name != "triton"]
WIDE = ("reference", "torch")


def without_bias(case, name):
    """The case without biases of its classes where the head refuses them."""
    return testing.Case(case.x, case.w, case.labels, None if name == "uniface-clamped" else case.bias)


MADE = {
    **{
        f"sphereface2-{kind}-{gradient}": (
            lambda c, kind=kind, m=m, gradient=gradient: mk.SphereFace2(c, 30.0, m, 2.5, 0.6, 20.0, kind, gradient),
            f.sphereface2(30.0, m, 2.5, 0.6, 20.0, kind, gradient == "exact"),
        )
        for kind, m in (("C", 0.3), ("A", 0.4), ("M", 1.6))
        for gradient in ("detached", "exact")
    },
    "sphereface2": (lambda c: mk.SphereFace2(c), f.sphereface2(40.0, 0.4, 3.0, 0.7, 50.0, "C")),
    "uniface": (lambda c: mk.UniFace(c), f.uniface(64.0, 0.4)),
    "uniface-own": (lambda c: mk.UniFace(c, 20.0, 0.2, 0.3), f.uniface(20.0, 0.2, 0.3)),
    "uniface-clamped": (lambda c: mk.UniFace(c, 6.0, 0.3, 0.5, clamp=True), f.uniface(6.0, 0.3, 0.5, True)),
}
#: N, D, C: one row, one class, two classes, one chunk of classes and a bit, ragged in each.
SHAPES = [(1, 5, 9), (6, 4, 1), (7, 9, 2), (5, 7, 131), (24, 13, 37)]


def problem(shape, dtype, seed=0):
    """Rows at all angles to their own centers, past pi - m too, of norms from 1e-3 to 200; one is ignored. In float64, rounded to
    ``dtype``, away from cosines of +-1, where acos has no derivative."""
    n, d, c = shape
    g = torch.Generator().manual_seed(seed)
    case = testing.Case.random(n, d, c, torch.float64, bias=True, seed=seed)
    unit = normalize(case.w[case.labels.clamp_min(0)])
    side = torch.randn(unit.shape, generator=g, dtype=torch.float64)
    side = normalize(side - (side * unit).sum(1, keepdim=True) * unit)
    theta = torch.linspace(0.1, math.pi - 0.1, n, dtype=torch.float64)[:, None]
    norm = torch.logspace(-3, math.log10(200), n, dtype=torch.float64)[torch.randperm(n, generator=g), None]
    x = norm * (theta.cos() * unit + theta.sin() * side)
    return testing.Case(x.to(dtype), case.w.to(dtype), case.labels, case.bias.to(dtype))


def of_formula(case, margin, rows, reduction, bias):
    """Loss and gradients in float64, under the names of :func:`testing.run`."""
    leaves = {"dx": case.x, "dw": case.w} | ({"dbias": case.bias} if bias else {}) | {"db": margin.b.detach()}
    leaves = {name: v.double().requires_grad_() for name, v in leaves.items()}
    losses = rows(leaves["dx"], leaves["dw"], case.labels, leaves["db"], leaves.get("dbias", 0))
    if reduction == "none":
        weight = weights(case)
    else:
        weight = 1 / max(int((case.labels >= 0).sum()), 1) if reduction == "mean" else 1.0
    found = torch.autograd.grad((losses * weight).sum(), list(leaves.values()), allow_unused=True)
    found = [torch.zeros_like(v) if one is None else one for one, v in zip(found, leaves.values(), strict=True)]
    loss = losses.detach() if reduction == "none" else (losses.detach() * weight).sum()
    return {"loss": loss} | dict(zip(leaves, found, strict=True))


def weights(case):
    return torch.linspace(-1, 2, len(case.labels), dtype=torch.float64)


@pytest.mark.parametrize("head", MADE)
@pytest.mark.parametrize("backend", QUICK)
def test_agrees_with_the_papers(backend, head):
    """Loss and gradients of x, w, b and the classes' own biases."""
    make, rows = MADE[head]
    dtypes = (torch.float64,) if backend in WIDE else (torch.float32, torch.bfloat16)
    for dtype, shape in itertools.product(dtypes, SHAPES):
        for reduction, bias in (("none", False), ("mean", True), ("sum", False)):
            bias = bias and head != "uniface-clamped"
            case, margin = problem(shape, dtype), make(shape[2])
            margin = margin.double() if dtype == torch.float64 else margin
            want = of_formula(case, margin, rows, reduction, bias)
            upstream = weights(case) if reduction == "none" else None
            given = case if bias else testing.Case(case.x, case.w, case.labels, None)
            got = testing.run(given, margin, backend, reduction=reduction, upstream=upstream)
            for name, v in want.items():
                error = testing.relative_error(got[name], v)
                if error > testing.TOLERANCE[dtype]:
                    # One number in which rows and classes nearly cancel: eager float32 is off as well.
                    assert (name, dtype == torch.float64) == ("db", False), (dtype, shape, reduction, name, error)
                    eager = testing.run(given, margin, "reference", reduction=reduction, upstream=upstream)
                    assert error <= 2 * testing.relative_error(eager[name], v), (dtype, shape, reduction, error)


def test_problem_reaches_every_branch():
    """Angles on both sides of pi - m and of pi / m, exponents on both sides of the clamp, for the own class and for the others."""
    case = problem(SHAPES[-1], torch.float64)
    c, kept = f.cosines(case.x, case.w), case.labels >= 0
    own = c.gather(1, case.labels.clamp_min(0)[:, None])[kept]
    for m in (math.pi - 0.4, math.pi / 1.6):
        assert (own.acos() > m).any()
        assert (own.acos() < m).any()
    b = math.log(10 * SHAPES[-1][2])
    for z in (6.0 * (own - 0.3) - b, 6.0 * c - b):
        assert (z < -6).any()
        assert (z > -6).any()


@pytest.mark.parametrize("head", MADE)
@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends_of_the_cosine(backend, head, dtype):
    """Rows on their own center, opposite of it, on another center and opposite of another; norms from 1e-3 to 200; also a zero row and a
    zero center. Nothing is ever NaN."""
    w = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    w = torch.cat([w, -w[:1], torch.zeros(1, 8)])
    for own, at, sign, norm in ((0, 0, 1, 1e-3), (0, 0, -1, 200.0), (0, 1, 1, 30.0), (0, 1, -1, 1.0), (1, 0, 1, 200.0), (7, 0, 1, 0.0)):
        norm = max(norm, 0.1) if dtype == torch.float16 and norm else norm  # the gradient of a shorter row is past float16's end
        case = testing.Case((sign * norm * w[at : at + 1]).to(dtype), w.to(dtype), torch.tensor([own]), None)
        for name, v in testing.run(case, MADE[head][0](8), backend).items():
            assert torch.isfinite(v).all(), (name, own, at, sign)


@pytest.mark.parametrize("backend", QUICK)
def test_logits_of_any_size(backend):
    """Where exp would overflow, each term is max(z, 0), and where it vanishes next to nothing, but not 0 all together."""
    dtype = torch.float64 if backend in WIDE else torch.float32
    case = testing.Case.random(9, 16, 60, dtype, seed=4)
    for scale in (1e-3, 300.0, 1e4):
        for b in (0.0, 80.0, -80.0):
            margin = mk.UniFace(60, scale, 0.2)
            torch.nn.init.constant_(margin.b, b)
            margin = margin.double() if dtype == torch.float64 else margin
            want = of_formula(case, margin, f.uniface(scale, 0.2), "sum", False)
            got = testing.run(case, margin, backend, reduction="sum")
            for name, v in want.items():
                # An exponential is as wrong, relatively, as its exponent absolutely.
                tolerance = testing.TOLERANCE[dtype] + scale * torch.finfo(dtype).eps
                assert float((got[name].double() - v).norm()) <= tolerance * max(float(v.norm()), 1e-30), (scale, b, name)
    for dtype in (torch.float16, torch.bfloat16):
        for margin in (mk.UniFace(60, 1e4), mk.SphereFace2(60, 1e4)):
            got = testing.run(testing.Case(case.x.to(dtype), case.w.to(dtype), case.labels, None), margin, backend)
            assert all(v.isfinite().all() for v in got.values())


@pytest.mark.parametrize("backend", QUICK)
def test_saved_weights(backend):
    """What the row pass leaves to the class pass changes nothing but the rounding; ``cpu`` and ``triton`` leave something."""
    dtype = torch.float64 if backend in WIDE else torch.float32
    case = testing.Case.random(40, 24, 700, dtype, seed=5, bias=True)
    for head, (make, _) in MADE.items():
        given = without_bias(case, head)
        want, *found = (testing.run(given, make(700), backend, workspace_mb=mb) for mb in (0.0, 0.06, math.inf))
        for got in found:
            for name, v in want.items():
                assert testing.relative_error(got[name], v) <= (1e-12 if dtype == torch.float64 else 1e-5), (head, name)


def test_ignored_rows_and_none_at_all():
    everything = problem((24, 13, 37), torch.float32)
    for backend in QUICK:
        for head, (make, _) in MADE.items():
            case = without_bias(everything, head)
            broken = case.x.clone()
            broken[case.labels < 0] = math.nan
            want = testing.run(case, make(37), backend)
            got = testing.run(testing.Case(broken, case.w, case.labels, case.bias), make(37), backend)
            assert all(testing.relative_error(got[name], v) <= 1e-6 for name, v in want.items())
            for x, y in ((case.x[:0], case.labels[:0]), (case.x, torch.full_like(case.labels, -100))):
                none = testing.run(testing.Case(x, case.w, y, case.bias), make(37), backend)
                assert not any(v.any() for v in none.values())


def test_a_bias_of_minus_infinity_masks_a_class():
    case = problem((24, 13, 37), torch.float32)
    labels = case.labels.clamp_max(30)
    bias = case.bias.clone()
    bias[31:] = -math.inf
    for backend in QUICK:
        for make in [make for head, (make, _) in MADE.items() if head != "uniface-clamped"]:
            margin = make(37)
            got = testing.run(testing.Case(case.x, case.w, labels, bias), margin, backend)
            other = make(31)
            torch.nn.init.constant_(other.b, margin.b.item())
            want = testing.run(testing.Case(case.x, case.w[:31], labels, bias[:31]), other, "reference", dtype=torch.float64)
            for name, v in want.items():
                if got[name].shape != v.shape:
                    assert not got[name][31:].any()
                    got[name] = got[name][:31]
                assert testing.relative_error(got[name], v) <= 1e-4, (backend, name)


@pytest.mark.parametrize(("kind", "margin"), [("C", 0.4), ("C", 0.0), ("A", 0.5), ("A", 2.0), ("M", 1.0), ("M", 1.7), ("M", 3.0)])
def test_where_the_bias_of_sphereface2_starts(kind, margin):
    """Where the derivative of the loss in b is 0 if all cosines are 0: found by halving."""
    for classes in (2, 3, 10, 1000, 10_000_000):
        for balance in (0.3, 0.7, 0.99):
            low, high = -200.0, 200.0
            for _ in range(80):
                middle = (low + high) / 2
                falls = f.sphereface2_pull(middle, classes, 40.0, margin, 3.0, balance, kind) < 0
                low, high = (middle, high) if falls else (low, middle)
            head = mk.SphereFace2(classes, 40.0, margin, balance=balance, kind=kind)
            assert head.b.item() == pytest.approx(middle, rel=1e-6, abs=1e-6)
            assert head.start() == pytest.approx(middle, rel=1e-9, abs=1e-9)
    assert torch.isfinite(mk.SphereFace2(1).b)


def test_where_the_bias_of_uniface_starts():
    for classes in (1, 2, 1000, 10_000_000):
        assert mk.UniFace(classes).b.item() == pytest.approx(math.log(10 * classes))


@pytest.mark.parametrize("make", [lambda: mk.SphereFace2(50), lambda: mk.UniFace(50)])
def test_the_bias_is_a_parameter_like_any(make):
    head = mk.MarginHead(8, 50, make())
    assert [name for name, _ in head.named_parameters()] == ["weight", "margin.b"]
    assert head.margin.b.shape == ()
    assert head.margin.b.dtype == torch.float32
    start = head.margin.b.item()
    loss = head(torch.randn(6, 8), torch.arange(6))
    loss.backward()
    torch.optim.SGD(head.parameters(), 0.1).step()
    assert head.margin.b.item() != start
    other = mk.MarginHead(8, 50, make())
    other.load_state_dict(head.state_dict())
    assert other.margin.b.item() == head.margin.b.item()
    assert copy.deepcopy(head).margin.b.item() == head.margin.b.item()
    head.margin.reset_parameters()
    assert head.margin.b.item() == start
    empty = mk.MarginHead(8, 50, make(), device="meta").to_empty(device="cpu")
    empty.margin.reset_parameters()
    assert empty.margin.b.item() == start
    with pytest.raises(RuntimeError, match=r"margin\.b"):
        head.load_state_dict(mk.MarginHead(8, 50, mk.ArcFace()).state_dict())
    with pytest.raises(ValueError, match=r"^num_classes: expected 51 in .* got 50"):
        mk.MarginHead(8, 51, make())


@pytest.mark.parametrize("make", [lambda: mk.SphereFace2(50), lambda: mk.UniFace(50)])
def test_what_they_refuse(make):
    x, w, y = torch.randn(6, 8), torch.randn(50, 8), torch.arange(6)
    for backend in QUICK:
        for name, value in (("label_smoothing", 0.1), ("class_weight", torch.ones(50)), ("mix", (y, 0.5))):
            with pytest.raises(ValueError, match=rf"^{name}: expected .* with {type(make()).__name__}, which is a binary classifier"):
                mk.margin_cross_entropy(x, w, y, margin=make(), backend=backend, **{name: value})
    for name, value in (("label_smoothing", 0.1), ("class_weight", torch.ones(50))):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* which is a binary classifier"):
            mk.MarginHead(8, 50, make(), **{name: value})
    with pytest.raises(ValueError, match=r"^log_q: expected False .* which is a binary classifier"):
        mk.MarginHead(8, 50, make(), sample_rate=0.5, log_q=True)
    focal = make()
    focal.focal_gamma = 1.0
    with pytest.raises(ValueError, match=r"^focal_gamma: expected 0 .* which is a binary classifier"):
        mk.MarginHead(8, 50, focal)
    clamped = mk.UniFace(50, clamp=True)
    with pytest.raises(ValueError, match=r"^bias: expected none with UniFace\(clamp=True\)"):
        mk.margin_cross_entropy(x, w, y, margin=clamped, bias=torch.zeros(50))
    with pytest.raises(ValueError, match=r"^bias: expected none with UniFace\(clamp=True\)"):
        mk.MarginHead(8, 50, clamped, bias=True)


def test_arguments():
    for make, name in (
        (lambda: mk.SphereFace2(0), "num_classes"),
        (lambda: mk.SphereFace2(9, scale=0.0), "scale"),
        (lambda: mk.SphereFace2(9, margin=2.1), "margin"),
        (lambda: mk.SphereFace2(9, margin=3.2, kind="A"), "margin"),
        (lambda: mk.SphereFace2(9, margin=0.0, kind="M"), "margin"),
        (lambda: mk.SphereFace2(9, t=0.9), "t"),
        (lambda: mk.SphereFace2(9, balance=1.0), "balance"),
        (lambda: mk.SphereFace2(9, balance=0.0), "balance"),
        (lambda: mk.SphereFace2(9, loss_weight=0.0), "loss_weight"),
        (lambda: mk.SphereFace2(9, kind="B"), "kind"),
        (lambda: mk.SphereFace2(9, gradient="none"), "gradient"),
        (lambda: mk.UniFace(0), "num_classes"),
        (lambda: mk.UniFace(9, margin=-0.1), "margin"),
        (lambda: mk.UniFace(9, negative_weight=0.0), "negative_weight"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            make()
    shown = "num_classes=9, scale=40.0, margin=0.4, t=3.0, balance=0.7, loss_weight=50.0, kind='C', gradient='detached'"
    assert repr(mk.SphereFace2(9)) == f"SphereFace2({shown})"
    assert repr(mk.UniFace(9)) == "UniFace(num_classes=9, scale=64.0, margin=0.4, negative_weight=1.0, clamp=False)"


@pytest.mark.parametrize("backend", QUICK)
def test_a_margin_that_is_set(backend):
    """It is that of a head made with it, but for b, which stays."""
    case = testing.Case.random(9, 16, 60, torch.float32, seed=6)
    for make, other in (
        (lambda m: mk.SphereFace2(60, 30.0, m), 0.1),
        (lambda m: mk.SphereFace2(60, 30.0, m, kind="A", gradient="exact"), 0.7),
        (lambda m: mk.SphereFace2(60, 30.0, 1 + m, kind="M"), 0.7),
        (lambda m: mk.UniFace(60, 30.0, m), 0.1),
    ):
        made, changed = make(other), make(0.4)
        changed.set_margin(made.margin)
        torch.nn.init.constant_(made.b, changed.b.item())
        want, got, before = (testing.run(case, margin, backend) for margin in (made, changed, make(0.4)))
        assert all(torch.equal(got[name], v) for name, v in want.items())
        assert float(got["loss"]) != float(before["loss"])
    with pytest.raises(ValueError, match=r"^margin: expected"):
        mk.UniFace(60).set_margin(3.0)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("make", [lambda: mk.SphereFace2(300), lambda: mk.UniFace(300)])
def test_sampled_classes(backend, make):
    """The classes that take part, as if there were no others."""
    if backend == "reference":
        pytest.skip("it does not sample")
    head = mk.MarginHead(8, 300, make(), sample_rate=0.2, sparse_grad=False, bias=True, backend=backend)
    torch.nn.init.normal_(head.weight)
    x, y = torch.randn(12, 8, requires_grad=True), torch.arange(12)
    loss = head(x, y)
    loss.backward()
    index = head.sampler.index
    assert len(index) == 60
    margin = make()
    margin.num_classes = 60
    labels = torch.stack([(index == label).nonzero()[0, 0] for label in y])
    drawn = testing.Case(x.detach(), head.weight.detach()[index], labels, head.bias.detach()[index])
    want = testing.run(drawn, margin, "reference", dtype=torch.float64)
    assert loss.item() == pytest.approx(float(want["loss"]), rel=1e-5)
    for got, v in ((x.grad, want["dx"]), (head.weight.grad[index], want["dw"]), (head.margin.b.grad, want["db"])):
        assert testing.relative_error(got, v) <= 1e-4
    assert float(head.weight.grad.abs().sum()) == pytest.approx(float(head.weight.grad[index].abs().sum()))


@pytest.mark.parametrize("make", [lambda: mk.SphereFace2(40), lambda: mk.UniFace(40), lambda: mk.UniFace(40, 8.0, clamp=True)])
def test_autocast_and_compile(make):
    x, y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    head = mk.MarginHead(8, 40, make(), backend="torch")
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))

    def step(head, x):
        head.zero_grad()
        loss = head(x, y)
        loss.backward()
        return [loss.detach(), head.weight.grad.clone(), head.margin.b.grad.clone()]

    with torch.autocast("cpu", torch.bfloat16):
        got = step(head, x)
    want = step(head, x.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    want = step(head, x)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled, x), want, strict=True):
        torch.testing.assert_close(a, b)
    head.margin.set_margin(0.1)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = step(compiled, x)
    for a, b in zip(got, step(head, x), strict=True):
        torch.testing.assert_close(a, b)
    assert float(got[0]) != float(want[0])
