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


def row_tile(dim: int, x: torch.dtype, w: torch.dtype, need_u: bool, arch: str) -> Tile:
    d = power_of_two(dim)
    if arch == "interpreter":
        return Tile(16, 64, 64 if dim > 64 else d, 64 if dim > 64 else d, 1, 1)
    if x == torch.float32:
        return Tile(64, 64, 32, min(d, 256), 8, 2)
    if not need_u:
        return Tile(128, 128, 64, d, 8, 3)
    if d > 512:
        return Tile(64, 32, 128, 512, 8, 2)
    return Tile(64, 32, d, d, 8, 2)


def class_tile(dim: int, x: torch.dtype, w: torch.dtype, need_w: bool, arch: str) -> Tile:
    d = power_of_two(dim)
    if arch == "interpreter":
        return Tile(64, 16, 64 if dim > 64 else d, 64 if dim > 64 else d, 1, 1)
    if x == torch.float32:
        return Tile(64, 64, 32, min(d, 256), 8, 2)
    if not need_w:
        return Tile(128, 128, 64, d, 8, 3)
    if d > 512:
        return Tile(64, 32, 128, 512, 8, 2)
    return Tile(64, 32, d, d, 8, 2)
