"""The operations that insightface's PartialFC_V2 performs at sample rate 1 on one rank, reimplemented without a process group.

Normalize both sides, multiply in low precision, clamp, take arccos and cos of the whole matrix without gradient, then softmax and its
gradient by hand. The target gradient is therefore that of the unchanged cosine (dT/dcos = 1), and so is the reference it is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work, unit_sides


class _HandCrossEntropy(torch.autograd.Function):
    """Mean of -log p_y with p floored at 1e-30; overwrites ``logits`` (N, C) with the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return -logits.gather(1, labels[:, None]).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(p).scatter_(1, labels[:, None], 1)
        return p.sub_(one_hot).div_(p.shape[0]).mul_(upstream), None


class PartialFC(Provider):
    name = "partialfc-sequence"
    note = "the operations of insightface's PartialFC_V2 at rate 1, one process; target gradient detached, as there"
    heads = ("arcface", "cosface")
    detached_heads = ("arcface",)
    logit_copies, weight_copies = 6.0, 4.3

    def unsupported_reason(self, case: Case, device: str) -> str | None:
        return "always has a margin" if case.head not in self.heads else super().unsupported_reason(case, device)

    def build(self, case: Case, w: Tensor) -> Work:
        def loss(x: Tensor, labels: Tensor) -> Tensor:
            logits = F.linear(*unit_sides(x, w, DTYPES[case.dtype])).float().clamp(-1, 1)
            rows = torch.arange(len(labels), device=labels.device)
            if case.head == "arcface":
                with torch.no_grad():
                    shifted = logits[rows, labels].arccos_() + 0.5
                    logits.arccos_()
                    logits[rows, labels] = shifted
                    logits.cos_()
                logits = logits * SCALE
            else:
                logits[rows, labels] = logits[rows, labels] - 0.35
                logits = logits * SCALE
            return _HandCrossEntropy.apply(logits, labels)

        return Work(loss, w)
