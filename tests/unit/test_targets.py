"""Weights of classes and mixed labels: against torch's cross-entropy, and against the two losses that a mix is made of."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers.chunks import chunks_of

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED

N, D, C = 9, 16, 23
BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
#: One head of each shape of problem: plain, raw sides, a scale per row, trained, both hard transforms, state, a term of its own, draws.
HEADS = ["arcface", "softmax", "lsoftmax", "sphereface", "l2-softmax-trainable", "mv-arc", "curricularface", "adacos", "adaface", "magface"]
HEADS += ["elasticface-plus", "arcface-per-class", "arcface-focal"]


def problem(seed=0, dtype=torch.float32):
    """Labels with one ignored row each, not the same; weights of which one is 0."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((N, D), (C, D), (C,)))
    y, other = (torch.randint(C, (N,), generator=g) for _ in range(2))
    y[2], other[5] = -100, -100
    weight = torch.rand(C, generator=g, dtype=torch.float64).to(dtype)
    weight[y[0]] = 0
    return x * 4, w, b, y, other, weight


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def close(got, want, dtype):
    for one, other in zip(got, want, strict=True):
        assert testing.relative_error(one, other) <= testing.TOLERANCE[dtype]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weight_is_that_of_torch(backend, reduction, smoothing):
    x, w, b, y, _, weight = problem()
    x, w, b = (v.requires_grad_() for v in (x, w, b))
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = mk.margin_cross_entropy(x, w, y, margin=mk.NormFace(16.0), bias=b, class_weight=weight, backend=backend, **options)
    x2, w2, b2 = (v.detach().double().requires_grad_() for v in (x, w, b))
    want = F.cross_entropy(16 * F.normalize(x2) @ F.normalize(w2).T + b2, y, weight=weight.double(), **options)
    close(gradients(got, x, w, b), gradients(want, x2, w2, b2), torch.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_class_weight_on_every_shape_of_head(backend, name, smoothing):
    """Against the reference, in chunks too: hard transforms sum their logits in a pass that knows the weights."""
    x, w, b, y, _, weight = problem(1)
    case = testing.Case(x, w, y, b)
    options = {"class_weight": weight, "label_smoothing": smoothing}
    want = testing.run(case, testing.HEADS[name](C), "reference", dtype=torch.float64, **options)
    got = testing.run(case, testing.HEADS[name](C), backend, **options)
    for key, v in want.items():
        assert testing.relative_error(got[key], v) < 2 * testing.TOLERANCE[torch.float32], key


def test_equal_weights_are_no_weights():
    x, w, b, y, _, _ = problem(2)
    for reduction in ("mean", "sum"):
        for smoothing in (0.0, 0.2):
            options = {"margin": mk.CosFace(), "bias": b, "reduction": reduction, "label_smoothing": smoothing}
            want = mk.margin_cross_entropy(x, w, y, **options)
            got = mk.margin_cross_entropy(x, w, y, class_weight=torch.full((C,), 3.0), **options)
            torch.testing.assert_close(got, want if reduction == "mean" else 3 * want)


def test_a_mean_over_no_weight_is_zero():
    x, w, _, y, _, weight = problem()
    assert mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), class_weight=weight * 0) == 0
    assert mk.margin_cross_entropy(x, w, torch.full((N,), -100), margin=mk.ArcFace(), class_weight=weight) == 0


def mixed_longhand(x, w, labels, lam, weight, reduction, loss):
    """``lam L(labels[0]) + (1 - lam) L(labels[1])`` by the rows' losses, each sum over its own weights."""
    total = 0
    for y, share in zip(labels, (lam, 1 - lam), strict=True):
        rows = share * loss(x, w, y)
        if reduction != "none":
            of_rows = torch.where(y >= 0, 1.0 if weight is None else weight.double()[y.clamp_min(0)], 0.0)
            rows = rows.sum() / of_rows.sum()
        total = total + rows
    return total


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mix_is_the_sum_of_two_losses(backend, name, reduction, weighted):
    x, w, _, y, other, weight = problem(3)
    weight = weight if weighted else None
    margin = testing.HEADS[name](C).eval()
    for lam in (0.3, torch.tensor(0.0), torch.rand(N, generator=torch.Generator().manual_seed(0))):
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        options = {"margin": copy.deepcopy(margin), "class_weight": weight, "label_smoothing": 0.1}
        got = mk.margin_cross_entropy(*leaves, y, mix=(other, lam), reduction=reduction, backend=backend, **options)
        wide = [v.double().requires_grad_() for v in (x, w)]
        options |= {"class_weight": None if weight is None else weight.double(), "reduction": "none", "backend": "reference"}
        lam = lam.double() if isinstance(lam, torch.Tensor) else lam
        want = mixed_longhand(*wide, (y, other), lam, weight, reduction, lambda *of, o=options: mk.margin_cross_entropy(*of, **o))
        for one, two in zip(gradients(got, *leaves), gradients(want, *wide), strict=True):
            assert testing.relative_error(one, two) < 2 * testing.TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["curricularface", "adacos", "adaface", "elasticface", "sphereface-annealed"])
def test_a_mix_moves_the_state_by_the_first_labels(backend, name):
    x, _, _, y, other, _ = problem(4)
    plain, mixed = testing.HEADS[name](C), testing.HEADS[name](C)
    one, two = (mk.MarginHead(D, C, m, backend=backend) for m in (plain, mixed))
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        one(x, y)
        two(x, y, mix=(other, 0.25))
        for key, v in plain.named_buffers():
            torch.testing.assert_close(dict(mixed.named_buffers())[key], v, msg=key)
        for key, v in one.stats.items():
            torch.testing.assert_close(two.stats[key], v, msg=key)
    if name == "elasticface" and backend != "reference":
        torch.testing.assert_close(mixed.drawn, plain.drawn, rtol=0, atol=0, equal_nan=True)


def test_a_mix_draws_the_classes_of_both_labels():
    x, _, _, y, other, _ = problem(5)
    head = mk.MarginHead(D, C, mk.ArcFace(), sample_rate=0.1, sparse_grad=False)
    head(x, y, mix=(other, 0.5)).backward()
    drawn = set(head.sampler.index.tolist())
    assert {*y[y >= 0].tolist(), *other[other >= 0].tolist()} <= drawn
    assert head.sampler.draws == 1
    met = {*y[y >= 0].tolist(), *other[other >= 0].tolist()}
    assert all(head.weight.grad[c].any() for c in met)


def test_sampled_classes_and_their_weights():
    """The classes that are not drawn are as if they were not there, also to the smoothing: the loss is that of a head of the drawn ones."""
    x, _, _, y, _, weight = problem(6)
    for margin in (mk.CosFace(), mk.MVSoftmax()):
        head = mk.MarginHead(D, C, margin, sample_rate=0.5, label_smoothing=0.2, class_weight=weight, log_q=False, sparse_grad=False)
        got = head(x, y)
        drawn = head.sampler.index
        place = torch.full((C,), -100).index_copy(0, drawn, torch.arange(len(drawn)))
        labels = torch.where(y < 0, -100, place[y.clamp_min(0)])
        options = {"margin": margin, "label_smoothing": 0.2, "class_weight": weight[drawn], "backend": "reference"}
        want = mk.margin_cross_entropy(
            x.double(), head.weight[drawn].double(), labels, **options | {"class_weight": weight[drawn].double()}
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_the_heads_buffer():
    """A copy, part of the state dict, moved with the head, and there again after the meta device."""
    x, _, _, y, _, weight = problem(7)
    head = mk.MarginHead(D, C, mk.ArcFace(), class_weight=weight.half())
    assert head.class_weight.dtype == torch.float32
    assert "class_weight" in head.state_dict()
    assert "class_weight" not in mk.MarginHead(D, C, mk.ArcFace()).state_dict()
    want = mk.margin_cross_entropy(x, head.weight, y, margin=mk.ArcFace(), class_weight=weight.half().float())
    weight.zero_()
    torch.testing.assert_close(head(x, y), want)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = mk.MarginHead(D, C, mk.ArcFace(), class_weight=torch.ones(C))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x, y), head(x, y))
    assert torch.equal(copy.deepcopy(head)(x, y), head(x, y))
    with torch.device("meta"):
        deferred = mk.MarginHead(D, C, mk.ArcFace(), class_weight=torch.arange(1.0, C + 1, device="cpu"))
    deferred = deferred.to_empty(device="cpu")
    deferred.reset_parameters()
    assert torch.equal(deferred.class_weight, torch.arange(1.0, C + 1))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiled(backend):
    torch._dynamo.reset()
    x, _, _, y, other, weight = problem(8)
    head = mk.MarginHead(D, C, mk.CurricularFace(), class_weight=weight, label_smoothing=0.1, backend=backend)
    compiled = copy.deepcopy(head)
    step = torch.compile(lambda *of: compiled(*of[:2], mix=of[2:]), fullgraph=True)
    for k in range(3):
        lam = torch.rand(N, generator=torch.Generator().manual_seed(k))
        a, b = head(x, y, mix=(other, lam)), step(x, y, other, lam)
        assert torch.equal(a, b)
        a.backward(), b.backward()
    assert torch.equal(head.weight.grad, compiled.weight.grad)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"class_weight": torch.ones(C + 1)}, ValueError, rf"class_weight: expected shape \({C},\), .* got \({C + 1},\)"),
        ({"class_weight": [1.0] * C}, TypeError, "class_weight: expected a torch.Tensor, got list"),
        ({"class_weight": torch.ones(C, dtype=torch.int64)}, TypeError, "class_weight: expected float16"),
        ({"class_weight": -torch.ones(C)}, ValueError, "class_weight: expected finite numbers >= 0, got values from -1 to -1"),
        ({"class_weight": torch.full((C,), torch.nan)}, ValueError, "class_weight: expected finite numbers"),
        ({"class_weight": torch.full((C,), torch.inf)}, ValueError, "class_weight: expected finite numbers"),
        ({"class_weight": torch.ones(C).requires_grad_()}, ValueError, "class_weight: .* not differentiated"),
        ({"class_weight": torch.ones(C, device="meta")}, ValueError, "class_weight: expected device cpu"),
        ({"mix": torch.zeros(N).long()}, TypeError, r"mix: expected \(labels_b, lam\), got Tensor"),
        ({"mix": (torch.zeros(N).long(),)}, TypeError, r"mix: expected \(labels_b, lam\), got 1 values"),
        ({"mix": (torch.zeros(N), 0.5)}, TypeError, "mix: in labels_b expected torch.int64, got torch.float32"),
        ({"mix": (torch.zeros(N - 1).long(), 0.5)}, ValueError, rf"mix: in labels_b expected shape \({N},\)"),
        ({"mix": (torch.full((N,), C), 0.5)}, ValueError, rf"labels: expected values in \[0, {C}\)"),
        ({"mix": (torch.zeros(N).long(), 1.5)}, ValueError, r"mix: lam: expected a number in \[0, 1\], got 1.5"),
        ({"mix": (torch.zeros(N).long(), "a")}, TypeError, "mix: lam: expected a number, got 'a'"),
        ({"mix": (torch.zeros(N).long(), torch.ones(N + 1))}, ValueError, rf"mix: lam: expected a number or shape \(\) or \({N},\)"),
        ({"mix": (torch.zeros(N).long(), torch.full((N,), -0.1))}, ValueError, r"mix: lam: expected numbers in \[0, 1\]"),
        ({"mix": (torch.zeros(N).long(), torch.full((N,), torch.nan))}, ValueError, r"mix: lam: expected numbers in \[0, 1\]"),
        ({"mix": (torch.zeros(N).long(), torch.ones(N).long())}, TypeError, "mix: lam: expected a number or a floating tensor"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_refused(options, error, says, backend):
    x, w, _, y, _, _ = problem()
    with pytest.raises(error, match=says):
        mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), backend=backend, **options)
    if "class_weight" in options and "device" not in says and "not differentiated" not in says:
        with pytest.raises(error, match="class_weight"):
            mk.MarginHead(D, C, mk.ArcFace(), **options)


def test_no_rows():
    x, w, _, y, other, weight = problem()
    x.requires_grad_()
    loss = mk.margin_cross_entropy(x[:0], w, y[:0], margin=mk.AdaFace(), mix=(other[:0], torch.ones(0)), class_weight=weight)
    assert loss == 0
    loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("width", [1, 5, 9])
def test_chunks_of_classes(width):
    x, w, b, y, other, weight = problem(9)
    case = testing.Case(x, w, y, b)
    for name in ("arcface", "mv-arc", "curricularface"):
        options = {"class_weight": weight, "label_smoothing": 0.3, "mix": (other, 0.4)}
        want = testing.run(case, testing.HEADS[name](C), "reference", dtype=torch.float64, **options)
        with chunks_of(width):
            got = testing.run(case, testing.HEADS[name](C), "torch", **options)
        for key, v in want.items():
            assert testing.relative_error(got[key], v) < 2 * testing.TOLERANCE[torch.float32], (name, key)
