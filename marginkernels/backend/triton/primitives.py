"""Tile code that both passes share. Everything here is inlined into the kernels.

A *query* block stays with its program; *key* blocks stream past it, and the keys are the values as well. In the row pass the rows are the
queries and the centers the keys; in the class pass it is the other way round. Tiles of similarities are (keys, queries) and accumulators
are (D, queries). So the weights are the second operand of the second product, which Hopper's tensor cores take from shared memory, and no
thread holds a copy of another thread's data. Logits are in units of log 2, so that ``exp`` is one instruction.

Tensor cores that take their operands from registers (all but sm_90's and sm_100's) want it otherwise, where PARTS > 0: accumulators are
(queries, D / PARTS), PARTS of them. Then one copy of the key block in shared memory serves both products as it lies, and Triton fetches it
ahead by cp.async; a block that is turned around for the second product is loaded when it is needed, with nothing to hide that behind. In
parts, since a product reads all of its operand into registers before it begins.
"""

from typing import Any

import triton
import triton.language as tl

from ...core import nontarget
from . import saved_layout, slots

#: The interpreter multiplies the bits of bfloat16 numbers as integers, and cuts float32 to bfloat16 instead of rounding: there both are
#: done by hand.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_REST = tl.constexpr(1.92596299e-8)  # what LOG2E lacks as a float32

#: Arguments that change from batch to batch and from head to head: kernels are not compiled anew for a size of 1 or a multiple of 16.
#: First classes of a chunk and counts of saved classes are always a multiple of 16, which spares registers.
SIZES = ("n", "c", "count", "splits", "blocks_per_split")

#: Of saved weights; see marginkernels.backend.triton.saved_layout.
SAVED_STEP = tl.constexpr(saved_layout.STEP)

# The numbers of marginkernels.core.nontarget.NonTarget; a test compares the two.
IDENTITY = tl.constexpr(0)
HARD_LINEAR = tl.constexpr(1)
HARD_QUADRATIC = tl.constexpr(2)
FILTERED = tl.constexpr(3)
HINGE = tl.constexpr(4)
ANGLE_PART = tl.constexpr(5)
ANGLE_PART_DETACHED = tl.constexpr(6)
CLIPPED = tl.constexpr(7)
POWER = tl.constexpr(8)
POWER_DETACHED = tl.constexpr(9)
LEAST_BASE = tl.constexpr(nontarget.LEAST_BASE)
LIFTED = tl.constexpr(10)
LIFTED_ANGLE = tl.constexpr(11)
PI = tl.constexpr(3.141592653589793)
LEAST_SINE = tl.constexpr(nontarget.LEAST_SINE)
LEAST_LIFTED_SINE = tl.constexpr(nontarget.LEAST_LIFTED_SINE)

#: Of classes with several centers; see marginkernels.backend.triton.slots.
GROUP = tl.constexpr(slots.GROUP)
slots_of_class = triton.constexpr_function(slots.of_class)
#: Past every center.
NO_CENTER = tl.constexpr(2147483647)


@triton.jit
def wide(i):
    """An index in 64 bits, be it a tensor, a constant or, under the interpreter, a Python number."""
    return tl.zeros((), tl.int64) + i


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32.

    Where the first of two dependent products stands under a condition, even one that always holds, Triton lays out each of them for the
    tensor cores by itself. Otherwise it gives the first product all warps along its rows, and a 64-row tile then computes everything
    twice.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(a, DTYPE: tl.constexpr):
    """``a`` (float32 or ``DTYPE``) rounded to nearest in ``DTYPE``."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = a.to(tl.float32).to(tl.uint32, bitcast=True)
        a = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return a.to(DTYPE)


@triton.jit
def to_unit_range(a):
    """The power of two that brings each a >= 0 to [1, 2): for 0 the largest there is, and the smallest for what is near float32's end."""
    exponent = tl.minimum((a.to(tl.int32, bitcast=True) >> 23) & 255, 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def angle(c, LEAST: tl.constexpr):
    """theta = acos(c), and its sine, as csrc/scalar.h's Angle, which has more to say."""
    square = tl.maximum(0.5 - 0.5 * tl.abs(c), LEAST)
    s = tl.sqrt(square)
    p = square * 0.113449931 - 0.0966452733
    p = p * square + 0.0800102577
    p = p * square + 0.0152228381
    p = p * square + 0.0467416383
    p = p * square + 0.0748597309
    p = p * square + 0.166670203
    p = p * square + 1.0
    near = 2.0 * s * p
    return tl.where(c < 0, PI - near, near), 2.0 * s * tl.sqrt(1.0 - square)


@triton.jit
def sine_of(y):
    """sin(y) for y in [0, pi/2]."""
    square = y * y
    p = square * 2.60190313e-06 - 0.000198074194
    p = p * square + 0.0083330255
    p = p * square - 0.166666567
    return y * (p * square + 1.0)


@triton.jit
def cosine_of(y):
    """cos(y) for y in [0, pi/2]."""
    square = y * y
    p = square * -2.60514952e-07 + 2.4760162e-05
    p = p * square - 0.00138883619
    p = p * square + 0.0416666381
    p = p * square - 0.5
    return p * square + 1.0


@triton.jit
def nontarget_value(c, threshold, t, NON_TARGET: tl.constexpr):
    """N(c) of a tile of similarities; ``threshold`` and ``t`` broadcast against it."""
    if NON_TARGET == HARD_LINEAR:
        c = tl.where(c > threshold, (1 + t) * c + t, c)
    elif NON_TARGET == HARD_QUADRATIC:
        c = tl.where(c > threshold, c * (t + c), c)
    elif NON_TARGET == FILTERED:
        c = tl.where(c > threshold, 0.0, c)
    elif NON_TARGET == HINGE:
        c = tl.where(c + t < 0, 0.0, c + t) * (c - t)
    elif NON_TARGET == LIFTED:
        c = tl.where(c > threshold, c + t, c)
    elif NON_TARGET == LIFTED_ANGLE:
        at = tl.clamp(c, -1.0, 1.0)
        lifted = at * cosine_of(t) + tl.sqrt_rn(1.0 - at * at) * sine_of(t)
        c = tl.where(c > threshold, lifted, c)
    elif NON_TARGET == CLIPPED:
        c = tl.where(c < threshold, threshold, c)
        c = tl.where(c > t, t, c)
    elif NON_TARGET >= POWER:  # detached or not
        c = 2.0 * tl.exp2(t * tl.log2(tl.maximum(0.5 + 0.5 * c, LEAST_BASE))) + (threshold - 1.0)
    elif NON_TARGET >= ANGLE_PART:
        theta, _ = angle(c, 0.0)
        half = sine_of(0.5 * t * theta)
        c = 1.0 - 2.0 * half * half
    return c


@triton.jit
def nontarget_slope(g, c, threshold, t, NON_TARGET: tl.constexpr):
    """g N'(c)."""
    if NON_TARGET == HARD_LINEAR:
        g = tl.where(c > threshold, g * (1 + t), g)
    elif NON_TARGET == HARD_QUADRATIC:
        g = tl.where(c > threshold, g * (t + 2 * c), g)
    elif NON_TARGET == FILTERED:
        g = tl.where(c > threshold, 0.0, g)
    elif NON_TARGET == HINGE:
        g *= tl.where(c + t < 0, 0.0, c + t)
    elif NON_TARGET == ANGLE_PART:
        theta, sine = angle(c, 1e-9)
        y = 0.5 * t * theta
        g *= t * 2.0 * sine_of(y) * cosine_of(y) / tl.maximum(sine, tl.where(c < 0, LEAST_SINE, 0.0))
    elif NON_TARGET == CLIPPED:
        g = tl.where((c < threshold) | (c > t), 0.0, g)
    elif NON_TARGET == POWER:
        g *= t * tl.exp2((t - 1) * tl.log2(tl.maximum(0.5 + 0.5 * c, LEAST_BASE)))
    elif NON_TARGET == LIFTED_ANGLE:
        at = tl.clamp(c, -1.0, 1.0)
        sine = tl.sqrt_rn(tl.maximum(1.0 - at * at, LEAST_LIFTED_SINE * LEAST_LIFTED_SINE))
        g = tl.where(c > threshold, g * (cosine_of(t) - at * sine_of(t) / sine), g)
    return g


@triton.jit
def bias_slope(g, c, threshold, t, NON_TARGET: tl.constexpr):
    """g times the slope of the logit in the bias."""
    if NON_TARGET == CLIPPED:
        g = tl.where((c < threshold) | (c > t), 0.0, g)
    return g


@triton.jit
def exp_of_minus(z):
    """exp(-|z|). The terms of a sum of softplus are as wrong, relatively, as their exponents absolutely, and with one error in common they
    would not average out: hence z comes in natural units, and LOG2E to more digits than a float32 has."""
    a = -tl.abs(z)
    return tl.exp2(a * LOG2E + a * LOG2E_REST)


@triton.jit
def sigmoid_of(z, e):
    """The slope of softplus, from ``e = exp(-|z|)``."""
    return tl.where(z > 0, 1.0, e) / (1.0 + e)


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1], with its digits where e is small."""
    q = e / (2.0 + e)
    square = q * q
    p = square * 0.140891671 + 0.139803007
    p = p * square + 0.200124547
    p = p * square + 0.333331585
    return 2.0 * q * (p * square + 1.0)


@triton.jit
def class_at(slot, SUB: tl.constexpr):
    """The class of each slot, with SUB centers a class."""
    if SUB > 1:
        CLASSES: tl.constexpr = GROUP // slots_of_class(SUB)
        slot = slot // GROUP * CLASSES + slot % CLASSES
    return slot


@triton.jit
def center_at(slot, SUB: tl.constexpr):
    """The center in each slot, with SUB centers a class; NO_CENTER in an empty one."""
    if SUB > 1:
        CLASSES: tl.constexpr = GROUP // slots_of_class(SUB)
        sub = slot % GROUP // CLASSES
        slot = tl.where(sub < SUB, class_at(slot, SUB) * SUB + sub, NO_CENTER)
    return slot


@triton.jit
def centers_of(first, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """The center in slot ``first``, the first of a group, and how far from it those in BLOCK slots lie (BLOCK,)."""
    far = tl.arange(0, BLOCK)
    if SUB > 1:
        far = center_at(first + far, SUB)
        first = center_at(tl.zeros((), tl.int32) + first, SUB)  # see `wide`
        far -= first
    return first, far


@triton.jit
def slots_of(count, SUB: tl.constexpr):
    """Slots of ``count`` centers, SUB a class."""
    if SUB > 1:
        count = tl.cdiv(count, GROUP // slots_of_class(SUB) * SUB) * GROUP
    return count


@triton.jit
def class_of(center, SUB: tl.constexpr):
    """The class of each center, -1 of a negative one."""
    if SUB > 1:
        center = tl.where(center < 0, -1, center // SUB)
    return center


@triton.jit
def winners(near, SUB: tl.constexpr, APART: tl.constexpr):
    """Which of a tile of products are the highest of their class, the first of equals; and NaN, so that it comes through. APART is how far
    the products of neighboring slots lie from each other, row-major: 1, or the tile's columns."""
    EACH: tl.constexpr = slots_of_class(SUB)
    each = tl.reshape(near, (near.shape[0] * near.shape[1] // (GROUP * APART), EACH, GROUP // EACH * APART))
    place = tl.arange(0, EACH)[None, :, None]
    if EACH > SUB:
        each = tl.where(place < SUB, each, float("-inf"))
    highest = tl.max(each, 1, keep_dims=True)
    first = tl.min(tl.where(each == highest, place, EACH), 1, keep_dims=True)
    return tl.reshape((place == first) | (each != each), near.shape)


@triton.jit
def load_tile(matrix, box, stride, first, count, first_dim,
              DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr, SUB: tl.constexpr = 1):  # fmt: skip
    """(BLOCK, WIDTH) of a (count, DIM) matrix from row ``first`` and column ``first_dim``; zeros outside.

    ``box`` is the matrix as a tensor descriptor with boxes of that size, or None to go through pointers. Those are 64-bit up to the tile
    and 32-bit inside it. Tiles go over the columns in steps of COVER, at least WIDTH: some lie partly or wholly outside where DIM is no
    multiple of it. With SUB > 1 the matrix has SUB centers a class, and ``first`` and BLOCK are slots of them.
    """
    if box is not None:
        return box.load([first, first_dim])
    first, row = centers_of(first, BLOCK, SUB)
    dim = first_dim + tl.arange(0, WIDTH)
    at = matrix + wide(first) * stride + row[:, None] * stride + dim[None, :]
    inside = row[:, None] < count - first
    if DIM % COVER != 0:
        inside &= dim[None, :] < DIM
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def to_product(v, factor, PRESCALE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of vectors in the product's dtype, times ``factor`` (BLOCK,) where PRESCALE.

    float16 needs that of class centers, since one of any norm must fit; the other dtypes have float32's range and take the factor after
    the product.
    """
    if PRESCALE:
        v = v.to(tl.float32) * factor[:, None]
    return narrow(v, DTYPE)


@triton.jit
def similarities(keys, key_box, stride_k, first_key, key_count, queries, query_box, stride_q, first_query, query_count, held, factor,
                 PRESCALE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
                 KEY_DIM: tl.constexpr, QUERY_DIM: tl.constexpr, DEPTH: tl.constexpr,
                 BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, QUERY_SUB: tl.constexpr = 1):  # fmt: skip
    """Products (BLOCK_K, BLOCK_Q) of a key block and the query block, and the parts of the key tile where that is whole.

    ``held`` is the query tile (DEPTH, BLOCK_Q), in parts of its rows, or None where D is deeper than DEPTH: then both blocks are read in
    steps of it. QUERY_SUB: the centers of a class, where the queries are such.
    """
    near = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    if held is not None:
        key = ()
        WIDE: tl.constexpr = DEPTH // len(held)
        for i in tl.static_range(len(held)):
            part = load_tile(keys, key_box, stride_k, first_key, key_count, i * WIDE, KEY_DIM, BLOCK_K, WIDE, DEPTH)
            if key_count > 0:  # always; see `product`
                near = product(part, held[i], near, PRECISION)
            key += (part,)
    else:
        key = near  # nobody's
        for d in tl.range(0, QUERY_DIM, DEPTH):
            query = load_tile(queries, query_box, stride_q, first_query, query_count, d, QUERY_DIM, BLOCK_Q, DEPTH, DEPTH, QUERY_SUB)
            part = load_tile(keys, key_box, stride_k, first_key, key_count, d, KEY_DIM, BLOCK_K, DEPTH, DEPTH)
            near = product(part, tl.trans(to_product(query, factor, PRESCALE, DTYPE)), near, PRECISION)
    return near, key


@triton.jit
def accumulators(PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Zeros: ((WIDTH, BLOCK_Q),), or PARTS tiles (BLOCK_Q, WIDTH / PARTS)."""
    found = ()
    if PARTS == 0:
        found += (tl.zeros((WIDTH, BLOCK_Q), tl.float32),)
    for _ in tl.static_range(PARTS):
        found += (tl.zeros((BLOCK_Q, WIDTH // PARTS), tl.float32),)
    return found


@triton.jit
def accumulate(key, g, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus the products of the parts of a key tile (BLOCK_K, WIDTH) and weights g (BLOCK_K, BLOCK_Q)."""
    found = ()
    for i in tl.static_range(len(acc)):
        if PARTS == 0:
            found += (product(tl.trans(key[i]), g, acc[i], PRECISION),)
        else:
            found += (product(tl.trans(g), key[i], acc[i], PRECISION),)
    return found


@triton.jit
def load_transform(threshold, t, row, inside, NON_TARGET: tl.constexpr):
    """The rows' thresholds and parameters t (BLOCK,) of the transform, or zeros that nothing reads."""
    hard = tl.zeros(row.shape, tl.float32)
    param = tl.zeros(row.shape, tl.float32)
    if NON_TARGET != IDENTITY:
        hard = tl.load(threshold + row, mask=inside, other=0.0)
        param = tl.load(t + row, mask=inside, other=0.0)
    return hard, param


@triton.jit
def store_tile(matrix, stride, first, count, first_dim, value,
               DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COVER: tl.constexpr, SUB: tl.constexpr = 1):  # fmt: skip
    """The reverse of :func:`load_tile` through pointers, in the matrix's dtype."""
    first, row = centers_of(first, BLOCK, SUB)
    dim = first_dim + tl.arange(0, WIDTH)
    at = matrix + wide(first) * stride + row[:, None] * stride + dim[None, :]
    inside = row[:, None] < count - first
    if DIM % COVER != 0:
        inside &= dim[None, :] < DIM
    tl.store(at, narrow(value, matrix.dtype.element_ty), mask=inside)


@triton.jit
def halves(a):
    """The upper and the lower half of the rows of ``a``: what is turned around and stored piece by piece needs less scratch memory and
    fewer registers."""
    return tl.split(tl.permute(tl.reshape(a, (2, a.shape[0] // 2, a.shape[1])), (1, 2, 0)))


@triton.jit
def fold_sum(a):
    """(tall / 2, BLOCK) from a (tall, BLOCK) tile: places 8 apart added up, which lie in one thread where tensor cores made the tile.

    A loop keeps its running sums so and adds across threads only once, at its end.
    """
    return tl.reshape(tl.sum(tl.reshape(a, (a.shape[0] // 16, 2, 8, a.shape[1])), 1), (a.shape[0] // 2, a.shape[1]))


@triton.jit
def fold_max(a):
    """As :func:`fold_sum`, the largest."""
    return tl.reshape(tl.max(tl.reshape(a, (a.shape[0] // 16, 2, 8, a.shape[1])), 1), (a.shape[0] // 2, a.shape[1]))


@triton.jit
def load_labels(labels, row, inside):
    """Labels (BLOCK,) int32, -1 for those that are no class index: an int64 beyond int32 must not wrap into one."""
    label = tl.load(labels + row, mask=inside, other=-1)
    return tl.where((label >= 0) & (label <= 2147483647), label, -1).to(tl.int32)


def take_keys(namespace: dict[str, Any]) -> None:
    """Take Triton's key of each of a module's functions, in the order of their definition. Triton leaves the constants of a called function
    out of the caller's key where the former's key has not been taken before, and would find nothing in its cache when kernels are compiled
    in another order."""
    for one in list(namespace.values()):
        getattr(one, "cache_key", None)


take_keys(globals())
