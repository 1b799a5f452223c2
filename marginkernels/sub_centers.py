"""What several centers a class have learned: which of them is dominant, and which rows lie far from it (Deng et al., ECCV 2020).

With K centers a class, most rows of an identity gather at one of them, and mislabeled ones at the others. Once that has been learned,
the rows far from the dominant center are dropped, and so are the other centers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .core.numerics import target_centers, target_rows, unit_rows

#: Beyond it a row counts as mislabeled: the paper's 75 degrees.
FAR = math.radians(75.0)


@dataclass(frozen=True)
class Outliers:
    """What :meth:`marginkernels.MarginHead.outliers` finds.

    Attributes:
        far: (N,) bool, whether the row lies beyond the angle from the dominant center of its class; False for ignored rows.
        angle: (N,) float64 radians, from the dominant center of the row's class; NaN for ignored rows.
        dominant: (C,) int64, the sub-center that most rows of the class have, the first of equals.
        share: (C,) float64, how many of the rows of the class have it; NaN where there are none.
            Of a sharded head the last two are of this rank's classes.
    """

    far: Tensor
    angle: Tensor
    dominant: Tensor
    share: Tensor


def counted(x: Tensor, w: Tensor, labels: Tensor, sub_centers: int, normalize: bool) -> Tensor:
    """(C, K) int64 how many rows of ``x`` (N, D) are nearest to each sub-center of their class, in ``w`` (C K, D).

    Args:
        labels: (N,) in [0, C); other rows do not count.
        normalize: whether the similarity uses w/|w|.
    """
    found = torch.zeros(w.shape[0] + 1, dtype=torch.int64, device=w.device)
    rows = target_rows(x, w, labels, sub_centers, normalize)
    return found.index_add_(0, torch.where(rows < 0, w.shape[0], rows), torch.ones_like(rows))[:-1].view(-1, sub_centers)


def angles(x: Tensor, w: Tensor, labels: Tensor, dominant: Tensor) -> Tensor:
    """(N,) float64 angle between each row of ``x`` (N, D) and the dominant center of its class, 0 where ``labels`` (N,) is no class.

    Args:
        w: (C K, D).
        dominant: (C,) the sub-center of each class.
    """
    classes = dominant.shape[0]
    here = (labels >= 0) & (labels < classes)
    if classes == 0:
        return torch.zeros_like(labels, dtype=torch.float64)
    label = torch.where(here, labels, 0)
    center = target_centers(w, label * (w.shape[0] // classes) + dominant[label])
    cos = (unit_rows(x)[0] * unit_rows(center)[0]).sum(1).clamp(-1, 1)
    return torch.where(here, torch.acos(cos), 0.0)
