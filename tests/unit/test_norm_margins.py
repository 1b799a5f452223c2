"""Margins that follow the norm of the embedding: against the formulas for norms from 1e-3 to 200, over several steps."""

import math

import pytest
import torch
from helpers import formulas as f

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

N, D, C = 18, 9, 23
BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
QUICK = [name for name in BACKENDS if name != "triton"]


def problem(seed, dtype=torch.float64):
    """Rows at target angles from 0.05 to pi - 0.05, whose norms from 1e-3 to 200 have nothing to do with their angle."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(C, D, generator=g, dtype=torch.float64)
    y = torch.randint(C, (N,), generator=g)
    unit = torch.nn.functional.normalize(w[y])
    side = torch.randn(N, D, generator=g, dtype=torch.float64)
    side = torch.nn.functional.normalize(side - (side * unit).sum(1, keepdim=True) * unit)
    theta = torch.linspace(0.05, math.pi - 0.05, N, dtype=torch.float64)[torch.randperm(N, generator=g), None]
    norm = torch.logspace(-3, math.log10(200), N, dtype=torch.float64)[torch.randperm(N, generator=g), None]
    return (norm * (theta.cos() * unit + theta.sin() * side)).to(dtype), w.to(dtype), y


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def close(got, want, dtype):
    """Loss and both gradients, of which each row counts for itself: the norms are unlike."""
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for g, v in zip(got, want, strict=True):
        g, v = (u.double() if u.ndim else u.double().reshape(1, 1) for u in (g, v))
        off, size = (g - v).norm(dim=1), v.norm(dim=1)
        assert (off <= tolerance * (size + 1e-3 * size.max())).all(), (off / size).max()


def dtype_of(backend):
    return torch.float64 if backend in ("reference", "torch") else torch.float32


@pytest.mark.parametrize("backend", QUICK)
def test_adaface_for_steps(backend):
    """Statistics, losses and gradients, with ignored rows: of many rows, of one, of none, and in eval mode; the quality at both ends."""
    dtype, margin, state, qualities = dtype_of(backend), mk.AdaFace(16.0, 0.5, h=4.0, momentum=0.6), (20.0, 100.0), []
    assert [float(v) for v in margin.state_dict().values()] == list(state)
    assert list(margin.state_dict()) == ["norm_mean", "norm_std"]
    for step, kept in enumerate((N, N - 5, 1, 0, N, 2, N)):
        x, w, y = problem(step, dtype)
        y[kept:] = -100
        wide = x.double().requires_grad_(), w.double().requires_grad_()
        if step != 4:
            state = f.adaface_step(*state, wide[0], y, 0.6)
        qualities += [f.adaface_quality(v, *state, 4.0) for v in wide[0].norm(dim=1)[:kept].tolist()]
        want = gradients(f.cross_entropy(f.adaface(16.0, 0.5, *state, h=4.0)(*wide, y), y), *wide)
        leaves = x.requires_grad_(), w.requires_grad_()
        loss = mk.margin_cross_entropy(*leaves, y, margin=margin.train(step != 4), backend=backend)
        if kept:
            close(gradients(loss, *leaves), want, dtype)
        assert [float(v) for v in margin.state_dict().values()] == pytest.approx(state, rel=1e-9 if dtype == torch.float64 else 1e-6)
    assert min(qualities) == -1
    assert max(qualities) == 1
    assert any(-0.5 < q < 0.5 for q in qualities)


def test_adaface_at_every_angle():
    """Value and slope for qualities from -1 to 1, where theta + g leaves [0, pi] as well, and at cos = 1 and -1."""
    theta = torch.cat([torch.tensor([0.0, math.pi], dtype=torch.float64), torch.linspace(0.004, math.pi - 0.004, 400, dtype=torch.float64)])
    ends = 0
    for m, norm in ((m, norm) for m in (0.0, 0.4, 1.9) for norm in (1e-3, 10.0, 20.0, 25.0, 40.0, 150.0)):
        margin = mk.AdaFace(64.0, m, h=10.0).eval()
        q = f.adaface_quality(norm, 20.0, 100.0, 10.0)
        rows = torch.full((len(theta), 1), norm, dtype=torch.float64)
        value, slope = margin.target(theta.cos(), mk.BatchInfo(rows, torch.zeros(len(theta), dtype=torch.int64), C))
        turned = theta - m * q
        inside = (turned > 0) & (turned < math.pi)
        want = turned.clamp(0, math.pi).cos() - m * (q + 1)
        torch.testing.assert_close(value[2:], want[2:], rtol=0, atol=1e-12)
        torch.testing.assert_close(value[:2], want[:2], rtol=0, atol=1e-7)  # the sine has a floor
        steep = torch.where(inside, turned.sin() / theta.sin(), 0.0)
        torch.testing.assert_close(slope[2:], steep[2:], rtol=1e-9, atol=1e-9)
        assert slope.isfinite().all()
        ends += int((~inside).sum())
    assert ends > 500


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["adaface"])
def test_a_repeated_pass_does_not_advance_the_state(name, reentrant):
    x, _, y = problem(0, torch.float32)
    torch.manual_seed(0)
    plain, again = (mk.MarginHead(D, C, testing.HEADS[name](C)) for _ in range(2))
    again.load_state_dict(plain.state_dict())
    for _ in range(2):
        found = []
        for head, call in ((plain, plain), (again, lambda *a: torch.utils.checkpoint.checkpoint(again, *a, use_reentrant=reentrant))):
            head.zero_grad()
            leaf = x.clone().requires_grad_()
            call(leaf, y).backward()
            found.append([leaf.grad, head.weight.grad, *head.margin.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_state_is_as_before_where_a_step_raises(monkeypatch):
    x, w, y = problem(0, torch.float32)
    margin = mk.AdaFace(momentum=0.5)
    before = {k: v.clone() for k, v in margin.state_dict().items()}
    monkeypatch.setattr(mk.AdaFace, "target", lambda self, cos, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mk.margin_cross_entropy(x, w, y, margin=margin)
    assert all(torch.equal(v, before[k]) for k, v in margin.state_dict().items())


NORMS, MARGINS = (0.5, 60.0), (0.3, 1.1)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "focal": 2.0}])
def test_magface_differentiates_the_norm(backend, options):
    """Losses and gradients, also of rows past pi and on either side of ``norm_range``; the term comes after focal factor and smoothing."""
    dtype, focal, smoothing = dtype_of(backend), options.get("focal", 0.0), options.get("label_smoothing", 0.0)
    for seed, beyond in enumerate(("easy", "linear", "none", "continuous", "clip")):
        x, w, y = problem(seed, dtype)
        y[[2, 5]] = -100
        upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
        wide = x.double().requires_grad_(), w.double().requires_grad_()
        rows = f.cross_entropy(f.magface(16.0, NORMS, MARGINS, beyond)(*wide, y), y, reduction="none", gamma=focal, smoothing=smoothing)
        rows = rows + torch.where(y >= 0, f.magface_term(wide[0], NORMS, 7.0), 0)
        leaves = x.requires_grad_(), w.requires_grad_()
        margin = mk.MagFace(16.0, NORMS, MARGINS, 7.0, beyond, focal_gamma=focal)
        got = mk.margin_cross_entropy(*leaves, y, margin=margin, reduction="none", label_smoothing=smoothing, backend=backend)
        assert got[2] == got[5] == 0
        assert got.double().tolist() == pytest.approx(rows.tolist(), rel=1e-9 if dtype == torch.float64 else 1e-4)
        close(gradients((got * upstream.to(got.dtype)).sum(), *leaves), gradients((rows * upstream).sum(), *wide), dtype)
        mean = mk.margin_cross_entropy(x, w, y, margin=margin, label_smoothing=smoothing, backend=backend)
        assert float(mean.detach()) == pytest.approx(float(rows.detach().sum()) / (N - 2), rel=1e-6)


def test_magface_of_the_defaults():
    """What the paper's numbers give for a row at a right angle less 0.1, longer than all and in the middle of the range."""
    for norm, a, m in ((200.0, 110.0, 0.8), (60.0, 60.0, 0.625), (0.001, 10.0, 0.45)):
        x, w = torch.tensor([[math.sin(0.1) * norm, math.cos(0.1) * norm]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        z = 64 * math.cos(math.pi / 2 - 0.1 + m), 64 * math.cos(0.1)
        want = math.log1p(math.exp(z[1] - z[0])) + 35 * (1 / a + a / 110**2)
        for backend in ("reference", "torch"):
            got = mk.margin_cross_entropy(x, w, torch.tensor([0]), margin=mk.MagFace(), backend=backend)
            assert float(got) == pytest.approx(want, rel=1e-12)


def test_magface_at_every_angle():
    """Value and slope for margins at both ends and between, past pi, and at cos = 1 and -1."""
    theta = torch.cat([torch.tensor([0.0, math.pi], dtype=torch.float64), torch.linspace(0.004, math.pi - 0.004, 400, dtype=torch.float64)])
    for beyond in ("easy", "linear", "none", "continuous", "clip"):
        for norm, m in ((0.01, 0.0), (10.0, 0.0), (60.0, 1.0), (110.0, 2.0), (1e4, 2.0)):
            rows = torch.full((len(theta), 1), norm, dtype=torch.float64)
            batch = mk.BatchInfo(rows, torch.zeros(len(theta), dtype=torch.int64), C)
            value, slope = mk.MagFace(margin_range=(0.0, 2.0), beyond_pi=beyond).target(theta.cos(), batch)
            angles = theta[2:].clone().requires_grad_()
            want = torch.stack([f.turned_target(v, torch.tensor(m, dtype=torch.float64), beyond) for v in angles])
            torch.testing.assert_close(value[2:], want, rtol=0, atol=1e-12)
            (steep,) = torch.autograd.grad(want.sum(), angles)
            torch.testing.assert_close(slope[2:], -steep / theta[2:].sin(), rtol=1e-9, atol=1e-9)
            assert slope.isfinite().all()
            assert value.isfinite().all()
