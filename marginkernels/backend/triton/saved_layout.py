"""The layout of what the row pass keeps for the class pass; needs no Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Classes, or slots where a class has several centers, are saved in groups of so many: every key block of the row pass, and every chunk of
#: converted centers, divides it.
GROUP = 128
#: What the weights' exponentials were taken against is stored once a row for so many classes; key blocks are multiples of it.
STEP = 32


def row_stride(n: int) -> int:
    """Rows, padded so that loads and stores are wide whatever their number."""
    return math.ceil(n / 16) * 16


def group_bytes(n: int, dtype: torch.dtype) -> int:
    """Of one group: weights in the product's dtype, and what their exponentials were taken against, in float32."""
    return row_stride(n) * (GROUP * dtype.itemsize + GROUP // STEP * 4)


def parts(saved: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (K, row_stride) and bases (K / STEP, row_stride) of ``saved`` (bytes,) uint8."""
    stride = row_stride(n)
    classes = saved.numel() // group_bytes(n, dtype) * GROUP
    weights, bases = classes * stride * dtype.itemsize, classes // STEP * stride * 4
    return saved[:weights].view(dtype).view(-1, stride), saved[weights : weights + bases].view(torch.float32).view(-1, stride)
