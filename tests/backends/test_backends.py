"""Every fused backend against the float64 reference: every head, every dtype, ragged shapes, every option."""

import itertools

import pytest
import torch

from marginkernels import testing
from marginkernels.backend import FUSED

SHAPES = [(7, 33, 101), (31, 64, 1000), (33, 128, 517)]
BACKENDS = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]


@pytest.mark.parametrize(("backend", "head", "shape"), list(itertools.product(BACKENDS, testing.HEADS, SHAPES)))
def test_every_head(backend, head, shape):
    for dtype in FUSED[backend].dtypes:
        found = testing.errors(testing.Case.random(*shape, dtype), testing.HEADS[head](shape[2]), backend)
        assert max(found.values()) <= testing.TOLERANCE[dtype], (dtype, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", testing.HEADS)
def test_no_worse_than_eager(backend, head):
    """At most three times the error that eager PyTorch makes in the same dtype, on two problems of awkward shape."""
    for shape in ((31, 64, 1000), (25, 123, 507)):
        for dtype in FUSED[backend].dtypes:
            if dtype == torch.float64:
                continue
            case = testing.Case.random(*shape, dtype, seed=3, bias=head == "softmax")
            margin = testing.HEADS[head](shape[2])
            want = testing.run(case, margin, "reference", dtype=torch.float64)
            fair = testing.eager(case, margin)
            got = testing.run(case, margin, backend)
            for name in fair:
                ours, theirs = (testing.relative_error(v[name], want[name]) for v in (got, fair))
                # One rounding of the result is nobody's error.
                assert ours <= 3 * theirs + torch.finfo(want[name].float().dtype).eps, (shape, dtype, name, ours, theirs)
