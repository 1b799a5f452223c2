"""The row optimizers: the values and the state of torch's, in chunks of any size, and of formulas in plain numbers; what torch refuses is
refused, in every group."""

import math

import pytest
import torch

import marginkernels as mk

BAD = [
    (mk.optim.AdamW, "betas", (0.9, 1.0)),
    (mk.optim.AdamW, "betas", (1.0, 0.999)),
    (mk.optim.AdamW, "betas", (-0.1, 0.999)),
    (mk.optim.AdamW, "betas", (0.9, math.nan)),
    (mk.optim.AdamW, "eps", -1e-8),
    (mk.optim.AdamW, "eps", math.nan),
    (mk.optim.AdamW, "lr", -1.0),
    (mk.optim.AdamW, "lr", math.nan),
    (mk.optim.AdamW, "weight_decay", -0.1),
    (mk.optim.SGD, "lr", -1.0),
    (mk.optim.SGD, "momentum", -0.5),
    (mk.optim.SGD, "momentum", math.nan),
    (mk.optim.SGD, "weight_decay", -0.1),
]


@pytest.mark.parametrize(("kind", "option", "value"), BAD)
def test_refused_everywhere(kind, option, value):
    p, q = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    with pytest.raises(ValueError, match=f"{option}: expected"):
        kind([p], **{option: value})
    with pytest.raises(ValueError, match=f"{option}: expected"):
        kind([{"params": [p], option: value}])
    optimizer = kind([p])
    with pytest.raises(ValueError, match=f"{option}: expected"):
        optimizer.add_param_group({"params": [q], option: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 2


def test_wrong_kinds():
    p = torch.nn.Parameter(torch.ones(3, 2))
    for betas in (0.9, (0.9,), (0.9, 0.99, 0.999)):
        with pytest.raises(TypeError, match="betas: expected two numbers in"):
            mk.optim.AdamW([p], betas=betas)
    with pytest.raises(ValueError, match="momentum: expected a number > 0 for nesterov=True"):
        mk.optim.SGD([p], nesterov=True)
    with pytest.raises(ValueError, match="momentum: expected a number > 0 for nesterov=True"):
        mk.optim.SGD([{"params": [p], "nesterov": True}])
    mk.optim.SGD([{"params": [p], "nesterov": True, "momentum": 0.9}])


def test_the_ends_that_torch_takes():
    p = torch.nn.Parameter(torch.ones(3, 2))
    for ours, theirs, options in (
        (mk.optim.AdamW, torch.optim.AdamW, {"betas": (0.0, 0.0), "eps": 0.5, "weight_decay": 0.0}),
        (mk.optim.SGD, torch.optim.SGD, {"lr": 0.0, "momentum": 0.0}),
    ):
        results = []
        for kind in (ours, theirs):
            q = torch.nn.Parameter(p.detach().clone())
            q.grad = torch.full_like(q, 0.3)
            kind([q], **options).step()
            results.append(q.detach())
        torch.testing.assert_close(*results)


UPDATES = [
    (mk.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (mk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    (mk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    (mk.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.05}),
    (mk.optim.AdamW, torch.optim.AdamW, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.2}),
]
SHAPES = [(7, 3), (11,), (5, 2, 2), (1, 9), ()]


@pytest.fixture(params=[1, 7, 1 << 24], ids=["one row", "a few", "all"])
def chunks(request, monkeypatch):
    """Chunks of so many elements, at least one row."""
    monkeypatch.setattr(mk.optim.rows, "CHUNK_ELEMENTS", request.param)


def test_chunks_take_each_row_once(chunks):
    for shape in (*SHAPES[:-1], (0, 4), (3, 0)):
        v = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        parts = [v[part] for part in mk.optim.rows._chunks(v)]
        assert torch.equal(torch.cat([v[:0], *parts]), v)
        assert all(part.shape[0] == 1 or part.numel() <= mk.optim.rows.CHUNK_ELEMENTS for part in parts)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "options"), UPDATES)
def test_values_and_state_are_those_of_torch(chunks, ours, theirs, options, sparse):
    """Of parameters of any shape; rows of sparse gradients come in any order, and twice, until they are coalesced."""
    g = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if shape or not sparse]
    start = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    a, b = ([v.clone().requires_grad_() for v in start] for _ in range(2))
    one, two = ours(a, **options), theirs(b, **options)
    for _ in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.grad = q.grad.clone()
            if sparse:
                rows = torch.randperm(len(p), generator=g)
                halves = torch.cat([q.grad[rows] * 0.25, q.grad[rows] * 0.75])
                p.grad = torch.sparse_coo_tensor(torch.cat([rows, rows])[None], halves, p.shape)
        one.step()
        two.step()
    for p, q, v in zip(a, b, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(p, v)
        mine, other = one.state[p], two.state[q]
        assert {k for k, u in other.items() if u is not None} == mine.keys()
        for key, u in mine.items():
            torch.testing.assert_close(u, torch.as_tensor(other[key]).to(u.dtype).expand_as(u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw"])
def test_rows_in_plain_numbers(chunks, kind):
    """Each row as a number that takes part in its own steps only, by the formulas of the papers; rows without a gradient stand still."""
    lr, decay, momentum, first, second, eps = 0.1, 0.2, 0.8, 0.7, 0.9, 0.05
    p = torch.linspace(-1, 2, 13).double().requires_grad_()
    optimizer = {
        "sgd": lambda: mk.optim.SGD([p], lr, momentum, decay),
        "nesterov": lambda: mk.optim.SGD([p], lr, momentum, decay, nesterov=True),
        "adamw": lambda: mk.optim.AdamW([p], lr, (first, second), eps, decay),
    }[kind]()
    want, m, v, steps = p.tolist(), [0.0] * 13, [0.0] * 13, [0] * 13
    for step in range(6):
        rows = [j for j in range(13) if j % 3 == step % 3 or j == 12]
        g = [0.1 * (j + 1) - 0.3 * step for j in rows]
        p.grad = torch.sparse_coo_tensor([rows], torch.tensor(g, dtype=torch.float64), p.shape)
        optimizer.step()
        for j, gj in zip(rows, g, strict=True):
            if kind == "adamw":
                steps[j] += 1
                want[j] *= 1 - lr * decay
                m[j], v[j] = first * m[j] + (1 - first) * gj, second * v[j] + (1 - second) * gj**2
                want[j] -= lr * (m[j] / (1 - first ** steps[j])) / (math.sqrt(v[j] / (1 - second ** steps[j])) + eps)
            else:
                gj += decay * want[j]
                m[j] = momentum * m[j] + gj
                want[j] -= lr * (gj + momentum * m[j] if kind == "nesterov" else m[j])
        assert p.tolist() == pytest.approx(want, rel=1e-12)
    if kind == "adamw":
        assert optimizer.state[p]["step"].tolist() == steps
        assert len(set(steps)) > 1


def test_the_closure_is_called_once_and_its_result_returned():
    p = torch.ones(3).requires_grad_()
    q = torch.ones(2).requires_grad_()  # without a gradient: left alone, without state
    optimizer, calls = mk.optim.SGD([p, q], lr=0.5), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        (loss := (p**2).sum()).backward()
        return loss

    assert float(optimizer.step(closure)) == 3
    assert calls == [True]
    assert p.tolist() == [0.0, 0.0, 0.0]
    assert q.tolist() == [1.0, 1.0]
    assert q not in optimizer.state
    assert optimizer.step() is None
