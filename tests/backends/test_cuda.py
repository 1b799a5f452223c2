"""The CUDA kernels' own sources on a CPU, under csrc/cuda/emulate.h: the two backends against the float64 reference, pass by pass against
the torch backend, and the layouts against the PTX manual's tables. On a GPU, the compiled kernels themselves."""

import fcntl
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.passes import compare_passes, pass_inputs

from benchmarks import gpu_small
from marginkernels import NonTarget, SphereFace2, testing
from marginkernels.backend import FUSED
from marginkernels.backend.chunked import ChunkedBackend
from marginkernels.backend.cuda import common, generic, hopper
from marginkernels.core.types import PassInputs, Reduction, Request, Upstream

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "hopper": (torch.bfloat16, torch.float16)}
EVERY = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The sources compiled for the CPU; once, whichever worker comes first."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None or not Path("/proc").exists():
        pytest.skip("the emulation needs g++ or clang++ on Linux")
    base = tmp_path_factory.getbasetemp()  # of this worker; one above it is the session's, where there are several
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated_cuda"
    folder.mkdir(exist_ok=True)
    target = folder / "emulated_cuda.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            command = [
                compiler,
                "-std=c++17",
                "-O2",
                "-fPIC",
                "-shared",
                "-U_FORTIFY_SOURCE",
                "-Wall",
                "-Wno-unknown-pragmas",
                "-DMK_EMULATE",
                "-DMK_BARRIER_LIMIT=20000",
            ]
            command += ["-DMK_FUSED", "-DMK_MODULE=emulated_cuda", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            command += [
                "-x",
                "c++",
                *(str(SOURCES / name) for name in ("generic.cu", "hopper.cu", "module.cpp")),
                "-o",
                str(target) + ".new",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            Path(f"{target}.new").rename(target)
    spec = importlib.util.spec_from_file_location("emulated_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedCuda(generic.CudaBackend):
    device_types = ("cpu",)


class EmulatedHopper(hopper.HopperBackend):
    device_types = ("cpu",)

    def multiprocessors(self, device):
        return 6


@pytest.fixture
def emulated(kernels, monkeypatch):
    """Both backends by name, on the CPU, with chunks so narrow that small problems have several."""
    monkeypatch.setattr(common, "MAX_WIDTH", 256)
    monkeypatch.setattr(common, "ROW_THREADS", {False: 64, True: 64})
    monkeypatch.setattr(hopper, "ROW_CHUNK_BYTES", 256 * 2 * 128)
    monkeypatch.setattr(hopper, "CLASS_CHUNK_BYTES", 256 * 6 * 128)
    for name, kind in (("cuda", EmulatedCuda), ("hopper", EmulatedHopper)):
        backend = kind()
        backend.kernels = kernels
        monkeypatch.setitem(FUSED, name, backend)
    return FUSED


@pytest.mark.parametrize(("name", "head"), list(itertools.product(DTYPES, testing.HEADS)))
def test_every_head(emulated, name, head):
    number = list(testing.HEADS).index(head)
    dtype = DTYPES[name][number % len(DTYPES[name])]  # each dtype meets every kind of head; the passes below meet each form in each
    case = testing.Case.random(70, 128, 391, dtype, bias=number % 2 == 1, weight_dtype=torch.float32)
    for options in ({}, {"label_smoothing": 0.1}):
        found = testing.errors(case, testing.HEADS[head](391), name, **testing.accepted(head, **options))
        assert max(found.values()) <= testing.TOLERANCE[dtype], (dtype, options, found)


@pytest.mark.parametrize(("name", "dim"), [("hopper", 256), ("hopper", 512), ("cuda", 33), ("cuda", 2)])
def test_dimensions(emulated, name, dim):
    for head in ("l2-softmax", "curricularface"):
        found = testing.errors(testing.Case.random(37, dim, 301, torch.bfloat16), testing.HEADS[head](301), name)
        assert max(found.values()) <= testing.TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 1), (1, 128, 2), (2, 128, 256), (65, 128, 33), (130, 128, 3)])
def test_small_shapes(emulated, name, shape):
    case = testing.Case.random(*shape, torch.bfloat16, ignored=False)
    want = testing.run(case, testing.HEADS["cosface"](shape[2]), "reference", dtype=torch.float64)
    got = testing.run(case, testing.HEADS["cosface"](shape[2]), name)
    for key, value in want.items():  # with one class all of it is 0, hence the absolute part
        assert (got[key] - value).norm() <= 3e-2 * value.norm() + 1e-6, key


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_norms_far_from_one(emulated, name, dtype):
    """Centers of norm 1e18, 1e-18 and 0, in float32, and embeddings of the like where the dtype holds them."""
    case = testing.Case.random(70, 128, 517, dtype, weight_dtype=torch.float32)
    case.w[3::5] *= 1e18
    case.w[4::5] *= 1e-18
    case.w[7] = 0
    if dtype != torch.float16:
        case.x[::3] *= 1e18
        case.x[1::3] *= 1e-18
    want = testing.run(case, testing.HEADS["arcface"](517), "reference", dtype=torch.float64)
    got = testing.run(case, testing.HEADS["arcface"](517), name)
    tolerance = testing.TOLERANCE[dtype]
    assert testing.relative_error(got["loss"], want["loss"]) <= tolerance
    for part in (slice(3, None, 5), slice(4, None, 5), slice(0, None, 5)):  # each size by itself: the largest gradients hide the rest
        assert testing.relative_error(got["dw"][part], want["dw"][part]) <= tolerance
    assert (got["dw"][7] == 0).all()


@pytest.mark.parametrize("upstream", [1e-6, 65536.0])
@pytest.mark.parametrize("name", DTYPES)
def test_float16_holds_any_upstream(emulated, name, upstream):
    """Weights of the class pass are brought into float16's range, be the loss scaled up or averaged over many rows."""
    case, scale = testing.Case.random(31, 128, 300, torch.float16, weight_dtype=torch.float32), torch.tensor(upstream)
    want = testing.run(case, testing.HEADS["arcface"](300), "reference", dtype=torch.float64, upstream=scale)
    got = testing.run(case, testing.HEADS["arcface"](300), name, upstream=scale)
    assert testing.relative_error(got["dw"], want["dw"]) <= testing.TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", DTYPES)
def test_strided_centers_and_crowded_classes(emulated, name):
    """Centers that are columns of a larger tensor; all rows of one class; labels of other shards."""
    case = testing.Case.random(70, 128, 300, torch.bfloat16, weight_dtype=torch.float32, bias=True)
    wide = torch.randn(300, 200)
    wide[:, :128] = case.w
    labels = torch.full((70,), 299)
    labels[5] = -100
    got, want = ({}, {})
    for out, w, backend, dtype in ((got, wide[:, :128], name, None), (want, case.w, "reference", torch.float64)):
        out |= testing.run(testing.Case(case.x, w, labels, case.bias), testing.HEADS["arcface"](300), backend, dtype=dtype)
    assert max(testing.relative_error(got[k], want[k]) for k in want) <= testing.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", DTYPES)
def test_centers_off_sixteen_bytes(emulated, name):
    """As a view into a flat buffer of parameters may lie: tensor copies cannot take it from there."""
    case = testing.Case.random(70, 128, 300, torch.bfloat16)
    flat = torch.empty(300 * 128 + 1, dtype=torch.bfloat16)
    w = flat[1:].view(300, 128).copy_(case.w)
    assert w.data_ptr() % 16
    found = testing.errors(testing.Case(case.x, w, case.labels, None), testing.HEADS["softmax"](300), name)
    assert max(found.values()) <= testing.TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("mixed", [False, True], ids=["apart", "mixed"])
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_near_and_far(emulated, sign, mixed):
    """Rows whose logits cannot leave the range of an exponential keep no running maximum, others do; with cosines of all but 1 or -1."""
    p = pass_inputs(128, (torch.bfloat16, torch.float32))
    p.w[:] = sign * p.x[20].float() + 0.1 * p.w * torch.linspace(0, 1, 300)[:, None]
    p.x[:] = p.x[20]
    rows = torch.arange(70)
    far = rows % 3 == 0 if mixed else rows < 16  # some rows of every warp, or the first warp's
    p.scale[:] = torch.where(far, 1000.0, 64.0)
    assert torch.equal(emulated["hopper"]._reach(p) > 96, far)
    request = Request.log_sum_exp(need_center=True, need_cos=True)
    got, want = (b.row_pass(p, request) for b in (emulated["hopper"], ChunkedBackend()))
    for field in ("lse", "max_logit", "mean_cos", "mean_center"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "non_target", "reduction"), list(itertools.product(DTYPES, NonTarget, Reduction)))
def test_passes_against_the_torch_backend(emulated, name, non_target, reduction):
    """Everything the two passes may be asked for, and for nothing else, against plain PyTorch."""
    for dtype, bias, normalize in ((DTYPES[name][0], True, True), (torch.float16, False, False)):
        inputs = pass_inputs(128, (dtype, torch.float32), non_target, bias=bias, normalize_weight=normalize)
        compare_passes(emulated[name], inputs, reduction, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("head", ["l2-softmax", "curricularface"])
def test_bits_when_copies_and_products_are_late(emulated, kernels, head):
    """Whatever the hardware does on its own time done at the last moment, and threads in another order: nothing may change."""
    case = testing.Case.random(70, 128, 517, torch.bfloat16, bias=True)
    early = testing.run(case, testing.HEADS[head](517), "hopper", label_smoothing=0.1)
    kernels.set_late(True)
    try:
        late = testing.run(case, testing.HEADS[head](517), "hopper", label_smoothing=0.1)
    finally:
        kernels.set_late(False)
    for key, value in early.items():
        assert torch.equal(late[key], value), key


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tiles", range(1, 8))
def test_every_number_of_tiles(emulated, kernels, monkeypatch, tiles, late):
    """The two warpgroups take turns: as many tiles as may be, in both passes, in one split and in more splits than there are tiles."""
    n = c = tiles * 32 - 5
    case = testing.Case.random(n, 128, c, torch.bfloat16)
    monkeypatch.setattr(hopper, "ROW_CHUNK_BYTES", 1 << 20)
    kernels.set_late(late)
    try:
        for head, processors in itertools.product(("cosface", "mv-am"), (1, 8 * n)):
            monkeypatch.setattr(EmulatedHopper, "multiprocessors", lambda self, device, processors=processors: processors)
            found = testing.errors(case, testing.HEADS[head](c), "hopper")
            assert max(found.values()) <= testing.TOLERANCE[torch.bfloat16], (head, processors, found)
    finally:
        kernels.set_late(False)


@pytest.mark.parametrize(
    ("n", "least"), [(64, 0.95), (512, 0.95), (1024, 0.95), (1100, 0.9), (3000, 0.9), (4096, 0.95), (4225, 0.9), (5000, 0.9), (8449, 0.85)]
)
def test_splits_fill_the_waves(n, least):
    """How much of the GPU works on average, on 132 multiprocessors and a chunk of a million classes at D = 512. N = 3000 once filled 71%,
    4225 51% and 8449 50%."""
    row_tiles, tiles = -(-n // 64), hopper.ROW_CHUNK_BYTES // (2 * 512) // 32
    splits = hopper.splits_of(row_tiles, tiles, 132)
    blocks = row_tiles * splits
    assert blocks / (-(-blocks // 132) * 132) >= least
    assert tiles // splits >= 7  # or a block's own cost shows
    assert blocks <= max(row_tiles, hopper.MAX_WAVES * 132)


def test_splits_stay_few():
    for row_tiles, tiles, processors in itertools.product((1, 2, 7, 133, 2000), (1, 3, 100, 1024), (1, 6, 108, 132)):
        splits = hopper.splits_of(row_tiles, tiles, processors)
        assert 1 <= splits <= tiles
        assert splits == 1 or row_tiles * splits <= hopper.MAX_WAVES * processors
    assert hopper.splits_of(16, 1024, 132) == 8  # one wave is enough: no partial results for nothing


@pytest.mark.parametrize("processors", [78, 108, 114, 132, 144])
def test_the_small_cases_wrap_the_rings(processors):
    """On a whole GPU too: a block of the row pass uses each of its buffers several times in one of the cases of the sanitizers."""
    stages = int(re.search(r"constexpr int STAGES = (\d+);", (SOURCES / "hopper.cu").read_text())[1])
    most = 0
    for n, d, c in gpu_small.SHAPES:
        if d in hopper.HopperBackend.dims:
            tiles = hopper.chunk_width(c, hopper.ROW_CHUNK_BYTES // (2 * d)) // 32
            most = max(most, tiles // hopper.splits_of(-(-n // 64), tiles, processors))
    assert most >= 3 * stages


class Spy:
    """The kernels, noting the first class of each chunk that is computed in the class pass."""

    def __init__(self, kernels):
        self.kernels, self.starts = kernels, []

    def __getattr__(self, name):
        call = getattr(self.kernels, name)
        if name not in ("class_chunk", "fused_class"):
            return call
        return lambda *args, **options: (self.starts.append(options["start"]), call(*args, **options))


def test_rows_opposite_to_other_centers(emulated):
    """Rounding takes a cosine below -1, and 1 + cos below 0."""
    w = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    case = testing.Case(-3 * w, w, torch.arange(64).roll(1), None)
    for gradient in ("detached", "exact"):
        found = testing.run(case, SphereFace2(64, gradient=gradient), "cuda")
        assert all(v.isfinite().all() for v in found.values()), gradient


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_workspace(emulated, monkeypatch, name, dtype):
    """What is saved is within the limit, spares the class pass its products there, and changes nothing but rounding."""
    backend = emulated[name]
    size = common.saved_bytes(70, 256, dtype)
    assert [backend.workspace_bytes(70, 1000, dtype, k) for k in (0, size - 1, size, 2 * size + 5, 10**9)] == [
        0,
        0,
        size,
        2 * size,
        4 * size,
    ]
    case = testing.Case.random(70, 128, 1000, dtype)
    spy = Spy(backend.kernels)
    monkeypatch.setattr(backend, "kernels", spy)
    for head, options, expected in (
        ("arcface", {}, [512, 768]),
        ("curricularface", {}, [512, 768]),
        ("sphereface2", {}, [0, 256, 512, 768]),  # its bias has a gradient
        ("arcface", {"label_smoothing": 0.1}, [0, 256, 512, 768]),
    ):
        spy.starts.clear()
        found = testing.errors(case, testing.HEADS[head](1000), name, workspace_mb=2.5 * size / 2**20, **options)
        assert max(found.values()) <= testing.TOLERANCE[dtype], found
        assert spy.starts == expected
    spy.starts.clear()
    found = testing.errors(case, testing.HEADS["arcface"](1000), name, workspace_mb=100)
    assert max(found.values()) <= testing.TOLERANCE[dtype], found
    assert spy.starts == []


def test_a_missing_or_unknown_argument_is_an_error(kernels):
    with pytest.raises(KeyError, match="missing argument"):
        kernels.centers(0, 0, 0, w=None)
    pointers = ("running_max", "total", "cos", "max_logit", "center", "out_value", "out_cos", "out_max_logit", "out_center")
    with pytest.raises(KeyError, match="does not have"):
        kernels.combine(0, **dict.fromkeys(pointers), pow2=1.0, n=0, d=0, splits=0, reduction=0, more=1)


def test_layouts(kernels):
    """csrc/cuda/hopper_ptx.h against the tables of the PTX manual, written out another way."""
    places = {(kernels.fragment_row(t, i), kernels.fragment_column(t, i)) for t in range(128) for i in range(16)}
    assert places == set(itertools.product(range(64), range(32)))  # each element of a 64 x 32 accumulator once
    for t, i, row, column in (
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (0, 2, 8, 0),
        (1, 0, 0, 2),
        (4, 0, 1, 0),
        (0, 4, 0, 8),
        (33, 7, 24, 11),
        (127, 127, 63, 255),
    ):
        assert (kernels.fragment_row(t, i), kernels.fragment_column(t, i)) == (row, column)
    # 128-byte swizzle: sixteen-byte unit u of row r goes to unit u xor r.
    for r, u in itertools.product(range(32), range(8)):
        assert kernels.swizzled(r * 128 + u * 16 + 6) == r * 128 + (u ^ (r % 8)) * 16 + 6
    # Core matrices of eight rows of sixteen bytes, four side by side.
    assert sorted(kernels.weight_offset(r, c) for r in range(64) for c in range(32)) == list(range(0, 64 * 32 * 2, 2))
    assert kernels.weight_offset(1, 0) == 16
    assert kernels.weight_offset(0, 8) == 128
    assert kernels.weight_offset(8, 0) == 512
    # Descriptor: address, leading and stride offsets in sixteen bytes at bits 0, 16 and 32; 1 at bit 62 is the 128-byte swizzle.
    assert kernels.along_sum(0x12340) == 0x1234 | 1 << 16 | 64 << 32 | 1 << 62
    assert kernels.across_sum(0x400, 4096) == 0x40 | 256 << 16 | 64 << 32 | 1 << 62
    assert kernels.weight_descriptor(0x800) == 0x80 | 8 << 16 | 32 << 32
    assert all(kernels.fused_shared_bytes(d) <= 227 * 1024 for d in hopper.HopperBackend.dims)


def test_emulation_notices_a_deadlock(kernels):
    with pytest.raises(RuntimeError, match="none can go on"):
        kernels.wait_for_ever()
    with pytest.raises(RuntimeError, match="none can go on; waiting for nobody's"):
        kernels.wait_for_a_barrier(False)


def test_a_debug_build_gives_up_at_a_barrier_and_names_it(kernels):
    """Where other threads go on, and would for ever: as the kernel itself does on a GPU, with the same macro."""
    with pytest.raises(RuntimeError, match=r"waited for too long; waiting for nobody's$"):
        kernels.wait_for_a_barrier(True)
    with pytest.raises(RuntimeError, match=r"none can go on$"):  # and the next kernel runs
        kernels.wait_for_ever()


def test_never_chosen_by_auto_before_it_is_verified():
    for name in DTYPES:
        assert not FUSED[name].tested_on
        assert "never run on a GPU" in FUSED[name].note


def _on_gpu(name):
    backend = FUSED[name]
    reason = backend.unavailable_reason() or backend.unsupported_reason("cuda", torch.bfloat16, torch.float32, 128)
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "head"), list(itertools.product(DTYPES, testing.HEADS)))
def test_every_head_on_the_gpu(name, head):
    _on_gpu(name)
    for dtype, (n, d, c) in itertools.product(DTYPES[name], [(70, 128, 517), (129, 256, 20_011), (300, 512, 70_001)]):
        case = testing.Case.random(n, d, c, dtype, weight_dtype=torch.float32, device="cuda")
        for options in ({}, {"label_smoothing": 0.1}, {"workspace_mb": 8.0}):
            found = testing.errors(case, testing.HEADS[head](c), name, **testing.accepted(head, **options))
            assert max(found.values()) <= testing.TOLERANCE[dtype], (dtype, d, options, found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DTYPES)
def test_bits_repeat_on_the_gpu(name):
    _on_gpu(name)
    case = testing.Case.random(1000, 512, 100_003, torch.bfloat16, weight_dtype=torch.float32, device="cuda")
    first = testing.run(case, testing.HEADS["arcface"](100_003), name)
    for _ in range(5):
        assert all(torch.equal(v, first[k]) for k, v in testing.run(case, testing.HEADS["arcface"](100_003), name).items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", DTYPES)
def test_graph_capture(name):
    """Both passes are captured in a CUDA graph, and a replay sees new inputs."""
    _on_gpu(name)
    case = testing.Case.random(256, 512, 20_000, torch.bfloat16, weight_dtype=torch.float32, device="cuda", ignored=False)
    p = PassInputs(
        x=case.x * 0.01,
        row_factor=torch.full((256,), 3.0, device="cuda"),
        w=case.w,
        bias=None,
        labels=case.labels,
        scale=torch.full((256,), 20.0, device="cuda"),
        threshold=None,
        t=None,
        non_target=NonTarget.IDENTITY,
        normalize_weight=True,
    )
    row = torch.rand(256, device="cuda")

    def step():
        out = FUSED[name].row_pass(p, Request.log_sum_exp(need_center=True))
        upstream = Upstream(lse=out.lse, d_lse=row, d_logit_sum=None, d_target_cos=row, d_target_bias=None)
        grads = FUSED[name].class_pass(p, upstream, out.class_factor, out.saved, True, False)
        return out.lse, out.mean_center, grads.d_weight

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    p.x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
