"""The Triton kernels on CPU tensors under Triton's interpreter. Run by test_triton.py in processes of their own, since the interpreter
has to be on
before the kernels are imported; by hand: TRITON_INTERPRET=1 python -m pytest tests/backends/interpreted_triton.py."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from marginkernels import NonTarget, testing
from marginkernels import loss as loss_module
from marginkernels.backend import FUSED, Backend
from marginkernels.cli import tune
from marginkernels.core import nontarget
from marginkernels.core.numerics import TINY, reduce_losses
from marginkernels.core.types import HeadInputs, LossInputs, Reduction, Request, SumsUpstream, TopkInputs, Upstream
from marginkernels.core.update import MOMENTS, Rule, Update
from marginkernels.margins.contract import Evaluated
from marginkernels.ops import ClassSums, fused_loss

pytest.importorskip("triton")
from helpers import tensor_cores
from helpers.grids import ORDERS, set_grid_order
from helpers.passes import check_passes, compare_passes, pass_inputs

from marginkernels.backend.triton import aot, heuristics, interpreting, launch, primitives, rows, saved_layout, slots, use_tiles
from marginkernels.backend.triton import rows as triton_rows

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow", "ignore:All-NaN")

#: dtypes of embeddings and weight.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16-mixed": (torch.float16, torch.float32),
    "float32-narrow": (torch.float32, torch.bfloat16),
}
#: Largest relative error by kind: dw comes in the weight's dtype.
TOLERANCE = {kind: max(testing.TOLERANCE[dtype] for dtype in pair) for kind, pair in DTYPES.items()}
SHAPES = [(7, 40, 101), (31, 64, 300), (33, 128, 261)]
TRITON = FUSED["triton"]


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """Every launch of the test, so that a test can see which ways were taken."""
    assert interpreting(), "TRITON_INTERPRET=1 must be set before Triton is imported"
    seen, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda one: (seen.append(one), run(one))[1])
    return seen


@pytest.fixture
def narrow_chunks(monkeypatch):
    """Converted centers 256 at a time, at D = 64."""
    monkeypatch.setattr(launch, "CHUNK_BYTES", 256 * 64 * 2)


def ways(ran):
    """Of the row pass: for every launch, whether it carried a running maximum."""
    return [one.constants["ONLINE"] for one in ran if one.kernel is launch.row_pass_kernel]


@pytest.mark.parametrize("head", testing.HEADS)
def test_heads(head):
    """Every head: float32 on one shape after another, and one of the other dtypes by turns. What the kernels see of a head meets every
    dtype below."""
    number = list(testing.HEADS).index(head)
    others = list(DTYPES)[1:]
    for shape, kind in ((SHAPES[number % 3], "float32"), (SHAPES[0], others[number % 5])):
        x, w = DTYPES[kind]
        case = testing.Case.random(*shape, x, weight_dtype=w, bias=number % 2 == 1)
        found = testing.errors(case, testing.HEADS[head](shape[2]), "triton")
        assert max(found.values()) <= TOLERANCE[kind], (shape, kind, found)


@pytest.mark.parametrize("kind", DTYPES)
def test_options(kind, narrow_chunks, ran):
    x, w = DTYPES[kind]
    case = testing.Case.random(17, 64, 400, x, weight_dtype=w, bias=True)
    for head in ("curricularface", "l2-softmax-trainable"):
        found = testing.errors(case, testing.HEADS[head](400), "triton", label_smoothing=0.1)
        assert max(found.values()) <= TOLERANCE[kind], (head, found)
    chunks = {one.args["first_class"] for one in ran if one.kernel is launch.row_pass_kernel}
    assert chunks == {0} if x == w == torch.float32 or kind == "bfloat16" else chunks == set(range(0, 400, 256 * 2 // x.itemsize))


@pytest.fixture
def by_registers(monkeypatch):
    """Key blocks in two parts of columns, which feed both products as they lie, and no TMA: as for tensor cores without operands in shared
    memory, where a tile spans D."""
    parts = lambda kernel, dim, tile, dtype, arch: 2 * (dim <= tile.depth and tile.width == tile.depth)  # noqa: E731
    monkeypatch.setattr(launch, "parts", parts)
    monkeypatch.setattr(launch, "boxes", lambda *_: None)
    monkeypatch.setattr(launch, "padded", lambda dim, dtype, arch: -(-dim // 16) * 16)


#: Each head with dtypes whose products such tensor cores take from parts of a key block; those of float32 they do not.
FEEDING = [
    *itertools.product(["arcface"], ["bfloat16", "mixed", "float16", "float16-mixed"]),
    *(("curricularface", "bfloat16"), ("curricularface", "float16-mixed"), ("l2-softmax-trainable", "mixed"), ("softmax", "float16")),
]


@pytest.mark.parametrize(("head", "kind"), FEEDING)
def test_keys_that_feed_both_products(head, kind, by_registers, narrow_chunks, ran):
    """By every way: with a running maximum and without, saved weights and none, columns that do not fill the last part."""
    x, w = DTYPES[kind]
    case = testing.Case.random(9, 40, 300, x, weight_dtype=w, bias=head == "softmax")
    for options in ({}, workspace(case, 1)):
        found = testing.errors(case, testing.HEADS[head](300), "triton", **options)
        assert max(found.values()) <= TOLERANCE[kind], (options, found)
    assert all(one.constants["PARTS"] == 2 for one in ran if "PARTS" in one.constants)


@pytest.mark.parametrize("dim", [1, 33, 96, 200, 201])
def test_dimensions(dim, ran):
    """Odd rows, which TMA cannot load until they are padded, and columns that do not fill a tile."""
    for kind in ("float32", "mixed"):
        x, w = DTYPES[kind]
        found = testing.errors(testing.Case.random(19, dim, 150, x, weight_dtype=w), mk.CosFace(scale=16.0), "triton")
        # In one dimension a cosine is 1 or -1 and has no gradient: rounding is all there is.
        found = found if dim > 1 else {"loss": found["loss"]}
        assert max(found.values()) <= TOLERANCE[kind], (kind, found)
        assert all(one.args["w_box"] for one in ran if one.kernel is launch.row_pass_kernel)
        assert all(one.args["x_box"] for one in ran if one.kernel is launch.class_pass_kernel)


@pytest.mark.parametrize(("shape", "k"), [((1, 8, 1), 1), ((5, 40, 130), 64), ((33, 65, 200), 5), ((70, 130, 65), 33)])
def test_topk(shape, k, ran, monkeypatch):
    """The order of a float64 search on products that are exact, with ties and NaN; cosines of centers of any norm within rounding."""
    monkeypatch.setattr(launch, "_splits", lambda programs, blocks, processors: min(blocks, 3))
    torch.manual_seed(0)
    n, d, c = shape
    x, w = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (c, d)).float()
    w[c // 2] = torch.nan
    scores = x.double() @ w.double().T
    order = torch.where(scores.isnan(), torch.inf * 2, scores).argsort(dim=1, descending=True, stable=True)[:, :k]
    for dtype, weight_dtype in DTYPES.values():
        got = mk.topk(x.to(dtype), w.to(weight_dtype), k, mk.Softmax(), backend="triton")
        assert torch.equal(got[1], order)
        torch.testing.assert_close(got[0].double(), scores.gather(1, order), rtol=0, atol=0, equal_nan=True)
    assert [one.kernel for one in ran] == [rows.kernels.prepare_rows_kernel, launch.topk_kernel] * len(DTYPES)
    x, w, bias = torch.randn(n, d), torch.randn(d, c).T, torch.randn(c)
    w[::3] *= torch.logspace(-25, 25, len(w[::3]))[:, None]
    w[0] = 0
    for kind, b in (("float32", None), ("float32", bias), ("float16-mixed", None)):
        dtype, weight_dtype = DTYPES[kind]
        found, classes = mk.topk(x.to(dtype), w.to(weight_dtype), k, bias=b, backend="triton")
        true = torch.nn.functional.normalize(x.to(dtype).double()) @ torch.nn.functional.normalize(w.double(), eps=1e-30).T
        true = true if b is None else true + b.double()
        tolerance = 2e-6 if dtype == torch.float32 else 2e-3
        assert (found - true.gather(1, classes)).abs().max() <= tolerance
        assert (found - true.topk(k, 1).values).abs().max() <= tolerance


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_topk_as_in_passes(weight_dtype):
    """The row pass takes centers of another dtype normalized, then rounded; the search does so where it is asked to."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, generator=g).bfloat16(), torch.randn(90, 64, generator=g).to(weight_dtype)
    unit = F.normalize(w.double())
    unit = unit if weight_dtype == torch.bfloat16 else unit.bfloat16().double()
    want = (F.normalize(x.double()) @ unit.T).topk(4, 1)
    rounded, closer = (TRITON.topk(TopkInputs(x, w, None, None, True, True, as_in_passes=given), 4) for given in (True, False))
    assert torch.equal(rounded.classes, want.indices)
    assert (rounded.scores - want.values).abs().max() < 1e-6
    assert ((closer.scores - want.values).abs().max() > 1e-5) == (weight_dtype == torch.float32)


def test_topk_of_many_is_left_to_pytorch(ran):
    x, w = torch.randn(2, 8), torch.randn(100, 8)
    assert torch.equal(mk.topk(x, w, 65, backend="triton")[1], mk.topk(x, w, 65, backend="torch")[1])
    assert not ran


@pytest.mark.parametrize("shape", [(1, 40, 1), (1, 40, 2), (3, 40, 1), (1, 40, 300), (70, 40, 2), (130, 40, 129)])
def test_small_shapes(shape):
    case = testing.Case.random(*shape, ignored=False)
    want = testing.run(case, mk.ArcFace(), "reference", dtype=torch.float64)
    got = testing.run(case, mk.ArcFace(), "triton")
    for key, value in want.items():  # with one class all of it is 0, hence the absolute part
        assert (got[key] - value).norm() <= 2e-5 * value.norm() + 1e-7, key


def test_strides_of_the_centers():
    """Centers whose numbers lie apart; what lies between is NaN. The gaps were once read."""
    wide = torch.full((50, 80), torch.nan)
    case = testing.Case.random(7, 40, 50)
    wide[:, ::2] = case.w
    for w in (wide[:, ::2], case.w.t().contiguous().t()):
        found = testing.errors(testing.Case(case.x, w, case.labels, None), mk.ArcFace(), "triton")
        assert max(found.values()) <= testing.TOLERANCE[torch.float32], found


def test_no_rows_with_a_workspace():
    got = mk.margin_cross_entropy(
        torch.randn(0, 40, requires_grad=True),
        torch.randn(9, 40, requires_grad=True),
        torch.zeros(0, dtype=torch.int64),
        margin=mk.ArcFace(),
        backend="triton",
        workspace_mb=1,
    )
    assert got == 0


def test_no_row_counts():
    case = testing.Case.random(9, 40, 101)
    labels = torch.full((9,), -100)
    got = testing.run(testing.Case(case.x, case.w, labels, None), mk.ArcFace(), "triton")
    assert all((v == 0).all() for v in got.values())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mixed", "float16-mixed"])
def test_norms_far_from_one(kind, ran):
    """Centers of norm 1e18, 1e-18, 0 and near it, and embeddings of the like where the dtype holds them."""
    x, w = DTYPES[kind]
    case = testing.Case.random(33, 40, 150, x, weight_dtype=w)
    case.w[3::5] *= 1e18
    case.w[4::5] *= 1e-18
    case.w[7] = 0
    case.w[12] *= 1e-33
    if x != torch.float16:
        case.x[::3] *= 1e18
        case.x[1::3] *= 1e-18
    want = testing.run(case, mk.ArcFace(), "reference", dtype=torch.float64)
    got = testing.run(case, mk.ArcFace(), "triton")
    tolerance = TOLERANCE[kind]
    assert testing.relative_error(got["loss"], want["loss"]) <= tolerance
    for part in (slice(3, None, 5), slice(4, None, 5), slice(0, None, 5)):  # each size by itself: the largest gradients hide the rest
        assert testing.relative_error(got["dw"][part], want["dw"][part]) <= tolerance
    for part in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
        assert testing.relative_error(got["dx"][part], want["dx"][part]) <= tolerance
    assert (got["dw"][[7, 12]] == 0).all()


@pytest.mark.parametrize(("scale", "online"), [(64.0, False), (1024.0, True)])
def test_the_way_that_the_exponents_allow(scale, online, ran):
    """A scale of 64 needs no running maximum; of the two launches the device lets one return at once. Both ways give the same."""
    case = testing.Case.random(33, 64, 300)
    found = testing.errors(case, mk.CosFace(scale=scale), "triton")
    assert max(found.values()) <= 2e-5, found
    assert ways(ran) == [False, True]
    bound = next(one.args["bound"] for one in ran if one.kernel is launch.row_pass_kernel)
    assert (float(bound) > launch.LIMIT) == online


@pytest.mark.parametrize("bias", [300.0, -300.0])
def test_a_large_bias_needs_the_running_maximum(bias, ran):
    """A single class's bias takes the exponents out of range, for all rows or for none but its own."""
    case = testing.Case.random(33, 64, 300, bias=True)
    case.bias[150] = bias
    found = testing.errors(case, mk.CosFace(), "triton")
    assert max(found.values()) <= 2e-5, found
    bound = next(one.args["bound"] for one in ran if one.kernel is launch.row_pass_kernel)
    assert float(bound) > launch.LIMIT


@pytest.mark.parametrize(("dim", "scale"), list(itertools.product((128, 512, 1024), (64.0, 1024.0))))
def test_three_tf32_products_are_as_good_as_float32(dim, scale, monkeypatch):
    """In both passes, by an emulation of tensor cores that cut every sum towards zero. One such product is not."""
    monkeypatch.setattr(launch, "tile_for", lambda key: heuristics.Tile(32, 64, key.dim, key.dim, 1, 1))
    asked = tensor_cores.emulate(monkeypatch)
    case = testing.Case.random(17, dim, 200)
    assert max(testing.errors(case, mk.CosFace(scale=scale), "triton").values()) <= testing.TOLERANCE[torch.float32]
    assert set(asked) == {"tf32x3"}
    if dim == 128:
        monkeypatch.setattr(launch, "precision", lambda dtype: "tf32")
        assert max(testing.errors(case, mk.CosFace(scale=scale), "triton").values()) > 10 * testing.TOLERANCE[torch.float32]


#: What takes converted centers by the way that carries a running maximum: dtypes of embeddings and weight, and a head.
ONLINE = {
    "float32-narrow": (torch.float32, torch.bfloat16, lambda: mk.CosFace(scale=1024.0)),
    "float32-half": (torch.float32, torch.float16, lambda: mk.CosFace(scale=1024.0)),
    "mixed": (torch.bfloat16, torch.float32, lambda: mk.CosFace(scale=128.0)),
    "mixed-halves": (torch.bfloat16, torch.float16, lambda: mk.Softmax()),
    "float16": (torch.float16, torch.float16, lambda: mk.CosFace()),
    "float16-mixed": (torch.float16, torch.float32, lambda: mk.CurricularFace()),
}


@pytest.mark.parametrize("kind", ONLINE)
def test_programs_may_run_in_any_order(kind, monkeypatch, ran):
    """Several chunks of classes and slices of D: no program may read what another of the same launch writes, so the bits are the same in
    whatever order they run. Slices once shared the running maximum that the first of them moved on."""
    x, w, head = ONLINE[kind]
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1)
    case = testing.Case.random(7, 200, 300, x, weight_dtype=w)
    want = testing.run(case, head(), "reference", dtype=torch.float64)["dx"]
    results = {}
    for order in ORDERS:
        ran.clear()
        set_grid_order(monkeypatch, order)
        rows = case.x.clone().requires_grad_()
        loss = mk.margin_cross_entropy(rows, case.w, case.labels, margin=head(), backend="triton")
        results[order] = loss.detach(), *torch.autograd.grad(loss, rows)
        passes = [one for one in ran if one.kernel is launch.row_pass_kernel]
        assert {(one.args["first_class"], one.grid[2]) for one in passes} == {(first, 4) for first in (0, 128, 256)}
        assert testing.relative_error(results[order][1], want) <= testing.TOLERANCE[x], order
    for order, got in results.items():
        assert all(torch.equal(a, b) for a, b in zip(got, results["z-fastest"], strict=True)), order


@pytest.mark.parametrize("non_target", NonTarget)
@pytest.mark.parametrize("bias", [False, True])
def test_no_exponent_exceeds_its_bound(non_target, bias):
    """Nor do slopes under the sum, or the class factors: for cosines of 1 and -1, which are as far as exponents go."""
    p = pass_inputs(40, (torch.float32, torch.float32), non_target, bias=bias)
    p.w[:70] = p.x * torch.linspace(0.1, 3, 70)[:, None]
    p.w[70:140] = -p.x
    factor = p.w.double().norm(dim=1).reciprocal()
    unit = torch.nn.functional.normalize
    cos = unit(p.x.double()) @ unit(p.w.double()).T
    value = nontarget.value(non_target, cos, p.threshold, p.t)
    logit = p.scale[:, None] * value + (0.0 if p.bias is None else p.bias)
    largest = max(logit.logsumexp(1).max(), -logit.min(), (logit + factor.log()).max(), (-logit - factor.log()).max())
    bound = float(launch._exponent_bound(p, factor.float(), launch.Launch.run))
    assert float(largest) <= bound
    assert bound <= 2.5 * float(largest) + 20  # and is not so far above that it says nothing


def test_offsets_past_32_bits():
    """Centers in rows of 4 million elements, of which few are touched: the last classes lie past element 2^31."""
    case = testing.Case.random(5, 16, 600, weight_dtype=torch.bfloat16)
    w = torch.empty(600 << 22, dtype=torch.bfloat16).as_strided((600, 16), (1 << 22, 1)).copy_(case.w)
    case.labels[0], case.labels[1] = 599, 0
    want, got = (testing.run(testing.Case(case.x, v, case.labels, None), mk.ArcFace(), "triton") for v in (case.w, w))
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_what_is_not_needed_is_not_run(ran):
    case = testing.Case.random(9, 40, 101)
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    with torch.no_grad():
        mk.margin_cross_entropy(x, w, case.labels, margin=mk.ArcFace(), backend="triton")
    assert {one.constants["NEED_CENTER"] for one in ran if one.kernel is launch.row_pass_kernel} == {False}
    ran.clear()
    mk.margin_cross_entropy(x, w.detach(), case.labels, margin=mk.ArcFace(), backend="triton").backward()
    assert not any(one.kernel is launch.class_pass_kernel for one in ran)
    ran.clear()
    mk.margin_cross_entropy(x.detach(), w, case.labels, margin=mk.ArcFace(), backend="triton").backward()
    assert {one.constants["NEED_CENTER"] for one in ran if one.kernel is launch.row_pass_kernel} == {False}


def test_strided_centers_and_crowded_classes():
    """Centers that are columns of a larger tensor; all rows of one class."""
    for kind in ("float32", "mixed"):
        x, w = DTYPES[kind]
        case = testing.Case.random(33, 40, 300, x, weight_dtype=w)
        wide = torch.randn(300, 60, dtype=w)
        wide[:, 8:48] = case.w
        labels = torch.full((33,), 299)
        labels[5] = -100
        want = testing.run(testing.Case(case.x, case.w, labels, None), mk.ArcFace(), "reference", dtype=torch.float64)
        got = testing.run(testing.Case(case.x, wide[:, 8:48], labels, None), mk.ArcFace(), "triton")
        assert max(testing.relative_error(got[k], want[k]) for k in want) <= TOLERANCE[kind]


@pytest.mark.parametrize("groups", [0, 3])
def test_bits_repeat(groups):
    case = testing.Case.random(70, 64, 700, torch.bfloat16, weight_dtype=torch.float32)
    first, again = (testing.run(case, mk.CurricularFace(), "triton", **workspace(case, groups)) for _ in range(2))
    assert all(torch.equal(again[k], v) for k, v in first.items())


@pytest.mark.parametrize("upstream", [1e-6, 65536.0])
def test_float16_holds_any_upstream(upstream):
    """Weights of the class pass are brought into float16's range, be the loss scaled up or averaged over many rows."""
    case = testing.Case.random(31, 64, 1000, torch.float16, weight_dtype=torch.float32)
    scale = torch.tensor(upstream)
    want = testing.run(case, mk.ArcFace(), "reference", dtype=torch.float64, upstream=scale)
    got = testing.run(case, mk.ArcFace(), "triton", upstream=scale)
    assert testing.relative_error(got["dw"], want["dw"]) <= 3e-2


@pytest.mark.parametrize(("non_target", "reduction"), list(itertools.product(NonTarget, Reduction)))
def test_passes_against_the_torch_backend(non_target, reduction, narrow_chunks):
    """Everything the two passes may be asked for, and for nothing else, against plain PyTorch; centers are normalized and not by turns."""
    for kind, bias in (("float32", True), ("float16-mixed", False)):
        normalize = bias == ((non_target + reduction) % 2 == 0)
        n = 70 if non_target == NonTarget.IDENTITY else 33  # two blocks of rows are two for any transform
        inputs = pass_inputs(64, DTYPES[kind], non_target, bias=bias, normalize_weight=normalize, n=n)
        compare_passes(TRITON, inputs, reduction, 1e-5 if kind == "float32" else 4e-3)


#: Centers a class, classes, D, dtypes, transform, reduction, whether weights are normalized, and the share of the centers that is saved.
SUB_CENTERS = [
    (2, 137, 40, "float32", NonTarget.IDENTITY, Reduction.LOG_SUM_EXP, True, 1.0),
    (3, 91, 100, "float32", NonTarget.HARD_LINEAR, Reduction.LOGIT_SUM, True, 0.0),
    (3, 100, 40, "mixed", NonTarget.HARD_QUADRATIC, Reduction.LOG_SUM_EXP, True, 1.0),
    (3, 91, 100, "float16", NonTarget.IDENTITY, Reduction.LOG_SUM_EXP, False, 0.5),
    (4, 40, 40, "bfloat16", NonTarget.FILTERED, Reduction.LOGIT_SUM, True, 0.0),
    (5, 61, 40, "float16-mixed", NonTarget.HARD_LINEAR, Reduction.LOG_SUM_EXP, True, 0.5),
    (16, 9, 40, "float32", NonTarget.IDENTITY, Reduction.LOGIT_SUM, False, 0.0),
    (2, 61, 40, "float32", NonTarget.HINGE, Reduction.LOG_SUM_EXP, True, 0.0),
    (3, 61, 40, "bfloat16", NonTarget.ANGLE_PART, Reduction.LOGIT_SUM, True, 0.0),
    (5, 40, 40, "float32", NonTarget.ANGLE_PART_DETACHED, Reduction.LOG_SUM_EXP, True, 0.5),
    (2, 61, 40, "float16", NonTarget.CLIPPED, Reduction.SOFTPLUS_SUM, True, 0.5),
    (3, 61, 40, "mixed", NonTarget.POWER, Reduction.SOFTPLUS_SUM, True, 1.0),
    (4, 40, 40, "float32", NonTarget.POWER_DETACHED, Reduction.SOFTPLUS_SUM, True, 0.0),
    (5, 40, 40, "bfloat16", NonTarget.IDENTITY, Reduction.SOFTPLUS_SUM, False, 0.5),
    (3, 61, 40, "float16-mixed", NonTarget.LIFTED, Reduction.LOG_SUM_EXP, True, 0.5),
    (3, 61, 40, "float32", NonTarget.LIFTED_ANGLE, Reduction.LOG_SUM_EXP, True, 1.0),
]


def check_sub_centers(k, c, dim, kind, non_target, reduction, normalize, saved):
    p = pass_inputs(dim, DTYPES[kind], non_target, bias=True, normalize_weight=normalize, n=70, c=c * k, sub_centers=k)
    p.labels[4] = 2**31 - 1
    size = saved_layout.group_bytes(70, p.x.dtype) * math.ceil(saved * slots.slots(c * k, k) / saved_layout.GROUP)
    check_passes(TRITON, p, reduction, 1e-5 if kind == "float32" else 6e-3, workspace=size)


@pytest.mark.parametrize("problem", SUB_CENTERS, ids=str)
def test_sub_centers(problem, ran, monkeypatch):
    """Both passes from their definition: several chunks of converted centers, a ragged last group, and labels of no class."""
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1)
    check_sub_centers(*problem)
    k, c, *_, saved = problem
    assert {one.args["first_class"] for one in ran if one.kernel is launch.row_pass_kernel} == set(range(0, slots.slots(c * k, k), 128))
    each = 128 // slots.of_class(k) * k
    share = min(c * k, math.ceil(saved * slots.slots(c * k, k) / 128) * each)
    assert {one.args["c"] for one in ran if one.kernel is launch.saved_pass_kernel} == ({share} if saved else set())


def test_sub_centers_in_splits_and_by_registers(by_registers, ran):
    """Several splits of one chunk, and key blocks in parts."""
    check_sub_centers(3, 150, 40, "bfloat16", NonTarget.IDENTITY, Reduction.LOG_SUM_EXP, True, 0.7)
    assert {one.grid[1] for one in ran if one.kernel is launch.row_pass_kernel} == {2}


@pytest.mark.parametrize(("k", "where"), [(2, 3), (3, 8)])
def test_equal_sub_centers_and_nan(k, where):
    """Of equal centers the first has the whole gradient, be they of a row's own class or of another; NaN comes through, as it does in
    plain PyTorch."""
    case = testing.Case.random(9, 40, 20)
    w = case.w.repeat_interleave(k, 0)
    got = testing.run(testing.Case(case.x, w, case.labels, None), mk.ArcFace(), "triton", sub_centers=k)
    one = testing.run(case, mk.ArcFace(), "triton")
    each = got["dw"].view(20, k, 40)
    assert (each[:, 1:] == 0).all()
    assert testing.relative_error(each[:, 0], one["dw"]) <= TOLERANCE["float32"]
    assert testing.relative_error(got["dx"], one["dx"]) <= TOLERANCE["float32"]
    for bad in (w, case.x):
        bad[where, 5] = torch.nan
        found = [mk.margin_cross_entropy(case.x, w, case.labels, margin=mk.CosFace(), sub_centers=k, reduction="none", backend=name)
                 for name in ("triton", "torch")]  # fmt: skip
        assert torch.equal(*(v.isnan() for v in found))
        assert found[0].isnan().any()
        bad[where, 5] = 1.0


def test_topk_by_class(ran, monkeypatch):
    """The order of a float64 search on products that are exact: ties, NaN, a bias, several splits."""
    monkeypatch.setattr(launch, "_splits", lambda programs, blocks, processors: min(blocks, 3))
    torch.manual_seed(0)
    for k, (n, d, c), best in ((2, (5, 40, 130), 64), (3, (33, 20, 66), 5), (16, (3, 8, 9), 9)):
        x, w, bias = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (c * k, d)).float(), torch.randint(-9, 9, (c,)).float()
        w[c // 2 * k + 1] = torch.nan
        for dtype, b in (("float32", bias), ("float16-mixed", None)):
            x_dtype, w_dtype = DTYPES[dtype]
            scores = (x.double() @ w.double().T).unflatten(1, (c, k)).amax(2) + (0 if b is None else b)
            order = torch.where(scores.isnan(), torch.inf * 2, scores).argsort(dim=1, descending=True, stable=True)[:, :best]
            found = mk.topk(x.to(x_dtype), w.to(w_dtype), best, mk.Softmax(), b, sub_centers=k, backend="triton")
            assert torch.equal(found[1], order), (k, dtype)
            torch.testing.assert_close(found[0].double(), scores.gather(1, order), rtol=0, atol=0, equal_nan=True)
    assert [one.kernel for one in ran].count(launch.topk_kernel) == 6


def workspace(case, groups):
    """As an argument, in MB, enough for so many groups of saved classes and not for one more."""
    return {"workspace_mb": (groups + 0.9) * saved_layout.group_bytes(case.x.shape[0], case.x.dtype) / 2**20}


#: One for each kind of transform, sum, scale and normalization: more the kernels do not see of a head.
WORKSPACE_HEADS = (
    *("softmax", "sphereface", "arcface", "mv-arc", "curricularface", "l2-softmax-trainable", "adacos"),
    *("sphereface2", "sphereface2-arc", "uniface"),
)


@pytest.mark.parametrize("head", WORKSPACE_HEADS)
def test_workspace_heads(head):
    """Part of the classes saved, and all; a ragged last group; in float32, and in two of the other dtypes by turns."""
    number, kinds = WORKSPACE_HEADS.index(head), list(DTYPES)
    for kind in ("float32", kinds[1 + number % 5], kinds[1 + (number + 2) % 5]):
        x, w = DTYPES[kind]
        case = testing.Case.random(9, 24, 300, x, weight_dtype=w)
        margin = testing.HEADS[head](300)
        want = testing.run(case, margin, "reference", dtype=torch.float64)
        for groups in (1, 3):
            got = testing.run(case, margin, "triton", **workspace(case, groups))
            found = {k: testing.relative_error(got[k], v) for k, v in want.items()}
            assert max(found.values()) <= TOLERANCE[kind], (kind, groups, found)


def test_workspace_and_smoothing():
    """Of the sum of logits the saved weights know nothing."""
    case = testing.Case.random(9, 24, 300)
    want = testing.run(case, mk.ArcFace(), "reference", dtype=torch.float64, label_smoothing=0.3)
    got = testing.run(case, mk.ArcFace(), "triton", label_smoothing=0.3, **workspace(case, 3))
    assert all(testing.relative_error(got[k], v) <= TOLERANCE["float32"] for k, v in want.items())


@pytest.mark.parametrize(("kind", "scale"), [("float32", 1024.0), ("bfloat16", 1024.0), ("mixed", 64.0), ("float16-mixed", 64.0)])
def test_workspace_ways(kind, scale, narrow_chunks, ran):
    """With and without a running maximum, an end in the middle of a chunk of converted centers, more rows than one block, and a bias that
    is not trained."""
    x, w = DTYPES[kind]
    case = testing.Case.random(70, 64, 600, x, weight_dtype=w, bias=True)
    margin = mk.CosFace(scale=scale)
    # A logit of up to scale is known to scale * 2^-24 in float32, and so is its exponential, relative to it.
    tolerance = max(TOLERANCE[kind], scale * 2.0**-24)
    for groups, saved in ((3, 384), (5, 600)):
        ran.clear()
        results = []
        for inputs, backend, options in ((torch.float64, "reference", {}), (None, "triton", workspace(case, groups))):
            a, b = (v.detach().to(inputs or v.dtype).requires_grad_() for v in (case.x, case.w))
            bias = case.bias.to(inputs or case.bias.dtype)
            mk.margin_cross_entropy(a, b, case.labels, margin=margin, bias=bias, backend=backend, **options).backward()
            results.append((a.grad, b.grad))
        for want, got in zip(*results, strict=True):
            assert testing.relative_error(got, want) <= tolerance, (kind, groups)
        assert [one.args["c"] for one in ran if one.kernel is launch.saved_pass_kernel] == [saved]


def test_saved_classes_are_not_computed_again(ran):
    """The class pass on the rest alone; nothing is saved where it would not do, and a limit below one group saves nothing."""
    case = testing.Case.random(20, 40, 300)
    seen = lambda kernel: [one.args["c"] for one in ran if one.kernel is kernel]  # noqa: E731
    group = saved_layout.group_bytes(20, torch.float32)
    sizes = [TRITON.workspace_bytes(20, 300, torch.float32, limit) for limit in (0, group - 1, group, 3 * group - 1, 10**9)]
    assert sizes == [0, 0, group, 2 * group, 3 * group]
    for groups, saved, again in ((0, [], [300]), (2, [256], [44]), (3, [300], [])):
        ran.clear()
        testing.run(case, mk.ArcFace(), "triton", **workspace(case, groups))
        assert (seen(launch.saved_pass_kernel), seen(launch.class_pass_kernel)) == (saved, again)
    for options, bias in (({"label_smoothing": 0.1}, None), ({}, torch.zeros(300))):
        ran.clear()
        asked = testing.Case(case.x, case.w, case.labels, bias)
        found = testing.errors(asked, mk.ArcFace(), "triton", **workspace(case, 3), **options)
        assert max(found.values()) <= TOLERANCE["float32"]
        assert (seen(launch.saved_pass_kernel), seen(launch.class_pass_kernel)) == ([], [300])


def test_saved_weights_are_the_softmax():
    """exp(z - base) for every class and row, 0 at the row's own; times the class factor, since the centers were taken as they stand."""
    p = pass_inputs(64, DTYPES["float32"])
    n, c = p.x.shape[0], p.w.shape[0]
    size = TRITON.workspace_bytes(n, c, p.x.dtype, 10**9)
    r = TRITON.row_pass(p, Request.log_sum_exp(workspace_bytes=size))
    weights, bases = saved_layout.parts(r.saved, n, p.x.dtype)
    z = p.scale[:, None] * p.row_factor[:, None] * (p.x @ torch.nn.functional.normalize(p.w).T)
    z[torch.arange(c) == p.labels[:, None]] = -torch.inf
    base = bases[:, :n].T.repeat_interleave(primitives.SAVED_STEP.value, 1)[:, :c] * primitives.LN2.value
    torch.testing.assert_close((weights[:c, :n] / r.class_factor[:, None]).T, (z - base).exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("upstream", [1e-6, 65536.0])
def test_workspace_in_float16_holds_any_upstream(upstream):
    case = testing.Case.random(31, 64, 300, torch.float16, weight_dtype=torch.float32)
    scale = torch.tensor(upstream)
    want = testing.run(case, mk.ArcFace(), "reference", dtype=torch.float64, upstream=scale)
    got = testing.run(case, mk.ArcFace(), "triton", upstream=scale, **workspace(case, 3))
    assert testing.relative_error(got["dw"], want["dw"]) <= 3e-2


@pytest.fixture
def heuristic_tiles():
    yield
    use_tiles(None)


def test_tuning(tmp_path, ran, heuristic_tiles):
    """Everything but the GPU's own times: what stays out, what is timed, what is chosen, written, read and taken."""
    shape = tune.Shape(20, 100, 150, torch.float32, torch.float32)
    calls = []

    def look(shape, key, tile):
        if tile.queries == 2 * heuristics.default(key).queries:
            raise RuntimeError("no such tile")
        return aot.Resources(100, 8 if tile.stages == 2 else 0, 1000)

    def timer(run):
        ((key, tile),) = heuristics.CHOSEN.items()
        calls.append(key)
        return {32: 1.0, 16: 3.0, 64: 2.0}[tile.queries] + (key.kernel == "saved" and tile.keys == 32) * -0.5

    size = TRITON.workspace_bytes(20, 150, torch.float32, 10**9)
    rows = tune.tune(shape, "cpu", "interpreter", workspace=size, rounds=2, timer=timer, look=look)
    best = {row["what"]: row["tile"] for row in rows if row["best"]}
    assert list(best) == [f"row pass{what}" for what in ("", ", no gradient", ", weights saved")] + [
        "class pass, weights saved",
        "class pass",
    ]
    assert [t.queries for t in best.values()] == [32] * 5
    assert {row["why"] for row in rows} == {"", "uses the stack", "does not compile (RuntimeError)"}
    assert all((row["ms"] is None) == bool(row["why"]) for row in rows)
    assert len(calls) == 2 * sum(not row["why"] for row in rows)
    assert not heuristics.CHOSEN
    assert "does not compile" in tune.show(rows)
    tune.save(tmp_path / "tiles.json", rows, gpu="none")
    keys = use_tiles(tmp_path / "tiles.json")
    assert len(keys) == 5
    case = testing.Case.random(20, 100, 150)
    for options in ({}, workspace(case, 2)):
        ran.clear()
        assert max(testing.errors(case, mk.CosFace(scale=16.0), "triton", **options).values()) <= 2e-5
        bounded = next(one for one in ran if one.kernel is launch.row_pass_kernel and not one.constants["ONLINE"])
        assert (bounded.constants["BLOCK_N"], bounded.args["saved"] is not None) == (32, bool(options))


def test_tuning_leaves_out_what_is_wrong():
    key = heuristics.Key.of("class", 64, torch.float32, "interpreter")
    first, other = tune.candidates(key)[:2]
    run = lambda: [torch.ones(3) * (1 if heuristics.tile(key) == first else 2)]  # noqa: E731
    assert tune.disagreement(key, first, run, [torch.ones(3)]) == ""
    assert "off by" in tune.disagreement(key, other, run, [torch.ones(3)])
    assert "does not run" in tune.disagreement(key, other, lambda: 1 / 0, [torch.ones(3)])


def test_transforms_have_the_numbers_of_the_package():
    assert {one.name: getattr(primitives, one.name).value for one in NonTarget} == {one.name: int(one) for one in NonTarget}


def test_splits_fill_the_device_and_stay_few():
    for programs, blocks in itertools.product((1, 3, 8, 64, 100, 1000), (1, 5, 10_000)):
        splits = launch._splits(programs, blocks, 132)
        assert 1 <= splits <= blocks
        assert splits == 1 or programs * splits <= 2 * 132
    assert launch._splits(8, 10_000, 132) * 8 >= 128
    assert launch._splits(64, 10_000, 132) * 64 == 128


def _head_inputs(n, d, c, x_dtype, w_dtype, normalize):
    """Rows and centers with norms from 1e-30 to 1e38 as far as their dtype goes, zero ones, and labels that are not here."""
    torch.manual_seed(0)
    most = {torch.float16: 3, torch.float32: 37, torch.bfloat16: 37}
    x = torch.randn(n, d) * torch.logspace(-30, most[x_dtype] - math.log10(d), n)[:, None]
    w = torch.randn(c, d) * torch.logspace(-30, most[w_dtype] - math.log10(d), c)[:, None]
    x[n // 2 :][:1], w[c // 2] = 0.0, 0.0
    labels = torch.arange(n) * 7 % (c + 2) - 1  # -1, every class, and C
    return HeadInputs(x.to(x_dtype), w.to(w_dtype), labels, *normalize)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("normalize", list(itertools.product((True, False), repeat=2)))
def test_rows_against_pytorch(kind, normalize, ran):
    """:class:`Backend`'s own float64 code, for no row and one, ragged blocks, and rows longer than a tile."""
    x_dtype, w_dtype = DTYPES[kind]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[x_dtype]
    for n, d, c in ((0, 8, 3), (1, 5, 1), (37, 40, 11), (5, 1500, 7)):
        inputs = _head_inputs(n, d, c, x_dtype, w_dtype, normalize)
        got, want = TRITON.prepare_inputs(inputs), Backend.prepare_inputs(TRITON, inputs)
        assert torch.equal(got.x, want.x)
        torch.testing.assert_close(got.row_factor, want.row_factor, rtol=2.0**-23, atol=0)
        torch.testing.assert_close(got.target_cos, want.target_cos, rtol=1e-12, atol=1e-15)
        size = want.target_similarity.abs().clamp_min(1e-15 if all(normalize) else 0)
        assert ((got.target_similarity - want.target_similarity).abs() <= 1e-11 * size).all()
        torch.manual_seed(1)
        f, mean_center = torch.randn(3, n), torch.randn(n, d)
        up = Upstream(f[0].double(), f[0], f[1], f[2], None)
        for total in (None, torch.randn(n, d), torch.randn(n, d, dtype=torch.float64)):
            got_dx, want_dx = (one.row_gradient(*(TRITON,) * (one is Backend), inputs, up, mean_center, total) for one in (TRITON, Backend))
            assert got_dx.dtype == x_dtype
            scale = want_dx.double().abs().amax(1, keepdim=True)
            finite = torch.isfinite(scale)
            # The smallest number there is; the interpreter makes no right ones below bfloat16's normal ones.
            step = torch.finfo(x_dtype).tiny * (1 if x_dtype == torch.bfloat16 else torch.finfo(x_dtype).eps)
            assert ((got_dx.double() - want_dx.double()).abs() <= tolerance * scale + step)[finite.expand(n, d)].all()
            assert torch.equal(got_dx.isnan(), want_dx.isnan())
    assert {one.kernel.__name__ for one in ran} == {"prepare_rows_kernel", "row_gradient_kernel"}


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_beyond_the_largest_power(normalize):
    """A norm of 2^127 and more: 2^128 is no float32."""
    inputs = HeadInputs(torch.tensor([[3e38, -1e38, 2e38], [2.0**126, 0.0, 0.0]]), torch.eye(3), torch.tensor([0, 1]), normalize, True)
    got, want = TRITON.prepare_inputs(inputs), Backend.prepare_inputs(TRITON, inputs)
    assert torch.equal(got.x, want.x)
    assert torch.isfinite(got.row_factor).all()
    torch.testing.assert_close(got.row_factor, want.row_factor, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_sum_of_centers_is_exact_to_float64(kind, monkeypatch):
    monkeypatch.setattr(rows, "SUM_PROGRAMS", 2)
    w_dtype = DTYPES[kind][1]
    for c, d in ((1, 1), (17, 40), (601, 130)):
        w = _head_inputs(1, d, c, w_dtype, w_dtype, (True, True)).w
        for factor in (torch.rand(c) + 0.5, torch.empty(0)):
            each = w.double() * (factor.double()[:, None] if factor.numel() else 1)
            got = TRITON.center_sum(w, factor)
            assert got.dtype == torch.float64
            assert ((got - each.sum(0)).abs() <= 1e-14 * each.abs().sum(0)).all()
            assert torch.equal(got, TRITON.center_sum(w, factor))
        assert torch.equal(TRITON.center_sum(w.T.contiguous().T, factor), got)


@pytest.mark.parametrize("n", [0, 1, 1024, 1025])
def test_labels_are_marked(n):
    labels = torch.arange(n) % 14 - 3
    labels[-1:] = 2**40
    for ignored in (-100, -2, 4, 2**40):
        got, bounds = rows.mark_labels(labels, 10, ignored)
        wrong = ((labels < 0) | (labels >= 10)) & (labels != ignored)
        assert torch.equal(got, torch.where(wrong | (labels == ignored), -1, labels))
        bad = [v for v in bounds.flatten().tolist() if not 0 <= v < 10]
        assert bad == [] or (min(bad), max(bad)) == (int(labels[wrong].min()), int(labels[wrong].max()))
        assert bool(bad) == bool(wrong.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ignored_rows_that_hold_no_numbers_are_replaced(dtype):
    x, labels = torch.randn(40, 1500).to(dtype), torch.arange(40) % 2 - 1
    x[2, 1499], x[4, 0], x[5, 7], x[6] = torch.nan, torch.inf, torch.nan, 0.0
    got, bad = TRITON.replace_rows(x, labels, None, 1.0)
    replaced = torch.zeros(40, dtype=torch.bool)
    replaced[[2, 4]] = True  # 5 has a label
    assert torch.equal(bad != 0, replaced)
    assert (got[replaced] == 1).all()
    assert torch.equal(got[~replaced].view(torch.int8), x[~replaced].view(torch.int8))
    want = got.masked_fill(replaced[:, None], 0.0)  # row 5 still holds NaN
    assert torch.equal(TRITON.replace_rows(got, None, bad, 0.0)[0].view(torch.int8), want.view(torch.int8))


def _loss_of_pytorch(p, own):
    """The assembly of the loss as it is where no kernel makes it."""
    sums = ClassSums(p.lse, own, own * 0 if p.bias is None else p.bias, own * 0 if p.logit_sum is None else p.logit_sum, own, p.max_logit)
    target = Evaluated(p.value, p.slope, p.scale, None, None, None)
    target_logit = loss_module._target_logit(sums, target, p.similarity, None)
    losses = loss_module._assemble(sums, target_logit, p.num_classes, p.label_smoothing, p.focal_gamma, None, None)
    valid = p.labels >= 0
    return reduce_losses(torch.where(valid, losses, 0), valid, p.reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("smoothing", "gamma", "bias"), [(0.0, 0.0, False), (0.1, 0.0, True), (0.0, 2.0, True), (0.3, 0.7, False)])
def test_the_loss_and_its_gradients(reduction, smoothing, gamma, bias):
    """Against the PyTorch code and its autograd: sure rows, hopeless ones, empty sums, ignored rows, no row and more than a block."""
    for n in (0, 1, 300):
        torch.manual_seed(2)
        lse, value = torch.randn(n).double() * 30 + 20, torch.rand(n).double() * 2 - 1
        lse[3:4], lse[4:5] = -torch.inf, 400.0
        leaves = {"lse": lse, "value": value, "scale": torch.rand(n).double() * 64 + 1, "own": value.clone()}
        leaves |= {"bias": torch.randn(n).double()} if bias else {}
        leaves |= {"logit_sum": torch.randn(n).double() * 100} if smoothing else {}
        labels = torch.arange(n) % 5 - 1
        rest = {"slope": torch.rand(n).double(), "similarity": value, "cos": value / 2, "max_logit": torch.randn(n), "labels": labels}
        rest["other"] = rest["max_logit"] - 5
        found = []
        for by_kernel in (False, True):
            at = {name: v.clone().requires_grad_() for name, v in leaves.items()}
            own = at.pop("own")
            p = LossInputs(**{"bias": None, "logit_sum": None} | at | rest, num_classes=1000, label_smoothing=smoothing,
                           focal_gamma=gamma, reduction=reduction)  # fmt: skip
            if by_kernel:
                got, stats = fused_loss(p, own, "triton")
            else:
                got = _loss_of_pytorch(p, own)
            weight = torch.linspace(0.5, 2, n) if reduction == "none" else torch.tensor(3.0)
            (got * weight).sum().backward()
            found.append([got.detach().double(), *(v.grad for v in (own, *at.values()))])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want.double(), rtol=3e-7 if got is found[1][0] else 2e-6, atol=1e-12)
        valid = labels >= 0
        top = (p.scale * value + (p.bias if bias else 0) > p.max_logit).double()
        beyond = (p.scale * p.value + (p.bias if bias else 0) > p.other).double()
        each = (value / 2, (value / 2).acos(), p.scale, top, beyond)
        means = [v[valid].mean() if valid.any() else torch.tensor(0.0) for v in each]
        torch.testing.assert_close(stats, torch.stack(means).detach().float(), rtol=1e-6, atol=1e-7)


def test_a_masked_target_has_no_gradient_under_smoothing():
    f = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    p = LossInputs(f(1.0, 2.0), f(0.5, 0.5), f(1.0, 1.0), f(8.0, 8.0), f(-torch.inf, 0.0), f(0.0, 0.0), torch.tensor([0, 1]), f(0.5, 0.5),
                   f(0.5, 0.5), torch.zeros(2), torch.zeros(2), 10, 0.1, 0.0, "none")  # fmt: skip
    out = rows.loss(p)
    assert out.loss[0] == torch.inf
    found = rows.loss_backward(p, out.count, torch.ones(2), True, True)
    assert all(v[0] == 0 and v[1] != 0 for v in vars(found).values())


@pytest.mark.parametrize("with_all", [True, False])
def test_upstream_and_its_rounding(with_all):
    torch.manual_seed(3)
    n = 131
    lse = torch.randn(n).double() * torch.logspace(-3, 12, n).double()
    lse[5] = -torch.inf
    scale = torch.rand(n) * 64
    g = [torch.randn(n).double() for _ in range(4)] if with_all else [torch.randn(n).double(), None, None, None]
    got = rows.upstream(SumsUpstream(lse, scale, *g), with_all, with_all).upstream(with_all, with_all)
    zero = torch.zeros(n)
    assert torch.equal(got.lse, torch.where(lse == -torch.inf, torch.inf, lse))
    assert torch.equal(got.d_lse, (g[0] * scale).float())
    assert torch.equal(got.d_target_cos, g[1].float() if with_all else zero)
    assert (got.d_target_bias is None) != with_all
    if with_all:
        assert torch.equal(got.d_target_bias, g[2].float())
        assert torch.equal(got.d_logit_sum, (g[3] * scale).float())
    plain = Upstream(got.lse, got.d_lse, got.d_logit_sum, got.d_target_cos, got.d_target_bias).rounded(torch.float32)
    rounded = got.rounded(torch.float32)
    assert torch.equal(rounded.lse, plain.lse)
    torch.testing.assert_close(rounded.d_lse, plain.d_lse, rtol=2.0**-23, atol=0)


def test_the_numbers_of_the_row_kernels_are_those_of_the_package():
    assert rows.kernels.TINY.value == TINY


def test_a_second_derivative_is_refused():
    case = testing.Case.random(5, 16, 20, torch.float32)
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    loss = mk.margin_cross_entropy(x, w, case.labels, margin=mk.ArcFace(), backend="triton")
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", list(Rule))
def test_an_optimizers_step(rule, dtype, ran):
    """In float32 within rounding of plain PyTorch, in half precision with the same random bits; drawn rows have their own numbers."""
    g = torch.Generator().manual_seed(0)
    for dim, numbers in ((40, 7), (600, torch.tensor([5, 1 << 40, 3]))):
        count = 33 if isinstance(numbers, int) else 3
        p, d = torch.randn(count, dim, generator=g).mul(1e-3).to(dtype), torch.randn(count, dim, generator=g)
        narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        state = {name: torch.rand(count, dim, generator=g).to(narrow) for name in MOMENTS[rule]}
        if rule == Rule.ADAMW:
            state["step"] = torch.arange(count, dtype=torch.float32)[:, None]
        for nesterov in (False, True):
            step = Update(rule, 1e-3, 0.1, 0.9, nesterov, eps=1e-4, stochastic=dtype != torch.float32, key=12345)
            mine, theirs = (({n: v.clone() for n, v in state.items()}, p.clone()) for _ in range(2))
            TRITON.update(step, mine[1], d, mine[0], numbers)
            step.apply(theirs[1], d, theirs[0], numbers)
            assert ran[-1].kernel is triton_rows.update_kernel
            for got, want in [(mine[1], theirs[1]), *((mine[0][n], theirs[0][n]) for n in state)]:
                if got.dtype == torch.float32:
                    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
                else:  # a last place apart where rounding before was another
                    assert (got != want).float().mean() < 0.01
                    torch.testing.assert_close(got, want)
                assert not torch.equal(got, p)


@pytest.mark.parametrize("kind", [mk.optim.FusedSGD, mk.optim.FusedAdamW])
def test_a_fused_step(kind, ran):
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        head = mk.MarginHead(24, 700, mk.ArcFace(scale=16.0), backend=backend)
        optimizer = kind(head, lr=0.01, weight_decay=0.1, **({"momentum": 0.9} if kind is mk.optim.FusedSGD else {}))
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                head(torch.randn(9, 24), torch.randint(700, (9,))).backward()
            assert head.weight.grad is None
            optimizer.step()
        found.append(head.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert [one.kernel for one in ran].count(triton_rows.update_kernel) >= 2
