"""The row pass: blocks of rows against all classes, in splits of the classes, and the kernels before and after it."""

import triton
import triton.language as tl

from .tiles import IDENTITY, LN2, LOG2E, form_slope, form_value, load_centres, load_labels, load_tile, product, store_tile, wide


@triton.jit
def class_factor_kernel(
    w,  # (C, D)
    factor,  # (C,) float32, out
    c, stride_wc, tiny,
    DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """1/|w_j|, 0 where |w_j| < tiny. Centres are brought to [1, 2) by a power of two first: squares neither overflow nor vanish."""
    first = tl.program_id(0) * BLOCK_C
    tile = load_tile(w + wide(first) * stride_wc, stride_wc, c - first, 0, DIM, BLOCK_C, WIDTH).to(tl.float32)
    largest = tl.max(tl.abs(tile), 1)
    exponent = tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 253)
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tile = tile * power[:, None]
    length = tl.sqrt_rn(tl.sum(tile * tile, 1))
    a = tl.where(length < tiny * power, 0.0, power / length)
    col = first + tl.arange(0, BLOCK_C)
    tl.store(factor + col, a, mask=col < c)


@triton.jit
def row_pass_kernel(
    x, w,  # (N, D), (C, D)
    row_factor, scale, threshold, labels,  # (N,)
    class_factor, bias,  # (C,)
    t,  # ()
    bound,  # (N,): the largest exponent that a row can meet, or None where it is not known
    part_sum, part_peak, part_top, part_moment,  # (splits, N), out
    part_u,  # (splits, N, D), out
    n, c, stride_xn, stride_wc, blocks_per_split, limit,
    DIM: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FORM: tl.constexpr, NORMALIZED: tl.constexpr, UNIFORM: tl.constexpr, ONLINE: tl.constexpr,
    NEED_U: tl.constexpr, NEED_MOMENT: tl.constexpr, PRESCALE: tl.constexpr, LIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the classes; with NEED_U, slice ``program_id(2)`` of u's columns.

    ONLINE carries the running maximum. Without it the exponentials are taken as they stand, which spares the reductions and the rescaling of u in the
    loop; a row block takes that way where its ``bound`` allows, and the launch of the other way leaves it alone.
    """
    WHOLE: tl.constexpr = DIM <= DEPTH
    DTYPE: tl.constexpr = x.dtype.element_ty
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    in_n = row < n
    if bound is not None:
        within = tl.load(bound + row, mask=in_n, other=0.0) <= limit
        if (tl.sum(within.to(tl.int32), 0) == BLOCK_N) == ONLINE:
            return
    x_base = x + wide(first_row) * stride_xn
    f = tl.load(row_factor + row, mask=in_n, other=0.0)[:, None]
    s = tl.load(scale + row, mask=in_n, other=0.0)[:, None] * LOG2E
    label = load_labels(labels, row, in_n)[:, None]
    hard = 0.0
    lifted = 0.0
    if FORM != IDENTITY:
        hard = tl.load(threshold + row, mask=in_n, other=0.0)[:, None]
        lifted = tl.load(t)
    if WHOLE:
        query = load_tile(x_base, stride_xn, n - first_row, 0, DIM, BLOCK_N, DEPTH)
    first_dim = tl.program_id(2) * WIDTH
    # One number per place of the tile; summed across at the end.
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    top = tl.full((BLOCK_N, BLOCK_C), float("-inf"), tl.float32)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if NEED_U:
        u = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    first_block = tl.program_id(1) * blocks_per_split
    for block in tl.range(first_block, tl.minimum(first_block + blocks_per_split, tl.cdiv(c, BLOCK_C))):
        first = block * BLOCK_C
        w_base = w + wide(first) * stride_wc
        col = first + tl.arange(0, BLOCK_C)
        in_c = col < c
        factor = 1.0
        if NORMALIZED:
            factor = tl.load(class_factor + col, mask=in_c, other=0.0)
        if WHOLE:
            key = load_centres(w_base, stride_wc, c - first, 0, factor, PRESCALE, DTYPE, DIM, BLOCK_C, DEPTH)
            cos = product(query, tl.trans(key), None, PRECISION)
        else:
            cos = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for d in tl.range(0, DIM, DEPTH):
                part = load_tile(x_base, stride_xn, n - first_row, d, DIM, BLOCK_N, DEPTH)
                key = load_centres(w_base, stride_wc, c - first, d, factor, PRESCALE, DTYPE, DIM, BLOCK_C, DEPTH)
                cos = product(part, tl.trans(key), cos, PRECISION)
        if NORMALIZED and not PRESCALE:
            cos = cos * factor[None, :]
        cos = cos * f
        value = form_value(cos, hard, lifted, FORM)
        logit = value * s
        raw = cos * s
        if bias is not None:
            b = (tl.load(bias + col, mask=in_c, other=0.0) * LOG2E)[None, :]
            logit += b
            raw += b
        keep = in_c[None, :] & (col[None, :] != label)
        top = tl.maximum(top, tl.where(keep, raw, float("-inf")))
        if UNIFORM:
            g = keep.to(tl.float32)
            total += tl.where(keep, logit, 0.0)
        else:
            logit = tl.where(keep, logit, float("-inf"))
            if ONLINE:
                higher = tl.maximum(peak, tl.max(logit, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                decay = tl.exp2(peak - base)[:, None]
                peak = higher
                logit -= base[:, None]
                total *= decay
                moment *= decay
                if NEED_U:
                    u *= decay
            g = tl.exp2(logit)
            total += g
        if NEED_MOMENT:
            moment += g * value
        if NEED_U:
            g = form_slope(g, cos, hard, lifted, FORM) * LIFT
            if NORMALIZED and not PRESCALE:
                g *= factor[None, :]
            if not WHOLE or WIDTH < DEPTH:
                key = load_centres(w_base, stride_wc, c - first, first_dim, factor, PRESCALE, DTYPE, DIM, BLOCK_C, WIDTH)
            u = product(g.to(DTYPE), key, u, PRECISION)
    out = wide(tl.program_id(1)) * n
    if tl.program_id(2) == 0:
        tl.store(part_sum + out + row, tl.sum(total, 1), mask=in_n)
        tl.store(part_peak + out + row, peak if ONLINE else tl.zeros((BLOCK_N,), tl.float32), mask=in_n)
        tl.store(part_top + out + row, tl.max(top, 1), mask=in_n)
        if NEED_MOMENT:
            tl.store(part_moment + out + row, tl.sum(moment, 1), mask=in_n)
    if NEED_U:
        store_tile(part_u + (out + first_row) * DIM, DIM, n - first_row, first_dim, u * (1.0 / LIFT), DIM, BLOCK_N, WIDTH)


@triton.jit
def combine_kernel(
    part_sum, part_peak, part_top, part_moment, part_u,  # of row_pass_kernel
    total, top, moment,  # (N,), out
    u,  # (N, D), out
    n, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, UNIFORM: tl.constexpr, NEED_U: tl.constexpr, NEED_MOMENT: tl.constexpr,
):  # fmt: skip
    """Join the splits of the classes, always in the same order."""
    first_row = tl.program_id(0) * BLOCK_N
    first_dim = tl.program_id(1) * WIDTH
    row = first_row + tl.arange(0, BLOCK_N)
    in_n = row < n
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for split in tl.range(splits):
        peak = tl.maximum(peak, tl.load(part_peak + wide(split) * n + row, mask=in_n, other=0.0))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    joint = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for split in tl.range(splits):
        at = wide(split) * n
        share = tl.exp2(tl.load(part_peak + at + row, mask=in_n, other=0.0) - base)
        mass += share * tl.load(part_sum + at + row, mask=in_n, other=0.0)
        best = tl.maximum(best, tl.load(part_top + at + row, mask=in_n, other=0.0))
        if NEED_MOMENT:
            mean += share * tl.load(part_moment + at + row, mask=in_n, other=0.0)
        if NEED_U:
            joint += share[:, None] * load_tile(part_u + (at + first_row) * DIM, DIM, n - first_row, first_dim, DIM, BLOCK_N, WIDTH)
    if UNIFORM:
        log_mass = mass
    else:
        log_mass = tl.where(mass == 0, float("-inf"), tl.log2(mass) + base)
        share = 1.0 / tl.where(mass == 0, 1.0, mass)
        mean *= share
        joint *= share[:, None]
    if tl.program_id(1) == 0:
        tl.store(total + row, log_mass * LN2, mask=in_n)
        tl.store(top + row, best * LN2, mask=in_n)
        if NEED_MOMENT:
            tl.store(moment + row, mean, mask=in_n)
    if NEED_U:
        store_tile(u + wide(first_row) * DIM, DIM, n - first_row, first_dim, joint, DIM, BLOCK_N, WIDTH)
