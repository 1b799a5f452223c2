"""Tile shapes by what a loop carries, depth, dtype and architecture.

Reached by compiling candidates for each architecture and reading registers, stack and shared memory (``python -m benchmarks resources``);
none has been timed, since none has run on a GPU. What limits them on sm_90, in 16-bit at D = 512, by count:

- A step of 64 keys and 64 queries is 2048 cycles of the matrix unit. Its first product takes 64x32x16 instructions, which read 3 KB of
  shared memory for 16 cycles of work: at 128 bytes a cycle that is 24, so it runs at two thirds. The second takes 64x64x16, balanced.
  Between them lie some 400 cycles of exponentials that nothing overlaps, since both warpgroups work on the same step.
- The accumulator is half of the registers, 128 of 255: twice the queries would spill, and half of them halve the work for each byte of
  keys that comes from L2.
- 205 KB of shared memory, one block of queries and two of keys: one program to a processor.

What the loop carries beyond plain logits (a running maximum, a hard form, a bias) costs a register for each of a thread's places in the
tile, hence the narrower query blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: The widest embedding that there are tiles for.
MAX_DIM = 1024
#: Shared memory a program may have, in bytes. The others have no more than the first.
SHARED = {"sm_86": 101376, "sm_80": 166912, "sm_90": 232448, "sm_100": 232448}


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut.

    Attributes:
        queries: rows (row pass) or classes (class pass) that a program keeps.
        keys: classes or rows that it takes at a time.
        depth: columns of D in one product for the similarities; at least D means that the query block stays on the chip.
        width: columns of u or dw that one program accumulates; D / width programs then repeat the similarities.
        warps, stages: see Triton.
    """

    queries: int
    keys: int
    depth: int
    width: int
    warps: int = 8
    stages: int = 2


#: Widest D -> queries and stages, where products are 16-bit: for plain logits, busy, with a running maximum, with both.
LARGE = {64: ((128, 64, 64, 64), 3), 128: ((128, 64, 64, 32), 3), 256: ((64, 64, 32, 32), 3), 512: ((64, 32, 32, 16), 2)}
SMALL = {64: ((64, 32, 32, 32), 3), 128: ((64, 32, 32, 32), 3), 256: ((32, 32, 32, 16), 2), 512: ((32, 32, 16, 16), 2)}


def power_of_two(dim: int, least: int = 32) -> int:
    """The power of two, at least ``least``, that holds ``dim`` columns."""
    return max(least, 1 << (dim - 1).bit_length())


def tile(dim: int, dtype: torch.dtype, arch: str, *, accumulates: bool, online: bool = False, busy: bool = False) -> Tile:
    """The tile of a row pass or class pass kernel.

    Args:
        dim: D.
        dtype: of the products.
        arch: ``"sm_90"`` and the like, or ``"interpreter"``.
        accumulates: whether u or dw is wanted.
        online: whether the loop carries a running maximum.
        busy: whether it carries a hard form, a bias, or sums beyond one.
    """
    d = power_of_two(dim, 64)
    large = SHARED.get(arch, 0) >= SHARED["sm_90"]
    if arch == "interpreter":  # every program costs the same there; narrow columns take small tests through what large D does
        return Tile(64, 128, 64, 64, 1, 1)
    if dtype == torch.float32:  # float32 precision: no matrix unit, and operands in registers
        return Tile(32, 64, 32, min(d, 128) if accumulates and large else 64)
    if not accumulates:
        return Tile(128, 64 if online or busy else 128, 64, d, stages=3) if large else Tile(64, 32, 64, d)
    if d > 512:  # the similarities in steps of D, the accumulator in two slices
        return Tile(16 if online and busy else 32, 64, 128, 512) if large else Tile(16, 32, 128, 512)
    queries, stages = (LARGE if large else SMALL)[d]
    if d == 512 and SHARED.get(arch, 0) < SHARED["sm_80"]:
        stages = 1
    return Tile(queries[2 * online + busy], 64 if large else 32, d, d, stages=stages)


def kept_tile(dim: int, dtype: torch.dtype, arch: str) -> Tile:
    """The tile of the class pass where the row pass kept the weights: all of D at once, for the Jacobian's sake."""
    d = power_of_two(dim, 64)
    if arch == "interpreter":
        return Tile(32, 64, d, d, 1, 1)
    return Tile(32, 32, d, d) if dtype != torch.float32 else Tile(16, 16, d, d)
