"""The class pass: blocks of classes against all rows; each row of dw is written once."""

import triton
import triton.language as tl

from .primitives import (
    GROUP,
    LOG2E,
    SAVED_STEP,
    SIZES,
    accumulate,
    accumulators,
    bias_slope,
    center_at,
    class_at,
    class_of,
    exp_of_minus,
    fold_sum,
    halves,
    load_labels,
    load_tile,
    load_transform,
    narrow,
    nontarget_slope,
    nontarget_value,
    sigmoid_of,
    similarities,
    slots_of_class,
    store_tile,
    take_keys,
    to_product,
    wide,
    winners,
)


@triton.jit
def unit_centers(w, factor, stride_wc, first, c, first_dim,
                 DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """Some columns (BLOCK_C, WIDTH) of the class centers, normalized, in float32."""
    return load_tile(w, None, stride_wc, first, c, first_dim, DIM, BLOCK_C, WIDTH, COVER, SUB).to(tl.float32) * factor[:, None]


@triton.jit
def finish(v, along, power_of_two, factor, w, dw, stride_wc, first, c, first_dim, NORMALIZED: tl.constexpr, FACTORED: tl.constexpr,
           DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """Take some columns of v (BLOCK_C, WIDTH), times ``power_of_two`` like ``along``, through the Jacobian, and write them. Where FACTORED
    both have the class factor already."""
    dv = v
    if NORMALIZED:
        dv -= along[:, None] * unit_centers(w, factor, stride_wc, first, c, first_dim, DIM, BLOCK_C, WIDTH, COVER, SUB)
        if not FACTORED:
            dv *= factor[:, None]
    store_tile(dw, DIM, first, c, first_dim, dv * (1.0 / power_of_two), DIM, BLOCK_C, WIDTH, COVER, SUB)


@triton.jit
def finish_parts(v, along, power_of_two, factor, w, dw, stride_wc, first, c, first_dim, NORMALIZED: tl.constexpr, FACTORED: tl.constexpr,
                 DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """:func:`finish` of the parts of v, one after the other."""
    WIDE: tl.constexpr = WIDTH // len(v)
    for i in tl.static_range(len(v)):
        finish(v[i], along, power_of_two, factor, w, dw, stride_wc, first, c, first_dim + i * WIDE, NORMALIZED, FACTORED,
               DIM, BLOCK_C, WIDE, WIDTH, SUB)  # fmt: skip


@triton.jit
def quarters(v):
    low, high = halves(v)
    v0, v1 = halves(low)
    v2, v3 = halves(high)
    return v0, v1, v2, v3


@triton.jit
def turned(v):
    """The transposes of the parts of v."""
    found = ()
    for i in tl.static_range(len(v)):
        found += (tl.trans(v[i]),)
    return found


@triton.jit(do_not_specialize=SIZES)
def class_pass_kernel(
    x, w,  # (N, PADDED), zeros past D; (C, D)
    x_box, w_box,  # the same as tensor descriptors with boxes (BLOCK_N, DEPTH) and (BLOCK_C, DEPTH), or None
    row_factor, scale, threshold, t, labels, lse, d_lse, d_logit_sum, d_target_cos, d_target_bias,  # (N,)
    class_factor, bias,  # (C,)
    pow2,  # (): a power of two that brings the weights of the rows into float16's range, or None
    dw, db,  # (C, D), (C,), out
    n, c, stride_xn, stride_wc,
    DIM: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    NON_TARGET: tl.constexpr, SOFTPLUS: tl.constexpr, NORMALIZED: tl.constexpr, PRESCALE: tl.constexpr, PRECISION: tl.constexpr,
    SUB: tl.constexpr,
):  # fmt: skip
    """One block of classes against every row; slice ``program_id(1)`` of dw's columns.

    v_j . w^_j, which the normalization's Jacobian takes off, is sum_i G_ij f_i (x_i . w^_j): it is summed in the loop from the very numbers
    that the product with x takes, so that no reduction over v is left to the end and a large v along w_j cancels to rounding.

    With SUB centers a class a block is of slots, and ``c`` of centers. Of a class the row's nearest center takes part, of its own class its
    label.
    """
    WHOLE: tl.constexpr = DIM <= DEPTH
    WIDE: tl.constexpr = DEPTH // max(PARTS, 1)
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_C
    slot = first + tl.arange(0, BLOCK_C)
    col = center_at(slot, SUB)
    in_c = col < c
    factor = 1.0
    if NORMALIZED:
        factor = tl.load(class_factor + col, mask=in_c, other=0.0)
    query = None
    if WHOLE:
        query = ()
        for i in tl.static_range(max(PARTS, 1)):
            part = load_tile(w, None, stride_wc, first, c, i * WIDE, DIM, BLOCK_C, WIDE, DEPTH, SUB)
            query += (tl.trans(to_product(part, factor, PRESCALE, DTYPE)),)
    if bias is not None:
        b = tl.load(bias + class_at(slot, SUB), mask=in_c, other=0.0)[None, :]
        if not SOFTPLUS:  # whose logits are in natural units
            b *= LOG2E
    power_of_two = 1.0
    if pow2 is not None:
        power_of_two = tl.load(pow2)
    first_dim = tl.program_id(1) * WIDTH
    along = tl.zeros((BLOCK_N // 2, BLOCK_C), tl.float32)
    if db is not None:
        bias_sum = tl.zeros((BLOCK_N // 2, BLOCK_C), tl.float32)
    if dw is not None:
        v = accumulators(PARTS, WIDTH, BLOCK_C)
    for first_row in tl.range(0, n, BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        in_n = row < n
        f = tl.load(row_factor + row, mask=in_n, other=0.0)[:, None]
        s = tl.load(scale + row, mask=in_n, other=1.0)[:, None]
        log_sum = tl.load(lse + row, mask=in_n, other=float("inf"))[:, None]
        up = tl.load(d_lse + row, mask=in_n, other=0.0)[:, None]
        label = load_labels(labels, row, in_n)[:, None]
        own = col[None, :] == label
        hard, param = load_transform(threshold, t, row, in_n, NON_TARGET)
        near, key = similarities(x, x_box, stride_xn, first_row, n, w, w_box, stride_wc, first, c, query, factor, PRESCALE, DTYPE,
                                 PRECISION, PADDED, DIM, DEPTH, BLOCK_N, BLOCK_C, SUB)  # fmt: skip
        if NORMALIZED and not PRESCALE:
            near = near * factor[None, :]
        cos = near * f
        logit = nontarget_value(cos, hard[:, None], param[:, None], NON_TARGET) * (s if SOFTPLUS else s * LOG2E)
        if bias is not None:
            logit += b
        if SOFTPLUS:
            g = sigmoid_of(logit, exp_of_minus(logit)) * up
        else:
            g = tl.exp2(logit - log_sum * LOG2E) * up
        if d_logit_sum is not None:
            g += tl.load(d_logit_sum + row, mask=in_n, other=0.0)[:, None]
        if SUB > 1:
            g = tl.where(winners(near, SUB, 1) & (class_at(slot, SUB)[None, :] != class_of(label, SUB)), g, 0.0)
        if db is not None:
            db_term = bias_slope(g, cos, hard[:, None], param[:, None], NON_TARGET) / s
            bias_sum += fold_sum(tl.where(own, tl.load(d_target_bias + row, mask=in_n, other=0.0)[:, None], db_term))
        if dw is not None:
            g = nontarget_slope(g, cos, hard[:, None], param[:, None], NON_TARGET)
            g = tl.where(own, tl.load(d_target_cos + row, mask=in_n, other=0.0)[:, None], g)
            g = narrow(g * (f * power_of_two), DTYPE)
            if NORMALIZED:
                along += fold_sum(g.to(tl.float32) * near)
            if not WHOLE or WIDTH < DEPTH:
                key = (load_tile(x, None, stride_xn, first_row, n, first_dim, PADDED, BLOCK_N, WIDTH, WIDTH),)
            v = accumulate(key, g, v, PARTS, PRECISION)
    if SUB > 1:  # as they are; the compiler, which does not know that, finds addresses again rather than holds them through the loop
        first = tl.where(c > 0, first, 0)
        col = center_at(first + tl.arange(0, BLOCK_C), SUB)
        in_c = col < c
    if db is not None and tl.program_id(1) == 0:
        if SUB > 1:
            EACH: tl.constexpr = slots_of_class(SUB)
            total = tl.where(in_c, tl.sum(bias_sum, 0), 0.0)
            total = tl.sum(tl.reshape(total, (BLOCK_C // GROUP, EACH, GROUP // EACH)), 1)
            of_class = first // EACH + tl.arange(0, BLOCK_C // EACH)
            tl.store(db + of_class, tl.reshape(total, (BLOCK_C // EACH,)), mask=of_class < c // SUB)
        else:
            tl.store(db + col, tl.sum(bias_sum, 0), mask=in_c)
    if dw is not None:
        along = tl.sum(along, 0)
        if NORMALIZED:  # read again rather than held, in the layout of the end, through the loop
            factor = tl.load(class_factor + col, mask=in_c, other=0.0, cache_modifier=".cg")
        if PARTS == 0:
            v = turned(quarters(v[0]))
        finish_parts(v, along, power_of_two, factor, w, dw, stride_wc, first, c, first_dim, NORMALIZED, False, DIM, BLOCK_C, WIDTH, SUB)


@triton.jit(do_not_specialize=SIZES)
def saved_pass_kernel(
    x, w,  # (N, PADDED), zeros past D; (C, D)
    x_box,  # x as a tensor descriptor with boxes (BLOCK_N, WIDTH), or None
    row_factor, labels, lse, d_lse, d_target_cos,  # (N,)
    class_factor,  # (C,)
    pow2,  # (), as of class_pass_kernel
    saved, saved_base,  # (K, saved_stride), (K / SAVED_STEP, saved_stride), of row_pass_kernel
    dw,  # (C, D), out
    n, c, stride_xn, stride_wc, saved_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    NORMALIZED: tl.constexpr, FACTORED: tl.constexpr, SAVED_POW2: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One block of classes, whose weights the row pass saved, against every row, in all of D: one product a step, whatever the head.

    FACTORED weights have the class factor in them. With SUB centers a class weights and blocks are of slots, and ``c`` of centers.
    """
    first = tl.program_id(0) * BLOCK_C
    col = center_at(first + tl.arange(0, BLOCK_C), SUB)
    in_c = col < c
    power_of_two = 1.0
    if pow2 is not None:
        power_of_two = tl.load(pow2)
    weights = saved + wide(first) * saved_stride
    bases = saved_base + wide(first // SAVED_STEP) * saved_stride
    factor = 1.0
    if FACTORED:
        factor = tl.load(class_factor + col, mask=in_c, other=0.0)
    v = accumulators(PARTS, WIDTH, BLOCK_C)
    KEY_WIDE: tl.constexpr = WIDTH // max(PARTS, 1)
    for first_row in tl.range(0, n, BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        in_n = row < n
        f = tl.load(row_factor + row, mask=in_n, other=0.0) * power_of_two
        log_sum = tl.load(lse + row, mask=in_n, other=float("inf"))
        up = tl.load(d_lse + row, mask=in_n, other=0.0) * f * (1.0 / SAVED_POW2)
        own = col[None, :] == load_labels(labels, row, in_n)[:, None]
        decay = tl.exp2(tl.load(bases + row, mask=in_n, other=0.0) - log_sum * LOG2E)
        at = weights + tl.arange(0, BLOCK_C)[None, :] * saved_stride + row[:, None]
        g = tl.load(at, mask=in_c[None, :] & (row[:, None] < saved_stride), other=0.0).to(tl.float32)  # row < n would make loads narrow
        g = g * decay[:, None] * up[:, None]  # in this order: exp(-lse) can be as large as float32 goes
        mine = (tl.load(d_target_cos + row, mask=in_n, other=0.0) * f)[:, None]
        if FACTORED:
            mine = mine * factor[None, :]
        g = tl.where(own, mine, g)
        key = ()
        for i in tl.static_range(max(PARTS, 1)):
            key += (load_tile(x, x_box, stride_xn, first_row, n, i * KEY_WIDE, PADDED, BLOCK_N, KEY_WIDE, WIDTH),)
        v = accumulate(key, narrow(g, x.dtype.element_ty), v, PARTS, PRECISION)
    if PARTS == 0:
        v = quarters(v[0])
    WIDE: tl.constexpr = WIDTH // len(v)
    along = tl.zeros((BLOCK_C,), tl.float32)
    if NORMALIZED:
        factor = tl.load(class_factor + col, mask=in_c, other=0.0, cache_modifier=".cg")
        for i in tl.static_range(len(v)):
            part = unit_centers(w, factor, stride_wc, first, c, i * WIDE, DIM, BLOCK_C, WIDE, WIDTH, SUB)
            along += tl.sum(v[i] * part, 1) if PARTS else tl.sum(v[i] * tl.trans(part), 0)
    if PARTS == 0:
        v = turned(v)
    finish_parts(v, along, power_of_two, factor, w, dw, stride_wc, first, c, 0, NORMALIZED, FACTORED, DIM, BLOCK_C, WIDTH, SUB)


take_keys(globals())
