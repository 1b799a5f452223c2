"""The row pass: blocks of rows against all classes, in splits of the classes, and the kernels before and after it."""

import triton
import triton.language as tl

from .primitives import (
    IDENTITY,
    LN2,
    LOG2E,
    SAVED_STEP,
    SIZES,
    accumulate,
    accumulators,
    center_at,
    class_at,
    class_of,
    exp_of_minus,
    fold_max,
    fold_sum,
    halves,
    load_labels,
    load_tile,
    load_transform,
    log1p_of,
    narrow,
    nontarget_slope,
    nontarget_value,
    sigmoid_of,
    similarities,
    slots_of,
    store_tile,
    take_keys,
    to_unit_range,
    wide,
    winners,
)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    w,  # (C, D)
    factor,  # (C,) float32, out, or None
    copy,  # (count, PADDED) in the product's dtype, out, or None
    first_class, count, stride_wc, tiny,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """For ``count`` centers from slot ``first_class``: 1/|w_j|, 0 where |w_j| < tiny, and the centers times that in their slots, with zeros
    after them and in empty slots.

    Centers are brought to [1, 2) by a power of two first: squares neither overflow nor vanish.
    """
    first = tl.program_id(0) * BLOCK_C
    first_center = center_at(first_class, SUB)
    chunk = w + wide(first_center) * stride_wc
    tile = load_tile(chunk, None, stride_wc, first, count, 0, DIM, BLOCK_C, WIDTH, WIDTH, SUB).to(tl.float32)
    if factor is not None:
        power = to_unit_range(tl.max(tl.abs(tile), 1))
        unit = tile * power[:, None]
        length = tl.sqrt_rn(tl.sum(unit * unit, 1))
        zero = length < tiny * power
        col = center_at(first + tl.arange(0, BLOCK_C), SUB)
        tl.store(factor + first_center + col, tl.where(zero, 0.0, power / length), mask=col < count)
        tile = unit * tl.where(zero, 0.0, 1.0 / length)[:, None]
    if copy is not None:
        store_tile(copy, PADDED, first, slots_of(count, SUB), 0, tile, PADDED, BLOCK_C, WIDTH, WIDTH)


@triton.jit
def add_to_tile(matrix, first, count, first_dim, value, decay, RESUME: tl.constexpr,
                DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr):  # fmt: skip
    """Store a tile, plus ``decay`` (BLOCK,) times what stands there where RESUME."""
    if RESUME:
        value += decay[:, None] * load_tile(matrix, None, DIM, first, count, first_dim, DIM, BLOCK, WIDTH, COVER)
    store_tile(matrix, DIM, first, count, first_dim, value, DIM, BLOCK, WIDTH, COVER)


@triton.jit
def store_halves(matrix, first, count, first_dim, u, decay, RESUME: tl.constexpr,
                 DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """:func:`add_to_tile` of the transpose of u (WIDTH, BLOCK), in two pieces."""
    low, high = halves(u)
    add_to_tile(matrix, first, count, first_dim, tl.trans(low), decay, RESUME, DIM, BLOCK, WIDTH // 2, WIDTH)
    add_to_tile(matrix, first, count, first_dim + WIDTH // 2, tl.trans(high), decay, RESUME, DIM, BLOCK, WIDTH // 2, WIDTH)


@triton.jit
def update_running_max(running_max, logit):
    """The running maximum (BLOCK_N,) over a tile of logits (keys, BLOCK_N), what exponentials are taken against, and how far older ones
    shrink."""
    higher = tl.maximum(running_max, tl.max(logit, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, base, tl.exp2(running_max - base)


@triton.jit
def rescale(u, decay, PARTS: tl.constexpr):
    """Accumulators times ``decay`` (BLOCK_N,)."""
    found = ()
    for i in tl.static_range(len(u)):
        found += (u[i] * (decay[None, :] if PARTS == 0 else decay[:, None]),)
    return found


@triton.jit
def save_weights(saved, saved_box, saved_base, saved_stride, weight, base, first, count, first_row):
    """Leave a tile of weights (classes, rows) for the class pass, and what its exponentials were taken against, once for every SAVED_STEP
    classes. Rows past the last are written too, finite, as far as the padding goes: so all stores are wide."""
    row = first_row + tl.arange(0, weight.shape[1])
    if saved_box is not None:
        saved_box.store([first, first_row], weight)
    else:
        col = tl.arange(0, weight.shape[0])
        at = saved + wide(first) * saved_stride + col[:, None] * saved_stride + row[None, :]
        tl.store(at, weight, mask=(col[:, None] < count - first) & (row[None, :] < saved_stride))
    for step in tl.static_range(weight.shape[0] // SAVED_STEP):
        tl.store(saved_base + wide(first // SAVED_STEP + step) * saved_stride + row, base, mask=row < saved_stride)


@triton.jit
def store_row(part, row, inside, value, decay, RESUME: tl.constexpr):
    """Store (BLOCK_N,) results, joined to those that stand there where RESUME: sums to ``decay`` times them, maxima (``decay`` None) to the
    larger."""
    if RESUME:
        before = tl.load(part + row, mask=inside, other=0.0)
        value = tl.maximum(value, before) if decay is None else value + decay * before
    tl.store(part + row, value, mask=inside)


@triton.jit
def own_running_max(part_running_max, n, row):
    """Where this program's running maxima (BLOCK_N,) are. Slices of D have copies of their own, all the same: no program may read what
    another of the same launch writes."""
    return part_running_max + (wide(tl.program_id(2)) * tl.num_programs(1) + tl.program_id(1)) * n + row


@triton.jit(do_not_specialize=SIZES)
def row_pass_kernel(
    x, w,  # (N, PADDED), (count, PADDED): zeros past D
    x_box, w_box,  # the same as tensor descriptors with boxes (BLOCK_N, DEPTH) and (BLOCK_C, DEPTH), or None
    row_factor, scale, threshold, t, labels,  # (N,)
    class_factor,  # (C,), or None where w needs none
    bias,  # (C,), or None
    bound,  # (): the largest exponent that a row can meet, or None where it is not known
    part_sum, part_max_logit, part_cos,  # (splits, N)
    part_running_max,  # (slices, splits, N)
    part_center,  # (splits, N, D)
    saved, saved_base,  # (saved_count, saved_stride), (saved_count / SAVED_STEP, saved_stride), out; or None
    saved_box,  # saved as a tensor descriptor with boxes (BLOCK_C, BLOCK_N), or None
    n, first_class, count, saved_count, stride_xn, stride_wc, saved_stride, blocks_per_split, limit,
    DIM: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    NON_TARGET: tl.constexpr, LOGIT_SUM: tl.constexpr, SOFTPLUS: tl.constexpr, ONLINE: tl.constexpr, RESUME: tl.constexpr,
    NEED_CENTER: tl.constexpr, NEED_COS: tl.constexpr, POW2: tl.constexpr, PRECISION: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of ``count`` classes from ``first_class``; with NEED_CENTER, slice ``program_id(2)`` of
    its columns.

    ONLINE carries the running maximum. Without it the exponentials are taken as they stand, which spares the reductions and the rescaling
    of u in the loop; where ``bound`` is given both ways are launched, and it decides on the device which of them returns at once. RESUME
    goes on from the partial results of an earlier launch. The weights of classes before ``saved_count`` are left in ``saved``,
    as the product takes them: times the class factor, if given.

    With SUB centers a class ``count`` is of centers, ``w`` has them in their slots, and there is no class factor; ``first_class`` and
    ``saved_count`` are slots. Of a class the row's nearest center takes part.
    """
    WHOLE: tl.constexpr = DIM <= DEPTH
    WIDE: tl.constexpr = DEPTH // max(PARTS, 1)
    PLAIN: tl.constexpr = NON_TARGET == IDENTITY and not NEED_COS
    DTYPE: tl.constexpr = x.dtype.element_ty
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    in_n = row < n
    if bound is not None and (tl.load(bound) <= limit) == ONLINE:
        return
    f = tl.load(row_factor + row, mask=in_n, other=0.0)[None, :]
    s = tl.load(scale + row, mask=in_n, other=0.0)[None, :]
    if not SOFTPLUS:  # whose logits are in natural units
        s *= LOG2E
    if PLAIN:  # the similarities themselves are not wanted
        s *= f
    own = (class_of(load_labels(labels, row, in_n), SUB) - class_at(first_class, SUB))[None, :]
    hard, param = load_transform(threshold, t, row, in_n, NON_TARGET)
    query = None
    if WHOLE:
        query = ()
        for i in tl.static_range(max(PARTS, 1)):
            query += (tl.trans(load_tile(x, None, stride_xn, first_row, n, i * WIDE, PADDED, BLOCK_N, WIDE, DEPTH)),)
    first_dim = tl.program_id(2) * WIDTH
    total = tl.zeros((BLOCK_C // 2, BLOCK_N), tl.float32)
    cos_sum = tl.zeros((BLOCK_C // 2, BLOCK_N), tl.float32)
    max_logit = tl.full((BLOCK_C // 2, BLOCK_N), float("-inf"), tl.float32)
    running_max = tl.full((BLOCK_N,), float("-inf") if ONLINE else 0.0, tl.float32)
    base = tl.zeros((BLOCK_N,), tl.float32)
    decayed = tl.full((BLOCK_N,), 1.0, tl.float32)
    out = wide(tl.program_id(1)) * n
    if RESUME and ONLINE:
        running_max = tl.load(own_running_max(part_running_max, n, row), mask=in_n, other=float("-inf"))
    if NEED_CENTER:
        u = accumulators(PARTS, WIDTH, BLOCK_N)
    first_block = tl.program_id(1) * blocks_per_split
    end = slots_of(count, SUB)
    for block in tl.range(first_block, tl.minimum(first_block + blocks_per_split, tl.cdiv(end, BLOCK_C))):
        first = block * BLOCK_C
        slot = first + tl.arange(0, BLOCK_C)
        col = class_at(slot, SUB)
        in_c = center_at(slot, SUB) < count
        cos, key = similarities(w, w_box, stride_wc, first, end, x, x_box, stride_xn, first_row, n, query, 1.0, False, DTYPE, PRECISION,
                                PADDED, PADDED, DEPTH, BLOCK_C, BLOCK_N)  # fmt: skip
        if SUB > 1:
            won = winners(cos, SUB, BLOCK_N)
        if class_factor is not None:
            factor = tl.load(class_factor + first_class + col, mask=in_c, other=0.0)[:, None]
            cos = cos * factor
        if not PLAIN:
            cos = cos * f
        value = nontarget_value(cos, hard[None, :], param[None, :], NON_TARGET)
        logit = value * s
        raw = cos * s
        if bias is not None:
            b = tl.load(bias + class_at(first_class, SUB) + col, mask=in_c, other=0.0)[:, None]
            if not SOFTPLUS:
                b *= LOG2E
            logit += b
            raw += b
        keep = in_c[:, None] & (col[:, None] != own)
        if SUB > 1:
            keep &= won
        max_logit = tl.maximum(max_logit, fold_max(tl.where(keep, raw, float("-inf"))))
        if LOGIT_SUM:
            g = keep.to(tl.float32)
            total += fold_sum(tl.where(keep, logit, 0.0))
        elif SOFTPLUS:
            logit = tl.where(keep, logit, float("-inf"))
            e = exp_of_minus(logit)
            total += fold_sum(tl.maximum(logit, 0.0) + log1p_of(e))
            g = sigmoid_of(logit, e)
        else:
            logit = tl.where(keep, logit, float("-inf"))
            if ONLINE:
                running_max, base, decay = update_running_max(running_max, logit)
                logit -= base[None, :]
                decayed *= decay
                total *= decay[None, :]
                cos_sum *= decay[None, :]
                if NEED_CENTER:
                    u = rescale(u, decay, PARTS)
            g = tl.exp2(logit)
            total += fold_sum(g)
        if NEED_COS:
            cos_sum += fold_sum(g * value)
        g = nontarget_slope(g, cos, hard[None, :], param[None, :], NON_TARGET) * POW2
        if class_factor is not None:
            g *= factor
        g = narrow(g, DTYPE)
        if saved is not None and first_class + first < saved_count and tl.program_id(2) == 0:
            save_weights(saved, saved_box, saved_base, saved_stride, g, base, first_class + first, saved_count, first_row)
        if NEED_CENTER:
            if not WHOLE or WIDTH < DEPTH:
                key = (load_tile(w, None, stride_wc, first, end, first_dim, PADDED, BLOCK_C, WIDTH, WIDTH),)
            u = accumulate(key, g, u, PARTS, PRECISION)
    if tl.program_id(2) == 0:
        store_row(part_max_logit + out, row, in_n, tl.max(max_logit, 0), None, RESUME)
        store_row(part_sum + out, row, in_n, tl.sum(total, 0), decayed, RESUME)
        if NEED_COS:
            store_row(part_cos + out, row, in_n, tl.sum(cos_sum, 0), decayed, RESUME)
    if RESUME or tl.program_id(2) == 0:  # without RESUME nobody reads the others
        tl.store(own_running_max(part_running_max, n, row), running_max, mask=in_n)
    if NEED_CENTER:
        if PARTS == 0:
            store_halves(part_center + out * DIM, first_row, n, first_dim, u[0] * (1.0 / POW2), decayed, RESUME, DIM, BLOCK_N, WIDTH)
        for i in tl.static_range(PARTS):
            part = u[i] * (1.0 / POW2)
            add_to_tile(part_center + out * DIM, first_row, n, first_dim + i * WIDE, part, decayed, RESUME, DIM, BLOCK_N, WIDE, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    part_sum, part_running_max, part_max_logit, part_cos, part_center,  # of row_pass_kernel; the first slice's running maxima
    value, max_logit, cos,  # (N,), out
    center,  # (N, D), out
    n, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    PLAIN_SUM: tl.constexpr, SOFTPLUS: tl.constexpr, NEED_CENTER: tl.constexpr, NEED_COS: tl.constexpr,
):  # fmt: skip
    """Join the splits of the classes, always in the same order. PLAIN_SUM: of what needs no running maximum."""
    UNIT: tl.constexpr = 1.0 if SOFTPLUS else LN2
    first_row = tl.program_id(0) * BLOCK_N
    first_dim = tl.program_id(1) * WIDTH
    row = first_row + tl.arange(0, BLOCK_N)
    in_n = row < n
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for split in tl.range(splits):
        running_max = tl.maximum(running_max, tl.load(part_running_max + wide(split) * n + row, mask=in_n, other=0.0))
    base = tl.where(running_max == float("-inf"), 0.0, running_max)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    joint = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for split in tl.range(splits):
        at = wide(split) * n
        share = tl.exp2(tl.load(part_running_max + at + row, mask=in_n, other=0.0) - base)
        mass += share * tl.load(part_sum + at + row, mask=in_n, other=0.0)
        best = tl.maximum(best, tl.load(part_max_logit + at + row, mask=in_n, other=0.0))
        if NEED_COS:
            mean += share * tl.load(part_cos + at + row, mask=in_n, other=0.0)
        if NEED_CENTER:
            joint += share[:, None] * load_tile(part_center + at * DIM, None, DIM, first_row, n, first_dim, DIM, BLOCK_N, WIDTH, WIDTH)
    if PLAIN_SUM:
        log_mass = mass
    else:
        log_mass = tl.where(mass == 0, float("-inf"), tl.log2(mass) + base)
        share = 1.0 / tl.where(mass == 0, 1.0, mass)
        mean *= share
        joint *= share[:, None]
    if tl.program_id(1) == 0:
        tl.store(value + row, log_mass * UNIT, mask=in_n)
        tl.store(max_logit + row, best * UNIT, mask=in_n)
        if NEED_COS:
            tl.store(cos + row, mean, mask=in_n)
    if NEED_CENTER:
        store_tile(center, DIM, first_row, n, first_dim, joint, DIM, BLOCK_N, WIDTH, WIDTH)


take_keys(globals())
