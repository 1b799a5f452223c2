"""Gradient scaling for class-parallel heads, where each rank sees only the gradients of its own classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that looks for infinite gradients on all ranks, so that either all ranks skip a step or none does.

    Args:
        device: as in ``torch.amp.GradScaler``.
        process_group: that of the head; ``None`` for all ranks.
        **options: of ``torch.amp.GradScaler``.
    """

    def __init__(self, device: str = "cuda", *, process_group: dist.ProcessGroup | None = None, **options: Any):
        super().__init__(device, **options)
        self.process_group = process_group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        # A rank without any gradient takes part too: it must skip the same steps.
        any_inf = torch.stack([v.to(found_inf.device) for v in found.values()] or [found_inf]).amax(0)
        dist.all_reduce(any_inf, op=dist.ReduceOp.MAX, group=self.process_group)
        for v in found.values():
            v.copy_(any_inf)
        return found or {found_inf.device: any_inf}
