"""``marginkernels.compat.mmpretrain`` beside mmpretrain's head or, where it is not installed, a stand-in with its formulas."""

import copy
import importlib
import math
import re

import pytest
import torch
from helpers import stand_ins
from helpers.shims import SAME, assert_same, error_without, near
from torch.nn import functional as F

N, D, C = 48, 16, 24
DTYPES = pytest.mark.parametrize("dtype", SAME, ids=lambda dtype: str(dtype).removeprefix("torch."))
OWN = [0.05 + 0.45 * (7 * c % C) / C for c in range(C)]


@pytest.fixture(scope="module")
def ours():
    with stand_ins.compat("mmpretrain") as shim:
        yield shim


def pair(ours, **options):
    """The library's head and ours, made from one seed."""
    made = []
    for cls in (ours._ArcFaceClsHead, ours.ArcFaceClsHead):
        torch.manual_seed(3)
        made.append(cls(num_classes=C, in_channels=D, **copy.deepcopy(options)))
    return made


def batch(head, dtype):
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(5))
    return near(head.norm_product.weight, y * head.num_subcenters, dtype), y


def samples(y, scores=None):
    make = importlib.import_module("mmpretrain.structures").DataSample
    made = [make().set_gt_label(label) for label in y]
    for i, one in enumerate(made if scores is not None else ()):
        one.set_gt_score(scores[i])
    return made


def step(head, x, data, **kwargs):
    x = x.clone().requires_grad_()
    head.zero_grad()
    found = head.loss((x[:, :2], x), data, **kwargs)
    assert list(found) == ["loss"]
    found["loss"].sum().backward()
    return [found["loss"].detach(), x.grad, head.norm_product.weight.grad]


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_subcenters": 3, "scale": 30.0},
        {"margins": OWN},
        {"margins": OWN, "num_subcenters": 2, "easy_margin": True},
        {"margins": 2.0, "scale": 8.0},  # most rows are past pi - m
        {"loss": {"type": "CrossEntropyLoss", "loss_weight": 0.3}},
    ],
    ids=["plain", "sub-centers", "margins", "easy", "past-pi", "loss-weight"],
)
def test_loss_and_gradients_are_the_librarys(ours, options, dtype):
    theirs, mine = (head.to(dtype) for head in pair(ours, **options))
    assert mine.fused
    assert isinstance(mine, ours._ArcFaceClsHead)
    assert torch.equal(mine.norm_product.weight, theirs.norm_product.weight)
    x, y = batch(mine, dtype)
    # Past pi mmpretrain takes off m sin(m), which it holds in float32.
    limit = torch.float32 if options.get("margins") == 2.0 else dtype
    assert_same(step(mine, x, samples(y)), step(theirs, x, samples(y)), limit)


@DTYPES
def test_margins_that_the_hook_sets(ours, dtype):
    theirs, mine = (head.to(dtype) for head in pair(ours))
    x, y = batch(mine, dtype)
    before = step(mine, x, samples(y))[0]
    for head in (theirs, mine):
        head.set_margins(OWN)
    assert_same(step(mine, x, samples(y)), step(theirs, x, samples(y)), torch.float32)
    assert step(mine, x, samples(y))[0] < before
    other = copy.deepcopy(mine)
    other.set_margins(0.5)
    assert_same([step(other, x, samples(y))[0]], [before], dtype)


def test_everything_else_is_the_librarys(ours):
    theirs, mine = pair(ours, num_subcenters=2)
    x, y = batch(mine, torch.float32)
    assert list(mine.state_dict()) == list(theirs.state_dict()) == ["norm_product.weight"]
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine((x,)), theirs((x,)))
    assert torch.equal(mine((x,), y), theirs((x,), y))
    for name in ("forward", "predict", "pre_logits", "set_margins"):
        assert getattr(ours.ArcFaceClsHead, name, None) is getattr(ours._ArcFaceClsHead, name, None)
    mine.loss((x,), samples(y))
    assert list(mine.state_dict()) == ["norm_product.weight"]


def test_the_registry_has_it(ours):
    models = importlib.import_module("mmpretrain.registry").MODELS
    assert models.get("ArcFaceClsHead") is ours.ArcFaceClsHead


def test_the_formula_longhand(ours):
    _, mine = pair(ours, margins=OWN, num_subcenters=2, scale=20.0)
    mine = mine.double()
    x, y = batch(mine, torch.float64)
    cos = (F.normalize(x) @ F.normalize(mine.norm_product.weight.detach()).T).unflatten(1, (C, 2)).amax(2)
    total = 0.0
    for row, label in zip(cos.tolist(), y.tolist(), strict=True):
        m, theta = float(mine.margins[label]), math.acos(row[label])
        own = math.cos(theta + m) if theta < math.pi - m else row[label] - m * math.sin(m)
        z = torch.tensor([20 * (own if j == label else c) for j, c in enumerate(row)], dtype=torch.float64)
        total += float(z.logsumexp(0) - z[label])
    assert mine.loss((x,), samples(y))["loss"].item() == pytest.approx(total / N, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: setattr(head.loss_module, "class_weight", [1.0] * (C - 1) + [2.0]), "loss_module"),
        (lambda head: setattr(head.loss_module, "reduction", "none"), "loss_module"),
        (lambda head: head.set_margins([-0.1] * C), "m2|margin"),
        (lambda head: setattr(head, "fuse", False), "fuse"),
    ],
)
def test_what_cannot_be_fused_is_the_librarys_own(ours, change, reason):
    theirs, mine = pair(ours)
    for head in (theirs, mine):
        change(head)
    assert not mine.fused
    assert re.search(reason, mine.unfused_reason)
    x, y = batch(mine, torch.float32)
    for found, expected in zip(step(mine, x, samples(y)), step(theirs, x, samples(y)), strict=True):
        assert torch.equal(found, expected)


def test_scores_and_further_arguments_are_the_librarys_own(ours):
    """Mixup and CutMix give scores, which the head's cross-entropy takes over labels or, with ``use_soft``, over scores."""
    theirs, mine = pair(ours, loss={"type": "CrossEntropyLoss", "use_soft": True})
    x, y = batch(mine, torch.float32)
    scores = 0.7 * F.one_hot(y, C).float() + 0.3 * F.one_hot(y.flip(0), C).float()
    assert not mine.fused
    for found, expected in zip(step(mine, x, samples(y, scores)), step(theirs, x, samples(y, scores)), strict=True):
        assert torch.equal(found, expected)
    theirs, mine = pair(ours)
    assert mine.fused
    for data, kwargs in ((samples(y, scores), {}), (samples(y), {"weight": torch.linspace(0, 1, N)})):
        for found, expected in zip(step(mine, x, data, **kwargs), step(theirs, x, data, **kwargs), strict=True):
            assert torch.equal(found, expected)


def test_no_tensor_is_rows_by_classes(ours):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.update(tuple(t.shape) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor))
            return out

    for head, expected in zip(pair(ours), (True, False), strict=True):
        x, y = batch(head, torch.float32)
        data = samples(y)
        with Shapes() as shapes:
            shapes.seen = set()
            step(head, x, data)
        assert ((N, C) in shapes.seen) is expected


def test_what_differs_a_cosine_of_one(ours):
    """There the angle has no slope before PyTorch 2.14, or is NaN where rounding has left [-1, 1]; here loss and gradients are finite."""
    x, y = 2 * torch.eye(D, dtype=torch.float64)[:1], torch.zeros(1, dtype=torch.int64)
    found = []
    for head in pair(ours):
        head = head.double()
        head.norm_product.weight.data[0] = torch.eye(D, dtype=torch.float64)[0]
        found.append(step(head, x, samples(y)))
    assert all(part.isfinite().all() for part in found[1])
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        assert found[0][1].isnan().any()


def test_what_differs_half_precision(ours):
    """Embeddings of half precision beside float32 centers are an error there, where autocast is off in the head; here they are taken."""
    theirs, mine = pair(ours)
    x, y = batch(mine, torch.float32)
    with pytest.raises(RuntimeError):
        theirs.loss((x.bfloat16(),), samples(y))
    found = mine.loss((x.bfloat16(),), samples(y))["loss"]
    torch.testing.assert_close(found, mine.loss((x,), samples(y))["loss"], rtol=0.02, atol=0)


def test_without_the_library_the_error_says_what_to_install():
    assert "pip install mmpretrain" in error_without("mmpretrain", "mmpretrain")
