"""Margins that raise the logits of hard non-target classes, those that lie above a threshold of the row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.nontarget import NonTarget
from .angles import added
from .base import BatchInfo, Margin, NonTargetLSE, check_range, setting, settled


class MVSoftmax(Margin):
    """MV-softmax: a margin on the target, and hard non-target classes (``c_j > T``) raised to ``(1 + t) c_j + t``
    (Wang et al., AAAI 2020, eq. 7).

    Args:
        kind: ``"arc"``, T = cos(theta + m) with m in radians in [0, pi), or ``"am"``, T = cos(theta) - m with m in [0, 2].
        scale: s > 0.
        margin: m.
        t: >= 0; the paper's t is this one plus 1 (its 1.2 is 0.2 here).
        focal_gamma: see :class:`Margin`.
    """

    non_target = NonTarget.HARD_LINEAR

    def __init__(self, kind: str = "arc", scale: float = 32.0, margin: float = 0.5, t: float = 0.2, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        if kind not in ("arc", "am"):
            raise ValueError(f"kind: expected 'arc' or 'am', got {kind!r}")
        self.kind = kind
        self.margin = margin
        self.t = check_range("t", t, 0.0)
        self._hold()

    _fixed_scale = True
    margin: float = setting("margin", "m, a float; assigning is :meth:`set_margin`.")

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, math.nextafter(math.pi, 0) if self.kind == "arc" else 2.0)

    def _numbers(self) -> Iterable[float]:
        return self.margin, math.cos(self.margin), math.sin(self.margin)

    def set_margin(self, margin: float) -> None:
        """Change m; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        margin, cos_margin, sin_margin = self._read(cos)
        return (cos - margin, torch.ones_like(cos)) if self.kind == "am" else added(cos, cos_margin, sin_margin)

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        return self.target(cos, batch)[0]


class CurricularFace(Margin):
    """CurricularFace: target ``cos(theta + m)`` with ArcFace's linear fallback past pi, hard non-target classes
    (``c_j > cos(theta_y + m)``, without the fallback) reweighted to ``c_j (t + c_j)`` (Huang et al., CVPR 2020, eq. 5 to 10).

    Args:
        scale: s > 0.
        margin: m, radians in [0, pi).
        momentum: of t, in [0, 1]: each training step ``t <- (1 - momentum) mean(cos(theta_y)) + momentum t``, before t is used.
        focal_gamma: see :class:`Margin`.

    ``t`` is a float64 buffer (1,) that starts at 0; it stands still in eval mode.
    """

    non_target = NonTarget.HARD_QUADRATIC
    t: Tensor

    _state_names = ("t",)

    def __init__(self, scale: float = 64.0, margin: float = 0.5, momentum: float = 0.99, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        self.margin = margin
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.register_buffer("t", torch.zeros(1, dtype=torch.float64))
        self._hold()

    _fixed_scale = True
    margin: float = setting("margin", "m in radians, a float; assigning is :meth:`set_margin`.")

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, math.nextafter(math.pi, 0), unit="radians")

    def _numbers(self) -> Iterable[float]:
        m = self.margin
        return math.cos(m), math.sin(m), -math.cos(m), m * math.sin(m)

    def set_margin(self, margin: float) -> None:
        """Change m; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def reset_parameters(self) -> None:
        self.t.zero_()

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        moved = (1 - self.momentum) * batch.mean(cos) + self.momentum * self.t
        self.t.copy_(torch.where(batch.valid.any(), settled(moved), self.t))

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        cos_margin, sin_margin, end, drop = self._read(cos)
        value, slope = added(cos, cos_margin, sin_margin)
        inside = cos > end
        return torch.where(inside, value, cos - drop), torch.where(inside, slope, 1.0)

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        cos_margin, sin_margin, *_ = self._read(cos)
        return added(cos, cos_margin, sin_margin)[0]
