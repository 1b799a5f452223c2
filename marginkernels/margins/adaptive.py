"""Margins that follow the training: a scale from batch statistics, and harder weights for hard non-target classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import forms
from .angles import added
from .base import Margin, Rows, check_range, settled


class AdaCos(Margin):
    """AdaCos: ``z_j = s cos(theta_j)`` with a scale from the batch (Zhang et al., CVPR 2019).

    Fixed: ``s = sqrt(2) ln(C - 1)`` (eq. 9). Dynamic, each training step (eq. 15 to 17):
    ``s_t = ln B_avg / cos(min(pi/4, theta_med))``, where ``B_avg`` is the batch mean of ``sum_{j != y} exp(s_{t-1} c_j)`` under the
    old scale and ``theta_med`` the (lower) median of the target angles; the new scale serves the same step. ``ln B_avg`` is taken as the
    log-mean-exp of the rows' non-target log-sum-exps, so it does not overflow. A step whose result is not a positive number (an
    empty batch; two classes far apart) keeps the old scale.

    Args:
        num_classes: C >= 3.
        dynamic: follow the batch; ``False`` keeps the fixed scale.
        focal_gamma: see :class:`Margin`.

    The scale is the float64 buffer ``s`` (1,); it stands still in eval mode.
    """

    def __init__(self, num_classes: int, dynamic: bool = True, *, focal_gamma: float = 0.0):
        super().__init__(None, focal_gamma=focal_gamma)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 3:
            raise ValueError(f"num_classes: expected an integer >= 3, got {num_classes!r}")
        self.num_classes = num_classes
        self.dynamic = bool(dynamic)
        self.register_buffer("s", torch.full((1,), math.sqrt(2.0) * math.log(num_classes - 1), dtype=torch.float64))

    @property
    def scale(self) -> Tensor:
        return self.s

    def row_scale(self, rows: Rows) -> Tensor:
        # A copy: the buffer moves on at the next step, and the backward pass of this one may still be to come.
        return self.s.clone()

    def update(self, cos: Tensor, rows: Rows, non_target_lse) -> None:
        if not self.dynamic:
            return
        count = rows.valid.sum()
        lse = torch.where(rows.valid, non_target_lse(self.s).to(torch.float64), -math.inf)
        log_b = torch.logsumexp(lse, 0) - count.to(torch.float64).log()
        theta = torch.where(rows.valid, torch.acos(cos), math.nan)
        # nanmedian has no value for an empty batch; one NaN row makes it NaN, which keeps the old scale below.
        median = torch.nanmedian(torch.cat([theta, theta.new_full((1,), math.nan)]))
        new = log_b / torch.cos(median.clamp_max(math.pi / 4))
        self.s.copy_(torch.where(torch.isfinite(new) & (new > 0), settled(new), self.s))

    def target(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return cos, torch.ones_like(cos)


class MVSoftmax(Margin):
    """MV-softmax: a margin on the target, and hard non-target classes (``c_j > T``) lifted to ``(1 + t) c_j + t``
    (Wang et al., AAAI 2020, eq. 7).

    Args:
        kind: ``"arc"``, T = cos(theta + m) with m in radians in [0, pi), or ``"am"``, T = cos(theta) - m with m in [0, 2].
        scale: s > 0.
        margin: m.
        t: >= 0; the paper's t is this one plus 1 (its 1.2 is 0.2 here).
        focal_gamma: see :class:`Margin`.
    """

    form = forms.HARD_LINEAR

    def __init__(self, kind: str = "arc", scale: float = 32.0, margin: float = 0.5, t: float = 0.2, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        if kind not in ("arc", "am"):
            raise ValueError(f"kind: expected 'arc' or 'am', got {kind!r}")
        self.kind = kind
        self.margin = check_range("margin", margin, 0.0, math.nextafter(math.pi, 0) if kind == "arc" else 2.0)
        self.t = check_range("t", t, 0.0)

    def target(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.kind == "am":
            return cos - self.margin, torch.ones_like(cos)
        return added(cos, self.margin)

    def threshold(self, cos: Tensor, rows: Rows) -> Tensor:
        return self.target(cos, rows)[0]


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

    form = forms.HARD_QUADRATIC

    def __init__(self, scale: float = 64.0, margin: float = 0.5, momentum: float = 0.99, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        self.margin = check_range("margin", margin, 0.0, math.nextafter(math.pi, 0), unit="radians")
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.register_buffer("t", torch.zeros(1, dtype=torch.float64))

    def update(self, cos: Tensor, rows: Rows, non_target_lse) -> None:
        moved = (1 - self.momentum) * rows.mean(cos) + self.momentum * self.t
        self.t.copy_(torch.where(rows.valid.any(), settled(moved), self.t))

    def target(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        value, slope = added(cos, self.margin)
        inside = cos > -math.cos(self.margin)
        return torch.where(inside, value, cos - self.margin * math.sin(self.margin)), torch.where(inside, slope, 1.0)

    def threshold(self, cos: Tensor, rows: Rows) -> Tensor:
        return added(cos, self.margin)[0]
