"""Tile shapes by kernel, depth and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: The widest embedding that the table knows.
MAX_DIM = 1024


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
    warps: int
    stages: int


def power_of_two(dim: int) -> int:
    """The power of two, at least 32, that holds ``dim`` columns."""
    return max(32, 1 << (dim - 1).bit_length())


def row_tile(dim: int, dtype: torch.dtype, need_u: bool, online: bool, busy: bool, arch: str) -> Tile:
    """``online`` and ``busy``: whether the loop carries a running maximum, or more than plain logits (a hard form, a bias, a moment)."""
    d = power_of_two(dim)
    if arch == "interpreter":
        return _interpreted(d)
    if dtype == torch.float32:
        return Tile(64, 64, 32, min(d, 256), 8, 2)
    if not need_u:
        return Tile(128, 64 if online or busy else 128, 64, d, 8, 3)
    if d > 512:
        return Tile(32, 64, 128, 512, 8, 2)
    return Tile(32 if online or busy else 64, 64, d, d, 8, 2)


def class_tile(dim: int, dtype: torch.dtype, need_w: bool, busy: bool, arch: str) -> Tile:
    """``busy``: whether the loop carries more than plain logits (a hard form, a bias, a sum of logits)."""
    d = power_of_two(dim)
    if arch == "interpreter":
        return _interpreted(d)
    if dtype == torch.float32:
        return Tile(64, 64, 32, min(d, 256), 8, 2)
    if not need_w:
        return Tile(128, 64, 64, d, 8, 3)
    if d > 512:
        return Tile(32, 64, 128, 512, 8, 2)
    return Tile(32 if busy else 64, 64, d, d, 8, 2)


def _interpreted(d: int) -> Tile:
    """Under the interpreter every program costs the same; narrow columns, so that small tests take the ways of large D as well."""
    return Tile(64, 128, min(d, 64), min(d, 64), 1, 1)
