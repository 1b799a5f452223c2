"""Class sampling on one device: what is drawn, what has a gradient, and that nothing else changes."""

import copy
import math

import pytest
import torch

import marginkernels as mk
from marginkernels import optim, testing
from marginkernels.sampling import Sampler, draw_op

D = 8


def drawn(seed: int, step: int, c: int, k: int, labels=()) -> torch.Tensor:
    labels = torch.tensor(labels, dtype=torch.int64)
    return draw_op(torch.tensor(seed), torch.tensor(step), labels, 0, c, k)[0]


@pytest.mark.parametrize(
    ("c", "k", "labels"), [(100, 10, [3, 3, 99, -1, 0]), (7, 7, [6]), (5, 1, [4]), (50, 20, []), (1, 1, [-1]), (0, 0, [-1])]
)
def test_every_class_of_the_batch_and_no_class_twice(c, k, labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    for step in range(20):
        index, positive, place = draw_op(torch.tensor(5), torch.tensor(step), labels, 0, c, k)
        assert len(index) == k == len(set(index.tolist()))
        assert (index.diff() > 0).all()
        here = labels >= 0
        assert torch.equal(index[place[here]], labels[here])
        assert (place[~here] == -1).all()
        assert set(index[positive].tolist()) == set(labels[here].tolist())


def test_draws_are_uniform_and_independent():
    c, k, steps = 64, 16, 4000
    hits = torch.zeros(steps, c, dtype=torch.float64)
    for step in range(steps):
        hits[step, drawn(7, step, c, k)] = 1
    rate = k / c
    # How often each class is drawn, each pair of classes, and each class in two consecutive steps, in standard errors.
    share = (hits.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    assert share.abs().max() < 4.5
    both = (hits.T @ hits) / steps
    pair = rate * (k - 1) / (c - 1)
    z = (both - pair) / math.sqrt(pair * (1 - pair) / steps)
    assert z[~torch.eye(c, dtype=torch.bool)].abs().max() < 5.5
    again = ((hits[1:] * hits[:-1]).mean(0) - rate**2) / math.sqrt(rate**2 * (1 - rate**2) / steps)
    assert again.abs().max() < 4.5


def test_seed_and_step_give_the_draw():
    assert torch.equal(drawn(1, 5, 1000, 50), drawn(1, 5, 1000, 50))
    for other in (drawn(2, 5, 1000, 50), drawn(1, 6, 1000, 50), drawn(5, 1, 1000, 50)):
        assert len(set(other.tolist()) & set(drawn(1, 5, 1000, 50).tolist())) < 15  # 2.5 are expected
    assert len(set(drawn(-(2**63), 0, 1000, 50).tolist()) & set(drawn(2**63 - 1, 0, 1000, 50).tolist())) < 15


@pytest.mark.parametrize("seed", [0, 1])
def test_log_q_makes_the_sum_unbiased(seed):
    """The mean over many draws of the sum of corrected exponentials is the sum over all classes."""
    case = testing.Case.random(4, D, 60, torch.float64, seed=seed, ignored=False)
    sampler = Sampler(0.3, seed, log_q=True).double()
    z = torch.nn.functional.normalize(case.x) @ torch.nn.functional.normalize(case.w).T * 4
    own = torch.nn.functional.one_hot(case.labels, 60).bool()
    want = z.masked_fill(own, -math.inf).exp().sum(1)
    found = []
    for _ in range(3000):
        w, _, labels, correction = sampler(case.w, None, case.labels)
        z = torch.nn.functional.normalize(case.x) @ torch.nn.functional.normalize(w).T * 4 + correction
        found.append(z.scatter(1, labels[:, None], -math.inf).exp().sum(1))
    found = torch.stack(found)
    error = (found.mean(0) - want).abs() / (found.std(0) / math.sqrt(len(found)))
    assert error.max() < 4


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", ["arcface", "curricularface", "adacos", "softmax", "l2-softmax-trainable", "arcface-focal"])
def test_loss_and_gradient_are_those_of_the_drawn_classes(name, backend):
    case = testing.Case.random(12, D, 300, bias=True)
    head = mk.MarginHead(D, 300, testing.HEADS[name](300), bias=True, sample_rate=0.1, label_smoothing=0.1, backend=backend)
    head.load_state_dict(head.state_dict() | {"weight": case.w, "bias": case.bias})
    single = copy.deepcopy(head.margin)
    x = case.x.clone().requires_grad_()
    loss = head(x, case.labels)
    loss.backward()
    index = head.weight.grad.indices()[0]
    assert len(index) == 30
    assert torch.equal(index, head.bias.grad.indices()[0])
    leaf = [v.double().requires_grad_() for v in (case.x, case.w[index], case.bias[index])]
    labels = torch.where(case.labels < 0, -100, torch.searchsorted(index, case.labels))
    want = mk.margin_cross_entropy(*leaf[:2], labels, margin=single, bias=leaf[2], label_smoothing=0.1, backend="reference")
    want.backward()
    for got, expected in (
        (loss, want),
        (x.grad, leaf[0].grad),
        (head.weight.grad.values(), leaf[1].grad),
        (head.bias.grad.values(), leaf[2].grad),
        *((p.grad, q.grad) for p, q in zip(head.margin.parameters(), single.parameters(), strict=True)),
    ):
        assert testing.relative_error(got.detach(), expected.detach()) < 2e-5


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_rows_do_not_change_by_a_bit(name):
    torch.manual_seed(0)
    head = mk.MarginHead(D, 500, mk.CosFace(scale=4.0), sample_rate=0.05, bias=True)
    optimizer = OPTIMIZERS[name](head.parameters())
    moved = torch.zeros(500, dtype=torch.bool)
    for _ in range(5):
        before = [v.clone() for v in _everything(head, optimizer)]
        optimizer.zero_grad()
        head(torch.randn(6, D), torch.randint(500, (6,))).backward()
        index = head.weight.grad.indices()[0]
        assert len(index) == 25
        optimizer.step()
        still = torch.ones(500, dtype=torch.bool)
        still[index] = False
        moved |= ~still
        for old, new in zip(before, _everything(head, optimizer), strict=False):
            assert new[still].numpy().tobytes() == old[still].numpy().tobytes()
        assert (head.weight[index] != before[0][index]).any(1).all()
    assert 25 < int(moved.sum()) < 126


def _everything(head, optimizer):
    return [head.weight.detach(), head.bias.detach(), *(v for p in (head.weight, head.bias) for v in optimizer.state[p].values())]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_torch_when_every_row_takes_part(name):
    torch.manual_seed(0)
    ours = [torch.randn(7, 3), torch.randn(5), torch.randn(())]
    theirs = [v.clone().requires_grad_() for v in ours]
    ours = [v.requires_grad_() for v in ours]
    a, b = OPTIMIZERS[name](ours), getattr(torch.optim, "AdamW" if name == "adamw" else "SGD")(theirs)
    for key in a.param_groups[0].keys() - {"params"}:
        b.param_groups[0][key] = a.param_groups[0][key]
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape)
            q.grad = g
            rows = torch.arange(len(p))[None] if p.ndim else None
            p.grad = (
                torch.sparse_coo_tensor(rows, g, p.shape, is_coalesced=True, check_invariants=False) if p.ndim and step % 2 else g.clone()
            )
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_row_sees_its_own_steps_only():
    """A row that takes part in every third step ends where it would if there were no other steps."""
    for make in OPTIMIZERS.values():
        p, q = (torch.ones(4, 2).requires_grad_() for _ in range(2))
        a, b = make([p]), make([q])
        for step in range(9):
            row, g = torch.tensor([[step % 3]]), torch.full((1, 2), float(step + 1))
            p.grad = torch.sparse_coo_tensor(row, g, p.shape, is_coalesced=True, check_invariants=False)
            a.step()
            if step % 3 == 1:
                q.grad = p.grad
                b.step()
        assert torch.equal(p[1], q[1])
        assert torch.equal(p[3], torch.ones(2))


def test_accumulated_gradients():
    """Two draws before one step: the gradient has the rows of both, each once, with the sum where both have a row."""
    head = mk.MarginHead(D, 200, mk.ArcFace(), sample_rate=0.3)
    x, y = torch.randn(6, D), torch.randint(200, (6,))
    head(x, y).backward()
    first = head.weight.grad.clone()
    head(x, y).backward()
    both = head.weight.grad.coalesce()
    head.weight.grad = None
    head.sampler.draws.zero_()
    head(x, y).backward()
    assert torch.equal(head.weight.grad.to_dense(), first.to_dense())
    head.weight.grad = None
    head(x, y).backward()
    torch.testing.assert_close(both.to_dense(), first.to_dense() + head.weight.grad.to_dense())
    optim.SGD([head.weight], lr=0.1).step()


def test_eval_uses_every_class_and_draws_nothing():
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1).eval()
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    want = mk.margin_cross_entropy(x, head.weight, y, margin=mk.CosFace())
    assert torch.equal(head(x, y), want)
    assert int(head.sampler.draws) == 0


def test_resumed_draws_go_on():
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    a = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1, sample_seed=3)
    for _ in range(3):
        a(x, y)
    b = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x, y), b(x, y))


def test_under_compile():
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    a = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1, sample_seed=3)
    b = copy.deepcopy(a)
    compiled = torch.compile(b, backend="aot_eager")
    for _ in range(3):
        a.zero_grad()
        b.zero_grad()
        one, two = a(x, y), compiled(x, y)
        one.backward()
        two.backward()
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(a.weight.grad.to_dense(), b.weight.grad.to_dense())


def test_grad_scaler_takes_sparse_gradients():
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    optimizer = optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    scaler.scale(head(x, y)).backward()
    scaled = head.weight.grad.to_dense().clone()
    scaler.unscale_(optimizer)
    assert torch.equal(head.weight.grad.to_dense() * 16, scaled)
    before = head.weight.detach().clone()
    head.weight.grad.values()[0, 0] = math.inf
    scaler.step(optimizer)
    assert not torch.equal(head.weight, before)  # the gradients were unscaled before they became infinite, so the step is taken
    head.zero_grad()
    scaler.update()
    scaler.scale(head(x, y)).backward()
    head.weight.grad.values()[0, 0] = math.inf
    before = head.weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sample_rate": 0.0}, ValueError, "sample_rate"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate"),
        ({"sample_rate": "all"}, TypeError, "sample_rate"),
        ({"sample_rate": 0.5, "sample_seed": 2**63}, ValueError, "sample_seed"),
        ({"log_q": True}, ValueError, "log_q"),
        ({"batch_size": 5}, ValueError, "batch_size"),
        ({"process_group": "world"}, TypeError, "process_group"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=f"{text}: expected"):
        mk.MarginHead(D, 10, mk.ArcFace(), **options)


def test_no_sampling_with_the_reference():
    head = mk.MarginHead(D, 10, mk.ArcFace(), sample_rate=0.5, backend="reference")
    with pytest.raises(ValueError, match="backend: expected a fused backend"):
        head(torch.randn(2, D), torch.tensor([0, 1]))
