"""Tile code that both passes share. Everything here is inlined into the kernels.

A *query* block stays with its program, *key* blocks stream past it; keys are the values as well. In the row pass the rows are the queries
and the centres the keys; in the class pass it is the other way round. Logits are kept in units of log 2, so that ``exp`` is one instruction.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The numbers of marginkernels.forms; a test holds the two together.
IDENTITY = tl.constexpr(0)
HARD_LINEAR = tl.constexpr(1)
HARD_QUADRATIC = tl.constexpr(2)


@triton.jit
def wide(i):
    """An index in 64 bits, be it a tensor, a constant or, under the interpreter, a Python number."""
    return tl.zeros((), tl.int64) + i


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. Triton's interpreter multiplies the bits of bfloat16 numbers as integers; "widen" gives it the same numbers in float32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def form_value(c, threshold, t, FORM: tl.constexpr):
    """N(c) of a tile of similarities; ``threshold`` broadcasts against it."""
    if FORM == HARD_LINEAR:
        c = tl.where(c > threshold, (1 + t) * c + t, c)
    elif FORM == HARD_QUADRATIC:
        c = tl.where(c > threshold, c * (t + c), c)
    return c


@triton.jit
def form_slope(g, c, threshold, t, FORM: tl.constexpr):
    """g N'(c)."""
    if FORM == HARD_LINEAR:
        g = tl.where(c > threshold, g * (1 + t), g)
    elif FORM == HARD_QUADRATIC:
        g = tl.where(c > threshold, g * (t + 2 * c), g)
    return g


@triton.jit
def load_tile(base, stride, count, first_dim, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a matrix from its row ``base``, of which ``count`` rows are left, and column ``first_dim``; zeros outside.

    Offsets inside a tile fit in 32 bits; the caller moves ``base`` in 64.
    """
    row = tl.arange(0, BLOCK)
    dim = first_dim + tl.arange(0, WIDTH)
    at = base + row[:, None] * stride + dim[None, :]
    if DIM % WIDTH == 0:
        return tl.load(at, mask=row[:, None] < count, other=0.0)
    return tl.load(at, mask=(row[:, None] < count) & (dim[None, :] < DIM), other=0.0)


@triton.jit
def load_centres(base, stride, count, first_dim, factor, PRESCALE: tl.constexpr, DTYPE: tl.constexpr,
                 DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A tile of class centres in the product's dtype, times ``factor`` (BLOCK,) where PRESCALE.

    float16 needs that, since a centre of any norm must fit; the other dtypes have float32's range and take the factor after the product.
    """
    w = load_tile(base, stride, count, first_dim, DIM, BLOCK, WIDTH)
    if PRESCALE:
        w = w.to(tl.float32) * factor[:, None]
    return w.to(DTYPE)


@triton.jit
def store_tile(base, stride, count, first_dim, value, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of :func:`load_tile`, in the destination's dtype."""
    row = tl.arange(0, BLOCK)
    dim = first_dim + tl.arange(0, WIDTH)
    at = base + row[:, None] * stride + dim[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=(row[:, None] < count) & (dim[None, :] < DIM))


@triton.jit
def load_labels(labels, row, inside):
    """Labels (BLOCK,) int32, -1 for those that are no class index: an int64 beyond int32 must not wrap into one."""
    label = tl.load(labels + row, mask=inside, other=-1)
    return tl.where((label >= 0) & (label <= 2147483647), label, -1).to(tl.int32)
