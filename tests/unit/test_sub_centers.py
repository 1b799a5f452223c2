"""Several centers a class: the loss and its gradients against the formula of the paper, every path that a head has, what is refused, and
the dominant centers."""

import copy
import math

import pytest
import torch
from helpers import formulas as f
from helpers.chunks import chunks_of

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED, cpu
from marginkernels.core.numerics import target_rows
from marginkernels.retrieval import topk

BACKENDS = ["reference", "torch"]
SERVING = [name for name, b in FUSED.items() if b.max_sub_centers != 1 and b.unavailable_reason() is None and "cpu" in b.device_types]
OWN = [(7 * i % 37) / 32 for i in range(37)]
#: Margin, formula, and whether weights are normalized.
FORMULAS = {
    "softmax": (lambda: mk.Softmax(), f.softmax, False),
    "w-norm": (lambda: mk.Softmax(normalize_weight=True), f.w_norm_softmax, True),
    "l2": (lambda: mk.L2Softmax(12.0), f.l2_softmax(12.0), False),
    "lsoftmax": (lambda: mk.LSoftmax(3, 2.0), f.lsoftmax(3, 2.0), False),
    "sphereface": (lambda: mk.SphereFace(margin=3), f.sphereface(3), True),
    "cosface": (lambda: mk.CosFace(20.0), f.cosface(20.0, 0.35), True),
    "arcface": (lambda: mk.ArcFace(20.0, beyond_pi="none"), f.arcface(20.0, 0.5, "none"), True),
    "arcface-filtered": (lambda: mk.ArcFace(20.0, 0.3, filter_above=0.2), f.filtered(f.arcface(20.0, 0.3), 20.0, 0.2), True),
    "mv-arc": (lambda: mk.MVSoftmax(), f.mv_softmax("arc", 32.0, 0.5, 0.2), True),
    "circle": (lambda: mk.Circle(25.0), f.circle(25.0, 0.25), True),
}


def problem(n, d, c, k, dtype=torch.float64, seed=0, ignored=True):
    """Rows lie in one of k modes, and each class has a center in each, in an order of its own: so the nearest is nearer than rounding."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.eye(max(k, d), d, dtype=torch.float64)[:k]
    order = torch.stack([torch.randperm(k, generator=g) for _ in range(c)])
    w = (torch.randn(c, k, d, generator=g, dtype=torch.float64) / math.sqrt(d) + axes[order]).view(c * k, d)
    y, mode = (torch.randint(high, (n,), generator=g) for high in (c, k))
    x = 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64) / math.sqrt(d) + axes[mode]
    if ignored and n > 4:
        y[n // 2] = -100
    return testing.Case(x.to(dtype), w.to(dtype), y, torch.randn(c, generator=g, dtype=torch.float64).to(dtype))


def leaves(case, bias):
    return [v.clone().requires_grad_() for v in ((case.x, case.w, case.bias) if bias else (case.x, case.w))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name, k, backend):
    make, formula, normalized = FORMULAS[name]
    for n, c, options in ((9, 37, {}), (9, 37, {"smoothing": 0.2, "gamma": 0.7, "bias": True}), (1, 5, {}), (3, 1, {"bias": True})):
        case, bias = problem(n, 13, c, k), options.get("bias", False)
        given = leaves(case, bias)
        z = f.with_sub_centers(formula, k, normalized)(given[0], given[1], case.labels)
        smoothing, gamma = options.get("smoothing", 0.0), options.get("gamma", 0.0)
        want = f.cross_entropy(z + given[2] if bias else z, case.labels, smoothing=smoothing, gamma=gamma)
        want = [want.detach(), *torch.autograd.grad(want, given)]
        given, margin = leaves(case, bias), make()
        margin.focal_gamma = gamma
        with chunks_of(4 if backend == "torch" else None):
            loss = mk.margin_cross_entropy(
                given[0],
                given[1],
                case.labels,
                margin=margin,
                bias=given[2] if bias else None,
                label_smoothing=smoothing,
                sub_centers=k,
                backend=backend,
            )
        got = [loss.detach(), *torch.autograd.grad(loss, given)]
        for g, v in zip(got, want, strict=True):
            assert (g - v).norm() <= 1e-9 * v.norm() + 1e-12, (n, c, options)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_every_dtype(backend, k):
    for (n, d, c), dtype in ((shape, dtype) for shape in ((7, 33, 43), (1, 64, 129), (33, 64, 1)) for dtype in FUSED[backend].dtypes):
        case = problem(n, d, c, k, dtype)
        case = testing.Case(case.x, case.w, case.labels, None)
        heads = ("arcface", "curricularface", "adacos", "l2-softmax-trainable", "arcface-per-class", "softmax", "sphereface2-arc")
        for name in heads:
            # Of one row rounding is not averaged, and the gradient of a scale is the difference of two numbers that are nearly equal.
            if c > 1 and (n > 1 or (dtype.itemsize > 2 and name != "l2-softmax-trainable")):
                found = testing.errors(case, testing.HEADS[name](c), backend, sub_centers=k)
                assert max(found.values()) <= testing.TOLERANCE[dtype], (n, d, c, dtype, name, found)
        got = testing.run(case, mk.ArcFace(), backend, sub_centers=k)
        assert all(v.isfinite().all() for v in got.values())


@pytest.mark.parametrize("backend", ["reference", *SERVING])
@pytest.mark.parametrize("name", testing.HEADS)
def test_equal_sub_centers_are_one(name, backend):
    """Every head: with K times the same centers all is as with one, and together they have its gradient."""
    case = testing.Case.random(9, 16, 23, torch.float32, bias=True)
    options = testing.accepted(name, label_smoothing=0.1)
    want = testing.run(case, testing.HEADS[name](23), "reference", dtype=torch.float64, **options)
    thrice = testing.Case(case.x, case.w.repeat_interleave(3, 0), case.labels, case.bias)
    got = testing.run(thrice, testing.HEADS[name](23), backend, sub_centers=3, **options)
    got["dw"] = got["dw"].view(23, 3, 16).sum(1)
    for key, v in want.items():
        assert testing.relative_error(got[key], v) <= testing.TOLERANCE[torch.float32], key


@pytest.mark.parametrize("backend", ["reference", *SERVING])
def test_nothing_is_nan(backend):
    """No rows, one class, one row, an embedding and a center of zero, a NaN in a row that is ignored, no row with a label."""
    for n, c in ((0, 23), (1, 1), (9, 1), (9, 23)):
        case = problem(n, 16, c, 2, torch.float32, ignored=False)
        if n > 3:
            case.x[0], case.x[2], case.w[0], case.labels[2] = 0, torch.nan, 0, -100
        for labels in (case.labels, torch.full_like(case.labels, -100)):
            for name in testing.HEADS if c > 1 else ("arcface", "softmax", "mv-arc", "curricularface"):
                found = testing.run(testing.Case(case.x, case.w, labels, case.bias), testing.HEADS[name](c), backend, sub_centers=2)
                assert all(v.isfinite().all() for v in found.values()), (n, c, name)


@pytest.mark.parametrize("backend", SERVING)
def test_class_weights_mixed_labels_and_smoothing(backend):
    case, g = problem(12, 16, 21, 3, torch.float32), torch.Generator().manual_seed(3)
    mix = (torch.randint(21, (12,), generator=g), torch.rand(12, generator=g))
    for options in (
        {"mix": mix},
        {"class_weight": torch.rand(21, generator=g), "label_smoothing": 0.2},
        {"mix": mix, "label_smoothing": 0.1},
    ):
        for make in (mk.ArcFace, mk.CurricularFace, mk.LSoftmax, lambda: mk.MVSoftmax(focal_gamma=1.0)):
            found = testing.errors(case, make(), backend, sub_centers=3, **options)
            assert max(found.values()) <= testing.TOLERANCE[torch.float32], (options.keys(), found)


@pytest.mark.parametrize("backend", ["reference", *SERVING])
def test_first_of_equals_gets_the_whole_gradient(backend):
    """Equal sub-centers, an embedding of zero, centers of zero: finite, and of equals only the first has a gradient."""
    w = torch.eye(6).repeat_interleave(2, 0)
    x = torch.stack([torch.eye(6)[0] + 0.5, torch.zeros(6)])
    got = testing.run(testing.Case(x, w, torch.tensor([1, 2]), None), mk.CosFace(4.0, 0.1), backend, sub_centers=2)
    assert all(v.isfinite().all() for v in got.values())
    assert got["dw"][1::2].abs().max() == 0
    assert (got["dw"][0::2].norm(dim=1) > 0).all()
    got = testing.run(testing.Case(x, torch.zeros(6, 6), torch.tensor([1, -100]), None), mk.ArcFace(), backend, sub_centers=2)
    assert all(v.isfinite().all() for v in got.values())


@pytest.mark.skipif("cpu" not in SERVING, reason="not built")
@pytest.mark.parametrize("level", cpu.levels())
def test_search_on_every_instruction_set(level, monkeypatch):
    """Few rows and many, few classes and so many that threads share them, as many centers a class as a chunk holds; a NaN comes first."""
    monkeypatch.setattr(FUSED["cpu"], "level", level)
    for n, c, k in ((1, 50, 3), (16, 1, 2), (40, 301, 2), (40, 77, 5), (7, 3, FUSED["cpu"].max_sub_centers), (40, 4001, 3)):
        for bias in (None, torch.randn(c, generator=torch.Generator().manual_seed(2))):
            case = problem(n, 33, c, k, torch.float32)
            cos = torch.nn.functional.normalize(case.x.double()) @ torch.nn.functional.normalize(case.w.double()).T
            want = cos.unflatten(1, (-1, k)).amax(2) if bias is None else 9 * cos.unflatten(1, (-1, k)).amax(2) + bias
            want = want.topk(min(c, 9), 1)
            scores, classes = topk(case.x, case.w, min(c, 9), mk.CosFace(9.0), bias, sub_centers=k, backend="cpu")
            assert testing.relative_error(scores, want.values) < 1e-6, (n, c, k)
            assert (classes == want.indices).float().mean() > 0.99  # of the rest the scores are equal but for rounding
    for n in (2, 40):
        case = problem(n, 33, 50, 3, torch.float32)
        case.w[31, 5] = torch.nan
        scores, classes = topk(case.x, case.w, 4, sub_centers=3, backend="cpu")
        assert (classes[:, 0] == 10).all()
        assert scores[:, 0].isnan().all()


@pytest.mark.parametrize("backend", SERVING)
def test_topk_is_by_class(backend):
    case = problem(11, 16, 50, 3, torch.float32)
    cos = torch.nn.functional.normalize(case.x.double()) @ torch.nn.functional.normalize(case.w.double()).T
    want = cos.unflatten(1, (-1, 3)).amax(2).topk(7, 1)
    scores, classes = topk(case.x, case.w, 7, sub_centers=3, backend=backend)
    assert torch.equal(classes, want.indices)
    assert testing.relative_error(scores, want.values) < 1e-6
    head = mk.MarginHead(16, 50, mk.ArcFace(), sub_centers=3, backend=backend)
    head.load_state_dict({"weight": case.w})
    assert torch.equal(head.topk(case.x, 7)[1], want.indices)


def test_statistics():
    case = problem(40, 8, 5, 3, ignored=False)
    _, _, want = mk.head_losses(case.x, case.w, case.labels, margin=mk.ArcFace(), sub_centers=3, backend="reference")
    _, _, got = mk.head_losses(case.x, case.w, case.labels, margin=mk.ArcFace(), sub_centers=3, backend="torch")
    assert {k: float(v) for k, v in got.items()} == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-6)
    assert 0 < float(want["top1"]) < 1


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("log_q", [True, False])
def test_sampled_classes(sparse, log_q):
    """All sub-centers of a drawn class take part, and the loss is that of the drawn classes alone."""
    case = problem(8, 16, 60, 3, torch.float32)
    options = {"sample_rate": 0.3, "log_q": log_q, "sparse_grad": sparse, "bias": True}
    head = mk.MarginHead(16, 60, mk.ArcFace(), sub_centers=3, **options)
    head.load_state_dict(head.state_dict() | {"weight": case.w, "bias": case.bias})
    x = case.x.clone().requires_grad_()
    loss = head(x, case.labels)
    loss.backward()
    index = head.sampler.index
    rows = (index[:, None] * 3 + torch.arange(3)).flatten()
    place = torch.where(case.labels < 0, -100, torch.searchsorted(index, case.labels))
    bias = case.bias[index]
    if log_q:
        kept = torch.isin(index, case.labels)
        q = (~kept).sum() / (60 - kept.sum())
        bias = bias + torch.where(kept, 0.0, -torch.log(q))
    small = testing.Case(case.x, case.w[rows], place, bias)
    want = testing.run(small, mk.ArcFace(), "reference", dtype=torch.float64, sub_centers=3)
    dw, db = (v.grad.to_dense() for v in (head.weight, head.bias))
    assert head.weight.grad.is_sparse == sparse
    for got, name in ((loss, "loss"), (x.grad, "dx"), (dw[rows], "dw"), (db[index], "dbias")):
        assert testing.relative_error(got.detach(), want[name]) < 2e-5, name
    assert dw.norm() == dw[rows].norm()
    if sparse:
        assert head.weight.grad.is_coalesced()
        assert head.bias.grad.is_coalesced()


def test_autocast_and_compile():
    case = problem(8, 16, 20, 3, torch.float32)
    head = mk.MarginHead(16, 20, mk.CurricularFace(), sub_centers=3, backend="torch")
    head.load_state_dict(head.state_dict() | {"weight": case.w})
    torch._dynamo.reset()
    one, other = copy.deepcopy(head), torch.compile(head, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = [h(case.x, case.labels) for h in (one, other)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    assert torch.equal(one.weight.grad, head.weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        low = head.eval()(case.x, case.labels)
    assert float(low.detach()) == pytest.approx(float(head(case.x, case.labels).detach()), rel=3e-2)


def test_the_row_of_a_target():
    case = problem(30, 8, 7, 4)
    for normalize in (True, False):
        w = case.w * torch.linspace(0.2, 3, 28, dtype=torch.float64)[:, None]
        sims = case.x @ (torch.nn.functional.normalize(w) if normalize else w).T
        want = [-1 if y < 0 else max(range(4 * y, 4 * y + 4), key=lambda r, i=i: float(sims[i, r])) for i, y in enumerate(case.labels)]
        assert target_rows(case.x, w, case.labels, 4, normalize).tolist() == want
    outside = torch.tensor([-1, 7, 6] * 10)
    assert (target_rows(case.x, case.w, outside, 4, True)[:2] == -1).all()


def test_refusals():
    case, arc = problem(5, 8, 7, 3, torch.float32), mk.ArcFace()
    for bad in (0, -1, 1.5, True, "2", None):
        with pytest.raises(ValueError, match="sub_centers: expected an integer >= 1, got"):
            mk.MarginHead(8, 7, arc, sub_centers=bad)
        with pytest.raises(ValueError, match="sub_centers: expected an integer >= 1, got"):
            mk.margin_cross_entropy(case.x, case.w, case.labels, margin=arc, sub_centers=bad)
        with pytest.raises(ValueError, match="sub_centers: expected an integer >= 1, got"):
            topk(case.x, case.w, sub_centers=bad)
    with pytest.raises(ValueError, match=r"weight: expected shape \(C \* 4, D\), sub_centers rows of each class, got \(21, 8\)"):
        mk.margin_cross_entropy(case.x, case.w, case.labels, margin=arc, sub_centers=4)
    with pytest.raises(ValueError, match=r"bias: expected shape \(7,\)"):
        mk.margin_cross_entropy(case.x, case.w, case.labels, margin=arc, bias=torch.zeros(21), sub_centers=3)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 7\)"):
        mk.margin_cross_entropy(case.x, case.w, case.labels.clamp_min(7), margin=arc, sub_centers=3)
    if FUSED["cpu"].unavailable_reason() is None and FUSED["cpu"].max_sub_centers == 1:
        with pytest.raises(ValueError, match="cpu: has no sub-centers, not 3"):
            mk.margin_cross_entropy(case.x, case.w, case.labels, margin=arc, sub_centers=3, backend="cpu")


def test_outliers_and_pruning():
    """Class 0: three rows at its second center, one at its first, far from the second; class 1: one at its first; class 2: none."""
    e = torch.eye(6)
    head = mk.MarginHead(6, 3, mk.ArcFace(), sub_centers=2, bias=True)
    head.load_state_dict(head.state_dict() | {"weight": e})
    x = torch.stack([2 * e[1], e[1] + 0.1 * e[2], e[1] + 0.2 * e[3], e[0] + 0.1 * e[1], e[2], e[5]])
    y = torch.tensor([0, 0, 0, 0, 1, -100])
    counts = head.sub_center_counts(x, y)
    assert counts.tolist() == [[1, 3], [1, 0], [0, 0]]
    parts = head.sub_center_counts(x[:2], y[:2]) + head.sub_center_counts(x[2:], y[2:])
    assert torch.equal(parts, counts)
    found = head.outliers(x, y)
    assert found.far.tolist() == [False, False, False, True, False, False]
    assert found.dominant.tolist() == [1, 0, 0]
    assert found.share[:2].tolist() == [0.75, 1.0]
    assert found.share[2].isnan()
    assert found.angle[:5].tolist() == pytest.approx([0, math.atan(0.1), math.atan(0.2), math.atan(10), 0], abs=1e-7)
    assert found.angle[5].isnan()
    assert head.outliers(x, y, angle=math.atan(0.15)).far.tolist() == [False, False, True, True, False, False]
    assert head.outliers(x[3:4], y[3:4]).far.tolist() == [False]
    assert head.outliers(x[3:4], y[3:4], counts=counts).far.tolist() == [True]
    with pytest.raises(ValueError, match="angle: expected a number in"):
        head.outliers(x, y, angle=75.0)
    with pytest.raises(ValueError, match=r"counts: expected shape \(3, 2\)"):
        head.outliers(x, y, counts=counts[:, :1])
    head.prune(counts)
    assert torch.equal(head.weight, e[[1, 2, 4]])
    assert head.sub_centers == 1
    assert head.weight.requires_grad
    want = testing.run(testing.Case(x, e[[1, 2, 4]], y, torch.zeros(3)), mk.ArcFace(), "reference")
    assert float(head(x, y).detach()) == pytest.approx(float(want["loss"]), rel=1e-5)


def test_a_pruned_head_draws_its_classes():
    head = mk.MarginHead(16, 60, mk.ArcFace(), sub_centers=3, sample_rate=0.3)
    case = problem(9, 16, 60, 3, torch.float32)
    head(case.x, case.labels).backward()
    head.prune(head.sub_center_counts(case.x, case.labels))
    head(case.x, case.labels).backward()
    assert head.weight.grad.is_coalesced()
    assert torch.equal(head.weight.grad._indices()[0], head.sampler.index)


def test_state_and_checkpoint(tmp_path):
    head = mk.MarginHead(8, 10, mk.ArcFace(), sub_centers=3)
    assert tuple(head.weight.shape) == (30, 8)
    assert "sub_centers=3" in repr(head)
    case = problem(6, 8, 10, 3, torch.float32)
    optimizer = torch.optim.AdamW(head.parameters())
    head(case.x, case.labels).backward()
    optimizer.step()
    mk.distributed.checkpoint.save(tmp_path / "a", head, optimizer)
    other = mk.MarginHead(8, 12, mk.ArcFace(), sub_centers=3)
    rest, opt = other.weight[30:].detach().clone(), torch.optim.AdamW(other.parameters())
    mk.distributed.checkpoint.load(tmp_path / "a", other, opt, grow=True)
    assert torch.equal(other.weight[:30], head.weight)
    assert torch.equal(other.weight[30:], rest)
    moment = opt.state[other.weight]["exp_avg"]
    assert torch.equal(moment[:30], optimizer.state[head.weight]["exp_avg"])
    assert moment.shape == other.weight.shape
    with pytest.raises(ValueError, match="head: expected sub_centers = 3"):
        mk.distributed.checkpoint.load(tmp_path / "a", mk.MarginHead(8, 10, mk.ArcFace()))
    mk.distributed.centers.export_centers(head, tmp_path / "c.npy")
    again = mk.MarginHead(8, 10, mk.ArcFace(), sub_centers=3)
    mk.distributed.centers.import_centers(again, tmp_path / "c.npy")
    assert torch.equal(again.weight, head.weight)
