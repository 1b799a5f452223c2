"""torch.nn.functional.linear_cross_entropy with its default chunking (PyTorch 2.13 and later)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work, unit_sides


class TorchLinearCrossEntropy(Provider):
    name = "F.linear_cross_entropy"
    note = "chunked over the batch, torch.nn.LinearCrossEntropyOptions() as it comes"
    heads = ("normface",)
    logit_copies, weight_copies = 0.5, 4.0

    def unavailable_reason(self, device: str) -> str | None:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"needs torch >= 2.13, this is {torch.__version__}"
        return super().unavailable_reason(device)

    def build(self, case: Case, w: Tensor) -> Work:
        options = torch.nn.LinearCrossEntropyOptions()

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            x_unit, w_unit = unit_sides(x, w, DTYPES[case.dtype])
            return F.linear_cross_entropy(SCALE * x_unit, w_unit, labels, options=options)

        return Work(loss, w)
