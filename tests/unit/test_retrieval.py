"""``topk``: the order of a brute-force search, ties and NaN included, over chunks of every size; its arguments; its cost."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from marginkernels import retrieval


def brute_force(scores, k):
    """The stable order of falling (N, C) ``scores``, NaN first."""
    order = (torch.where(scores.isnan(), torch.inf * 2, scores) + 0.0).argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), order


@pytest.fixture(params=["one chunk", 40, 100, 700])
def chunks(request, monkeypatch):
    """Chunks of so many classes."""
    if request.param != "one chunk":
        for name, value in {"ONE_CHUNK": 0, "LEAST_WIDTH": request.param, "CACHED_SCORES": 1}.items():
            monkeypatch.setattr(retrieval, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_and_nan(chunks, dtype):
    """Products of small integers are exact: many ties, among them whole rows and centers that are NaN."""
    torch.manual_seed(0)
    for case in range(8):
        n, c = int(torch.randint(1, 9, ())), int(torch.randint(1, 3000, ()))
        k, largest = int(torch.randint(1, min(c, 60) + 1, ())), 2 if case % 3 else 100
        x, w = (torch.randint(-largest, largest + 1, (m, 4)).to(dtype) for m in (n, c))
        if case % 5 == 0:
            x[0] = 0
        if case % 4 == 0:
            w[torch.randint(c, (3,))] = torch.nan
        scores, classes = mk.topk(x, w, k, mk.Softmax())
        want = brute_force(x.double() @ w.double().T, k)
        assert torch.equal(classes, want[1])
        torch.testing.assert_close(scores.double(), want[0], rtol=0, atol=0, equal_nan=True)


def test_best_has_no_signed_nan():
    scores = torch.tensor([[1.0, -math.nan, 3.0, math.nan, 0.0, -0.0]])
    scores.view(torch.int32)[0, 1] |= -(2**31)
    for dtype in (torch.float32, torch.float64):
        assert retrieval.best(scores.to(dtype), torch.arange(6)[None], 6)[1].tolist() == [[1, 3, 2, 0, 4, 5]]


@pytest.mark.parametrize(("n", "d", "c"), [(1, 64, 10_001), (33, 8, 5000), (70, 33, 9001)])
def test_cosines(chunks, n, d, c):
    """Every dtype and any strides: each score within the dtype's rounding of the true cosine, no better class left out."""
    torch.manual_seed(0)
    x, w = torch.randn(n, d), torch.randn(d, c).T
    w[::3] *= torch.logspace(-2, 2, len(w[::3]))[:, None]
    w[7] = 0
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        rows, centers = x.to(dtype), w.to(dtype)
        scores, classes = mk.topk(rows, centers, 9)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        true = F.normalize(rows.double()) @ F.normalize(centers.double()).T
        assert (scores - true.gather(1, classes)).abs().max() <= tolerance
        assert (scores - true.topk(9, 1).values).abs().max() <= tolerance
        assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_lengths_of_centers():
    """Norms whose squares overflow or vanish."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 8), torch.randn(400, 8)
    want = mk.topk(x, w, 6)
    w *= torch.tensor([1.0, 1e30, 1e-25, 1e-12])[torch.arange(400) % 4, None]
    for embeddings in (x, x * 1e30, x.repeat(9, 1)):  # more rows than dimensions: the centers are scaled instead
        scores, classes = mk.topk(embeddings, w, 6)
        assert torch.equal(classes[:5], want[1])
        torch.testing.assert_close(scores[:5], want[0])


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


@pytest.fixture
def one_thread():
    """So that other processes on the machine delay both sides alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_no_slower_than_eager():
    """Than a loop of products and ``torch.topk`` over chunks; the best of some turns, and a half more for the noise of other processes."""
    torch.manual_seed(0)
    x, w = torch.randn(128, 32), torch.randn(200_000, 32)

    def eager():
        unit, scores, classes = F.normalize(x), torch.empty(128, 0), torch.empty(128, 0, dtype=torch.int64)
        for start in range(0, len(w), 32768):
            found, at = (unit @ F.normalize(w[start : start + 32768]).T).topk(5, 1)
            scores, order = torch.cat([scores, found], 1).topk(5, 1)
            classes = torch.cat([classes, at + start], 1).gather(1, order)
        return scores, classes

    assert torch.equal(mk.topk(x, w, 5)[1], eager()[1])
    spent = {mk.topk: math.inf, eager: math.inf}
    for _ in range(5):
        for f in spent:
            start = time.perf_counter()
            f(x, w, 5) if f is mk.topk else f()
            spent[f] = min(spent[f], time.perf_counter() - start)
    assert spent[mk.topk] <= 1.5 * spent[eager], spent
