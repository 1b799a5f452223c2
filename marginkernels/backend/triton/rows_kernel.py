"""What a step does per row, O(N) and O(N D), beside its two passes: one kernel where PyTorch has ten or thirty. In float64 where the
PyTorch code is, with sums in a fixed order."""

import triton
import triton.language as tl

from .primitives import SIZES, angle, narrow, take_keys, wide

#: Of :data:`marginkernels.core.numerics.TINY`; a test compares the two.
TINY = tl.constexpr(1e-30)
#: Besides sizes, what is no variant of its own.
NUMBERS = (*SIZES, "num_classes", "ignore_index", "stride_scale")
#: What :func:`loss_kernel` gives.
NONE, SUM, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(matrix, row, inside, stride, step, first_dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) float64 of the rows ``row`` (BLOCK,) of a matrix from column ``first_dim``; zeros outside and not ``inside``."""
    dim = first_dim + tl.arange(0, WIDTH)
    at = matrix + wide(row)[:, None] * stride + wide(dim)[None, :] * step
    return tl.load(at, mask=inside[:, None] & (dim[None, :] < DIM), other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def inverse_of(squares):
    """The length that the sum of squares ``squares`` (BLOCK,) float64 belongs to, and its inverse, 0 for a zero vector."""
    length = tl.sqrt(squares)
    return length, tl.where(length < TINY, 0.0, 1.0 / tl.where(length == 0.0, 1.0, length))


@triton.jit
def own_classes(labels, row, inside, c):
    """The label of each row, 0 where it is none of the ``c`` classes, and whether it is one."""
    label = tl.load(labels + row, mask=inside, other=-1)
    own = (label >= 0) & (label < c)
    return tl.where(own, label, 0), own


@triton.jit(do_not_specialize=SIZES)
def prepare_rows_kernel(
    x, w, labels,
    out,  # (N, D) in x's dtype: the rows times a power of two
    row_factor,  # (N,) float32
    similarity, cos,  # (N,) float64
    n, c, stride_xn, stride_xd, stride_wc, stride_wd,
    NORMALIZE_X: tl.constexpr, NORMALIZE_W: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """:meth:`marginkernels.backend.Backend.prepare_inputs`."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    label, own = own_classes(labels, row, inside, c)
    x_squares = tl.zeros((BLOCK_N,), tl.float64)
    w_squares = tl.zeros((BLOCK_N,), tl.float64)
    product = tl.zeros((BLOCK_N,), tl.float64)
    for d in tl.range(0, DIM, WIDTH):
        a = load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH)
        b = load_rows(w, label, own, stride_wc, stride_wd, d, DIM, WIDTH)
        x_squares += tl.sum(a * a, 1)
        w_squares += tl.sum(b * b, 1)
        product += tl.sum(a * b, 1)
    x_norm, x_inverse = inverse_of(x_squares)
    _, w_inverse = inverse_of(w_squares)
    near = product * x_inverse * w_inverse
    near = tl.where(near > 1.0, 1.0, tl.where(near < -1.0, -1.0, near))  # and NaN stays
    tl.store(cos + row, near, mask=inside)
    if not (NORMALIZE_X and NORMALIZE_W):
        near = product
        if NORMALIZE_X:
            near = near * x_inverse
        if NORMALIZE_W:
            near = near * w_inverse
    tl.store(similarity + row, near, mask=inside)
    # The exponent e with 2^(e - 1) <= |x| < 2^e, at most float32's largest; 0 for a norm of 0, infinity or NaN.
    biased = (x_norm.to(tl.int64, bitcast=True) >> 52) & 2047
    exponent = tl.where((biased == 0) | (biased == 2047), 0, tl.minimum(biased - 1022, 127))
    pow2 = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    inverse = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    factor = pow2
    if NORMALIZE_X:
        factor = pow2 * x_inverse
    tl.store(row_factor + row, factor.to(tl.float32), mask=inside)
    for d in tl.range(0, DIM, WIDTH):
        a = load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH) * inverse[:, None]
        store_rows(out, row, inside, d, a, DIM, WIDTH)


@triton.jit
def store_rows(matrix, row, inside, first_dim, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """``value`` (BLOCK, WIDTH) float64 to the rows ``row`` (BLOCK,) of a contiguous matrix, in its dtype."""
    dim = first_dim + tl.arange(0, WIDTH)
    value = narrow(value.to(tl.float32), matrix.dtype.element_ty)
    tl.store(matrix + wide(row)[:, None] * DIM + dim[None, :], value, mask=inside[:, None] & (dim[None, :] < DIM))


@triton.jit
def gradient_part(w, label, own, own_weight, mean_center, center_sum, d_lse, d_logit_sum, row, inside, stride_wc, stride_wd, d,
                  DIM: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """(BLOCK, WIDTH) float64 gradient in the (normalized) rows."""
    g = d_lse[:, None] * load_rows(mean_center, row, inside, DIM, 1, d, DIM, WIDTH)
    g += own_weight[:, None] * load_rows(w, label, own, stride_wc, stride_wd, d, DIM, WIDTH)
    if center_sum is not None:
        dim = d + tl.arange(0, WIDTH)
        at = center_sum + wide(row)[:, None] * DIM + dim[None, :]
        g += d_logit_sum[:, None] * tl.load(at, mask=inside[:, None] & (dim[None, :] < DIM), other=0.0).to(tl.float64)
    return g


@triton.jit(do_not_specialize=SIZES)
def row_gradient_kernel(
    x, w, labels,
    mean_center,  # (N, D) float32
    center_sum,  # (N, D) float32 or float64, or None
    d_lse, d_logit_sum, d_target_cos,  # (N,) float32, d_logit_sum None where center_sum is
    dx,  # (N, D) in x's dtype
    n, c, stride_xn, stride_xd, stride_wc, stride_wd,
    NORMALIZE_X: tl.constexpr, NORMALIZE_W: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """:meth:`marginkernels.backend.Backend.row_gradient`."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    label, own = own_classes(labels, row, inside, c)
    from_lse = tl.load(d_lse + row, mask=inside, other=0.0).to(tl.float64)
    from_sum = from_lse
    if center_sum is not None:
        from_sum = tl.load(d_logit_sum + row, mask=inside, other=0.0).to(tl.float64)
    own_weight = tl.load(d_target_cos + row, mask=inside, other=0.0).to(tl.float64)
    if NORMALIZE_W:
        squares = tl.zeros((BLOCK_N,), tl.float64)
        for d in tl.range(0, DIM, WIDTH):
            b = load_rows(w, label, own, stride_wc, stride_wd, d, DIM, WIDTH)
            squares += tl.sum(b * b, 1)
        _, w_inverse = inverse_of(squares)
        own_weight *= w_inverse
    along = tl.zeros((BLOCK_N,), tl.float64)
    inverse = along
    if NORMALIZE_X:
        squares = tl.zeros((BLOCK_N,), tl.float64)
        for d in tl.range(0, DIM, WIDTH):
            g = gradient_part(w, label, own, own_weight, mean_center, center_sum, from_lse, from_sum, row, inside, stride_wc, stride_wd,
                              d, DIM, WIDTH)  # fmt: skip
            a = load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH)
            squares += tl.sum(a * a, 1)
            along += tl.sum(a * g, 1)
        _, inverse = inverse_of(squares)
        along *= inverse * inverse
    for d in tl.range(0, DIM, WIDTH):
        g = gradient_part(w, label, own, own_weight, mean_center, center_sum, from_lse, from_sum, row, inside, stride_wc, stride_wd,
                          d, DIM, WIDTH)  # fmt: skip
        if NORMALIZE_X:
            a = load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH)
            g = (g - along[:, None] * a) * inverse[:, None]
        store_rows(dx, row, inside, d, g, DIM, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def labels_kernel(
    labels,  # (N,) int64
    out,  # (N,) int64: the same, -1 where ignored or out of range
    bounds,  # (blocks, 2) int64: the smallest and the largest label that is out of range, or num_classes // 2
    n, c, ignore_index,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """:func:`marginkernels.core.labels.checked_labels`."""
    row = wide(tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    label = tl.load(labels + row, mask=inside, other=0)
    ignored = label == ignore_index
    outside = ((label < 0) | (label >= c)) & (label != ignore_index) & inside
    tl.store(out + row, tl.where(ignored | outside, -1, label), mask=inside)
    bad = tl.where(outside, label, wide(c) // 2)
    tl.store(bounds + 2 * tl.program_id(0), tl.min(bad, 0))
    tl.store(bounds + 2 * tl.program_id(0) + 1, tl.max(bad, 0))


@triton.jit(do_not_specialize=SIZES)
def replace_rows_kernel(
    x, labels,
    bad,  # (N,) int8: which rows are replaced; out where MARK, else in
    out,  # (N, D) in x's dtype
    n, stride_xn, stride_xd, fill,
    MARK: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``x`` with ``fill`` in the rows that are ``bad``; MARK finds them: those without a label that hold NaN or infinity."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    if MARK:
        # Added up after the loop: a sum of one float32 row inside it is more than Triton 3.7's compiler can place.
        each = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for d in tl.range(0, DIM, WIDTH):
            each += load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH).to(tl.float32)
        total = tl.sum(each, 1)
        ignored = tl.load(labels + row, mask=inside, other=0) < 0
        replaced = ignored & (total - total != 0.0)  # infinity and NaN
        tl.store(bad + row, replaced.to(tl.int8), mask=inside)
    else:
        replaced = tl.load(bad + row, mask=inside, other=0) != 0
    for d in tl.range(0, DIM, WIDTH):
        a = load_rows(x, row, inside, stride_xn, stride_xd, d, DIM, WIDTH)
        store_rows(out, row, inside, d, tl.where(replaced[:, None], fill, a), DIM, WIDTH)


@triton.jit
def softplus(gap):
    """log(1 + exp(gap)), and what it is made of: exp(-|gap|) in (0, 1]."""
    small = tl.exp(-tl.abs(gap))
    one_more = 1.0 + small
    # log(1 + small) with 1 + small's own rounding made good.
    log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * small / tl.where(one_more == 1.0, 1.0, one_more - 1.0))
    return tl.maximum(gap, 0.0) + log1p, small


@triton.jit
def load_or_zero(values, row, inside):
    """(BLOCK,) float64, zeros where ``values`` is None."""
    found = tl.zeros(row.shape, tl.float64)
    if values is not None:
        found = tl.load(values + row, mask=inside, other=0.0).to(tl.float64)
    return found


@triton.jit
def row_loss(
    lse, value, scale, bias, logit_sum, row, inside, stride_scale, num_classes, smoothing, focal_gamma,
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """The loss of rows without the focal factor, that factor, the gap and exp(-|gap|), and where smoothing makes the loss infinite."""
    logit = load_or_zero(scale, row * stride_scale, inside) * load_or_zero(value, row, inside) + load_or_zero(bias, row, inside)
    gap = load_or_zero(lse, row, inside) - logit
    loss, small = softplus(gap)
    masked = load_or_zero(bias, row, inside) == -float("inf")
    if SMOOTH:
        loss += smoothing * (logit - (logit + load_or_zero(logit_sum, row, inside)) / num_classes)
    factor = tl.full(row.shape, 1.0, tl.float64)
    if FOCAL:
        other, _ = softplus(-gap)
        factor = tl.exp(-focal_gamma * other)
    return loss, factor, gap, small, masked


@triton.jit(do_not_specialize=NUMBERS)
def loss_kernel(
    lse, value, scale, bias, logit_sum,  # (N,) float64, the last two or None
    labels,  # (N,) int64, -1 for rows without a loss
    similarity, cos,  # (N,) float64
    max_logit, other,  # (N,) float32
    loss,  # float32: (N,), or (1,) of the sum or the mean
    stats,  # (5,) float32: the means of cos, its angle, scale, and whether the target is the top class without and with the margin
    count,  # (1,) float64: rows with a loss, at least 1
    n, stride_scale, num_classes, smoothing, smoothing_rest, focal_gamma, focal_gamma_rest,  # each number as the sum of two float32
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The assembly of the loss, its reduction, and the statistics of the step; one program, so that every sum has one order."""
    smoothing = tl.full((), smoothing, tl.float64) + smoothing_rest
    focal_gamma = tl.full((), focal_gamma, tl.float64) + focal_gamma_rest
    all_losses = tl.zeros((BLOCK_N,), tl.float64)
    all_cos = tl.zeros((BLOCK_N,), tl.float64)
    all_angles = tl.zeros((BLOCK_N,), tl.float64)
    all_scales = tl.zeros((BLOCK_N,), tl.float64)
    all_top = tl.zeros((BLOCK_N,), tl.float64)
    all_beyond = tl.zeros((BLOCK_N,), tl.float64)
    valid_rows = tl.zeros((BLOCK_N,), tl.float64)
    for first in tl.range(0, n, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < n
        valid = tl.load(labels + row, mask=inside, other=-1) >= 0
        one, factor, _, _, masked = row_loss(lse, value, scale, bias, logit_sum, row, inside, stride_scale, num_classes, smoothing,
                                             focal_gamma, SMOOTH, FOCAL)  # fmt: skip
        if SMOOTH:
            one = tl.where(masked, float("inf"), one)
        one = tl.where(valid, one * factor, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + row, one.to(tl.float32), mask=inside)
        all_losses += one
        s = load_or_zero(scale, row * stride_scale, inside)
        b = load_or_zero(bias, row, inside)
        logit = s * load_or_zero(similarity, row, inside) + b
        with_margin = s * load_or_zero(value, row, inside) + b
        c = load_or_zero(cos, row, inside)
        theta, _ = angle(c, 0.0)
        all_cos += tl.where(valid, c, 0.0)
        all_angles += tl.where(valid, theta, 0.0)
        all_scales += tl.where(valid, s, 0.0)
        all_top += tl.where(valid & (logit > load_or_zero(max_logit, row, inside)), 1.0, 0.0)
        all_beyond += tl.where(valid & (with_margin > load_or_zero(other, row, inside)), 1.0, 0.0)
        valid_rows += tl.where(valid, 1.0, 0.0)
    number = tl.maximum(tl.sum(valid_rows, 0), 1.0)
    tl.store(count, number)
    if REDUCTION != NONE:
        total = tl.sum(all_losses, 0)
        if REDUCTION == MEAN:
            total = total / number
        tl.store(loss, total.to(tl.float32))
    tl.store(stats, (tl.sum(all_cos, 0) / number).to(tl.float32))
    tl.store(stats + 1, (tl.sum(all_angles, 0) / number).to(tl.float32))
    tl.store(stats + 2, (tl.sum(all_scales, 0) / number).to(tl.float32))
    tl.store(stats + 3, (tl.sum(all_top, 0) / number).to(tl.float32))
    tl.store(stats + 4, (tl.sum(all_beyond, 0) / number).to(tl.float32))


@triton.jit(do_not_specialize=NUMBERS)
def loss_backward_kernel(
    lse, value, scale, slope, bias, logit_sum, labels, count,  # as loss_kernel; slope (N,) float64
    upstream,  # float32: (N,) or (1,), as the loss
    d_lse, d_similarity, d_value, d_scale, d_bias, d_logit_sum,  # (N,) float64, out; the last four or None
    n, stride_scale, num_classes, smoothing, smoothing_rest, focal_gamma, focal_gamma_rest,  # each number as the sum of two float32
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of :func:`loss_kernel`'s loss."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    smoothing = tl.full((), smoothing, tl.float64) + smoothing_rest
    focal_gamma = tl.full((), focal_gamma, tl.float64) + focal_gamma_rest
    counts = tl.load(labels + row, mask=inside, other=-1) >= 0
    loss, factor, gap, small, masked = row_loss(lse, value, scale, bias, logit_sum, row, inside, stride_scale, num_classes, smoothing,
                                                focal_gamma, SMOOTH, FOCAL)  # fmt: skip
    if REDUCTION == NONE:
        g = tl.load(upstream + row, mask=inside, other=0.0).to(tl.float64)
    else:
        g = tl.load(upstream).to(tl.float64) + tl.zeros((BLOCK_N,), tl.float64)
        if REDUCTION == MEAN:
            g = g / tl.load(count)
    rate = tl.where(gap >= 0.0, 1.0, small) / (1.0 + small)  # 1 - p_y
    in_gap = rate * factor
    if FOCAL:
        rest = tl.where(gap >= 0.0, small, 1.0) / (1.0 + small)
        in_gap += tl.where((factor == 0.0) | (rest == 0.0), 0.0, loss * focal_gamma * rest * factor)
    in_logit = -in_gap
    in_sum = tl.zeros((BLOCK_N,), tl.float64)
    if SMOOTH:
        in_sum = -smoothing * factor / num_classes
        in_logit += smoothing * factor + in_sum
        counts = counts & ~masked
    in_gap = tl.where(counts, g * in_gap, 0.0)
    in_logit = tl.where(counts, g * in_logit, 0.0)
    in_sum = tl.where(counts, g * in_sum, 0.0)
    s = load_or_zero(scale, row * stride_scale, inside)
    tl.store(d_lse + row, in_gap, mask=inside)
    tl.store(d_similarity + row, in_logit * s * load_or_zero(slope, row, inside), mask=inside)
    if d_value is not None:
        tl.store(d_value + row, in_logit * s, mask=inside)
    if d_scale is not None:
        tl.store(d_scale + row, in_logit * load_or_zero(value, row, inside), mask=inside)
    if d_bias is not None:
        tl.store(d_bias + row, in_logit, mask=inside)
    if d_logit_sum is not None:
        tl.store(d_logit_sum + row, in_sum, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def upstream_kernel(
    lse,  # (N,) float64
    scale,  # (N,) float32
    g_lse, g_similarity, g_bias, g_logit_sum,  # (N,) float64, or None for zeros
    out_lse,  # (N,) float64
    d_lse, d_target_cos, d_target_bias, d_logit_sum,  # (N,) float32, the last two or None
    rounded_lse, rounded_d_lse,  # (N,) float32
    n,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """:class:`marginkernels.core.types.Upstream`, as it is and rounded to float32."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    s = load_or_zero(scale, row, inside)
    value = load_or_zero(lse, row, inside)
    value = tl.where(value == -float("inf"), float("inf"), value)
    weight = (load_or_zero(g_lse, row, inside) * s).to(tl.float32)
    near = value.to(tl.float32)
    added = tl.where(tl.abs(value) < 68719476736.0, near.to(tl.float64) - value, 0.0)
    added = tl.minimum(tl.maximum(added, -44.0), 44.0)
    tl.store(out_lse + row, value, mask=inside)
    tl.store(d_lse + row, weight, mask=inside)
    tl.store(rounded_lse + row, near, mask=inside)
    tl.store(rounded_d_lse + row, (weight.to(tl.float64) * tl.exp(added)).to(tl.float32), mask=inside)
    tl.store(d_target_cos + row, load_or_zero(g_similarity, row, inside).to(tl.float32), mask=inside)
    if d_target_bias is not None:
        tl.store(d_target_bias + row, load_or_zero(g_bias, row, inside).to(tl.float32), mask=inside)
    if d_logit_sum is not None:
        tl.store(d_logit_sum + row, (load_or_zero(g_logit_sum, row, inside) * s).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def center_sum_kernel(
    w,  # (C, D)
    factor,  # (C,) float32, or None for ones
    parts,  # (splits, D) float64, out
    c, stride_wc, stride_wd, blocks_per_split,
    DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``sum_j a_j w_j`` over one split of the classes: every product and sum in float64, as exact as that is."""
    first_dim = tl.program_id(1) * WIDTH
    total = tl.zeros((BLOCK_C, WIDTH), tl.float64)
    first = wide(tl.program_id(0)) * blocks_per_split * BLOCK_C
    for block in tl.range(0, blocks_per_split):
        col = first + block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = col < c
        tile = load_rows(w, col, inside, stride_wc, stride_wd, first_dim, DIM, WIDTH)
        if factor is not None:
            tile *= tl.load(factor + col, mask=inside, other=0.0).to(tl.float64)[:, None]
        total += tile
    dim = first_dim + tl.arange(0, WIDTH)
    tl.store(parts + wide(tl.program_id(0)) * DIM + dim, tl.sum(total, 0), mask=dim < DIM)


@triton.jit(do_not_specialize=SIZES)
def add_splits_kernel(parts, out, splits, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(D,) float64: the sum of ``parts`` (splits, D)."""
    dim = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), tl.float64)
    for first in tl.range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        inside = (split[:, None] < splits) & (dim[None, :] < DIM)
        total += tl.load(parts + split[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    tl.store(out + dim, tl.sum(total, 0), mask=dim < DIM)


@triton.jit(do_not_specialize=SIZES)
def reach_kernel(
    x, row_factor, scale,
    out,  # (N,) float32
    n, stride_xn, added,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """How far from 0 the exponents of a row's terms without a transform, and with ``added`` = log C of their sum, can lie."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for d in tl.range(0, DIM, WIDTH):
        a = load_rows(x, row, inside, stride_xn, 1, d, DIM, WIDTH).to(tl.float32)
        squares += tl.sum(a * a, 1)
    reach = tl.load(row_factor + row, mask=inside, other=0.0) * tl.sqrt(squares)
    tl.store(out + row, tl.abs(tl.load(scale + row, mask=inside, other=0.0)) * reach + added, mask=inside)


take_keys(globals())
