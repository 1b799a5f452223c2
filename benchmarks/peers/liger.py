"""Liger's fused linear cross-entropy, with the gradient of the class centers accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work, unit_sides


class Liger(Provider):
    name = "liger"
    note = "liger_fused_linear_cross_entropy, accum_dtype=float32"
    package = "liger-kernel"
    heads = ("normface",)
    device_types = ("cuda",)
    weight_copies = 4.0

    def build(self, case: Case, w: Tensor) -> Work:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            x_unit, w_unit = unit_sides(x, w, DTYPES[case.dtype])
            return liger_fused_linear_cross_entropy(SCALE * x_unit, w_unit, labels, accum_dtype=torch.float32)

        return Work(loss, w)
