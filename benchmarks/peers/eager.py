"""The head in plain PyTorch, eager and through torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import HEADS, SCALE
from .base import Provider, Work, unit_sides


def eager_loss(head: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, w, labels) -> mean loss: normalize, multiply in ``dtype``, everything else in float32."""
    target = HEADS[head].target

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        x, w = unit_sides(x, w, dtype)
        cos = F.linear(x, w).float()
        if head != "normface":
            column = labels[:, None]
            cos = cos.scatter(1, column, target(cos.gather(1, column)))
        return F.cross_entropy(SCALE * cos, labels)

    return loss


class Eager(Provider):
    name = "eager"
    note = "the head in plain PyTorch"
    logit_copies, weight_copies = 5.0, 4.0

    def build(self, case: Case, w: Tensor) -> Work:
        run = eager_loss(case.head, DTYPES[case.dtype])
        return Work(lambda x, labels: run(x, w, labels), w)


class CompiledEager(Provider):
    name = "torch.compile"
    note = "the same function through torch.compile (static shapes, default mode)"
    logit_copies, weight_copies = 3.0, 1.5

    def unavailable_reason(self, device: str) -> str | None:
        if device == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            return "needs a C++ compiler"
        return super().unavailable_reason(device)

    def build(self, case: Case, w: Tensor) -> Work:
        run = torch.compile(eager_loss(case.head, DTYPES[case.dtype]), dynamic=False)
        return Work(lambda x, labels: run(x, w, labels), w)
