"""An optimizer's step of rows of a weight, from their gradient: :meth:`marginkernels.core.update.Update.apply` in one kernel."""

import triton
import triton.language as tl

from .primitives import narrow, take_keys, wide

#: What is no variant of its own: hyper-parameters that a schedule moves.
NUMBERS = ("rows", "lr", "decay", "momentum", "keep", "first_rest", "second", "second_rest", "eps")


@triton.jit
def random_bits(low, high, column, TENSOR: tl.constexpr):
    """(R, WIDTH) uint32 in [0, 2^16) of the keys ``low`` and ``high`` (R,) uint32 of the rows."""
    h = column.to(tl.uint32)[None, :] * tl.full((1, 1), 0x9E3779B1, tl.uint32) + (low[:, None] + tl.full((1, 1), TENSOR, tl.uint32))
    h = h ^ (h >> 16)
    h = h * tl.full((1, 1), 0x85EBCA6B, tl.uint32)
    h = h ^ high[:, None]
    h = h ^ (h >> 13)
    h = h * tl.full((1, 1), 0xC2B2AE35, tl.uint32)
    return h >> 16


@triton.jit
def stored(v, low, high, column, TENSOR: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``v`` float32 as ``DTYPE``, rounded at random where ``STOCHASTIC``; see :func:`marginkernels.core.update.rounded`."""
    if STOCHASTIC and (tl.bfloat16 == DTYPE or tl.float16 == DTYPE):
        random = random_bits(low, high, column, TENSOR)
        number = v.to(tl.uint32, bitcast=True)
        finite = (number & 0x7F800000) != 0x7F800000
        if tl.bfloat16 == DTYPE:
            out = ((number + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            normal = ((number + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
            size = tl.minimum(tl.abs(v), 1.0) * 16777216.0
            whole = tl.floor(size)
            up = (size - whole) * 65536.0 >= 65536.0 - random.to(tl.float32)
            small = (whole + tl.where(up, 1.0, 0.0)) * tl.where(v < 0, -1.0, 1.0) / 16777216.0
            out = tl.where(tl.abs(v) < 0.00006103515625, small, normal)
        v = tl.where(finite, out, v)
    return narrow(v, DTYPE)


@triton.jit(do_not_specialize=NUMBERS)
def update_kernel(
    p, g,
    moment, variance,  # (rows, DIM), or None
    low, high,  # (rows,) int32, the keys of the random numbers, or None
    rate, root,  # (rows,) float32, AdamW's corrections, or None
    rows, lr, decay, momentum, keep, first_rest, second, second_rest, eps,
    ADAMW: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``p``, ``moment`` and ``variance`` in place. ``SECOND`` and ``THIRD`` are what tells the moments' random numbers apart."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    at = wide(row)[:, None] * DIM + column[None, :]
    w = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.zeros((BLOCK_N,), tl.uint32)
    b = tl.zeros((BLOCK_N,), tl.uint32)
    if STOCHASTIC:
        a = tl.load(low + row, mask=row < rows, other=0).to(tl.uint32, bitcast=True)
        b = tl.load(high + row, mask=row < rows, other=0).to(tl.uint32, bitcast=True)
    if ADAMW:
        of_rate = tl.load(rate + row, mask=row < rows, other=0.0)[:, None]
        of_root = tl.load(root + row, mask=row < rows, other=1.0)[:, None]
        m = tl.load(moment + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(variance + at, mask=inside, other=0.0).to(tl.float32)
        w = w * keep
        m = m + (d - m) * first_rest
        v = v * second + d * d * second_rest
        w = w - m / (tl.sqrt(v) / of_root + eps) * of_rate
        tl.store(moment + at, stored(m, a, b, column, SECOND, moment.dtype.element_ty, STOCHASTIC), mask=inside)
        tl.store(variance + at, stored(v, a, b, column, THIRD, variance.dtype.element_ty, STOCHASTIC), mask=inside)
    else:
        d = d + w * decay
        if moment is not None:
            m = tl.load(moment + at, mask=inside, other=0.0).to(tl.float32) * momentum + d
            tl.store(moment + at, stored(m, a, b, column, SECOND, moment.dtype.element_ty, STOCHASTIC), mask=inside)
            d = d + m * momentum if NESTEROV else m
        w = w - d * lr
    tl.store(p + at, stored(w, a, b, column, 0, p.dtype.element_ty, STOCHASTIC), mask=inside)


take_keys(globals())
