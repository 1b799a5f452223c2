"""``marginkernels.compat.speechbrain`` beside speechbrain's classes or, where it is not installed, a stand-in with their formulas."""

import copy
import dataclasses
import math

import pytest
import torch
from helpers import stand_ins
from helpers.shims import SAME, assert_same, error_without, near
from torch.nn import functional as F

N, D, C = 48, 16, 24
DTYPES = pytest.mark.parametrize("dtype", SAME, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def ours():
    with stand_ins.compat("speechbrain") as shim:
        yield shim


def margin_of(ours, name, options):
    return getattr(ours.theirs, name)(**options)


def pair(ours, name="AdditiveAngularMargin", options=None, **classifier):
    """(classifier, cost) of the library and of ours, with the weights of one seed."""
    made = []
    for classes, cost in ((ours._Classifier, ours.theirs.LogSoftmaxWrapper), (ours.Classifier, ours.LogSoftmaxWrapper)):
        torch.manual_seed(3)
        options = {"margin": 0.2, "scale": 30.0} if options is None else options
        made.append((classes(**{"input_size": D, "out_neurons": C} | classifier), cost(margin_of(ours, name, options))))
    return made


def batch(classifier, dtype):
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(5))
    return near(classifier.weight, y, dtype).unsqueeze(1), y.unsqueeze(1)


def step(classifier, cost, x, y):
    """(loss, gradients of the embeddings and of the weight); ``x`` (N, 1, D), ``y`` (N, 1)."""
    x = x.clone().requires_grad_()
    classifier.zero_grad()
    loss = cost(classifier(x), y, torch.ones(len(x)))
    loss.backward()
    return [loss.detach(), x.grad, classifier.weight.grad]


@DTYPES
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdditiveAngularMargin", {"margin": 0.2, "scale": 30}),
        ("AdditiveAngularMargin", {"margin": 0.5, "scale": 30.0, "easy_margin": True}),
        ("AdditiveAngularMargin", {"margin": 2.0, "scale": 8.0}),  # most rows are past pi - m
        ("AdditiveAngularMargin", {}),
        ("AngularMargin", {"margin": 0.2, "scale": 32.0}),
        ("AngularMargin", {}),
    ],
)
def test_loss_and_gradients_are_the_librarys(ours, name, options, dtype):
    (classifier, cost), (mine, fused) = pair(ours, name, options)
    assert fused.fused
    assert torch.equal(mine.weight, classifier.weight)
    classifier, mine = classifier.to(dtype), mine.to(dtype)
    x, y = batch(mine, dtype)
    # The angular margin takes the cosines in float32, and the other one its margin.
    limit = torch.float32 if name == "AdditiveAngularMargin" or options else dtype
    assert_same(step(mine, fused, x, y), step(classifier, cost, x, y), limit)


def test_the_formula_longhand(ours):
    _, (mine, cost) = pair(ours, options={"margin": 2.0, "scale": 8.0})
    mine = mine.double()
    x, y = batch(mine, torch.float64)
    cos = F.normalize(x[:, 0]) @ F.normalize(mine.weight.detach()).T
    total = 0.0
    for row, label in zip(cos.tolist(), y[:, 0].tolist(), strict=True):
        theta = math.acos(row[label])
        own = math.cos(theta + 2.0) if theta < math.pi - 2.0 else row[label] - 2.0 * math.sin(2.0)
        z = torch.tensor([8 * (own if j == label else c) for j, c in enumerate(row)], dtype=torch.float64)
        total += float(z.logsumexp(0) - z[label])
    assert cost(mine(x), y).item() == pytest.approx(total / N, rel=1e-12)


def test_the_classifier_is_the_librarys_out_of_training(ours):
    (classifier, cost), (mine, fused) = pair(ours, lin_blocks=1, lin_neurons=12)
    assert isinstance(mine, ours._Classifier)
    assert isinstance(fused, ours.theirs.LogSoftmaxWrapper)
    assert list(mine.state_dict()) == list(classifier.state_dict())
    mine.load_state_dict(classifier.state_dict())
    classifier.load_state_dict(mine.state_dict())
    x, y = torch.randn(N, 1, D), torch.randint(C, (N, 1))
    for module in (mine, classifier):
        module.eval()
    assert mine(x).shape == (N, 1, C)
    assert torch.equal(mine(x), classifier(x))
    assert torch.equal(fused(mine(x), y), cost(classifier(x), y))
    mine.train(), classifier.train()
    assert torch.allclose(mine(x).cosines(), classifier(x))
    torch.testing.assert_close(fused(mine(x), y), cost(classifier(x), y))


def test_no_tensor_is_rows_by_classes(ours):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.update(tuple(t.shape) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor))
            return out

    for (classifier, cost), expected in zip(pair(ours), (True, False), strict=True):
        x, y = batch(classifier, torch.float32)
        with Shapes() as shapes:
            shapes.seen = set()
            step(classifier, cost, x, y)
        assert bool({(N, C), (N, 1, C)} & shapes.seen) is expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cost: setattr(cost, "loss_fn", torch.nn.Identity()), "Identity"),
        (lambda cost: setattr(cost.loss_fn, "scale", -1.0), "scale"),
        (lambda cost: setattr(cost.loss_fn, "margin", 0.7), "since it was made"),
        (lambda cost: setattr(cost, "fuse", False), "fuse"),
    ],
)
def test_what_cannot_be_fused_is_the_librarys_own(ours, change, reason):
    (classifier, cost), (mine, fused) = pair(ours)
    x, y = batch(mine, torch.float32)
    fused(mine(x), y)
    change(cost), change(fused)
    assert not fused.fused
    assert reason in fused.unfused_reason
    assert_same(step(mine, fused, x, y), step(classifier, cost, x, y), torch.float32)


def test_settings_that_change_while_training(ours):
    (classifier, cost), (mine, fused) = pair(ours)
    x, y = batch(mine, torch.float32)
    before = fused(mine(x), y)
    for one in (cost, fused):
        one.loss_fn = margin_of(ours, "AdditiveAngularMargin", {"margin": 0.4, "scale": 30.0})
    assert_same(step(mine, fused, x, y), step(classifier, cost, x, y), torch.float32)
    assert fused(mine(x), y) > before
    other = copy.deepcopy(fused)
    other.loss_fn.scale = 10.0
    assert other(mine(x), y) < fused(mine(x), y)


def test_distributed_data_parallel_finds_the_weight(ours):
    """DDP looks for unused parameters from the output: a dataclass whose tensors have a history, that of the weight too."""
    _, (mine, _) = pair(ours)
    found = mine(torch.randn(N, 1, D, requires_grad=True))
    assert dataclasses.is_dataclass(found)
    assert found.weight.grad_fn is not None
    assert found.weight.data_ptr() == mine.weight.data_ptr()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(mine, find_unused_parameters=True)
        _, (_, fused) = pair(ours)
        x, y = batch(mine, torch.float32)
        for _ in range(2):
            fused(wrapped(x), y).backward()
        assert mine.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_what_differs_cosines_are_not_rounded_to_float32(ours):
    """speechbrain's angular margin takes float32 cosines whatever the dtype, and holds them 1e-7 within [-1, 1]: there no slope is left."""
    (classifier, cost), (mine, fused) = pair(ours)
    classifier, mine = classifier.double(), mine.double()
    for module in (classifier, mine):
        module.weight.data[0] = torch.eye(D, dtype=torch.float64)[0]
    x, y = batch(mine, torch.float64)
    exact = F.normalize(x[:, 0]) @ F.normalize(mine.weight.detach()).T
    theta = exact.gather(1, y).acos()
    z = 30 * exact.scatter(1, y, torch.cos(theta + 0.2))  # none is past pi - 0.2
    want = F.cross_entropy(z, y[:, 0])
    errors = [abs(float(one.detach()) - float(want)) for one in (fused(mine(x), y), cost(classifier(x), y))]
    assert errors[0] < 1e-13 < errors[1]
    x, y = 2 * torch.eye(D, dtype=torch.float64)[:1, None], torch.zeros(1, 1, dtype=torch.int64)
    assert all(part.isfinite().all() for part in step(mine, fused, x, y))


def test_what_differs_labels(ours):
    """A label of -100 has no loss here and is an error there; one beyond the classes is a ValueError here and a RuntimeError there."""
    (classifier, cost), (mine, fused) = pair(ours)
    x, y = batch(mine, torch.float32)
    with pytest.raises(ValueError, match="labels"):
        fused(mine(x), y + C)
    with pytest.raises(RuntimeError):
        cost(classifier(x), y + C)
    y[0] = -100
    with pytest.raises(RuntimeError):
        cost(classifier(x), y)
    torch.testing.assert_close(fused(mine(x), y), fused(mine(x[1:]), y[1:]))


def test_what_differs_the_output_in_training_is_no_tensor(ours):
    (classifier, _), (mine, _) = pair(ours)
    x = torch.randn(N, 1, D)
    assert isinstance(classifier(x), torch.Tensor)
    assert isinstance(mine(x), ours.Unclassified)
    assert mine(x).embedding.shape == (N, D)


def test_without_the_library_the_error_says_what_to_install():
    assert "pip install speechbrain" in error_without("speechbrain", "speechbrain")
