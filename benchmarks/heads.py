"""The heads that are timed: a margin for this package, and a formula of the target logit for the peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import marginkernels as mk

SCALE = 64.0


@dataclass(frozen=True)
class Head:
    """One head.

    Attributes:
        margin: makes the margin of this package.
        target: target cosines (N,) -> target logits before the scale (N,), in any float dtype.
    """

    name: str
    margin: Callable[[], mk.Margin]
    target: Callable[[Tensor], Tensor]


def _arcface(cos: Tensor, m: float = 0.5) -> Tensor:
    shifted = cos * math.cos(m) - torch.sqrt((1 - cos * cos).clamp_min(1e-12)) * math.sin(m)
    return torch.where(cos > -math.cos(m), shifted, cos - m * math.sin(m))


HEADS = {
    h.name: h
    for h in (
        Head("arcface", lambda: mk.ArcFace(scale=SCALE, margin=0.5), _arcface),
        Head("cosface", lambda: mk.CosFace(scale=SCALE, margin=0.35), lambda cos: cos - 0.35),
        Head("normface", lambda: mk.NormFace(scale=SCALE), lambda cos: cos),
    )
}
