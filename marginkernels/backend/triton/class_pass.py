"""The class pass: blocks of classes against all rows; each row of dw is written once."""

import triton
import triton.language as tl

from .tiles import (
    IDENTITY,
    LOG2E,
    fold_sum,
    form_slope,
    form_value,
    halves,
    load_labels,
    load_tile,
    narrow,
    product,
    store_tile,
)


@triton.jit
def centres(w, factor, PRESCALE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of class centres in the product's dtype, times ``factor`` (BLOCK_C,) where PRESCALE.

    float16 needs that, since a centre of any norm must fit; the other dtypes have float32's range and take the factor after the product.
    """
    if PRESCALE:
        w = w.to(tl.float32) * factor[:, None]
    return narrow(w, DTYPE)


@triton.jit
def finish(v, along, power, factor, w, dw, stride_wc, first, c, first_dim, NORMALIZED: tl.constexpr,
           DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr):  # fmt: skip
    """Take some columns of v (WIDTH, BLOCK_C), lifted by ``power`` like ``along``, through the Jacobian, and write them."""
    dv = tl.trans(v)
    if NORMALIZED:
        unit = load_tile(w, None, stride_wc, first, c, first_dim, DIM, BLOCK_C, WIDTH, COVER).to(tl.float32) * factor[:, None]
        dv = (dv - along[:, None] * unit) * factor[:, None]
    store_tile(dw, first, c, first_dim, dv * (1.0 / power), DIM, BLOCK_C, WIDTH, COVER)


@triton.jit
def class_pass_kernel(
    x, w,  # (N, D), (C, D)
    x_box, w_box,  # the same as tensor descriptors with boxes (BLOCK_N, DEPTH) and (BLOCK_C, DEPTH), or None
    row_factor, scale, threshold, labels, lse, softmax, uniform, target, bias_weight,  # (N,)
    class_factor, bias,  # (C,)
    t,  # ()
    lift,  # (): a power of two that brings the weights of the rows into float16's range, or None
    dw, db,  # (C, D), (C,), out
    n, c, stride_xn, stride_wc,
    DIM: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    FORM: tl.constexpr, NORMALIZED: tl.constexpr, PRESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of classes against every row; slice ``program_id(1)`` of dw's columns.

    v_j . w^_j, which the normalisation's Jacobian takes off, is sum_i G_ij f_i (x_i . w^_j): it is summed in the loop from the very numbers
    that the product with x takes, so that no reduction over v is left to the end and a large v along w_j cancels to rounding.
    """
    WHOLE: tl.constexpr = DIM <= DEPTH
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)
    in_c = col < c
    factor = 1.0
    if NORMALIZED:
        factor = tl.load(class_factor + col, mask=in_c, other=0.0)
    if WHOLE:
        query = tl.trans(centres(load_tile(w, None, stride_wc, first, c, 0, DIM, BLOCK_C, DEPTH, DEPTH), factor, PRESCALE, DTYPE))
    if bias is not None:
        b = (tl.load(bias + col, mask=in_c, other=0.0) * LOG2E)[None, :]
    power = 1.0
    if lift is not None:
        power = tl.load(lift)
    lifted = 0.0
    if FORM != IDENTITY:
        lifted = tl.load(t)
    first_dim = tl.program_id(1) * WIDTH
    along = tl.zeros((BLOCK_N // 2, BLOCK_C), tl.float32)
    if db is not None:
        bias_sum = tl.zeros((BLOCK_N // 2, BLOCK_C), tl.float32)
    if dw is not None:
        v = tl.zeros((WIDTH, BLOCK_C), tl.float32)
    for first_row in tl.range(0, n, BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        in_n = row < n
        f = tl.load(row_factor + row, mask=in_n, other=0.0)[:, None]
        s = tl.load(scale + row, mask=in_n, other=1.0)[:, None]
        log_sum = tl.load(lse + row, mask=in_n, other=float("inf"))[:, None]
        up = tl.load(softmax + row, mask=in_n, other=0.0)[:, None]
        own = col[None, :] == load_labels(labels, row, in_n)[:, None]
        if FORM == IDENTITY:
            hard = 0.0
        else:
            hard = tl.load(threshold + row, mask=in_n, other=0.0)[:, None]
        near = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        if WHOLE:
            key = load_tile(x, x_box, stride_xn, first_row, n, 0, DIM, BLOCK_N, DEPTH, DEPTH)
            if n > 0:  # always; see `product`
                near = product(key, query, near, PRECISION)
        else:
            for d in tl.range(0, DIM, DEPTH):
                part = centres(load_tile(w, w_box, stride_wc, first, c, d, DIM, BLOCK_C, DEPTH, DEPTH), factor, PRESCALE, DTYPE)
                key = load_tile(x, x_box, stride_xn, first_row, n, d, DIM, BLOCK_N, DEPTH, DEPTH)
                near = product(key, tl.trans(part), near, PRECISION)
        if NORMALIZED and not PRESCALE:
            near = near * factor[None, :]
        cos = near * f
        logit = form_value(cos, hard, lifted, FORM) * (s * LOG2E)
        if bias is not None:
            logit += b
        g = tl.exp2(logit - log_sum * LOG2E) * up
        if uniform is not None:
            g += tl.load(uniform + row, mask=in_n, other=0.0)[:, None]
        if db is not None:
            bias_sum += fold_sum(tl.where(own, tl.load(bias_weight + row, mask=in_n, other=0.0)[:, None], g / s))
        if dw is not None:
            g = tl.where(own, tl.load(target + row, mask=in_n, other=0.0)[:, None], form_slope(g, cos, hard, lifted, FORM))
            g = narrow(g * (f * power), DTYPE)
            if NORMALIZED:
                along += fold_sum(g.to(tl.float32) * near)
            if not WHOLE or WIDTH < DEPTH:
                key = load_tile(x, None, stride_xn, first_row, n, first_dim, DIM, BLOCK_N, WIDTH, WIDTH)
            v = product(tl.trans(key), g, v, PRECISION)
    if db is not None and tl.program_id(1) == 0:
        tl.store(db + col, tl.sum(bias_sum, 0), mask=in_c)
    if dw is not None:
        along = tl.sum(along, 0)
        if NORMALIZED:  # read again rather than held, in the layout of the end, through the loop
            factor = tl.load(class_factor + col, mask=in_c, other=0.0, cache_modifier=".cg")
        low, high = halves(v)
        v0, v1 = halves(low)
        v2, v3 = halves(high)
        finish(v0, along, power, factor, w, dw, stride_wc, first, c, first_dim, NORMALIZED, DIM, BLOCK_C, WIDTH // 4, WIDTH)
        finish(v1, along, power, factor, w, dw, stride_wc, first, c, first_dim + WIDTH // 4, NORMALIZED, DIM, BLOCK_C, WIDTH // 4, WIDTH)
        finish(v2, along, power, factor, w, dw, stride_wc, first, c, first_dim + WIDTH // 2, NORMALIZED, DIM, BLOCK_C, WIDTH // 4, WIDTH)
        finish(
            v3, along, power, factor, w, dw, stride_wc, first, c, first_dim + 3 * WIDTH // 4, NORMALIZED, DIM, BLOCK_C, WIDTH // 4, WIDTH
        )
