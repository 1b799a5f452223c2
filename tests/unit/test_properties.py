"""Any problem that a user may pose, found by hypothesis: every fused backend against the float64 reference."""

import pytest
import torch
from helpers.chunks import chunks_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marginkernels import testing
from marginkernels.backend import FUSED

BACKENDS = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]
#: Interpreted backends take seconds where a compiled one takes milliseconds.
EXAMPLES = {"cpu": 100, "torch": 30}


@st.composite
def problems(draw):
    n, d, c = draw(st.integers(1, 70)), draw(st.integers(8, 140)), draw(st.integers(3, 400))
    seed = draw(st.integers(0, 2**31))
    options = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "workspace_mb": draw(st.sampled_from([None, 0.0, 0.02, 0.1])),
    }
    layout = draw(st.sampled_from(["plain", "pitched", "transposed"]))
    options["width"] = draw(st.sampled_from([None, 1, 7, 64]))  # of the chunks of the torch backend
    return (n, d, c), seed, draw(st.sampled_from(sorted(testing.HEADS))), draw(st.booleans()), layout, options


def relaid(v: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if layout == "pitched":
        return torch.cat([v, v, v[:, :1]], 1)[:, : v.shape[1]]
    return v.T.contiguous().T if layout == "transposed" else v


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_problem(backend):
    dtypes = [(a, b) for a in FUSED[backend].dtypes for b in FUSED[backend].dtypes if b != torch.float64 or a == torch.float64]

    @settings(max_examples=EXAMPLES.get(backend, 5), deadline=None, derandomize=True, database=None)
    @given(problem=problems(), dtype=st.sampled_from(dtypes))
    def holds(problem, dtype):
        shape, seed, head, bias, layout, options = problem
        width = options.pop("width")
        # A center that is rounded to the products' dtype is off by its last bit in few dimensions, and by less the more there are.
        assume(dtype[0] == dtype[1] or shape[1] >= 32)
        case = testing.Case.random(*shape, dtype[0], weight_dtype=dtype[1], bias=bias, seed=seed)
        case = testing.Case(relaid(case.x, layout), relaid(case.w, layout), case.labels, case.bias)
        upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed)) if options["reduction"] == "none" else None
        margin, options = testing.HEADS[head](shape[2]), testing.accepted(head, **options)
        want = testing.run(case, margin, "reference", dtype=torch.float64, upstream=upstream, **options)
        with chunks_of(width if backend == "torch" else None):
            got = testing.run(case, margin, backend, upstream=upstream, **options)
        tolerance = max(testing.TOLERANCE[v] for v in dtype)
        for output, value in want.items():
            # Where rows cancel (one class drawn from both sides, smoothing 1) what is left is measured against what cancelled, and below
            # 1e-12 the float64 reference itself has no digits: 1 - p of a p that rounds to 1.
            size = max(float(value.norm()), 1e-3 * float(want["loss"].abs().mean()), 1e-8)
            error = float((got[output].double() - value).norm())
            kind = torch.finfo(got[output].dtype)
            least = kind.smallest_normal * kind.eps * value.numel() ** 0.5  # a float16 gradient has no digits below 6e-8
            cancelling = 1 if value.ndim else 2  # the gradient of one number sums all others, of either sign
            assert error <= cancelling * tolerance * size + least, (output, error / size)

    holds()
