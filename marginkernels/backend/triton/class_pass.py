"""The class pass: blocks of classes against all rows; each row of dw is written once."""

import triton
import triton.language as tl

from .tiles import IDENTITY, LOG2E, form_slope, form_value, load_centres, load_labels, load_tile, product, store_tile, wide


@triton.jit
def class_pass_kernel(
    x, w,  # (N, D), (C, D)
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
    w_base = w + wide(first) * stride_wc
    factor = 1.0
    if NORMALIZED:
        factor = tl.load(class_factor + col, mask=in_c, other=0.0)
    if WHOLE:
        query = load_centres(w_base, stride_wc, c - first, 0, factor, PRESCALE, DTYPE, DIM, BLOCK_C, DEPTH)
    if bias is not None:
        b = (tl.load(bias + col, mask=in_c, other=0.0) * LOG2E)[:, None]
    power = 1.0
    if lift is not None:
        power = tl.load(lift)
    lifted = 0.0
    hard = 0.0
    if FORM != IDENTITY:
        lifted = tl.load(t)
    first_dim = tl.program_id(1) * WIDTH
    along = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    if db is not None:
        bias_sum = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    if dw is not None:
        v = tl.zeros((BLOCK_C, WIDTH), tl.float32)
    for first_row in tl.range(0, n, BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        in_n = row < n
        x_base = x + wide(first_row) * stride_xn
        f = tl.load(row_factor + row, mask=in_n, other=0.0)[None, :]
        s = tl.load(scale + row, mask=in_n, other=1.0)[None, :]
        log_sum = tl.load(lse + row, mask=in_n, other=float("inf"))[None, :]
        up = tl.load(softmax + row, mask=in_n, other=0.0)[None, :]
        own = col[:, None] == load_labels(labels, row, in_n)[None, :]
        if FORM != IDENTITY:
            hard = tl.load(threshold + row, mask=in_n, other=0.0)[None, :]
        if WHOLE:
            key = load_tile(x_base, stride_xn, n - first_row, 0, DIM, BLOCK_N, DEPTH)
            near = product(query, tl.trans(key), None, PRECISION)
        else:
            near = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
            for d in tl.range(0, DIM, DEPTH):
                part = load_centres(w_base, stride_wc, c - first, d, factor, PRESCALE, DTYPE, DIM, BLOCK_C, DEPTH)
                key = load_tile(x_base, stride_xn, n - first_row, d, DIM, BLOCK_N, DEPTH)
                near = product(part, tl.trans(key), near, PRECISION)
        if NORMALIZED and not PRESCALE:
            near = near * factor[:, None]
        cos = near * f
        logit = form_value(cos, hard, lifted, FORM) * (s * LOG2E)
        if bias is not None:
            logit += b
        g = tl.exp2(logit - log_sum * LOG2E) * up
        if uniform is not None:
            g += tl.load(uniform + row, mask=in_n, other=0.0)[None, :]
        if db is not None:
            bias_sum += tl.where(own, tl.load(bias_weight + row, mask=in_n, other=0.0)[None, :], g / s)
        if dw is not None:
            g = tl.where(own, tl.load(target + row, mask=in_n, other=0.0)[None, :], form_slope(g, cos, hard, lifted, FORM))
            g = (g * (f * power)).to(DTYPE)
            if NORMALIZED:
                along += g.to(tl.float32) * near
            if not WHOLE or WIDTH < DEPTH:
                key = load_tile(x_base, stride_xn, n - first_row, first_dim, DIM, BLOCK_N, WIDTH)
            v = product(g, key, v, PRECISION)
    if db is not None:
        if tl.program_id(1) == 0:
            tl.store(db + col, tl.sum(bias_sum, 1), mask=in_c)
    if dw is not None:
        if NORMALIZED:
            unit = load_tile(w_base, stride_wc, c - first, first_dim, DIM, BLOCK_C, WIDTH).to(tl.float32) * factor[:, None]
            v = (v - tl.sum(along, 1)[:, None] * unit) * factor[:, None]
        store_tile(dw + wide(first) * DIM, DIM, c - first, first_dim, v * (1.0 / power), DIM, BLOCK_C, WIDTH)
