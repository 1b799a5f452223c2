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

    def __init__(self, backend: str, variant: str = "", workspace_mb: float | None = None):
        """``workspace_mb``: None for what a user gets who does not say."""
        self.backend, self.variant = backend, variant
        self.workspace_mb = FUSED[backend].workspace_mb if workspace_mb is None else workspace_mb
        self.name = f"marginkernels-{backend}{variant}"
        kept = f"; up to {self.workspace_mb:,.0f} MB kept between the passes" if self.workspace_mb else ""
        self.note = FUSED[backend].note + kept
        self.device_types = FUSED[backend].device_types

    def unavailable(self, device: str) -> str | None:
        return super().unavailable(device) or FUSED[self.backend].unavailable()

    def refuses(self, case: Case, device: str) -> str | None:
        backend, dtype = FUSED[self.backend], DTYPES[case.dtype]
        reason = super().refuses(case, device) or backend.refuses(device, dtype, torch.float32, case.D)
        if reason is None and self.variant and self.expected_bytes(case) == self._kept(case, backend.workspace_mb):
            reason = "keeps between the passes what it does by default"
        return reason

    def expected_bytes(self, case: Case) -> int:
        """What it keeps between the passes; beside that nothing grows with N x C."""
        return self._kept(case, self.workspace_mb)

    def _kept(self, case: Case, workspace_mb: float) -> int:
        limit = int(workspace_mb * 2**20)
        return FUSED[self.backend].workspace_bytes(case.N, case.C, DTYPES[case.dtype], limit) if limit else 0

    def build(self, case: Case, w: Tensor) -> Work:
        margin = copy.deepcopy(HEADS[case.head].margin())

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            return mk.margin_cross_entropy(x, w, labels, margin=margin, backend=self.backend, workspace_mb=self.workspace_mb)

        return Work(loss, w)


def ours() -> list[Provider]:
    """Each backend as it comes, with a large workspace, and, where one keeps something by default, without."""
    without = [Ours(name, "-recompute", 0.0) for name, backend in FUSED.items() if backend.workspace_mb]
    return [Ours(name, variant, mb) for name in FUSED for variant, mb in (("", None), ("+workspace", 8192.0))] + without
