"""``marginkernels.compat.metric_learning`` beside pytorch-metric-learning: the same numbers, state and errors from the same arguments."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import marginkernels

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from marginkernels.compat import metric_learning as ours  # noqa: E402

N, D, C = 48, 16, 30
#: What docs/switching.md says: relative to the largest element.
SAME = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", SAME, ids=lambda dtype: str(dtype).removeprefix("torch."))
CASES = [
    ("ArcFaceLoss", {}),
    ("ArcFaceLoss", {"margin": 120, "scale": 8}),  # most rows are past pi - m
    ("SubCenterArcFaceLoss", {}),
    ("SubCenterArcFaceLoss", {"margin": 120, "scale": 8, "sub_centers": 2}),
    ("SubCenterArcFaceLoss", {"sub_centers": 1}),
    ("CosFaceLoss", {}),
    ("CosFaceLoss", {"margin": 0.2, "scale": 10}),
    ("LargeMarginSoftmaxLoss", {}),
    ("LargeMarginSoftmaxLoss", {"margin": 3, "scale": 0.5}),
    ("SphereFaceLoss", {}),
    ("SphereFaceLoss", {"margin": 2, "scale": 3}),
    ("NormalizedSoftmaxLoss", {}),
    ("NormalizedSoftmaxLoss", {"temperature": 0.2, "distance": distances.CosineSimilarity()}),
    ("NormalizedSoftmaxLoss", {"temperature": 0.7, "distance": distances.DotProductSimilarity(normalize_embeddings=False)}),
]
LOSSES = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
NAMES = pytest.mark.parametrize("name", ours.__all__)


def pair(name, **options):
    """The library's loss and ours, made from one seed."""
    made = []
    for module in (losses, ours):
        torch.manual_seed(3)
        made.append(getattr(module, name)(num_classes=C, embedding_size=D, **copy.deepcopy(options)))
    return made


def batch(dtype=torch.float32, rows=N):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, D, dtype=torch.float64, generator=generator)
    return x.to(dtype), torch.randint(C, (rows,), generator=generator)


def step(loss, x, y, *more):
    """(loss, gradient of the embeddings, gradient of W)."""
    x = x.clone().requires_grad_()
    loss.zero_grad()
    value = loss(x, y, *more)
    value.backward()
    return value.detach(), x.grad, loss.W.grad


def assert_same(found, expected, what=""):
    for mine, theirs, part in zip(found, expected, ("loss", "embeddings", "W"), strict=True):
        assert mine.dtype == theirs.dtype, (what, part)
        assert mine.shape == theirs.shape, (what, part)
        error = float((mine - theirs).abs().max() / theirs.abs().max())
        assert error <= SAME[theirs.dtype], (what, part, error)


@DTYPES
@LOSSES
def test_loss_and_gradients_are_the_librarys(name, options, dtype):
    theirs, mine = pair(name, **options)
    assert mine.fused
    assert isinstance(mine, getattr(losses, name))
    x, y = batch(dtype)
    assert_same(step(mine, x, y), step(theirs, x, y))
    assert mine.W.dtype == dtype
    torch.testing.assert_close(mine.get_logits(x), theirs.get_logits(x))


@NAMES
def test_the_weight_is_theirs_and_its_transpose_contiguous(name):
    theirs, mine = pair(name)
    assert mine.W.shape == (D, C * getattr(mine, "sub_centers", 1))
    assert torch.equal(mine.W, theirs.W)
    assert mine.W.t().is_contiguous()
    assert list(mine.state_dict()) == list(theirs.state_dict()) == ["W"]
    theirs.W.data.mul_(2)
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.W, theirs.W)
    assert mine.W.t().is_contiguous()
    theirs.load_state_dict(mine.state_dict())
    assert copy.deepcopy(mine).W.t().is_contiguous()


@NAMES
def test_an_assigned_weight_of_any_layout_works(name):
    theirs, mine = pair(name)
    x, y = batch()
    theirs.W.data.copy_(torch.randn(theirs.W.shape))
    mine.W = torch.nn.Parameter(theirs.W.data.clone())
    assert not mine.W.t().is_contiguous()
    assert_same(step(mine, x, y), step(theirs, x, y))


@DTYPES
@NAMES
def test_weights_of_miners(name, dtype):
    theirs, mine = pair(name)
    x, y = batch(dtype)
    found = miners.BatchHardMiner()(x, y)
    anchors = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([3, 3, 4, 5, 6]), torch.tensor([7, 8, 9, 10, 0])
    nothing = (torch.empty(0, dtype=torch.int64),) * 3
    for indices in (found, anchors, (*anchors[:2], *anchors[1:]), nothing):
        assert_same(step(mine, x, y, indices), step(theirs, x, y, indices), indices)
    assert not torch.equal(mine(x, y, anchors), mine(x, y))


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.AvgNonZeroReducer(),
        reducers.ThresholdReducer(low=1.0, high=40.0),
        reducers.ClassWeightedReducer(torch.linspace(0, 2, C)),
        reducers.PerAnchorReducer(),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
@DTYPES
def test_reducers(reducer, dtype):
    x, y = batch(dtype)
    for name in ours.__all__:
        theirs, mine = pair(name, reducer=reducer)
        assert_same(step(mine, x, y), step(theirs, x, y), name)


@NAMES
def test_without_a_reduction_the_rows_come_back(name):
    theirs, mine = pair(name, reducer=reducers.DoNothingReducer())
    x, y = batch(torch.float64)
    found, expected = mine(x, y), theirs(x, y)
    assert found.keys() == expected.keys()
    assert found["loss"]["reduction_type"] == expected["loss"]["reduction_type"]
    assert torch.equal(found["loss"]["indices"], expected["loss"]["indices"])
    torch.testing.assert_close(found["loss"]["losses"], expected["loss"]["losses"])


@DTYPES
@NAMES
def test_regularizers(name, dtype):
    options = {
        "weight_regularizer": regularizers.LpRegularizer(),
        "weight_reg_weight": 0.3,
        "embedding_regularizer": regularizers.LpRegularizer(),
        "embedding_reg_weight": 0.1,
    }
    theirs, mine = pair(name, **options)
    x, y = batch(dtype)
    regularized = step(mine, x, y)
    assert_same(regularized, step(theirs, x, y))
    assert mine.sub_loss_names() == theirs.sub_loss_names() == ["loss", "weight_reg_loss", "embedding_reg_loss"]
    assert regularized[0] > step(pair(name)[1], x, y)[0]
    theirs, mine = pair(name, weight_regularizer=regularizers.RegularFaceRegularizer())
    assert_same(step(mine, x, y), step(theirs, x, y))


@NAMES
def test_errors_are_the_librarys(name):
    theirs, mine = pair(name)
    x, y = batch()
    for arguments in ((x,), (x, y[:-1]), (x, y[:, None]), (x, y, None, x.clone(), y)):
        with pytest.raises(ValueError) as expected:
            theirs(*arguments)
        with pytest.raises(ValueError) as found:
            mine(*arguments)
        assert str(found.value) == str(expected.value)


@NAMES
def test_half_precision_and_autocast_give_the_librarys_dtypes(name):
    x, y = batch()
    for dtype in (torch.float16, torch.bfloat16):
        theirs, mine = pair(name)
        assert mine(x.to(dtype), y).dtype == theirs(x.to(dtype), y).dtype == dtype
        assert mine.W.dtype == theirs.W.dtype == dtype
    theirs, mine = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert mine(x.to(dtype), y).dtype == theirs(x.to(dtype), y).dtype == torch.float32


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SubCenterArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "SphereFaceLoss"])
def test_statistics(name):
    theirs, mine = pair(name, collect_stats=True, distance=distances.CosineSimilarity(collect_stats=True))
    x, y = batch()
    theirs(x, y), mine(x, y)
    assert mine.fused
    assert mine.avg_angle == pytest.approx(theirs.avg_angle, rel=1e-5)
    assert theirs.avg_angle > 10
    for stat in ("initial_avg_query_norm", "initial_avg_ref_norm", "final_avg_query_norm", "final_avg_ref_norm"):
        assert getattr(mine.distance, stat) == pytest.approx(getattr(theirs.distance, stat), rel=1e-5)
        assert getattr(mine.distance, stat) > 0


def test_several_centers_a_class_are_known_by_name_and_give_the_librarys_outliers():
    theirs, mine = pair("SubCenterArcFaceLoss", sub_centers=4)
    assert (mine.num_classes, mine.sub_centers) == (theirs.num_classes, theirs.sub_centers) == (C, 4)
    with pytest.raises(KeyError):
        ours.SubCenterArcFaceLoss(C, D)
    x, y = batch(rows=40 * C)
    own = theirs.W.t().unflatten(0, (C, 4))[y].detach()
    x = x + 4 * own[torch.arange(len(y)), torch.randint(3, (len(y),), generator=torch.Generator().manual_seed(7))]
    for threshold in (60, 75, 180):
        (found, centers), (expected, their_centers) = (loss.get_outliers(x, y, threshold=threshold) for loss in (mine, theirs))
        assert torch.equal(found, expected)
        assert torch.equal(centers, their_centers)
        assert (len(found) > 0) is (threshold < 180)
    assert mine.get_logits(x).shape == (len(y), C)


class Halved(ours.CosFaceLoss):
    def modify_cosine_of_target_classes(self, cosine):
        return super().modify_cosine_of_target_classes(cosine) / 2


class HalvedTheirs(losses.CosFaceLoss):
    def modify_cosine_of_target_classes(self, cosine):
        return super().modify_cosine_of_target_classes(cosine) / 2


def test_a_subclass_that_changes_the_computation_keeps_its_change():
    made = []
    for cls in (HalvedTheirs, Halved):
        torch.manual_seed(3)
        made.append(cls(C, D))
    theirs, mine = made
    assert not mine.fused
    assert "modify_cosine_of_target_classes" in mine.unfused_reason
    x, y = batch()
    assert_same(step(mine, x, y), step(theirs, x, y))


@pytest.mark.parametrize("name", ["get_cosine", "scale_logits", "get_target_mask", "get_angles"])
def test_a_method_that_is_replaced_on_the_object_is_used(name):
    mine = pair("ArcFaceLoss")[1]
    x, y = batch()
    called = []
    original = getattr(mine, name)
    setattr(mine, name, lambda *a: (called.append(name), original(*a))[1])
    assert not mine.fused
    mine(x, y)
    assert called == [name]


def test_a_subclass_that_only_adds_is_fused():
    class Named(ours.ArcFaceLoss):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    torch.manual_seed(3)
    mine = Named(C, D)
    x, y = batch()
    assert mine.fused
    torch.testing.assert_close(mine(x, y), 2 * pair("ArcFaceLoss")[0](x, y))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("NormalizedSoftmaxLoss", {"distance": distances.LpDistance()}, "distance"),
        ("NormalizedSoftmaxLoss", {"distance": distances.DotProductSimilarity(p=1)}, "distance"),
        ("NormalizedSoftmaxLoss", {"temperature": -0.5}, "scale"),
        ("NormalizedSoftmaxLoss", {"temperature": torch.tensor(0.5)}, "temperature"),
        ("ArcFaceLoss", {"distance": distances.CosineSimilarity(power=2)}, "distance"),
        ("ArcFaceLoss", {"margin": -10}, "margin"),
        ("ArcFaceLoss", {"scale": torch.tensor(8.0)}, "scale"),
        ("CosFaceLoss", {"margin": -0.1}, "margin"),
        ("SubCenterArcFaceLoss", {"margin": -10}, "margin"),
        ("SubCenterArcFaceLoss", {"distance": distances.CosineSimilarity(power=2)}, "distance"),
        ("SphereFaceLoss", {"scale": -1}, "scale"),
        ("LargeMarginSoftmaxLoss", {"scale": -1}, "scale"),
    ],
)
def test_what_cannot_be_fused_is_the_librarys_own(name, options, reason):
    theirs, mine = pair(name, **options)
    assert not mine.fused
    assert reason in mine.unfused_reason
    x, y = batch()
    for found, expected in zip(step(mine, x, y), step(theirs, x, y), strict=True):
        torch.testing.assert_close(found, expected)


def test_another_cross_entropy_is_used():
    theirs, mine = pair("CosFaceLoss")
    for loss in (theirs, mine):
        loss.cross_entropy = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    assert not mine.fused
    x, y = batch()
    assert_same(step(mine, x, y), step(theirs, x, y))


def test_attributes_that_change_while_training():
    theirs, mine = pair("CosFaceLoss")
    x, y = batch()
    mine(x, y)
    for loss in (theirs, mine):
        loss.margin, loss.scale = 0.1, 16
    assert_same(step(mine, x, y), step(theirs, x, y))
    theirs, mine = pair("NormalizedSoftmaxLoss")
    mine(x, y)
    for loss in (theirs, mine):
        loss.distance = distances.DotProductSimilarity(normalize_embeddings=False)
    assert_same(step(mine, x, y), step(theirs, x, y))


def test_no_tensor_is_rows_by_classes():
    """The largest tensor that the loss makes, counted by the dispatcher, and that the library does make one of (N, C)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.update(tuple(t.shape) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor))
            return out

    x, y = batch()
    for loss, expected in zip(pair("ArcFaceLoss"), (True, False), strict=True):
        with Shapes() as shapes:
            shapes.seen = set()
            step(loss, x, y)
        assert ((N, C) in shapes.seen) is expected


def test_what_differs_gradients_at_a_cosine_of_one():
    """The library's is NaN at cos = +-1 (acos) before PyTorch 2.14, which takes 0 for the slope there; ours is finite."""
    theirs, mine = pair("ArcFaceLoss")
    x, y = torch.zeros(1, D), torch.zeros(1, dtype=torch.int64)
    x[0, 0] = 1
    for loss in (theirs, mine):
        loss.W.data[:, 0] = 2 * x[0]
    of_theirs, of_mine = step(theirs, x, y), step(mine, x, y)
    assert all(part.isfinite().all() for part in of_mine)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        assert of_theirs[1].isnan().any()
    else:
        torch.testing.assert_close(of_theirs[1], of_mine[1], rtol=1e-4, atol=1e-6)


@NAMES
def test_what_differs_half_precision_is_nearer_to_float64(name):
    x, y = batch(rows=256)
    for dtype in (torch.float16, torch.bfloat16):
        theirs, mine = pair(name, reducer=reducers.DoNothingReducer())
        theirs(x.to(dtype), y)  # rounds W
        exact = copy.deepcopy(theirs)(x.to(dtype).double(), y)["loss"]["losses"]
        errors = [float((loss(x.to(dtype), y)["loss"]["losses"] - exact).square().mean()) for loss in (mine, theirs)]
        assert errors[0] < errors[1]


def test_what_differs_second_derivatives_need_fuse_false():
    mine = pair("CosFaceLoss")[1]
    x, y = batch()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mine(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()
    mine.fuse = False
    (gradient,) = torch.autograd.grad(mine(x, y), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


def test_what_differs_label_minus_100():
    """The library's margin losses raise for it unless there are 100 classes; here the row has no loss."""
    theirs, mine = pair("CosFaceLoss")
    x, y = batch()
    y[0] = -100
    with pytest.raises(IndexError):
        theirs(x, y)
    expected = F.cross_entropy(theirs.get_logits(x[1:]) - 64 * 0.35 * F.one_hot(y[1:], C), y[1:], reduction="sum") / N
    torch.testing.assert_close(mine(x, y), expected)


def test_without_the_library_the_error_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['pytorch_metric_learning'] = None\n"
        "import marginkernels.compat\n"
        "try:\n"
        "    import marginkernels.compat.metric_learning\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    root = Path(marginkernels.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "pip install pytorch-metric-learning" in done.stdout, done.stderr
