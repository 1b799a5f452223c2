"""A margin of its own for each class: the buffer, its number of classes, its changes, sampled classes; and margins from counts."""

import copy
import pickle

import pytest
import torch
from helpers import formulas as f

import marginkernels as mk
from marginkernels import testing

D, C = 16, 40
MAKE = {"arcface": mk.ArcFace, "cosface": mk.CosFace}


def batch(n=9):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=g), torch.randn(C, D, generator=g), torch.randint(C, (n,), generator=g)


def own(dtype=torch.float32):
    return torch.linspace(0.05, 0.6, C, dtype=dtype).flip(0)


@pytest.mark.parametrize("name", MAKE)
def test_the_buffer_is_state_that_does_not_move(name):
    x, w, y = batch()
    head, given = mk.MarginHead(D, C, MAKE[name](margin=own())), own()
    assert torch.equal(head.state_dict()["margin.margins"], given)
    assert head.margin.margin is head.margin.margins
    assert "margin=<(40,)>" in repr(head)
    head(x, y).backward()
    assert torch.equal(head.margin.margins, given)
    assert head.half().margin.margins.dtype == torch.float32
    assert MAKE[name](margin=own(torch.float64)).margins.dtype == torch.float64
    assert MAKE[name](margin=own().half()).margins.dtype == torch.float32
    want = testing.run(testing.Case(x, w, y, None), head.margin, "torch")
    other = MAKE[name](margin=torch.zeros(C))
    other.load_state_dict(head.margin.state_dict())
    for margin in (other, copy.deepcopy(head.margin), pickle.loads(pickle.dumps(head.margin))):
        assert repr(margin) == repr(head.margin)
        got = testing.run(testing.Case(x, w, y, None), margin, "torch")
        assert all(torch.equal(got[k], v) for k, v in want.items())
    with pytest.raises(RuntimeError, match="margins"):
        MAKE[name](margin=torch.zeros(C + 1)).load_state_dict(head.margin.state_dict())
    with pytest.raises(RuntimeError, match="margins"):
        MAKE[name]().load_state_dict(head.margin.state_dict())


@pytest.mark.parametrize("name", MAKE)
def test_meta_device_and_reset(name):
    empty = mk.MarginHead(D, C, MAKE[name](margin=own()), device="meta")
    assert empty.margin.margins.is_meta
    filled = empty.to_empty(device="cpu")
    filled.margin.margins.fill_(77)
    filled.reset_parameters()
    assert torch.equal(filled.margin.margins, own())
    filled.margin.set_margin(own() / 2)
    filled.margin.margins.fill_(77)
    filled.reset_parameters()
    assert torch.equal(filled.margin.margins, own() / 2)


@pytest.mark.parametrize("name", MAKE)
def test_set_margin(name):
    """To others and to one for all, by the method and by assignment; a wrong one changes nothing, and nothing is compiled again."""
    x, _, y = batch()
    torch.manual_seed(0)
    head, seen = mk.MarginHead(D, C, MAKE[name](margin=own()), backend="torch"), []

    def compiler(graph, _):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(head, fullgraph=True, backend=compiler)
    for value in (own().flip(0), own(torch.float64) / 3, 0.25):
        head.margin.set_margin(value)
        fresh = copy.deepcopy(head)
        fresh.margin = MAKE[name](margin=value.float() if isinstance(value, torch.Tensor) else torch.full((C,), value))
        assert torch.equal(run(x, y), fresh(x, y))
        assert head.margin.fingerprint() == fresh.margin.fingerprint()
    assert len(seen) == 1
    with pytest.raises(ValueError, match="margin: expected"):
        head.margin.margin = own() * 100
    assert torch.equal(head.margin.margins, torch.full((C,), 0.25))
    one = MAKE[name](margin=torch.full((C,), 0.25, dtype=torch.float64))
    testing_case = testing.Case(x, head.weight.detach(), y, None)
    want, got = (testing.run(testing_case, margin, "torch") for margin in (MAKE[name](margin=0.25), one))
    assert all(testing.relative_error(got[k], v) < 1e-7 for k, v in want.items())


@pytest.mark.parametrize("name", MAKE)
def test_drawn_classes_keep_their_margins(name):
    """The margin is that of the class, not of its place among those drawn."""
    x, w, y = batch()
    head = mk.MarginHead(D, C, MAKE[name](16.0, own(torch.float64)), sample_rate=0.4, backend="torch")
    head.load_state_dict(head.state_dict() | {"weight": w})
    loss = head(x, y)
    loss.backward()
    index = head.weight.grad.indices()[0]
    assert 9 <= len(index) < C
    formula = {"arcface": f.arcface_per_class, "cosface": f.cosface_per_class}[name](16.0, own(torch.float64)[index].tolist())
    leaves = x.double().requires_grad_(), w.double()[index].requires_grad_()
    place = torch.searchsorted(index, y)
    want = f.cross_entropy(formula(*leaves, place), place)
    want.backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert testing.relative_error(head.weight.grad.values(), leaves[1].grad) < 2e-5


def test_margins_from_counts():
    counts = [1, 0, 5, 1000, 17, 5, 3]
    for options in ({}, {"power": -0.5, "low": 0.2, "high": 0.7}, {"power": 0.5}):
        got = mk.margins_from_counts(torch.tensor(counts), **options)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(f.class_margins(counts, **options), rel=1e-12)
        assert torch.equal(got, mk.margins_from_counts(counts, **options))
    rare = mk.margins_from_counts(counts)
    assert [float(rare[i]) for i in (0, 1, 3)] == [0.5, 0.5, 0.05]
    assert rare[0] > rare[6] > rare[2] == rare[5] > rare[4] > rare[3]
    assert mk.margins_from_counts([7, 7, 7]).tolist() == pytest.approx([0.275] * 3)
    assert mk.margins_from_counts([0, 1], low=0.1, high=0.1).tolist() == [0.1, 0.1]
    assert mk.margins_from_counts(torch.tensor([2, 900]), power=0.0).tolist() == pytest.approx([0.275] * 2)
