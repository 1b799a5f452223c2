"""Margins that follow the norm of the embedding, which these papers take for the quality of the image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .angles import added
from .angular import checked_beyond_pi, turned
from .base import BatchInfo, Margin, NonTargetLSE, _arguments, check_range, setting, settled


class AdaFace(Margin):
    """AdaFace: target ``cos(theta + g) - m (q + 1)`` with ``g = -m q`` and the quality ``q`` in [-1, 1] of the embedding's norm
    (Kim et al., CVPR 2022, section 3.2: the quality z^ and the adaptive margin of g_angle and g_add).

    ``q = clip((|x| - mean) / (std + 1e-3) h, -1, 1)``, with ``|x|`` clipped to [1e-3, 100]. q = -1 is ArcFace, 0 is CosFace with m, and
    at 1 the angle's margin is -m. ``theta + g`` is kept within [0, pi]: past an end the target stands still. q is not differentiated.

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

    def __init__(self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, momentum: float = 0.99, *, focal_gamma: float = 0.0):
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


class MagFace(Margin):
    """MagFace: target ``cos(theta + m(a))`` with a margin that grows with the norm ``a = |x|``, and a term ``lambda g(a)`` in the loss that
    rewards long embeddings (Meng et al., CVPR 2021, eq. 3 and the linear m(a) of its section 4.1).

    With a clipped to ``norm_range`` [l_a, u_a] and ``margin_range`` [l_m, u_m]: ``m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)`` and
    ``g(a) = 1/a + a/u_a^2``. The norm is differentiated in both, which is what the method lives on; outside of ``norm_range`` its gradient
    is 0. Each row's loss is its cross-entropy, with smoothing and focal factor, plus ``norm_weight g(a)``.

    Args:
        scale: s > 0.
        norm_range: (l_a, u_a) with 0 < l_a < u_a: of the order of the norms that the backbone gives. Rows outside have no gradient from g.
        margin_range: (l_m, u_m), radians with 0 <= l_m <= u_m < pi.
        norm_weight: lambda >= 0; 35 in the paper, 20 in the published code where nothing is said.
        beyond_pi: what the target is past theta = pi - m(a); see :class:`CombinedMargin`, with M = m(a). The default is that of the
            published code; the paper has none.
        focal_gamma: see :class:`Margin`.
    """

    _fixed_scale = True
    margin_range: tuple[float, float] = setting("margin_range", "(l_m, u_m) in radians; assigning is :meth:`set_margin`.")

    def __init__(
        self,
        scale: float = 64.0,
        norm_range: tuple[float, float] = (10.0, 110.0),
        margin_range: tuple[float, float] = (0.45, 0.8),
        norm_weight: float = 35.0,
        beyond_pi: str = "easy",
        *,
        focal_gamma: float = 0.0,
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        low, high = _pair("norm_range", norm_range)
        low = check_range("norm_range", low, 0.0, open_low=True)
        high = check_range("norm_range", high, low, open_low=True)
        self.norm_range = low, high
        self.margin_range = margin_range
        self.norm_weight = check_range("norm_weight", norm_weight, 0.0)
        self.beyond_pi = checked_beyond_pi(beyond_pi)
        self._hold()

    def _checked(self, name: str, value: Any) -> tuple[float, float]:
        low, high = _pair("margin_range", value)
        low = check_range("margin_range", low, 0.0, math.nextafter(math.pi, 0), unit="radians")
        return low, check_range("margin_range", high, low, math.nextafter(math.pi, 0), unit="radians")

    def _numbers(self) -> Iterable[float]:
        (low, high), (shortest, longest) = self.margin_range, self.norm_range
        return low, (high - low) / (longest - shortest)

    def set_margin(self, low: Any, high: float | None = None) -> None:
        """Change l_m and u_m, as two numbers or one pair; see :meth:`Margin.set_margin`."""
        self._change(margin_range=low if high is None else (low, high))

    def _clipped(self, batch: BatchInfo) -> Tensor:
        return batch.norm.clamp(*self.norm_range)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        low, rate = self._read(cos)
        margin = low + rate * (self._clipped(batch).to(cos.dtype) - self.norm_range[0])
        return turned(cos, margin, self.beyond_pi)

    def regularizer(self, batch: BatchInfo) -> Tensor:
        norm = self._clipped(batch)
        return self.norm_weight * (1 / norm + norm / self.norm_range[1] ** 2)

    def extra_repr(self) -> str:
        shown = ("scale", "norm_range", "margin_range", "norm_weight", "beyond_pi", "focal_gamma")
        return _arguments({name: getattr(self, name) for name in shown})


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of numbers (low, high), got {value!r}")
    return value[0], value[1]
