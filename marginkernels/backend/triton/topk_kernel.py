"""The search for the nearest class centers: blocks of rows against a split of the classes, the k best so far of each row in registers."""

import triton
import triton.language as tl

from .primitives import (
    GROUP,
    SIZES,
    center_at,
    class_at,
    load_tile,
    narrow,
    product,
    slots_of,
    slots_of_class,
    take_keys,
    to_unit_range,
    wide,
)

#: Below every key, with room for one of its own for each place that is still empty; and above every key.
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)


@triton.jit
def keys_of(score, col):
    """(classes, rows) int64 that order as (score, class falling) do, NaN first: the score's bits, rising with it, times 2^32, minus the
    class."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) - col[:, None].to(tl.int64)


@triton.jit
def inverse_norms(w, stride, first, count, tiny,
                  DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """1/|w_j| (BLOCK,), 0 where |w_j| < tiny. Centers are brought to [1, 2) by a power of two: squares neither overflow nor vanish."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for d in tl.range(0, DIM, WIDTH):
        tile = load_tile(w, None, stride, first, count, d, DIM, BLOCK, WIDTH, WIDTH, SUB).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 1))
    power = to_unit_range(largest)
    total = tl.zeros((BLOCK,), tl.float32)
    for d in tl.range(0, DIM, WIDTH):
        tile = load_tile(w, None, stride, first, count, d, DIM, BLOCK, WIDTH, WIDTH, SUB).to(tl.float32) * power[:, None]
        total += tl.sum(tile * tile, 1)
    length = tl.sqrt_rn(total)
    return tl.where(length < tiny * power, 0.0, power / length)


@triton.jit(do_not_specialize=SIZES)
def topk_kernel(
    x, w,  # (N, D) contiguous, (C, D)
    row_factor, scale, bias,  # (N,), (N,) and (C,); the last two are None together
    best,  # (splits, N, K) int64, out: keys, in any order
    n, c, stride_wc, blocks_per_split, tiny,
    DIM: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr,
    NORMALIZED: tl.constexpr, PRESCALE: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the classes.

    Once some classes have been seen, few scores of a block are better than a row's k-th best: the loop that puts them in its place, one for
    each row at a time, then hardly ever runs. With PRESCALE centers are normalized before they are rounded for the products. With SUB
    centers a class ``c`` is of centers and a block of slots, and a class has the best of its keys.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    EACH: tl.constexpr = slots_of_class(SUB)
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    in_n = row < n
    place = tl.arange(0, PLACES)
    f = tl.load(row_factor + row, mask=in_n, other=0.0)
    # Empty places differ, so that one at a time is filled; those past the k-th are never the worst.
    found = tl.zeros((BLOCK_N, PLACES), tl.int64) + tl.where(place < K, place.to(tl.int64) + LOWEST + 1, HIGHEST)[None, :]
    start = tl.program_id(1) * blocks_per_split * BLOCK_C
    stop = tl.minimum(start + blocks_per_split * BLOCK_C, slots_of(c, SUB))
    for first in tl.range(start, stop, BLOCK_C):
        slot = first + tl.arange(0, BLOCK_C)
        col = class_at(slot, SUB)
        factor = tl.zeros((BLOCK_C,), tl.float32) + 1.0
        if NORMALIZED:
            factor = inverse_norms(w, stride_wc, first, c, tiny, DIM, BLOCK_C, DEPTH, SUB)
        near = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for d in tl.range(0, DIM, DEPTH):
            query = load_tile(x, None, DIM, first_row, n, d, DIM, BLOCK_N, DEPTH, DEPTH)
            center = load_tile(w, None, stride_wc, first, c, d, DIM, BLOCK_C, DEPTH, DEPTH, SUB)
            if PRESCALE:
                center = center.to(tl.float32) * factor[:, None]
            near = product(narrow(center, DTYPE), tl.trans(query), near, PRECISION)
        score = near * f[None, :]
        if NORMALIZED and not PRESCALE:
            score = score * factor[:, None]
        in_c = center_at(slot, SUB) < c
        if bias is not None:
            s = tl.load(scale + row, mask=in_n, other=0.0)
            score = score * s[None, :] + tl.load(bias + col, mask=in_c, other=0.0)[:, None]
        key = tl.where(in_c[:, None] & in_n[None, :], keys_of(score, col), LOWEST)
        if SUB > 1:
            key = tl.max(tl.reshape(key, (BLOCK_C // GROUP, EACH, GROUP // EACH * BLOCK_N)), 1)
            key = tl.reshape(key, (BLOCK_C // EACH, BLOCK_N))
        top = tl.max(key, 0)
        worst = tl.min(found, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            found = tl.where((found == worst[:, None]) & (top > worst)[:, None], top[:, None], found)
            key = tl.where(key == top[None, :], LOWEST, key)
            top = tl.max(key, 0)
            worst = tl.min(found, 1)
    at = best + (wide(tl.program_id(1)) * n + row[:, None]) * K + place[None, :]
    tl.store(at, found, mask=in_n[:, None] & (place < K)[None, :])


take_keys(globals())
