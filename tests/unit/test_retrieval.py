"""``topk``: the order of a brute-force search, ties and NaN included, over chunks of every size; its arguments; its cost."""

import math
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from benchmarks import topk_times
from marginkernels.backend import FUSED, cpu, torch_topk
from marginkernels.core.numerics import best
from marginkernels.core.types import TopkInputs


def brute_force(scores, k):
    """The stable order of falling (N, C) ``scores``, NaN first."""
    order = (torch.where(scores.isnan(), torch.inf * 2, scores) + 0.0).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order


def better(scores, k):
    """(N, k) float64 scores of the k best."""
    return brute_force(scores, k)[0]


BACKENDS = [name for name in ("torch", "cpu") if FUSED[name].unavailable_reason() is None]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=["one chunk", 40, 100, 700])
def chunks(request, monkeypatch, backend):
    """Chunks of so many classes of the torch backend; those of the C++ kernels have 128."""
    if request.param != "one chunk":
        if backend != "torch":
            pytest.skip("has chunks of one size")
        for name, value in {"CHUNK_SCORES": 1, "LEAST_WIDTH": request.param}.items():
            monkeypatch.setattr(torch_topk, name, value)


@pytest.fixture
def threads():
    """Sets their number for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_ties(case, dtype):
    """Products of small integers are exact: many ties, among them whole rows and centers that are NaN."""
    g = torch.Generator().manual_seed(case)
    n, c = int(torch.randint(1, (9, 70)[case % 2], (), generator=g)), int(torch.randint(1, 3000, (), generator=g))
    k, largest = int(torch.randint(1, min(c, 60) + 1, (), generator=g)), 2 if case % 3 else 100
    x, w = (torch.randint(-largest, largest + 1, (m, 4), generator=g).to(dtype) for m in (n, c))
    if case % 5 == 0:
        x[0] = 0
    if case % 4 == 0:
        w[torch.randint(c, (3,), generator=g)] = torch.nan
    return x, w, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_and_nan(chunks, backend, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("no float64")
    for case in range(9):
        x, w, k = with_ties(case, dtype)
        want = brute_force(x.double() @ w.double().T, k)
        scores, classes = mk.topk(x, w, k, mk.Softmax(), backend=backend)
        assert torch.equal(classes, want[1])
        torch.testing.assert_close(scores.double(), want[0], rtol=0, atol=0, equal_nan=True)


@needs_cpu
def test_every_level_and_number_of_threads(threads):
    """Classes in the order of a brute-force search at every level; the same bits for any number of threads, however the classes are cut."""
    for level in cpu.levels():
        one = cpu.CpuBackend(level)
        dtype = torch.bfloat16 if level in ("amx", "avx512_bf16") else torch.float32
        for case in range(6):
            x, w, k = with_ties(case, dtype)
            found = one.topk(TopkInputs(x, w, None, None, False, False), k)
            assert torch.equal(found.classes, brute_force(x.double() @ w.double().T, k)[1])
            mixed = one.topk(TopkInputs(x, w.float(), None, None, False, False), k)
            assert torch.equal(mixed.classes, found.classes)
        for n, d, c, k in ((1, 64, 40_000, 5), (7, 33, 20_001, 300), (40, 70, 6000, 9), (300, 16, 4000, 17)):
            torch.manual_seed(n)
            x, w, bias = torch.randn(n, d).to(dtype), torch.randn(c, d).to(dtype), torch.randn(c)
            for inputs in (TopkInputs(x, w, None, None, True, True), TopkInputs(x, w, bias, torch.rand(n), True, False)):
                results = []
                for count in (1, 2, 3):
                    threads(count)
                    results.append(one.topk(inputs, k))
                for other in results[1:]:
                    assert torch.equal(other.scores, results[0].scores)
                    assert torch.equal(other.classes, results[0].classes)


def test_best_has_no_signed_nan():
    scores = torch.tensor([[1.0, -math.nan, 3.0, math.nan, 0.0, -0.0]])
    scores.view(torch.int32)[0, 1] |= -(2**31)
    for dtype in (torch.float32, torch.float64):
        assert best(scores.to(dtype), torch.arange(6)[None], 6)[1].tolist() == [[1, 3, 2, 0, 4, 5]]


def test_no_signed_nan_nor_zero(backend):
    """Of a bias and of products, in both ways of the C++ kernels."""
    bias = torch.tensor([1.0, -math.nan, 3.0, math.nan, 0.0, -0.0])
    bias.view(torch.int32)[1] |= -(2**31)
    for n in (1, 20):
        assert mk.topk(torch.zeros(n, 3), torch.zeros(6, 3), 6, bias=bias, backend=backend)[1].tolist() == [[1, 3, 2, 0, 4, 5]] * n
    every = mk.topk(torch.full((2, 1), -math.inf), torch.ones(300, 1), 300, mk.Softmax(), backend=backend)
    assert torch.equal(every[1], torch.arange(300).expand(2, -1))
    assert every[0].eq(-math.inf).all()


@pytest.mark.parametrize(("n", "d", "c"), [(1, 64, 10_001), (33, 8, 1500), (70, 33, 2001)])
def test_cosines(chunks, backend, n, d, c):
    """Every dtype and any strides: each score within the dtype's rounding of the true cosine, no better class left out."""
    torch.manual_seed(0)
    x, w = torch.randn(n, d), torch.randn(d, c).T
    w[::3] *= torch.logspace(-2, 2, len(w[::3]))[:, None]
    w[7] = 0
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        if backend == "cpu" and dtype == torch.float64:
            continue
        rows, centers = x.to(dtype), w.to(dtype)
        scores, classes = mk.topk(rows, centers, 9, backend=backend)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        true = F.normalize(rows.double()) @ F.normalize(centers.double()).T
        assert (scores - true.gather(1, classes)).abs().max() <= tolerance
        assert (scores - true.topk(9, 1).values).abs().max() <= tolerance
        assert (scores[:, :-1] >= scores[:, 1:]).all()


def strided(v, how):
    """``v`` (M, D) with the same values in another layout."""
    if how == "columns":
        return v.T.contiguous().T
    if how == "rows apart":
        return torch.cat([v, torch.full_like(v, math.nan)], 1)[:, : v.shape[1]]
    if how == "every other":
        return torch.stack([v, torch.full_like(v, math.nan)], 2)[:, :, 0]
    return v


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_cpu
@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed):
    """Random shapes, strides, dtypes, sides, biases and k against a float64 search: each score is its class's, in the right order, and no
    class left out is better."""
    rng = random.Random(seed)
    n, d, c = (
        rng.choice((1, 2, 3, 15, 16, 17, 33, 70)),
        rng.choice((1, 2, 7, 8, 31, 64, 65, 130)),
        rng.choice((1, 3, 127, 128, 129, 300, 2001)),
    )
    k = rng.choice((1, min(5, c), max(1, c // 2), c))
    torch.manual_seed(seed)
    x = strided(torch.randn(n, d).to(rng.choice(DTYPES)), rng.choice(("", "columns", "every other")))
    w = strided(torch.randn(c, d).to(rng.choice(DTYPES)), rng.choice(("", "columns", "rows apart", "every other")))
    margin = rng.choice((mk.Softmax(), mk.ArcFace(scale=3.0), mk.L2Softmax(alpha=3.0), mk.NormFace(scale=0.5)))
    bias = torch.randn(c) if rng.random() < 0.4 else None
    scores, classes = mk.topk(x, w, k, margin, bias, backend="cpu")
    rows = F.normalize(x.double()) if margin.normalize_embedding else x.double()
    centers = F.normalize(w.double()) if margin.normalize_weight else w.double()
    true = rows @ centers.T
    if bias is not None:
        batch = mk.margins.BatchInfo(x, torch.full((n,), -1), c)
        true = torch.as_tensor(margin.row_scale(batch), dtype=torch.float64).expand(n)[:, None] * true + bias.double()
    # Rounding of D products, each in float32.
    size = rows.abs() @ centers.abs().T * (1.0 if bias is None else 3.0) + (0.0 if bias is None else bias.double().abs())
    tolerance = 4e-7 * (2 + math.sqrt(d)) * float(size.max())
    assert all(len(set(one.tolist())) == k for one in classes)
    assert (scores - true.gather(1, classes)).abs().max() <= tolerance
    assert (scores - better(true, k)).abs().max() <= tolerance
    falls, ties = scores[:, :-1] > scores[:, 1:], scores[:, :-1] == scores[:, 1:]
    assert (falls | (ties & (classes[:, :-1] < classes[:, 1:]))).all()


def test_lengths_of_centers(backend):
    """Norms whose squares overflow or vanish."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 8), torch.randn(400, 8)
    want = mk.topk(x, w, 6, backend="torch")
    w *= torch.tensor([1.0, 1e30, 1e-25, 1e-12])[torch.arange(400) % 4, None]
    for embeddings in (x, x * 1e30, x.repeat(9, 1)):  # more rows than dimensions: the centers are scaled instead
        for rows in (embeddings[:1], embeddings):
            scores, classes = mk.topk(rows, w, 6, backend=backend)
            assert torch.equal(classes[:5], want[1][: len(rows)])
            torch.testing.assert_close(scores[:5], want[0][: len(rows)])


@needs_cpu
def test_offsets_beyond_32_bits():
    """Centers that lie more than 2^31 elements apart, in memory of which only their own pages are touched."""
    torch.manual_seed(0)
    w = torch.empty((3 << 30) + 64, dtype=torch.float16).as_strided((769, 64), (1 << 22, 1))
    w.copy_(torch.randn(769, 64))
    for x in (torch.randn(1, 64), torch.randn(40, 64)):
        scores, classes = mk.topk(x, w, 5, backend="cpu")
        want = mk.topk(x, w.contiguous(), 5, backend="cpu")
        assert torch.equal(classes, want[1])
        assert torch.equal(scores, want[0])
        assert (classes > 512).any()


INTERRUPTED = """
import os, signal, threading, time, torch, marginkernels as mk
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
torch.set_num_threads(2)
x, w = torch.randn(4096, 256), torch.randn(1, 256).expand(400_000, 256)
before = mk.topk(x[:64], w[:1000], 3, backend="cpu")
def interrupt():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    mk.topk(x, w, 3, backend="cpu")
    print("finished")
except KeyboardInterrupt:
    print(time.monotonic() - sent)
    assert torch.equal(mk.topk(x[:64], w[:1000], 3, backend="cpu")[0], before[0])
"""


@needs_cpu
def test_interrupt():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5  # seconds


def test_traced_rows_are_not_constants(backend):
    """A tracer sees an operator, not the result of one call."""
    w, x, other = torch.randn(50, 4), torch.randn(3, 4), torch.randn(3, 4)
    traced = torch.jit.trace(lambda x: mk.topk(x, w, 3, backend=backend), (x,), check_trace=False)
    assert torch.equal(traced(other)[1], mk.topk(other, w, 3, backend=backend)[1])


def test_backends():
    x, w = torch.randn(3, 4), torch.randn(50, 4)
    assert torch.equal(mk.topk(x, w, 3, backend="reference")[1], mk.topk(x, w, 3)[1])
    for call in (lambda: mk.topk(x, w, 3, backend="no"), lambda: mk.topk(x.double(), w, 3, backend="triton")):
        with pytest.raises(ValueError, match=r"^backend: "):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        scores = mk.topk(x, w, 3)[0]
        wide = mk.topk(x.double(), w, 3)[0]
    assert torch.equal(scores, mk.topk(x.bfloat16(), w, 3)[0])
    assert torch.equal(wide, mk.topk(x.double(), w, 3)[0])


def test_as_the_head():
    torch.manual_seed(0)
    x = torch.randn(7, 12)
    for margin in (mk.ArcFace(), mk.Softmax(), mk.L2Softmax(num_classes=300), mk.AdaCos(300)):
        head = mk.MarginHead(12, 300, margin, bias=True)
        torch.nn.init.normal_(head.bias)
        for got, want in zip(mk.topk(x, head.weight, 4, head.margin, head.bias), head.topk(x, 4), strict=True):
            assert torch.equal(got, want)
            assert not got.requires_grad
    bias = torch.randn(300)
    want = (F.normalize(x) @ F.normalize(head.weight).T + bias).topk(3, 1)
    assert torch.equal(mk.topk(x, head.weight, 3, bias=bias)[1], want.indices)
    assert mk.topk(x[:0], head.weight, 4)[1].shape == (0, 4)


X, W = torch.randn(3, 4), torch.randn(6, 4)
MISTAKES = {
    "weight": [lambda: mk.topk(X, W[:, :3]), lambda: mk.topk(X, [1.0]), lambda: mk.topk(X, W.double()), lambda: mk.topk(X, W.to("meta"))],
    "embeddings": [lambda: mk.topk(X.long(), W), lambda: mk.topk(X[0], W)],
    "k": [lambda: mk.topk(X, W, 7), lambda: mk.topk(X, W, 0), lambda: mk.topk(X, W, 2.0)],
    "margin": [lambda: mk.topk(X, W, 2, "arcface")],
    "bias": [lambda: mk.topk(X, W, 2, bias=torch.ones(5)), lambda: mk.topk(X, W, 2, bias=1.0)],
}


@pytest.mark.parametrize(("argument", "call"), [(name, call) for name, calls in MISTAKES.items() for call in calls])
def test_mistakes(argument, call):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected .*got"):
        call()


@pytest.mark.slow
@needs_cpu
def test_no_slower_than_eager(threads):
    """Than chunks of products and ``torch.topk``, in turn, by the median; a fifth more for the noise of other processes."""
    threads(1)  # so that other processes delay both sides alike
    found = {(s.n, s.d, s.c, s.normalized): s.ratio for s in topk_times.measure(rounds=9)}
    assert len(found) == 8
    assert all(ratio <= 1.2 for ratio in found.values()), found
