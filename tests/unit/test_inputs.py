"""Bad input gets an error that names the argument, what was expected and what came; odd but legal input works and stays finite."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

N, D, C = 6, 16, 11
X, W, Y = torch.randn(N, D), torch.randn(C, D), torch.arange(N)
BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]


def call(x=X, w=W, y=Y, margin=None, **options):
    return mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace() if margin is None else margin, **options)


BAD = {
    # what is called: (error, the argument it names, something of what came)
    "label too large": (lambda: call(y=torch.tensor([0, 1, 2, 3, 4, 11])), ValueError, "labels", "11"),
    "label negative": (lambda: call(y=torch.tensor([0, 1, -1, 3, 4, 5])), ValueError, "labels", "-1"),
    "labels far off": (lambda: call(y=torch.tensor([0, 2**40, -(2**40), 3, 4, 5])), ValueError, "labels", str(2**40)),
    "ignore_index of another": (lambda: call(y=torch.tensor([-100, 1, 2, 3, 4, 5]), ignore_index=-1), ValueError, "labels", "-100"),
    "labels int32": (lambda: call(y=Y.int()), TypeError, "labels", "int32"),
    "labels float": (lambda: call(y=Y.float()), TypeError, "labels", "float32"),
    "labels one-hot": (lambda: call(y=torch.eye(N, C).long()), ValueError, "labels", "(6, 11)"),
    "labels short": (lambda: call(y=Y[:4]), ValueError, "labels", "(4,)"),
    "labels a list": (lambda: call(y=[0, 1, 2, 3, 4, 5]), TypeError, "labels", "list"),
    "labels elsewhere": (lambda: call(y=Y.to("meta")), ValueError, "labels", "meta"),
    "weight elsewhere": (lambda: call(w=W.to("meta")), ValueError, "weight", "meta"),
    "weight transposed": (lambda: call(w=W.T), ValueError, "weight", "(16, 11)"),
    "weight flat": (lambda: call(w=W.flatten()), ValueError, "weight", "(176,)"),
    "weight without classes": (lambda: call(w=W[:0]), ValueError, "weight", "(0, 16)"),
    "weight integer": (lambda: call(w=W.long()), TypeError, "weight", "int64"),
    "weight finer than embeddings": (lambda: call(w=W.double()), TypeError, "weight", "float64"),
    "embeddings nested": (lambda: call(x=torch.nested.nested_tensor([X[:2], X[:3]])), TypeError, "embeddings", "nested"),
    "margin without values": (lambda: call(margin=mk.CurricularFace().to("meta")), ValueError, "margin", "meta"),
    "weight sparse": (lambda: call(w=W.to_sparse()), TypeError, "weight", "sparse"),
    "embeddings integer": (lambda: call(x=X.long()), TypeError, "embeddings", "int64"),
    "embeddings complex": (lambda: call(x=X.to(torch.complex64)), TypeError, "embeddings", "complex64"),
    "embeddings of three axes": (lambda: call(x=X[None]), ValueError, "embeddings", "(1, 6, 16)"),
    "embeddings without dimensions": (lambda: call(x=X[:, :0], w=W[:, :0]), ValueError, "embeddings", "(6, 0)"),
    "embeddings an array": (lambda: call(x=X.numpy()), TypeError, "embeddings", "ndarray"),
    "bias of wrong length": (lambda: call(bias=torch.zeros(C + 1)), ValueError, "bias", "(12,)"),
    "bias integer": (lambda: call(bias=torch.zeros(C, dtype=torch.int64)), TypeError, "bias", "int64"),
    "reduction unknown": (lambda: call(reduction="avg"), ValueError, "reduction", "avg"),
    "backend unknown": (lambda: call(backend="cudnn"), ValueError, "backend", "cudnn"),
    "backend that cannot": (lambda: call(backend="cuda"), ValueError, "backend", "cpu"),
    "smoothing above one": (lambda: call(label_smoothing=1.5), ValueError, "label_smoothing", "1.5"),
    "smoothing a string": (lambda: call(label_smoothing="0.1"), TypeError, "label_smoothing", "0.1"),
    "smoothing nan": (lambda: call(label_smoothing=math.nan), ValueError, "label_smoothing", "nan"),
    "workspace nan": (lambda: call(workspace_mb=math.nan), ValueError, "workspace_mb", "nan"),
    "workspace negative": (lambda: call(workspace_mb=-1), ValueError, "workspace_mb", "-1"),
    "ignore_index a float": (lambda: call(ignore_index=0.5), TypeError, "ignore_index", "0.5"),
    "margin a class": (lambda: call(margin=mk.ArcFace), TypeError, "margin", "ArcFace"),
    "margin a number": (lambda: call(margin=0.5), TypeError, "margin", "0.5"),
    "scale negative": (lambda: mk.CosFace(scale=-1.0), ValueError, "scale", "-1"),
    "scale zero": (lambda: mk.ArcFace(scale=0), ValueError, "scale", "0"),
    "scale infinite": (lambda: mk.NormFace(scale=math.inf), ValueError, "scale", "inf"),
    "scale nan": (lambda: mk.NormFace(scale=math.nan), ValueError, "scale", "nan"),
    "scale a string": (lambda: mk.NormFace(scale="64"), TypeError, "scale", "64"),
    "arc margin in degrees": (lambda: mk.ArcFace(margin=28.6), ValueError, "margin", "28.6"),
    "arc margin negative": (lambda: mk.ArcFace(margin=-0.1), ValueError, "margin", "-0.1"),
    "beyond_pi unknown": (lambda: mk.ArcFace(beyond_pi="hard"), ValueError, "beyond_pi", "hard"),
    "gradient unknown": (lambda: mk.ArcFace(gradient="straight"), ValueError, "gradient", "straight"),
    "cos margin too large": (lambda: mk.CosFace(margin=3.0), ValueError, "margin", "3.0"),
    "m1 zero": (lambda: mk.CombinedMargin(m1=0.0), ValueError, "m1", "0.0"),
    "m2 negative": (lambda: mk.CombinedMargin(m2=-0.2), ValueError, "m2", "-0.2"),
    "m3 negative": (lambda: mk.CombinedMargin(m3=-0.2), ValueError, "m3", "-0.2"),
    "sphere margin fractional": (lambda: mk.SphereFace(margin=1.5), ValueError, "margin", "1.5"),
    "sphere annealing a number": (lambda: mk.SphereFace(annealing=5.0), TypeError, "annealing", "5.0"),
    "annealing negative": (lambda: mk.Annealing(minimum=-1.0), ValueError, "minimum", "-1"),
    "alpha negative": (lambda: mk.L2Softmax(alpha=-3.0), ValueError, "alpha", "-3"),
    "alpha's bound for two classes": (lambda: mk.L2Softmax(num_classes=2), ValueError, "num_classes", "2"),
    "adacos for two classes": (lambda: mk.AdaCos(2), ValueError, "num_classes", "2"),
    "mv kind": (lambda: mk.MVSoftmax(kind="cos"), ValueError, "kind", "cos"),
    "mv t": (lambda: mk.MVSoftmax(t=-0.2), ValueError, "t", "-0.2"),
    "momentum": (lambda: mk.CurricularFace(momentum=1.5), ValueError, "momentum", "1.5"),
    "class margins in degrees": (lambda: mk.ArcFace(margin=torch.tensor([0.5, 28.6])), ValueError, "margin", "28.6"),
    "class margins nan": (lambda: mk.CosFace(margin=torch.tensor([0.5, math.nan])), ValueError, "margin", "nan"),
    "class margins of pi": (lambda: mk.ArcFace(margin=torch.full((3,), math.pi)), ValueError, "margin", "3.14"),
    "class margins of columns": (lambda: mk.CosFace(margin=torch.zeros(C, 1)), ValueError, "margin", "(11, 1)"),
    "class margin of no shape": (lambda: mk.CosFace(margin=torch.tensor(0.5)), ValueError, "margin", "()"),
    "class margins of integers": (lambda: mk.CosFace(margin=torch.ones(C).long()), TypeError, "margin", "int64"),
    "class margins of others": (lambda: mk.MarginHead(D, C, mk.ArcFace(margin=torch.zeros(12))), ValueError, "margin", "12"),
    "class margins of others, called": (lambda: call(margin=mk.CosFace(margin=torch.zeros(10))), ValueError, "margin", "10"),
    "class margins on meta": (lambda: mk.CosFace(margin=torch.zeros(C, device="meta")), ValueError, "margin", "meta"),
    "class margins set to others": (lambda: mk.CosFace(margin=torch.zeros(C)).set_margin(torch.zeros(3)), ValueError, "margin", "3"),
    "class margins where is one": (lambda: mk.CosFace().set_margin(torch.zeros(C)), TypeError, "margin", "tensor"),
    "class margins set too large": (lambda: mk.CosFace(margin=torch.zeros(C)).set_margin(2.5), ValueError, "margin", "2.5"),
    "counts negative": (lambda: mk.margins_from_counts([3, -1]), ValueError, "counts", "-1"),
    "counts of columns": (lambda: mk.margins_from_counts(torch.ones(3, 1)), ValueError, "counts", "(3, 1)"),
    "counts none": (lambda: mk.margins_from_counts([]), ValueError, "counts", "(0,)"),
    "counts a string": (lambda: mk.margins_from_counts("many"), TypeError, "counts", "many"),
    "counts low above high": (lambda: mk.margins_from_counts([1, 2], low=0.5, high=0.1), ValueError, "high", "0.1"),
    "counts power": (lambda: mk.margins_from_counts([1, 2], power=math.inf), ValueError, "power", "inf"),
    "elastic kind": (lambda: mk.ElasticFace(kind="am"), ValueError, "kind", "am"),
    "elastic margin": (lambda: mk.ElasticFace(margin=28.6), ValueError, "margin", "28.6"),
    "elastic std": (lambda: mk.ElasticFace(std=-0.1), ValueError, "std", "-0.1"),
    "elastic plus": (lambda: mk.ElasticFace(plus=True), ValueError, "plus", "True"),
    "elastic seed": (lambda: mk.ElasticFace(seed=0.5), ValueError, "seed", "0.5"),
    "l-softmax margin": (lambda: mk.LSoftmax(margin=2.5), ValueError, "margin", "2.5"),
    "l-softmax scale": (lambda: mk.LSoftmax(scale=None), TypeError, "scale", "None"),
    "ada margin in degrees": (lambda: mk.AdaFace(margin=22.9), ValueError, "margin", "22.9"),
    "ada h zero": (lambda: mk.AdaFace(h=0), ValueError, "h", "0"),
    "ada momentum": (lambda: mk.AdaFace(momentum=-0.01), ValueError, "momentum", "-0.01"),
    "ada scale none": (lambda: mk.AdaFace(scale=None), TypeError, "scale", "None"),
    "mag norms a number": (lambda: mk.MagFace(norm_range=110.0), TypeError, "norm_range", "110.0"),
    "mag norms from zero": (lambda: mk.MagFace(norm_range=(0.0, 110.0)), ValueError, "norm_range", "0.0"),
    "mag norms in reverse": (lambda: mk.MagFace(norm_range=(110.0, 10.0)), ValueError, "norm_range", "10.0"),
    "mag margins in reverse": (lambda: mk.MagFace(margin_range=(0.8, 0.45)), ValueError, "margin_range", "0.45"),
    "mag margins of three": (lambda: mk.MagFace().set_margin((0.1, 0.2, 0.3)), TypeError, "margin_range", "0.3"),
    "mag margins past pi": (lambda: mk.MagFace().set_margin(0.1, 3.2), ValueError, "margin_range", "3.2"),
    "mag weight": (lambda: mk.MagFace(norm_weight=-35.0), ValueError, "norm_weight", "-35"),
    "mag beyond_pi": (lambda: mk.MagFace(beyond_pi=True), ValueError, "beyond_pi", "True"),
    "focal": (lambda: mk.CosFace(focal_gamma=-2.0), ValueError, "focal_gamma", "-2"),
    "head without classes": (lambda: mk.MarginHead(D, 0, mk.CosFace()), ValueError, "num_classes", "0"),
    "head of fractional dimension": (lambda: mk.MarginHead(0.5, C, mk.CosFace()), ValueError, "embedding_dim", "0.5"),
    "head without margin": (lambda: mk.MarginHead(D, C, "arcface"), TypeError, "margin", "arcface"),
    "head reduction": (lambda: mk.MarginHead(D, C, mk.CosFace(), reduction="max"), ValueError, "reduction", "max"),
    "head of integers": (lambda: mk.MarginHead(D, C, mk.CosFace(), dtype=torch.int64), TypeError, "dtype", "int64"),
    "head on wrong embeddings": (lambda: mk.MarginHead(D + 1, C, mk.CosFace())(X, Y), ValueError, "weight", "(11, 17)"),
    "topk of too many": (lambda: mk.MarginHead(D, C, mk.CosFace()).topk(X, 12), ValueError, "k", "12"),
    "topk of none": (lambda: mk.MarginHead(D, C, mk.CosFace()).topk(X, 0), ValueError, "k", "0"),
    "topk of integers": (lambda: mk.MarginHead(D, C, mk.CosFace()).topk(X.long()), TypeError, "embeddings", "int64"),
    "center labels": (lambda: mk.CenterLoss(C, D)(X, Y + 20), ValueError, "labels", "20"),
    "embeddings on meta": (lambda: call(X.to("meta"), W.to("meta"), Y.to("meta")), ValueError, "embeddings", "meta"),
    "head on meta": (
        lambda: mk.MarginHead(D, C, mk.CosFace(), device="meta")(X.to("meta"), Y.to("meta")),
        ValueError,
        "embeddings",
        "meta",
    ),
    "arc scale none": (lambda: mk.ArcFace(scale=None), TypeError, "scale", "None"),
    "cos scale none": (lambda: mk.CosFace(scale=None), TypeError, "scale", "None"),
    "normface scale none": (lambda: mk.NormFace(None), TypeError, "scale", "None"),
    "mv scale none": (lambda: mk.MVSoftmax(scale=None), TypeError, "scale", "None"),
    "curricular scale none": (lambda: mk.CurricularFace(scale=None), TypeError, "scale", "None"),
    "sphere margin nan": (lambda: mk.SphereFace(margin=math.nan), ValueError, "margin", "nan"),
    "sphere margin infinite": (lambda: mk.SphereFace(margin=math.inf), ValueError, "margin", "inf"),
    "sphere margin a string": (lambda: mk.SphereFace(margin="4"), ValueError, "margin", "4"),
    "numpy classes below one": (lambda: mk.MarginHead(D, np.int64(0), mk.CosFace()), ValueError, "num_classes", "0"),
    "numpy fraction": (lambda: mk.MarginHead(D, np.float64(7.5), mk.CosFace()), ValueError, "num_classes", "7.5"),
    "numpy bool": (lambda: call(ignore_index=np.bool_(True)), TypeError, "ignore_index", "True"),
    "center dimension": (lambda: mk.CenterLoss(C, D + 1)(X, Y), ValueError, "centers", "(11, 17)"),
    "center on meta": (lambda: mk.CenterLoss(C, D, device="meta")(X.to("meta"), Y.to("meta")), ValueError, "embeddings", "meta"),
    "center classes": (lambda: mk.CenterLoss(-1, D), ValueError, "num_classes", "-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad(name):
    what, error, argument, came = BAD[name]
    with pytest.raises(error) as caught:
        what()
    message = str(caught.value)
    assert message.startswith((f"{argument}:", f"annealing.{argument}:")), message
    assert "expected" in message or argument == "backend", message
    assert came in message, message


def test_numpy_integers():
    classes, dim = np.int64(C), np.int32(D)
    head = mk.MarginHead(dim, classes, mk.AdaCos(classes))
    y = Y.clone()
    y[2] = -7
    assert math.isfinite(head(X, Y).detach())
    assert type(head.num_classes) is type(head.margin.num_classes) is int
    assert mk.L2Softmax(num_classes=classes).alpha == mk.L2Softmax(num_classes=C).alpha
    assert mk.SphereFace(margin=np.int64(3)).margin == 3
    assert mk.CosFace(scale=np.float32(32.0), margin=np.int64(0)).scale == 32.0
    assert math.isfinite(call(y=y, ignore_index=np.int64(-7)).detach())
    center = mk.CenterLoss(classes, dim, ignore_index=np.int64(-7))
    assert math.isfinite(center(X, y).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends_of_ranges_are_in_them(backend):
    """What an error says is allowed is allowed, ends included; what lies just beyond is not."""
    pi = math.nextafter(math.pi, 0)
    margins = [mk.CosFace(margin=0.0), mk.CosFace(margin=2.0), mk.ArcFace(margin=0.0), mk.ArcFace(margin=pi), mk.CombinedMargin(m3=2.0)]
    margins += [mk.CombinedMargin(m1=1e-3, m2=pi), mk.MVSoftmax("am", margin=2.0), mk.MVSoftmax("arc", margin=pi, t=0.0)]
    margins += [mk.CurricularFace(margin=pi, momentum=0.0), mk.CurricularFace(momentum=1.0), mk.SphereFace(margin=1), mk.AdaCos(3)]
    margins += [mk.AdaFace(margin=pi, momentum=0.0), mk.AdaFace(margin=0.0, momentum=1.0)]
    margins += [mk.ElasticFace(margin=pi, std=0.0), mk.ElasticFace("cos", margin=2.0, seed=-(2**63)), mk.ElasticFace(seed=2**63 - 1)]
    margins += [mk.MagFace(margin_range=(0.0, pi), norm_weight=0.0), mk.MagFace(margin_range=(pi, pi))]
    for margin in margins:
        c = getattr(margin, "num_classes", C)
        for smoothing in (0, 1, 1.0):
            assert math.isfinite(call(w=W[:c], y=Y % c, margin=margin, label_smoothing=smoothing, backend=backend))
    above = math.nextafter(2.0, 3)
    for make in (
        lambda: mk.CosFace(margin=above),
        lambda: mk.CombinedMargin(m3=above),
        lambda: mk.ArcFace(margin=math.pi),
        lambda: mk.CombinedMargin(m2=math.pi),
        lambda: mk.MVSoftmax("arc", margin=math.pi),
        lambda: mk.MVSoftmax("am", margin=above),
        lambda: mk.CurricularFace(margin=math.pi),
        lambda: mk.CurricularFace(momentum=math.nextafter(1.0, 2)),
        lambda: mk.AdaFace(margin=math.pi),
        lambda: call(label_smoothing=math.nextafter(1.0, 2), backend=backend),
        lambda: call(label_smoothing=-5e-324, backend=backend),
    ):
        with pytest.raises(ValueError, match=": expected"):
            make()


def test_workspace_in_bytes():
    from marginkernels.loss import workspace_bytes

    assert [workspace_bytes(mb) for mb in (None, 0, 1, 0.5, 3.0, math.inf)] == [None, 0, 1 << 20, 1 << 19, 3 << 20, 1 << 60]


def test_margin_must_define_target():
    with pytest.raises(NotImplementedError, match="must define target"):
        call(margin=mk.Margin())


def all_finite(out):
    return {k: bool(torch.isfinite(v).all()) for k, v in out.items()} == dict.fromkeys(out, True)


def odd_cases():
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(N, D, generator=g), torch.randn(C, D, generator=g)
    ones = torch.ones(N, dtype=torch.int64)
    zero_x, zero_w = x.clone(), w.clone()
    zero_x[2] = 0
    zero_w[[1, 7]] = 0
    mixed_x = x * torch.tensor([1e18, 1e-18, 1, 1e18, 1e-18, 1])[:, None]
    mixed_w = w * torch.logspace(-18, 18, C)[:, None]
    return {
        "zero row": (zero_x, w, Y),
        "zero center": (x, zero_w, Y),
        "all zero": (x * 0, w * 0, Y),
        "equal to center": (w[Y].clone(), w, Y),
        "opposite to center": (-w[Y].clone(), w, Y),
        "multiple of center": (3 * w[Y], w, Y),
        "all centers equal": (x, w[:1].repeat(C, 1), Y),
        "large norms": (x * 1e18, w * 1e18, Y),
        "small norms": (x * 1e-18, w * 1e-18, Y),
        "large and small norms": (mixed_x, mixed_w, Y),
        "everything ignored": (x, w, Y * 0 - 100),
        "some ignored": (x, w, torch.tensor([-100, 1, 2, -100, 4, 5])),
        "no rows": (x[:0], w, Y[:0]),
        "one row": (x[:1], w, Y[:1]),
        "one class": (x, w[:1], ones * 0),
        "two classes": (x, w[:2], ones),
        "one dimension": (x[:, :1], w[:, :1], Y),
        "repeated labels": (x, w, ones),
        "one-hot embeddings": (torch.eye(N, D), torch.eye(C, D), Y),
    }


SMALL_HEADS = {k: v for k, v in testing.HEADS.items() if not k.startswith("arcface-")} | {
    "arcface-1024": lambda c: mk.ArcFace(scale=1024.0),
    "cosface-1024": lambda c: mk.CosFace(scale=1024.0, focal_gamma=0.5),
    "curricularface-1024": lambda c: mk.CurricularFace(scale=1024.0),
    "arcface-detached": testing.HEADS["arcface-detached"],
    "normface-tiny-scale": lambda c: mk.NormFace(scale=1e-4),
}


#: Where an angle is 0 or pi the margin's slope is as steep as the dtype resolves, and with one dimension no direction is left to move in:
#: the loss is compared there, the gradients are only finite.
STEEP = ("equal to center", "opposite to center", "multiple of center", "one dimension", "one-hot embeddings")
#: Where all classes are alike, gradients are nothing but the difference of equal terms.
CANCELLING = ("one class", "all centers equal")


@functools.cache
def odd_reference(name, head, dtype, option):
    """Loss and gradients in float64, of inputs that were rounded to ``dtype``."""
    x, w, y = odd_cases()[name]
    case = testing.Case(x.to(dtype), w, y, odd_bias(w))
    return testing.run(case, SMALL_HEADS[head](w.shape[0]), "reference", dtype=torch.float64, **ODD_OPTIONS[option])


def odd_bias(w):
    return torch.randn(w.shape[0], generator=torch.Generator().manual_seed(2))


ODD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
ODD_OPTIONS = ({}, {"label_smoothing": 0.1}, {"reduction": "none"})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", odd_cases())
def test_odd_but_legal(name, backend):
    """Finite everywhere, and what the reference in float64 says of the same inputs."""
    x, w, y = odd_cases()[name]
    for dtype, head in itertools.product((torch.float32, torch.bfloat16), SMALL_HEADS):
        if w.shape[0] < 3 and head in ("adacos", "adacos-fixed", "l2-softmax", "l2-softmax-trainable"):
            continue  # their scale is made for C >= 3, and for the head's C
        case = testing.Case(x.to(dtype), w, y, odd_bias(w))
        for i, options in enumerate(ODD_OPTIONS):
            if head in testing.HEADS and testing.accepted(head, **options) != options:
                continue
            out = testing.run(case, SMALL_HEADS[head](w.shape[0]), backend, **options)
            assert all_finite(out), (head, dtype, options, {k: float(v.abs().max()) if v.numel() else None for k, v in out.items()})
            want = odd_reference(name, head, dtype, i)
            scale, eps, fair = float(getattr(SMALL_HEADS[head](3), "scale", None) or 1), torch.finfo(dtype).eps, None
            for key, v in want.items():
                if key != "loss" and (name in STEEP or scale * eps > 0.5):  # bfloat16 at a scale of 1024 says little of a softmax
                    continue
                off, right = float((out[key].double() - v).norm()), ODD_TOLERANCE[dtype] * float(v.norm())
                if off > right:  # what cancels is off by what rounding makes of the logits: thrice what the reference has in float32
                    fair = fair or testing.run(case, SMALL_HEADS[head](w.shape[0]), "reference", **options)
                    right += 3 * float((fair[key].double() - v).norm())
                    if key == "loss" or name in CANCELLING:  # a few roundings of a logit
                        right += 4 * eps * scale * v.numel() ** 0.5
                assert off <= right, (head, dtype, options, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn_from(backend):
    for x, y in ((X, Y * 0 - 100), (X[:0], Y[:0])):
        for reduction in ("mean", "sum"):
            out = testing.run(testing.Case(x, W, y, None), mk.ArcFace(), backend, reduction=reduction)
            assert all(float(v.abs().sum()) == 0 for v in out.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_do_not_count(backend):
    y = Y.clone()
    y[[1, 4]] = 255
    kept = y != 255
    for name in ("arcface", "adacos", "curricularface", "mv-arc", "arcface-focal"):
        for smoothing in (0.0, 0.1):
            some = testing.run(testing.Case(X, W, y, None), testing.HEADS[name](C), backend, ignore_index=255, label_smoothing=smoothing)
            only = testing.run(testing.Case(X[kept], W, y[kept], None), testing.HEADS[name](C), backend, label_smoothing=smoothing)
            assert testing.relative_error(some["loss"], only["loss"]) < 1e-6
            assert testing.relative_error(some["dx"][kept], only["dx"]) < 1e-5
            assert float(some["dx"][~kept].abs().sum()) == 0
            assert testing.relative_error(some["dw"], only["dw"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    wide = torch.randn(N, 2 * D)
    variants = [
        (wide[:, ::2], W, Y),
        (torch.randn(D, N).T, W, Y),
        (X, torch.randn(D, C).T, Y),
        (X, torch.randn(C, 3 * D)[:, D : 2 * D], Y),
        (X, torch.randn(2 * C, D)[::2], Y),
        (X, W[:1].expand(C, D), Y),
        (X[:1].expand(N, D), W, Y),
        (X, W, torch.arange(2 * N)[::2] % C),
    ]
    for x, w, y in variants:
        strided = testing.run(testing.Case(x, w, y, None), mk.ArcFace(), backend)
        plain = testing.run(testing.Case(x.contiguous(), w.contiguous(), y.contiguous(), None), mk.ArcFace(), backend)
        for name in strided:
            assert testing.relative_error(strided[name], plain[name]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_sure_rows_keep_their_gradient(backend):
    """At p = 0.9999999 the gradient is 1 - p, which a softmax that subtracts p from 1 in float32 does not have."""
    if backend == "reference":
        pytest.skip("the reference subtracts in the dtype it is given; only its float64 is a reference")
    w = torch.nn.functional.normalize(torch.randn(50, 32), dim=1)
    for scale in (12.0, 20.0, 40.0):
        case = testing.Case(w[:8] + 0.01 * torch.randn(8, 32), w, torch.arange(8), None)
        assert max(testing.errors(case, mk.NormFace(scale), backend).values()) < 2e-5


def test_refusal_lists_each_backend():
    with pytest.raises(ValueError) as caught:
        mk.margin_cross_entropy(X, W, Y, margin=mk.ArcFace(), backend="triton")
    assert "triton" in str(caught.value)
    listed = mk.backends()
    assert {"reference", "torch"} <= set(listed)
    for entry in listed.values():
        assert (entry["reason"] is None) == entry["available"]


MASKING = {"arcface": mk.ArcFace, "mv-arc": mk.MVSoftmax, "curricularface": mk.CurricularFace, "softmax": mk.Softmax}


def masked_losses(backend, margin, masked, y, **options):
    b = torch.zeros(C).index_fill(0, torch.tensor(masked), -torch.inf).requires_grad_()
    x, w = (v.clone().requires_grad_() for v in (X, W))
    losses = mk.margin_cross_entropy(x, w, y, margin=margin(), bias=b, reduction="none", backend=backend, **options)
    return losses, lambda: torch.autograd.grad(losses.sum(), (x, w, b))


@pytest.mark.parametrize("name", MASKING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes(backend, name):
    """Masked classes, all others too, are as if they were not there. As in F.cross_entropy: infinite for a masked label and with label
    smoothing (once finite on cpu, with a hard transform), NaN where every class is masked."""
    margin = MASKING[name]
    losses, grads = masked_losses(backend, margin, range(6, C), Y)
    want = mk.margin_cross_entropy(X, W[:6], Y, margin=margin(), reduction="none", backend=backend)
    torch.testing.assert_close(losses, want)
    dx, dw, db = grads()
    assert dx.isfinite().all()
    assert not dw[6:].any()
    assert not db[6:].any()
    zeros = torch.zeros_like(Y)
    losses, grads = masked_losses(backend, margin, range(1, C), zeros)
    assert not losses.any()
    assert not any(g.any() for g in grads())
    losses, grads = masked_losses(backend, margin, [0], zeros)
    assert (losses == torch.inf).all()
    assert all(g.isfinite().all() for g in grads())
    for masked in ([7], [0]):
        assert (masked_losses(backend, margin, masked, zeros, label_smoothing=0.1)[0] == torch.inf).all()
    assert masked_losses(backend, margin, range(C), Y)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_of_masked_classes(backend, monkeypatch):
    """Every class of a chunk but the first."""
    monkeypatch.setattr("marginkernels.core.numerics.CHUNK_ELEMENTS", 256)
    w = torch.randn(1500, D)
    b = torch.full((1500,), -torch.inf)
    b[:C] = 0
    w[:C] = W
    got = testing.run(testing.Case(X, w, Y, b), mk.ArcFace(), backend)
    want = testing.run(testing.Case(X, W, Y, torch.zeros(C)), mk.ArcFace(), backend)
    assert testing.relative_error(got["loss"], want["loss"]) < 1e-6
    assert testing.relative_error(got["dx"], want["dx"]) < 1e-5
    assert testing.relative_error(got["dw"][:C], want["dw"]) < 1e-5
    assert not got["dw"][C:].any()


def test_topk_of_masked_classes():
    head = mk.MarginHead(D, C, mk.ArcFace(), bias=True)
    with torch.no_grad():
        head.bias[3:] = -torch.inf
    scores, classes = head.topk(X, 5)
    assert (scores[:, :3] > -torch.inf).all()
    assert (classes[:, :3].sort(1).values == torch.arange(3)).all()
    assert (scores[:, 3:] == -torch.inf).all()
    with torch.no_grad():
        head.bias.fill_(-torch.inf)
    scores, classes = head.topk(X, 3)
    assert (scores == -torch.inf).all()
    assert (classes == torch.arange(3)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_over_one_class_is_exactly_zero(backend):
    """The sum over the other classes, none, was the rounding of an inverse norm."""
    for seed in range(20):
        case = testing.Case.random(3, 3, 1, ignored=False, seed=seed)
        loss = mk.margin_cross_entropy(case.x, case.w, case.labels, margin=mk.ArcFace(), backend=backend, label_smoothing=0.1)
        assert abs(loss) < 1e-12


def test_checkpoint_of_another_margin():
    def head(margin):
        return torch.nn.Sequential(mk.MarginHead(D, C, margin))

    with pytest.raises(RuntimeError, match=r"margin\.t .of CurricularFace, but the state dict is that of AdaCos") as caught:
        head(mk.CurricularFace()).load_state_dict(head(mk.AdaCos(C)).state_dict())
    assert "margin.s (of AdaCos, but the head's margin is CurricularFace)" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"margin\.t .of CurricularFace, but the state dict is that of a margin without it"):
        head(mk.CurricularFace()).load_state_dict(head(mk.ArcFace()).state_dict())
    found = head(mk.CurricularFace()).load_state_dict(head(mk.ArcFace()).state_dict(), strict=False)
    assert found.missing_keys == ["0.margin.t"]


def test_reference_of_a_sure_focal_row():
    """L = 2 log(1 + q) and 1 - p = q/(1 + q), q = exp(-64 sqrt(1/2)): taken from p, 1 - p would be 0 or a rounding."""
    x, w = torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    q = math.exp(-64 * (1 - math.sqrt(0.5)))
    loss = mk.margin_cross_entropy(2 * x, w, torch.tensor([0]), margin=mk.NormFace(64.0, focal_gamma=1.0), backend="reference")
    assert loss.item() == pytest.approx(math.log1p(q) * q / (1 + q), rel=1e-6)
    x = x.requires_grad_()
    bias = torch.tensor([0.0, -20.0], dtype=torch.float64)
    value = mk.margin_cross_entropy(x, w, torch.tensor([0]), margin=mk.NormFace(64.0, focal_gamma=1.0), bias=bias, backend="reference")
    q *= math.exp(-20.0)
    assert value.item() == pytest.approx(0.0, abs=q)  # the loss itself, log p, is all rounding there
    rest = mk.margin_cross_entropy(x, w, torch.tensor([1]), margin=mk.NormFace(64.0, focal_gamma=1.0), bias=bias, backend="reference")
    assert rest.item() == pytest.approx(math.log1p(1 / q) / (1 + q), rel=1e-9)
