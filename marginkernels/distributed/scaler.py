"""Gradient scaling where each rank sees only its own classes' gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose verdict on infinite gradients is that of all ranks, so that all skip a step or none does.

    Args:
        device: as there.
        process_group: the head's; ``None`` is all ranks.
        **options: as there.
    """

    def __init__(self, device: str = "cuda", *, process_group: dist.ProcessGroup | None = None, **options):
        super().__init__(device, **options)
        self.process_group = process_group

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        # A rank may hold no gradient at all; it still has to hear of the others'.
        verdict = torch.stack([v.to(found_inf.device) for v in found.values()] or [found_inf]).amax(0)
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=self.process_group)
        for v in found.values():
            v.copy_(verdict)
        return found or {found_inf.device: verdict}
