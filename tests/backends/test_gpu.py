"""Every backend that serves a GPU, at the sizes that it is for. Run by ``make test-gpu``; the backends' own small tests are elsewhere."""

import itertools
import subprocess
from pathlib import Path

import pytest
import torch

import marginkernels as mk
from benchmarks import gpu_kernels, gpu_report
from marginkernels import testing
from marginkernels.backend import FUSED

pytestmark = pytest.mark.gpu

BACKENDS = [name for name, b in FUSED.items() if "cuda" in b.device_types]
DTYPES = gpu_kernels.DTYPES


def serve(name, x, w, dim):
    reason = FUSED[name].unavailable_reason() or FUSED[name].unsupported_reason("cuda", x, w, dim)
    if reason:
        pytest.skip(f"{name}: {reason}")


def problem(n, d, c, x=torch.bfloat16, w=torch.float32, seed=0):
    """As :meth:`testing.Case.random`, drawn on the GPU: a million centers take too long on a CPU."""
    g = torch.Generator("cuda").manual_seed(seed)
    weight = torch.empty(c, d, device="cuda", dtype=w)
    for start in range(0, c, 1 << 20):
        part = weight[start : start + (1 << 20)]
        part.copy_(torch.randn(part.shape, generator=g, device="cuda") * 0.1)
    labels = torch.randint(c, (n,), generator=g, device="cuda")
    rows = torch.randn(n, d, generator=g, device="cuda")
    rows[::2] = 0.6 * rows[::2] + 12 * weight[labels[::2]].float()
    labels[n // 2] = -100
    return testing.Case(rows.to(x), weight, labels, None)


def judged(case, margin, rows=64):
    """Loss and gradients of the first ``rows`` rows alone, by plain float32 in chunks that fit any GPU: what N x C float64 would not."""
    return testing.run(testing.Case(case.x[:rows], case.w, case.labels[:rows], None), margin, "torch", dtype=torch.float32)


@pytest.mark.parametrize(("name", "head"), list(itertools.product(BACKENDS, testing.HEADS)))
def test_every_head_and_dtype(name, head):
    for number, (x, w) in enumerate(DTYPES):
        serve(name, x, w, 512)
        for n, d, c in ((33, 128, 517), (129, 512, 20_011)):
            case = testing.Case.random(n, d, c, x, weight_dtype=w, bias=number % 2 == 0, device="cuda")
            for options in ({}, {"label_smoothing": 0.1}):
                found = testing.errors(case, testing.HEADS[head](c), name, **testing.accepted(head, **options))
                assert max(found.values()) <= max(testing.TOLERANCE[x], testing.TOLERANCE[w]), (x, w, n, d, c, options, found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dim", gpu_kernels.DIMS)
def test_dimensions(name, dim):
    for x, w in DTYPES:
        if FUSED[name].unavailable_reason() or FUSED[name].unsupported_reason("cuda", x, w, dim):
            continue
        case = testing.Case.random(65, dim, 3001, x, weight_dtype=w, device="cuda")
        for head in gpu_kernels.DIM_HEADS:
            found = testing.errors(case, testing.HEADS[head](3001), name)
            assert max(found.values()) <= max(testing.TOLERANCE[x], testing.TOLERANCE[w]), (x, w, head, found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("n", "c"), [(512, 1_000_000), (1024, 999_999), (4096, 1_000_001), (1, 1_000_003), (4095, 65_537)])
def test_a_million_classes(name, n, c):
    serve(name, torch.bfloat16, torch.float32, 512)
    case = problem(n, 512, c)
    want = testing.run(case, mk.ArcFace(), "torch", dtype=torch.float32)
    got = testing.run(case, mk.ArcFace(), name)
    for key in want:
        assert testing.relative_error(got[key], want[key]) <= testing.TOLERANCE[torch.bfloat16], key


@pytest.mark.parametrize(("name", "dtypes"), list(itertools.product(BACKENDS, DTYPES)))
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_workspace(name, dtypes, share):
    """Part of the classes saved between the passes, and all: the same results, and the same bits again."""
    x, w = dtypes
    serve(name, x, w, 512)
    n, c = 129, 20_011
    mb = share * FUSED[name].workspace_bytes(n, c, x, 1 << 40) / 2**20
    if not mb:
        pytest.skip(f"{name} keeps nothing")
    case = testing.Case.random(n, 512, c, x, weight_dtype=w, device="cuda")
    for head in testing.HEADS:
        found = testing.errors(case, testing.HEADS[head](c), name, workspace_mb=mb)
        assert max(found.values()) <= max(testing.TOLERANCE[x], testing.TOLERANCE[w]), (head, found)
    first, again = (testing.run(case, mk.CurricularFace(), name, workspace_mb=mb) for _ in range(2))
    assert all(torch.equal(again[k], v) for k, v in first.items())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("n", "c", "mb"), [(512, 1_000_000, 600), (4096, 600_011, 6144)])
def test_workspace_at_size(name, n, c, mb):
    """The second keeps more weights than 32 bits count."""
    serve(name, torch.bfloat16, torch.float32, 512)
    if not FUSED[name].workspace_bytes(n, c, torch.bfloat16, mb << 20):
        pytest.skip(f"{name} keeps nothing")
    case = problem(n, 512, c)
    want = testing.run(case, mk.ArcFace(), "torch", dtype=torch.float32)
    got = testing.run(case, mk.ArcFace(), name, workspace_mb=mb)
    for key in want:
        assert testing.relative_error(got[key], want[key]) <= testing.TOLERANCE[torch.bfloat16], key
    tail = slice(c - 100_000, None)
    assert testing.relative_error(got["dw"][tail], want["dw"][tail]) <= testing.TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_more_elements_than_32_bits_count(name):
    """C D beyond 2^31: the last classes are read and written where they are."""
    serve(name, torch.bfloat16, torch.bfloat16, 512)
    c = 4_300_000
    case = problem(64, 512, c, w=torch.bfloat16)
    case.labels[-4:] = torch.tensor([c - 1, c - 2, 4_194_304, 4_194_303], device="cuda")
    want = judged(case, mk.ArcFace())
    got = testing.run(case, mk.ArcFace(), name)
    assert testing.relative_error(got["loss"], want["loss"]) <= 3e-2
    assert testing.relative_error(got["dx"], want["dx"]) <= 3e-2
    for part in (slice(0, 4096), slice(4_194_000, 4_195_000), slice(c - 4096, c)):
        assert testing.relative_error(got["dw"][part], want["dw"][part]) <= 3e-2


@pytest.mark.parametrize("name", BACKENDS)
def test_bits_repeat(name):
    serve(name, torch.bfloat16, torch.float32, 512)
    case = problem(1000, 512, 100_003)
    for head in ("arcface", "curricularface"):
        margin = testing.HEADS[head](100_003)
        first = testing.run(case, margin, name)
        for _ in range(5):
            assert all(torch.equal(v, first[k]) for k, v in testing.run(case, margin, name).items())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_training_step_in_a_cuda_graph(name, dtype):
    """Forward and backward pass are captured, so neither waits for the device, and a replay sees new embeddings."""
    serve(name, dtype, torch.float32, 512)
    case = problem(256, 512, 50_021, dtype)
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
    margin = mk.ArcFace()

    def step():
        loss = mk.margin_cross_entropy(x, w, case.labels, margin=margin, backend=name)
        return loss, *torch.autograd.grad(loss, (x, w))

    graph, captured = testing.captured(step)
    with torch.no_grad():
        x.copy_(x.roll(1, 0))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", [*BACKENDS, "torch"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"workspace_mb": 4.0}], ids=["plain", "smooth", "workspace"])
def test_a_step_does_not_wait(name, options):
    """PyTorch raises at whatever would stop the host until the device has caught up, such as a number that is copied to the device."""
    serve(name, torch.bfloat16, torch.float32, 512)
    case = problem(256, 512, 20_011)
    margins = [testing.HEADS[head](20_011).cuda() for head in ("arcface", "curricularface", "adacos", "l2-softmax-trainable", "softmax")]
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    for mode in (0, "error"):  # kernels are loaded in the first round
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for margin in margins:
                mk.margin_cross_entropy(x, w, case.labels, margin=margin, backend=name, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("name", BACKENDS)
def test_memory(name):
    """Above inputs and gradients at most 64 MB and a share that grows with N D and C alone; never N x C."""
    serve(name, torch.bfloat16, torch.float32, 512)
    n, d, c = 1024, 512, 400_000
    case = problem(n, d, c)
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mk.margin_cross_entropy(x, w, case.labels, margin=mk.ArcFace(), backend=name).backward()
    torch.cuda.synchronize()
    above = torch.cuda.max_memory_allocated() - before - x.grad.nbytes - w.grad.nbytes
    assert above <= (64 << 20) + 32 * n * d * 4 + 16 * c


@pytest.mark.parametrize("name", BACKENDS)
def test_on_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    serve(name, torch.bfloat16, torch.float32, 128)
    case = testing.Case.random(33, 128, 517, torch.bfloat16, weight_dtype=torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        found = testing.errors(case, mk.ArcFace(), name)
    assert max(found.values()) <= testing.TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """The small suite under compute-sanitizer, where it is installed."""
    if gpu_report.tool("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(gpu_report.sanitizer(tool)(Path()), capture_output=True, text=True, timeout=600, cwd=gpu_report.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
