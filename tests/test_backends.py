"""Every fused backend against the float64 reference: every head, every dtype, ragged shapes, every option."""

import itertools

import pytest

from marginkernels import verify
from marginkernels.backend import FUSED

SHAPES = [(7, 33, 101), (31, 64, 1000), (33, 128, 517)]
BACKENDS = [name for name, b in FUSED.items() if b.unavailable() is None and "cpu" in b.device_types]


@pytest.mark.parametrize(("backend", "head", "shape"), list(itertools.product(BACKENDS, verify.HEADS, SHAPES)))
def test_every_head(backend, head, shape):
    for dtype in FUSED[backend].dtypes:
        found = verify.errors(verify.Case.random(*shape, dtype), verify.HEADS[head](shape[2]), backend)
        assert max(found.values()) <= verify.TOLERANCE[dtype], (dtype, found)
