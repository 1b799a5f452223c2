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
        """``workspace_mb``: None for the backend's default."""
        self.backend, self.variant = backend, variant
        self.workspace_mb = FUSED[backend].workspace_mb if workspace_mb is None else workspace_mb
        self.name = f"marginkernels-{backend}{variant}"
        saved = f"; up to {self.workspace_mb:,.0f} MB saved between the passes" if self.workspace_mb else ""
        self.note = FUSED[backend].note + saved
        self.device_types = FUSED[backend].device_types

    def unavailable_reason(self, device: str) -> str | None:
        return super().unavailable_reason(device) or FUSED[self.backend].unavailable_reason()

    def unsupported_reason(self, case: Case, device: str) -> str | None:
        backend, dtype = FUSED[self.backend], DTYPES[case.dtype]
        reason = super().unsupported_reason(case, device) or backend.unsupported_reason(device, dtype, torch.float32, case.D)
        if reason is None and self.variant and self.expected_bytes(case) == self._saved(case, backend.workspace_mb):
            reason = "saves the same between the passes as by default"
        return reason

    def expected_bytes(self, case: Case) -> int:
        """What it saves between the passes; nothing else grows with N x C."""
        return self._saved(case, self.workspace_mb)

    def _saved(self, case: Case, workspace_mb: float) -> int:
        limit = int(workspace_mb * 2**20)
        return FUSED[self.backend].workspace_bytes(case.N, case.C, DTYPES[case.dtype], limit) if limit else 0

    def build(self, case: Case, w: Tensor) -> Work:
        margin = copy.deepcopy(HEADS[case.head].margin())

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            return mk.margin_cross_entropy(x, w, labels, margin=margin, backend=self.backend, workspace_mb=self.workspace_mb)

        return Work(loss, w)


def ours() -> list[Provider]:
    """Each backend with its default workspace and with a large one; where the default is not 0, also without one."""
    without = [Ours(name, "-recompute", 0.0) for name, backend in FUSED.items() if backend.workspace_mb]
    return [Ours(name, variant, mb) for name in FUSED for variant, mb in (("", None), ("+workspace", 8192.0))] + without
