"""Every fused backend against the float64 reference: every head, every dtype, ragged shapes, every option."""

import itertools

import pytest
import torch
from helpers.chunks import chunks_of

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED, resolve

SHAPES = [(7, 33, 101), (31, 64, 1000), (33, 128, 517)]
#: Classes in a chunk of the ``torch`` backend, for each shape: one, some, and all.
WIDTHS = dict(zip(SHAPES, (1, 300, None), strict=True))
BACKENDS = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]


@pytest.mark.parametrize(("backend", "head", "shape"), list(itertools.product(BACKENDS, testing.HEADS, SHAPES)))
def test_every_head(backend, head, shape):
    for dtype in FUSED[backend].dtypes:
        with chunks_of(WIDTHS[shape] if backend == "torch" else None):
            found = testing.errors(testing.Case.random(*shape, dtype), testing.HEADS[head](shape[2]), backend)
        assert max(found.values()) <= testing.TOLERANCE[dtype], (dtype, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ["arcface", "mv-arc", "curricularface", "combined"])
def test_embeddings_at_their_centers_in_float16(backend, head):
    """The target's slope is 1e8 there, past float16: the gradient of the center stays finite, and small beside that slope."""
    if torch.float16 not in FUSED[backend].dtypes:
        pytest.skip(f"{backend} has no float16")
    w = torch.nn.functional.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(0))).half()
    got = testing.run(testing.Case(w[:5].clone(), w, torch.arange(5), None), testing.HEADS[head](9), backend)
    assert all(v.isfinite().all() for v in got.values())
    assert float(got["dw"].float().norm()) < 1e4


def test_auto_takes_only_what_is_verified(monkeypatch):
    """On a CPU the first that can serve and that the project's tests prove there; by name also one that they do not."""
    for name in BACKENDS:
        monkeypatch.setattr(FUSED[name], "tested_on", ("cpu",) if name == "torch" else ())
        assert resolve(name, "cpu", torch.float32, torch.float32, 8) == name
    assert resolve("auto", "cpu", torch.float32, torch.float32, 8) == "torch"
    monkeypatch.setattr(FUSED["torch"], "tested_on", ())
    with pytest.raises(ValueError, match="has not been verified here"):
        resolve("auto", "cpu", torch.float32, torch.float32, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", testing.HEADS)
def test_no_worse_than_eager(backend, head):
    """At most three times the error that eager PyTorch makes in the same dtype, on problems of awkward shape (half precision: on one)."""
    for shape, width in (((31, 64, 1000), 300), ((25, 123, 507), None)):
        for dtype in FUSED[backend].dtypes:
            if dtype == torch.float64 or (dtype.itemsize == 2 and width is None):
                continue
            case = testing.Case.random(*shape, dtype, seed=3, bias=head == "softmax")
            margin = testing.HEADS[head](shape[2])
            want = testing.run(case, margin, "reference", dtype=torch.float64)
            fair = testing.eager(case, margin)
            with chunks_of(width if backend == "torch" else None):
                got = testing.run(case, margin, backend)
            for name in fair:
                ours, theirs = (testing.relative_error(v[name], want[name]) for v in (got, fair))
                # One rounding of the result is nobody's error.
                assert ours <= 3 * theirs + torch.finfo(want[name].float().dtype).eps, (shape, dtype, name, ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_32_bits(backend):
    """Centers in rows of 4 million elements, of which few are touched: the last classes lie past element 2^31."""
    case = testing.Case.random(5, 16, 600, weight_dtype=torch.bfloat16)
    w = torch.empty(600 << 22, dtype=torch.bfloat16).as_strided((600, 16), (1 << 22, 1)).copy_(case.w)
    case.labels[0], case.labels[1] = 599, 0
    want, got = (testing.run(testing.Case(case.x, v, case.labels, None), mk.ArcFace(), backend) for v in (case.w, w))
    assert all(torch.equal(got[k], v) for k, v in want.items())
