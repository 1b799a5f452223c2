"""Margins on the angle or its cosine: additive, multiplicative, and both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .angles import added, angle, detached, psi
from .base import BatchInfo, Margin, NonTargetLSE, check_range, setting
from .filtered import Filtered
from .per_class import PerClass

BEYOND_PI = ("linear", "none", "easy", "continuous", "clip")
GRADIENTS = ("exact", "detached")


def checked_beyond_pi(rule: object) -> str:
    """``rule``, or a ``ValueError`` where it is none of ``BEYOND_PI``."""
    if not isinstance(rule, str) or rule not in BEYOND_PI:
        raise ValueError(f"beyond_pi: expected one of {BEYOND_PI}, got {rule!r}")
    return rule


def checked_gradient(gradient: object) -> str:
    """``gradient``, or a ``ValueError`` where it is none of ``GRADIENTS``."""
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {GRADIENTS}, got {gradient!r}")
    return gradient


def beyond(cos: Tensor, value: Tensor, slope: Tensor, rule: str, end: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` and ``slope`` of a target, and what takes their place where ``cos`` is not above ``end``: see :class:`CombinedMargin` for
    the rules. ``end`` and ``drop`` are of shape () or (N,)."""
    if rule == "easy":
        inside = cos > 0
        value, slope = torch.where(inside, value, cos), torch.where(inside, slope, 1.0)
    elif rule != "none":
        inside = cos > end
        if rule == "clip":
            past, past_slope = torch.full_like(cos, -1.0), 0.0
        else:
            past, past_slope = cos - drop, 1.0
        value, slope = torch.where(inside, value, past), torch.where(inside, slope, past_slope)
    return value, slope


def turned(cos: Tensor, margin: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """``cos(theta + margin)`` with a margin for each row (N,), in radians in [0, pi), and its slope in cos; ``rule`` as ``beyond_pi``. The
    value may be differentiated in ``margin``."""
    cos_margin, sin_margin = margin.cos(), margin.sin()
    value, slope = added(cos, cos_margin, sin_margin)
    end = torch.where(margin > 0, -cos_margin.detach(), -math.inf)
    return beyond(cos, value, slope, rule, end, margin * sin_margin if rule == "linear" else 1 - cos_margin)


class CosFace(PerClass, Filtered):
    """CosFace / AM-softmax: target ``cos(theta) - m`` (Wang et al., CVPR 2018, eq. 4).

    Args:
        scale: s > 0.
        margin: m in [0, 2], a cosine; or a tensor (C,) with one for each class, see :func:`margins_from_counts`.
        filter_above: None, or the cosine in [-1, 1] above which that of a non-target class counts as 0: such a class is taken for the
            row's own under another label (insightface's inter-class filtering, which has 0.4).
        focal_gamma: see :class:`Margin`.
    """

    _fixed_scale = True
    _shown = ("scale", "margin", "filter_above", "focal_gamma")

    def __init__(
        self,
        scale: float = 64.0,
        margin: float | Tensor = 0.35,
        *,
        filter_above: float | None = None,
        focal_gamma: float = 0.0,
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        self._filter(filter_above)
        self._change(margin=self._taken(margin))
        self._hold()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, 2.0)

    def _numbers(self) -> Iterable[float]:
        return (self.__dict__["margin"],)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        margin = self._of_rows(batch, cos) if self.margins is not None else self._read(cos)[0]
        return cos - margin, torch.ones_like(cos)


class CombinedMargin(Filtered):
    """Combined margin: target ``cos(m1 theta + m2) - m3`` (Deng et al., CVPR 2019, eq. 4).

    Past the angle theta* where ``m1 theta + m2`` reaches pi the cosine would rise again. With ``M = pi - theta*`` (M = m2 at m1 = 1)
    the target there is, by ``beyond_pi`` and before m3 is taken off:

    - ``"linear"``: ``cos(theta) - M sin(M)``, the th/mm fallback of the published code; jumps by ``1 - cos M - M sin M`` at theta*
      (-0.117 at M = 0.5). Falling with theta while that jump is negative, M < 2.33, so for larger m1 choose one of the next two.
    - ``"continuous"``: ``cos(theta) - (1 - cos M)``, the same line without the jump; falling for every m1.
    - ``"clip"``: ``-1``, the angle clipped at pi, with zero slope; never rising for every m1.
    - ``"easy"``: no margin (and no m1) where ``cos(theta) <= 0``, the margin elsewhere: easy_margin of the published code.
    - ``"none"``: ``cos(m1 theta + m2)`` as it stands, rising again past theta*.

    The monotone psi of A-softmax is :class:`SphereFace`'s; here m1 != 1 uses the rules above.

    Args:
        scale: s > 0.
        m1: multiplies the angle, > 0.
        m2: added to the angle, radians in [0, pi).
        m3: taken off the cosine, in [0, 2].
        beyond_pi: one of the five above.
        gradient: ``"exact"``, or ``"detached"`` for ``dT/dcos = 1`` (insightface's arcface_torch since December 2022).
        filter_above: see :class:`CosFace`.
        focal_gamma: see :class:`Margin`.
    """

    def __init__(
        self,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        beyond_pi: str = "linear",
        gradient: str = "exact",
        *,
        filter_above: float | None = None,
        focal_gamma: float = 0.0,
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        self._filter(filter_above)
        self._change(m1=m1, m2=m2, m3=m3)
        self.beyond_pi = checked_beyond_pi(beyond_pi)
        self.gradient = checked_gradient(gradient)
        self._hold()

    _fixed_scale = True
    _m2_name = "m2"
    m1: float = setting("m1", "m1, a float; assigning is :meth:`set_margin`.")
    m2: float = setting("m2", "m2 in radians, a float; assigning is :meth:`set_margin`.")
    m3: float = setting("m3", "m3, a float; assigning is :meth:`set_margin`.")

    def _checked(self, name: str, value: Any) -> float:
        if name == "m1":
            return check_range("m1", value, 0.0, open_low=True)
        if name == "m2":
            return check_range(self._m2_name, value, 0.0, math.nextafter(math.pi, 0), unit="radians")
        return check_range("m3", value, 0.0, 2.0)

    def _numbers(self) -> Iterable[float]:
        # M = pi - theta*, where m1 theta* + m2 = pi; at or below 0 the end is never reached.
        reach = math.pi - (math.pi - self.m2) / self.m1
        end = -math.cos(reach) if reach > 0 else -math.inf
        drop = reach * math.sin(reach) if self.beyond_pi == "linear" else 1 - math.cos(reach)
        return self.m1, self.m2, math.cos(self.m2), math.sin(self.m2), self.m3, end, drop

    def set_margin(self, *values: Any, m1: float | None = None, m2: float | None = None, m3: float | None = None) -> None:
        """``set_margin(m1, m2, m3)``, all three, also as one tuple; or some of them by name. See :meth:`Margin.set_margin`."""
        named = {name: value for name, value in (("m1", m1), ("m2", m2), ("m3", m3)) if value is not None}
        given = values[0] if len(values) == 1 and isinstance(values[0], tuple | list) else values
        if (given and (named or len(given) != 3)) or not (given or named):
            raise TypeError(f"set_margin: expected m1, m2 and m3, or some of them by name, got {values!r} and {named!r}")
        self._change(**(dict(zip(("m1", "m2", "m3"), given, strict=True)) if given else named))

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        m1, m2, cos_m2, sin_m2, m3, end, drop = self._read(cos)
        value, slope = beyond(cos, *self._shifted(cos, m1, m2, cos_m2, sin_m2), self.beyond_pi, end, drop)
        return self._passed(cos, value - m3, slope)

    def _passed(self, cos: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope as ``gradient`` says."""
        return detached(cos, value) if self.gradient == "detached" else (value, slope)

    def _shifted(self, cos: Tensor, m1: Tensor, m2: Tensor, cos_m2: Tensor, sin_m2: Tensor) -> tuple[Tensor, Tensor]:
        """cos(m1 theta + m2) and its slope in cos(theta)."""
        theta, dtheta = angle(cos)
        phi = m1 * theta + m2
        # Where m1 = 1 no angle is needed: better conditioned. Both are computed, so that m1 may pass 1 without compiling again.
        plain, plain_slope = added(cos, cos_m2, sin_m2)
        return torch.where(m1 == 1, plain, phi.cos()), torch.where(m1 == 1, plain_slope, -m1 * phi.sin() * dtheta)


class ArcFace(PerClass, CombinedMargin):  # type: ignore[misc]  # set_margin takes m alone
    """ArcFace: target ``cos(theta + m)`` (Deng et al., CVPR 2019, eq. 3).

    Args:
        scale: s > 0.
        margin: m, radians in [0, pi) (0.5 is 28.6 degrees); or a tensor (C,) with one for each class, see :func:`margins_from_counts`.
        beyond_pi: what the target is past theta = pi - m; see :class:`CombinedMargin`, with M = m.
        gradient: ``"exact"`` or ``"detached"``; see :class:`CombinedMargin`.
        filter_above: see :class:`CosFace`.
        focal_gamma: see :class:`Margin`.
    """

    _m2_name = "margin"
    _setting = "m2"
    _shown = ("scale", "margin", "beyond_pi", "gradient", "filter_above", "focal_gamma")

    def __init__(
        self,
        scale: float = 64.0,
        margin: float | Tensor = 0.5,
        beyond_pi: str = "linear",
        gradient: str = "exact",
        *,
        filter_above: float | None = None,
        focal_gamma: float = 0.0,
    ):
        CombinedMargin.__init__(self, scale, 1.0, 0.0, 0.0, beyond_pi, gradient, filter_above=filter_above, focal_gamma=focal_gamma)
        self._change(m2=self._taken(margin))

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        if self.margins is None:
            return super().target(cos, batch)
        return self._passed(cos, *turned(cos, self._of_rows(batch, cos), self.beyond_pi))

    def _shifted(self, cos: Tensor, m1: Tensor, m2: Tensor, cos_m2: Tensor, sin_m2: Tensor) -> tuple[Tensor, Tensor]:
        return added(cos, cos_m2, sin_m2)


@dataclass(frozen=True)
class Annealing:
    """A-softmax's annealing: ``lambda_i = max(minimum, base (1 + gamma i) ** -power)`` at the i-th training step, i = 1, 2, ..."""

    base: float = 1000.0
    gamma: float = 0.12
    power: float = 1.0
    minimum: float = 5.0

    def __post_init__(self) -> None:
        for name in ("base", "gamma", "power", "minimum"):
            check_range(f"annealing.{name}", getattr(self, name), 0.0)


def _multiple(value: Any) -> int:
    """``value``, an integer >= 1 of any type, as an int."""
    number = isinstance(value, int | float | Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 1 or int(value) != value:
        raise ValueError(f"margin: expected an integer >= 1 (how often the angle is taken), got {value!r}")
    return int(value)


class SphereFace(Margin):
    """SphereFace / A-softmax: target ``(lambda cos(theta) + psi(theta)) / (1 + lambda)`` with the monotone
    ``psi = (-1)^k cos(m theta) - 2k`` on theta in [k pi/m, (k+1) pi/m] (Liu et al., CVPR 2017, eq. 7).

    Args:
        margin: m, an integer >= 1.
        scale: ``None`` keeps each embedding's norm as its scale (with its gradient), a number replaces it (F-norm SphereFace).
        annealing: ``None`` for lambda = 0 (psi alone), ``True`` for the published schedule, or an :class:`Annealing`. The step
            count is a buffer, so a resumed run goes on where it stopped; it is raised before lambda is taken, as in the
            published code, and stands still in eval mode.
        focal_gamma: see :class:`Margin`.
    """

    iteration: Tensor
    margin: int = setting("margin", "m, an int; assigning is :meth:`set_margin`.")

    _state_names = ("iteration",)

    def __init__(self, margin: int = 4, scale: float | None = None, annealing: Annealing | bool | None = None, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        if scale is None:
            self.scale = None  # type: ignore[assignment]
        self.margin = margin
        if annealing is True:
            annealing = Annealing()
        elif annealing is False:
            annealing = None
        if annealing is not None and not isinstance(annealing, Annealing):
            raise TypeError(f"annealing: expected None, True or mk.Annealing(...), got {annealing!r}")
        self.annealing = annealing
        if annealing is not None:
            self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    def _checked(self, name: str, value: Any) -> int:
        return _multiple(value)

    def set_margin(self, margin: int) -> None:
        """Change m, an integer; a compiled step is compiled again for each new one. See :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def reset_parameters(self) -> None:
        if self.annealing is not None:
            self.iteration.zero_()

    def row_scale(self, batch: BatchInfo) -> float | Tensor:
        return batch.norm if self.scale is None else self.scale

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        if self.annealing is not None:
            self.iteration += 1

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        value, slope = psi(cos, self.margin)
        if self.annealing is None:
            return value, slope
        a = self.annealing
        lam = (a.base * (1 + a.gamma * self.iteration.to(cos.dtype)) ** -a.power).clamp_min(a.minimum)
        return (lam * cos + value) / (1 + lam), (lam + slope) / (1 + lam)


class LSoftmax(Margin):
    """L-Softmax: ``z_j = s |x| |w_j| cos(theta_j)``, target ``s |x| |w_y| psi(theta)`` with SphereFace's monotone psi: neither side is
    normalized (Liu et al., ICML 2016, eq. 4 to 6).

    Args:
        margin: m, an integer >= 1; 1 is the linear softmax.
        scale: s > 0, 1 in the paper.
        focal_gamma: see :class:`Margin`.
    """

    normalize_embedding = False
    normalize_weight = False
    needs_center_norm = True
    _fixed_scale = True
    margin: int = setting("margin", "m, an int; assigning is :meth:`set_margin`.")

    def __init__(self, margin: int = 4, scale: float = 1.0, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        self.margin = margin

    def _checked(self, name: str, value: Any) -> int:
        return _multiple(value)

    def set_margin(self, margin: int) -> None:
        """Change m, an integer; a compiled step is compiled again for each new one. See :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        length = batch.norm * batch.center_norm
        some = length > 0
        value, slope = psi(cos / torch.where(some, length, 1.0), self.margin)
        return length * value, torch.where(some, slope, 0.0)
