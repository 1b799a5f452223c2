"""The options of the row optimizers: what torch refuses is refused, in every group."""

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
