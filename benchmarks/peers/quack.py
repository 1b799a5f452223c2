"""QuACK's chunked linear cross-entropy (Hopper and later)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work, unit_sides

CHUNK = 4096


class Quack(Provider):
    name = "quack"
    note = f"chunked_linear_cross_entropy, {CHUNK} rows a chunk"
    package = "quack-kernels"
    heads = ("normface",)
    device_types = ("cuda",)
    dtypes = ("bf16",)
    logit_copies, weight_copies = 0.5, 4.0

    def unavailable_reason(self, device: str) -> str | None:
        reason = super().unavailable_reason(device)
        if reason is None and torch.cuda.get_device_capability()[0] < 9:
            reason = "needs a GPU of compute capability 9.0 or later"
        return reason

    def unsupported_reason(self, case: Case, device: str) -> str | None:
        if case.N % 8 or case.D % 8 or case.C % 8:
            return "needs N, D and C divisible by 8"
        return super().unsupported_reason(case, device)

    def build(self, case: Case, w: Tensor) -> Work:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            x_unit, w_unit = unit_sides(x, w, DTYPES[case.dtype])
            return chunked_linear_cross_entropy(SCALE * x_unit, w_unit, labels, chunk_size=CHUNK)

        return Work(loss, w)
