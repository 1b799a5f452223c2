"""Margins that follow the norm of the embedding, which these papers take for the quality of the image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .angles import added
from .base import BatchInfo, Margin, NonTargetLSE, check_range, setting, settled


class AdaFace(Margin):
    """AdaFace: target ``cos(theta + g) - m (q + 1)`` with ``g = -m q`` and the quality ``q`` in [-1, 1] of the embedding's norm
    (Kim et al., CVPR 2022, section 3.2: the quality z^ and the adaptive margin of g_angle and g_add).

    ``q = clip((|x| - mean) / (std + 1e-3) h, -1, 1)``, with |x| clipped to [1e-3, 100]. q = -1 is ArcFace, 0 is CosFace with m, and at 1
    the angle's margin is -m. ``theta + g`` is kept within [0, pi]: past an end the target stands still. q is not differentiated.

    Args:
        scale: s > 0.
        margin: m, radians in [0, pi).
        h: how fast the margin follows the norm, > 0: q reaches an end at std / h from the mean.
        momentum: of the running statistics, in [0, 1]: each training step ``mean <- (1 - momentum) batch mean + momentum mean``, and
            alike the standard deviation (with n - 1), before they are used. The published code writes t_alpha for 1 - momentum.
        focal_gamma: see :class:`Margin`.

    ``norm_mean`` and ``norm_std`` are float64 buffers (1,) that start at 20 and 100; they stand still in eval mode. A batch of one row
    moves the mean alone. With several ranks the batch is that of all of them.
    """

    norm_mean: Tensor
    norm_std: Tensor
    NORMS = (1e-3, 100.0)  #: what the norms are clipped to
    EPS = 1e-3  #: added to the standard deviation

    _state_names = ("norm_mean", "norm_std")
    _fixed_scale = True
    margin: float = setting("margin", "m in radians, a float; assigning is :meth:`set_margin`.")

    def __init__(
        self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, momentum: float = 0.99, *, focal_gamma: float = 0.0
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        self.margin = margin
        self.h = check_range("h", h, 0.0, open_low=True)
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        for name in self._state_names:
            self.register_buffer(name, torch.empty(1, dtype=torch.float64))
        self.reset_parameters()
        self._hold()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, math.nextafter(math.pi, 0), unit="radians")

    def _numbers(self) -> Iterable[float]:
        return (self.margin,)

    def set_margin(self, margin: float) -> None:
        """Change m; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def reset_parameters(self) -> None:
        self.norm_mean.fill_(20.0)
        self.norm_std.fill_(100.0)

    def _norm(self, batch: BatchInfo) -> Tensor:
        return batch.norm.detach().clamp(*self.NORMS)

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        norm, count = self._norm(batch), batch.valid.sum()
        mean = batch.mean(norm)
        variance = torch.where(batch.valid, (norm - mean).square(), 0).sum() / (count - 1).clamp_min(1)
        for state, new, least in ((self.norm_mean, mean, 1), (self.norm_std, variance.sqrt(), 2)):
            moved = settled((1 - self.momentum) * new + self.momentum * state)
            state.copy_(torch.where(count >= least, moved, state))

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        (margin,) = self._read(cos)
        quality = ((self._norm(batch) - self.norm_mean) / (self.norm_std + self.EPS) * self.h).clamp(-1, 1).to(cos.dtype)
        turn = -margin * quality
        cos_turn = turn.cos()
        value, slope = added(cos, cos_turn, turn.sin())
        before, past = (turn < 0) & (cos > cos_turn), (turn > 0) & (cos < -cos_turn)  # theta + g < 0, > pi
        value = torch.where(before, 1.0, torch.where(past, -1.0, value))
        return value - margin * (quality + 1), torch.where(before | past, 0.0, slope)
