"""Margins that are drawn: what they are, who gets which, and that the loss is that of the formula with what was drawn."""

import copy
import math

import pytest
import torch
from helpers import formulas as f

import marginkernels as mk
from marginkernels.backend import FUSED

N, D, C = 14, 9, 23
BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
QUICK = [name for name in BACKENDS if name != "triton"]


def problem(seed, dtype=torch.float64):
    """Rows at target angles from 0.05 to pi - 0.05; some are past pi with any margin."""
    g = torch.Generator().manual_seed(seed)
    w, y = torch.randn(C, D, generator=g, dtype=torch.float64), torch.randint(C, (N,), generator=g)
    unit = torch.nn.functional.normalize(w[y])
    side = torch.randn(N, D, generator=g, dtype=torch.float64)
    side = torch.nn.functional.normalize(side - (side * unit).sum(1, keepdim=True) * unit)
    theta = torch.linspace(0.05, math.pi - 0.05, N, dtype=torch.float64)[torch.randperm(N, generator=g), None]
    return (3 * (theta.cos() * unit + theta.sin() * side)).to(dtype), w.to(dtype), y


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("kind", ["arc", "cos"])
@pytest.mark.parametrize("plus", [None, "paper", "code"])
def test_loss_and_gradients_of_what_was_drawn(plus, kind, backend):
    """Over steps with ignored rows, and in eval mode, which draws with the count as it stands."""
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    margin, plain = (mk.ElasticFace(kind, 16.0, 0.4, 0.2, p, seed=5) for p in (plus, None))
    seen = []
    assert margin.drawn is None
    for step in range(4):
        x, w, y = problem(step, dtype)
        y[[step, 7]] = -100
        for one in (margin, plain):
            mk.margin_cross_entropy(x, w, y, margin=one.train(step != 2), backend=backend)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        again = copy.deepcopy(margin).eval()
        loss = mk.margin_cross_entropy(*leaves, y, margin=again, backend=backend)
        drawn, kept = margin.drawn, y >= 0
        assert torch.equal(again.drawn[kept], drawn[kept])
        assert torch.equal(drawn.isnan(), ~kept)
        assert drawn.dtype == torch.float64
        cos = f.cosines(x.double(), w.double())[kept].gather(1, y[kept, None])[:, 0].tolist()
        assert drawn[kept].tolist() == pytest.approx(f.elastic_order(cos, plain.drawn[kept].tolist(), plus), abs=1e-12)
        wide = x.double().requires_grad_(), w.double().requires_grad_()
        want = f.cross_entropy(f.elasticface(kind, 16.0, drawn.tolist())(*wide, y), y)
        for got, right in zip((loss, *torch.autograd.grad(loss, leaves)), (want, *torch.autograd.grad(want, wide)), strict=True):
            assert (got.double() - right).norm() <= (1e-9 if dtype == torch.float64 else 2e-5) * right.norm()
        seen.append((int(margin.draws), round(float(drawn[kept].sum()), 9)))
    assert [draws for draws, _ in seen] == [1, 2, 2, 3]
    assert len({total for _, total in seen}) == 3  # eval mode repeats the draw of its count


def test_the_draw_is_that_of_a_normal_distribution():
    x, w = torch.ones(4000, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found = []
    for seed in (0, 1, -(2**63)):
        margin = mk.ElasticFace(margin=0.5, std=0.05, seed=seed)
        for _ in range(3):
            mk.margin_cross_entropy(x, w, torch.zeros(4000, dtype=torch.int64), margin=margin, backend="torch")
            found.append((margin.drawn - 0.5) / 0.05)
    for z in found:
        assert abs(float(z.mean())) < 4 / math.sqrt(4000)
        assert abs(float(z.std()) - 1) < 4 / math.sqrt(8000)
        ordered = torch.special.ndtr(z).sort().values
        assert float((ordered - (torch.arange(4000) + 0.5) / 4000).abs().max()) < 1.9 / math.sqrt(4000)
    together = torch.corrcoef(torch.stack(found)) - torch.eye(len(found))
    assert float(together.abs().max()) < 0.08


def test_a_row_keeps_its_draw_whoever_is_ignored_around_it():
    """The draw goes by the place among the rows that count: ignored rows, as those that pad a batch, change nothing."""
    x, w, y = problem(0)
    few, many = (mk.ElasticFace(std=0.3, plus="paper", seed=2) for _ in range(2))
    keep = torch.arange(N) % 3 != 1
    mk.margin_cross_entropy(x[keep], w, y[keep], margin=few, backend="torch")
    mk.margin_cross_entropy(x, w, torch.where(keep, y, -100), margin=many, backend="torch")
    assert torch.equal(many.drawn[keep], few.drawn)
    mk.margin_cross_entropy(x[:0], w, y[:0], margin=few, backend="torch")
    assert few.drawn.shape == (0,)
    assert few.fingerprint() == copy.deepcopy(few).fingerprint()
    many.load_state_dict(few.state_dict())
    assert few.fingerprint() == many.fingerprint()  # what a rank has drawn is no setting


def test_no_deviation_is_the_margin_itself():
    x, w, y = problem(1)
    for kind, other in (("arc", mk.ArcFace(16.0, 0.4, "none")), ("cos", mk.CosFace(16.0, 0.4))):
        got, want = (
            mk.margin_cross_entropy(x, w, y, margin=margin, backend="torch") for margin in (mk.ElasticFace(kind, 16.0, 0.4, 0.0), other)
        )
        assert float(got) == pytest.approx(float(want), rel=1e-14)
    assert repr(mk.ElasticFace("cos", 16.0, 0.4)) == "ElasticFace(kind='cos', scale=16.0, margin=0.4, std=0.0125, plus=None, seed=0)"


def test_compiled_steps_draw_the_same():
    x, _, y = problem(0, torch.float32)
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = mk.MarginHead(D, C, mk.ElasticFace(std=0.3, plus="paper"), backend="torch")
    other = copy.deepcopy(head)
    run = torch.compile(other, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(run(x, y), head(x, y))
            assert torch.equal(other.margin.drawn, head.margin.drawn)
    assert int(other.margin.draws) == 3
