"""``marginkernels.compat.oml`` beside Open Metric Learning's losses or, where it is not installed, a stand-in with their formulas."""

import copy
import math

import pytest
import torch
from helpers import stand_ins
from helpers.shims import SAME, assert_same, error_without, near
from torch.nn import functional as F

N, D, C = 48, 16, 20
DTYPES = pytest.mark.parametrize("dtype", SAME, ids=lambda dtype: str(dtype).removeprefix("torch."))
CATEGORIES = {c: "abc"[c % 3] for c in range(C)}


@pytest.fixture(scope="module")
def ours():
    with stand_ins.compat("oml") as shim:
        yield shim


def pair(ours, **options):
    """The library's loss and ours, made from one seed."""
    made = []
    for cls in (ours.theirs.ArcFaceLoss, ours.ArcFaceLoss):
        torch.manual_seed(3)
        made.append(cls(D, C, **options))
    return made


def batch(loss, dtype):
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(5))
    return near(loss.weight, y, dtype), y


def step(loss, x, y):
    x = x.clone().requires_grad_()
    loss.zero_grad()
    value = loss(x, y)
    value.sum().backward()
    return value.detach(), x.grad, loss.weight.grad


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"m": 2.0, "s": 8},  # most rows are past pi - m
        {"smoothing_epsilon": 0.2},
        {"smoothing_epsilon": None, "reduction": "sum"},
        {"reduction": "none", "m": 0.3, "s": 30.0},
        {"label2category": CATEGORIES},  # without a smoothing it changes nothing
    ],
    ids=str,
)
def test_loss_gradients_and_accuracy_are_the_librarys(ours, options, dtype):
    theirs, mine = (loss.to(dtype) for loss in pair(ours, **options))
    assert mine.fused
    assert isinstance(mine, ours.theirs.ArcFaceLoss)
    assert torch.equal(mine.weight, theirs.weight)
    x, y = batch(mine, dtype)
    # Smoothed labels are float32 there.
    limit = torch.float32 if options.get("smoothing_epsilon") else dtype
    assert_same(step(mine, x, y), step(theirs, x, y), limit)
    assert float(mine.last_logs["accuracy"]) == float(theirs.last_logs["accuracy"])
    assert 0 < float(mine.last_logs["accuracy"]) < 1


def test_state_and_attributes_are_the_librarys(ours):
    theirs, mine = pair(ours, m=0.4, s=30)
    assert list(mine.state_dict()) == list(theirs.state_dict()) == ["weight"]
    theirs.weight.data.mul_(2)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    assert torch.equal(mine.weight, theirs.weight)
    for name in ("criterion_name", "num_classes", "smoothing_epsilon", "rescale", "m", "cos_m", "sin_m", "th", "mm", "label2category"):
        assert getattr(mine, name) == getattr(theirs, name), name


@DTYPES
def test_the_loss_behind_a_network(ours, dtype):
    made = []
    for cls in (ours.theirs.ArcFaceLossWithMLP, ours.ArcFaceLossWithMLP):
        torch.manual_seed(3)
        made.append(cls(D, C, [24, 12], m=0.4, s=20, smoothing_epsilon=0.0).to(dtype))
    theirs, mine = made
    assert mine.fused
    assert mine.unfused_reason is None
    for (name, p), (other, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    x, y = torch.randn(N, D, dtype=dtype), torch.randint(C, (N,))
    for loss in (theirs, mine):
        loss(x, y).backward()
    assert_same([p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()], dtype)
    assert mine.last_logs["accuracy"] == theirs.last_logs["accuracy"]


def test_smoothing_within_a_category_is_the_librarys_own(ours):
    theirs, mine = pair(ours, smoothing_epsilon=0.2, label2category=CATEGORIES)
    assert not mine.fused
    assert "label2category" in mine.unfused_reason
    x, y = batch(mine, torch.float32)
    for found, expected in zip(step(mine, x, y), step(theirs, x, y), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss: setattr(loss, "criterion", torch.nn.CrossEntropyLoss(label_smoothing=0.1)), "criterion"),
        (lambda loss: setattr(loss, "fc", lambda x: x @ loss.weight.T / 100), "fc"),
        (lambda loss: setattr(loss, "fuse", False), "fuse"),
        (lambda loss: setattr(loss, "rescale", -3.0), "scale"),
    ],
)
def test_what_else_cannot_be_fused_is_the_librarys_own(ours, change, reason):
    theirs, mine = pair(ours)
    for loss in (theirs, mine):
        change(loss)
    assert not mine.fused
    assert reason in mine.unfused_reason
    x, y = batch(mine, torch.float32)
    for found, expected in zip(step(mine, x, y), step(theirs, x, y), strict=True):
        assert torch.equal(found, expected)


def test_what_differs_a_cosine_of_one(ours):
    """There the root of 1 - cos^2 has no slope, or is NaN itself where rounding has left [-1, 1]; here loss and gradients are finite."""
    theirs, mine = (loss.double() for loss in pair(ours))
    for loss in (theirs, mine):
        loss.weight.data[0] = torch.eye(D, dtype=torch.float64)[0]
    x, y = 2 * torch.eye(D, dtype=torch.float64)[:1], torch.zeros(1, dtype=torch.int64)
    assert step(theirs, x, y)[1].isnan().any()
    assert all(part.isfinite().all() for part in step(mine, x, y))


def test_what_differs_labels(ours):
    """A label beyond the classes is a ValueError here, and an AssertionError there; -100 has no loss here, and an error there."""
    theirs, mine = pair(ours)
    x, y = batch(mine, torch.float32)
    with pytest.raises(AssertionError):
        theirs(x, y + C)
    with pytest.raises(ValueError, match="labels"):
        mine(x, y + C)
    y[0] = -100
    with pytest.raises(RuntimeError):
        theirs(x, y)
    torch.testing.assert_close(mine(x, y), mine(x[1:], y[1:]))


def test_what_differs_a_changed_margin(ours):
    """Here ``m`` is read in every call; there it is read when the loss is made."""
    theirs, mine = pair(ours)
    x, y = batch(mine, torch.float32)
    before = theirs(x, y)
    for loss in (theirs, mine):
        loss.m = 0.1
    assert torch.equal(theirs(x, y), before)
    assert mine(x, y) < before
    assert_same([mine(x, y).detach()], [pair(ours, m=0.1)[0](x, y).detach()], torch.float32)


def test_what_differs_second_derivatives_need_fuse_false(ours):
    mine = pair(ours)[1]
    x, y = batch(mine, torch.float32)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mine(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()
    mine.fuse = False
    (gradient,) = torch.autograd.grad(mine(x, y), x, create_graph=True)
    gradient.square().sum().backward()


def test_a_copy_is_its_own(ours):
    mine = pair(ours)[1]
    x, y = batch(mine, torch.float32)
    mine(x, y)
    other = copy.deepcopy(mine)
    other.m = 0.1
    assert other(x, y) < mine(x, y)


def test_the_formula_longhand(ours):
    mine = pair(ours, m=2.0, s=8, reduction="sum")[1].double()
    x, y = batch(mine, torch.float64)
    cos = F.normalize(x) @ F.normalize(mine.weight.detach()).T
    total = 0.0
    for row, label in zip(cos.tolist(), y.tolist(), strict=True):
        theta = math.acos(row[label])
        own = math.cos(theta + 2.0) if theta < math.pi - 2.0 else row[label] - 2.0 * math.sin(2.0)
        z = torch.tensor([8 * (own if j == label else c) for j, c in enumerate(row)], dtype=torch.float64)
        total += float(z.logsumexp(0) - z[label])
    assert mine(x, y).item() == pytest.approx(total, rel=1e-12)


def test_without_the_library_the_error_says_what_to_install():
    assert "pip install open-metric-learning" in error_without("oml", "oml")
