"""The fused backends of this package."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import marginkernels as mk
from marginkernels.backend import FUSED

from ..cases import DTYPES, Case
from ..heads import HEADS
from .base import Provider, Work


class Ours(Provider):
    ours = True

    def __init__(self, backend: str, workspace_mb: float = 0.0):
        self.backend = backend
        self.workspace_mb = workspace_mb
        self.name = f"marginkernels-{backend}" + ("+workspace" if workspace_mb else "")
        self.note = FUSED[backend].note + (f"; up to {workspace_mb:,.0f} MB kept between the passes" if workspace_mb else "")
        self.device_types = FUSED[backend].device_types

    def unavailable(self, device: str) -> str | None:
        return super().unavailable(device) or FUSED[self.backend].unavailable()

    def refuses(self, case: Case, device: str) -> str | None:
        backend, dtype, limit = FUSED[self.backend], DTYPES[case.dtype], int(self.workspace_mb * 2**20)
        reason = super().refuses(case, device) or backend.refuses(device, dtype, torch.float32, case.D)
        if reason is None and limit and not backend.workspace_bytes(case.N, case.C, dtype, limit):
            reason = "keeps nothing between the passes"
        return reason

    def expected_bytes(self, case: Case) -> int:
        """What it keeps between the passes; beside that nothing grows with N x C."""
        limit = int(self.workspace_mb * 2**20)
        return FUSED[self.backend].workspace_bytes(case.N, case.C, DTYPES[case.dtype], limit) if limit else 0

    def build(self, case: Case, w: Tensor) -> Work:
        margin = copy.deepcopy(HEADS[case.head].margin())

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            return mk.margin_cross_entropy(x, w, labels, margin=margin, backend=self.backend, workspace_mb=self.workspace_mb)

        return Work(loss, w)


def ours() -> list[Provider]:
    return [Ours(name, mb) for name in FUSED for mb in (0.0, 8192.0)]
