"""Margins whose scale follows the statistics of the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.validation import integer
from .base import BatchInfo, Margin, NonTargetLSE, settled


class AdaCos(Margin):
    """AdaCos: ``z_j = s cos(theta_j)`` with a scale from the batch (Zhang et al., CVPR 2019).

    Fixed: ``s = sqrt(2) ln(C - 1)`` (eq. 9). Dynamic, each training step (eq. 15 to 17):
    ``s_t = ln B_avg / cos(min(pi/4, theta_med))``, where ``B_avg`` is the batch mean of ``sum_{j != y} exp(s_{t-1} c_j)`` under the
    old scale and ``theta_med`` the (lower) median of the target angles; the new scale serves the same step. ``ln B_avg`` is taken as the
    log-mean-exp of the rows' non-target log-sum-exps, so it does not overflow. A step whose result is not a positive number (an
    empty batch; two classes far apart) keeps the old scale.

    Args:
        num_classes: C >= 3, that of the head.
        dynamic: follow the batch; ``False`` keeps the fixed scale.
        focal_gamma: see :class:`Margin`.

    The scale is the float64 buffer ``s`` (1,); it stands still in eval mode.
    """

    s: Tensor

    _state_names = ("s",)

    def __init__(self, num_classes: int, dynamic: bool = True, *, focal_gamma: float = 0.0):
        super().__init__(None, focal_gamma=focal_gamma)
        self.num_classes = integer("num_classes", num_classes, 3)
        self.dynamic = bool(dynamic)
        self.register_buffer("s", torch.empty(1, dtype=torch.float64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.s.fill_(math.sqrt(2.0) * math.log(self.num_classes - 1))

    def bind(self, num_classes: int) -> None:
        if num_classes != self.num_classes:
            raise ValueError(f"num_classes: expected {num_classes} in AdaCos, as many as the head has, got {self.num_classes}")

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.s

    def row_scale(self, batch: BatchInfo) -> Tensor:
        # A copy: the buffer moves on at the next step, and the backward pass of this one may still be to come.
        return self.s.clone()

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        if not self.dynamic:
            return
        count = batch.valid.sum()
        lse = torch.where(batch.valid, non_target_lse(self.s).to(torch.float64), -math.inf)
        log_b = torch.logsumexp(lse, 0) - count.to(torch.float64).log()
        theta = torch.where(batch.valid, torch.acos(cos), math.nan)
        # nanmedian has no value for an empty batch; one NaN row makes it NaN, which keeps the old scale below.
        median = torch.nanmedian(torch.cat([theta, theta.new_full((1,), math.nan)]))
        new = log_b / torch.cos(median.clamp_max(math.pi / 4))
        self.s.copy_(torch.where(torch.isfinite(new) & (new > 0), settled(new), self.s))

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        return cos, torch.ones_like(cos)
