"""The few transforms of a non-target similarity before the scale.

A margin's effect on the *target* logit costs O(N) and stays out of the heavy loop; what the loop must know is only how a non-target
similarity ``c`` becomes a logit ``N(c)``. Kernels switch on the number and never name a loss.

======================  ===================================================  =======================================
transform               ``N(c)``                                             ``N'(c)``
======================  ===================================================  =======================================
``IDENTITY``            ``c``                                                1
``HARD_LINEAR``         ``(1 + t) c + t`` where ``c > threshold``, else ``c``  its derivative
``HARD_QUADRATIC``      ``c (t + c)`` where ``c > threshold``, else ``c``    its derivative
``FILTERED``            0 where ``c > threshold``, else ``c``                its derivative
``HINGE``               ``max(c + t, 0) (c - t)``                            ``max(c + t, 0)``: that factor is a weight
``ANGLE_PART``          ``cos(t acos(c))``, t in (0, 1]                      its derivative, see :data:`LEAST_SINE`
``ANGLE_PART_DETACHED`` the same                                             1
``CLIPPED``             ``c`` within [threshold, t], else the nearer end     1 within, else 0
``POWER``               ``2 ((1 + c) / 2)^t - 1 + threshold``, t in [1, 10]  its derivative
``POWER_DETACHED``      the same                                             1
``LIFTED``              ``c + t`` where ``c > threshold``, else ``c``        1
``LIFTED_ANGLE``        ``cos(acos(c) - t)`` there, t in [0, pi/2], else ``c``  its derivative, see :data:`LEAST_LIFTED_SINE`
======================  ===================================================  =======================================

``threshold`` and the parameter ``t`` are one number a row; ``POWER`` adds the former, a margin. Neither is differentiated, nor is the mask.
Where ``CLIPPED`` holds the cosine, the bias of the class gets no gradient either: it is the logit that stands still there (:func:`moves`).
``csrc/scalar.h`` holds the same for C++ and CUDA, ``backend/triton/primitives.py`` for Triton; all else follows from the table below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

#: What ``ANGLE_PART`` takes sin(theta) for where c < 0 and it is smaller, within 3.6 degrees of the opposite of a class center: there the
#: slope ``t sin(t theta) / sin(theta)`` goes to infinity. The gradient that reaches an embedding is this slope times sin(theta). A slope of
#: at most 10 leaves room in float16.
LEAST_SINE = 2.0**-4
#: What ``LIFTED_ANGLE`` takes sin(theta) for in its slope ``sin(theta - t) / sin(theta)`` where it is smaller, within half a degree of a
#: class center or its opposite, where the slope goes to infinity. The gradient that reaches an embedding is this slope times sin(theta).
LEAST_LIFTED_SINE = 2.0**-7


class NonTarget(IntEnum):
    """The transform of non-target similarities; see the module's table."""

    IDENTITY = 0
    HARD_LINEAR = 1
    HARD_QUADRATIC = 2
    FILTERED = 3
    HINGE = 4
    ANGLE_PART = 5
    ANGLE_PART_DETACHED = 6
    CLIPPED = 7
    POWER = 8
    POWER_DETACHED = 9
    LIFTED = 10
    LIFTED_ANGLE = 11

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def needs_threshold(self) -> bool:
        """Whether ``threshold`` matters."""
        return _TRANSFORMS[self].needs_threshold

    @property
    def needs_t(self) -> bool:
        """Whether ``t`` matters."""
        return _TRANSFORMS[self].needs_t


@dataclass(frozen=True)
class _Transform:
    """One line of the table; ``c`` (N, C), ``threshold`` and ``t`` (N, 1).

    Attributes:
        value: N(c), differentiable in ``c`` to what ``slope`` says.
        slope: N'(c).
        reach: what ``|N(c)|`` does not exceed where ``|c|`` does not exceed the first argument; of it, threshold and t, (N,) each.
    """

    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor | float]
    reach: Callable[[Tensor, Tensor, Tensor], Tensor]
    needs_threshold: bool = False
    needs_t: bool = False


def value(non_target: NonTarget, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N(cos)``; ``cos`` (N, C), ``threshold`` and ``t`` (N,), None for the identity. Differentiable in ``cos``, with the slope of
    :func:`slope`."""
    if non_target == NonTarget.IDENTITY:
        return cos
    return _TRANSFORMS[non_target].value(cos, *_columns(cos, threshold, t))


def slope(non_target: NonTarget, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N'(cos)``, same shapes as :func:`value`."""
    if non_target == NonTarget.IDENTITY:
        return torch.ones_like(cos)
    found = _TRANSFORMS[non_target].slope(cos, *_columns(cos, threshold, t))
    return found if isinstance(found, Tensor) else torch.full_like(cos, found)


def moves(non_target: NonTarget, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor | None:
    """(N, C) bool, where the bias of the class moves the logit; None for everywhere."""
    return slope(non_target, cos, threshold, t) != 0 if non_target == NonTarget.CLIPPED else None


def reach(non_target: NonTarget, largest: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """(N,) what ``|N(c)|`` does not exceed for ``|c|`` up to ``largest`` (N,), which is at least 0."""
    if non_target == NonTarget.IDENTITY:
        return largest
    assert threshold is not None
    assert t is not None
    return _TRANSFORMS[non_target].reach(largest, threshold, t)


def _columns(cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> tuple[Tensor, Tensor]:
    assert threshold is not None
    assert t is not None
    return threshold.to(cos.dtype).unsqueeze(1), t.to(cos.dtype).unsqueeze(1)


def _below_one(c: Tensor) -> float:
    return 1 - max(2e-9, torch.finfo(c.dtype).eps)


def _part_of_angle(c: Tensor, t: Tensor) -> Tensor:
    return torch.cos(t * torch.acos(c.clamp(-1, 1)))


def _part_of_angle_slope(c: Tensor, t: Tensor) -> Tensor:
    c = c.clamp(-1, _below_one(c))  # at 1 the slope is t^2, as just before it
    theta = torch.acos(c)
    sine = theta.sin()
    return t * (t * theta).sin() / torch.where(c < 0, sine.clamp_min(LEAST_SINE), sine)


def _differentiable_part_of_angle(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    if not c.requires_grad:
        return _part_of_angle(c, t)
    inside = (c > -math.sqrt(1 - LEAST_SINE**2)) & (c < _below_one(c))
    at = c.detach()
    line = _part_of_angle(at, t) + _part_of_angle_slope(at, t) * (c - at)
    return torch.where(inside, _part_of_angle(torch.where(inside, c, 0.0), t), line)


#: What ``POWER`` takes (1 + c) / 2 for at least, so that its logarithm is finite.
LEAST_BASE = 2.0**-40


def _power(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    return 2 * ((1 + c) / 2).clamp_min(LEAST_BASE) ** t + (threshold - 1)


def _power_slope(c: Tensor, t: Tensor) -> Tensor:
    return t * ((1 + c) / 2).clamp_min(LEAST_BASE) ** (t - 1)


def _differentiable_power(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    if not c.requires_grad:
        return _power(c, threshold, t)
    at = c.detach()
    return _power(at, threshold, t) + _power_slope(at, t) * (c - at)


def _clipped(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    c = torch.where(c < threshold, threshold, c)
    return torch.where(c > t, t, c)


def _lifted_angle(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    at = c.detach().clamp(-1, 1)
    lifted = at * t.cos() + (1 - at * at).clamp_min(0).sqrt() * t.sin()
    if c.requires_grad:
        lifted = lifted + _lifted_angle_slope(at, threshold, t) * (c - c.detach())
    return torch.where(c > threshold, lifted, c)


def _lifted_angle_slope(c: Tensor, threshold: Tensor, t: Tensor) -> Tensor:
    at = c.clamp(-1, 1)
    sine = (1 - at * at).clamp_min(LEAST_LIFTED_SINE**2).sqrt()
    return torch.where(c > threshold, t.cos() - at * t.sin() / sine, 1.0)


_TRANSFORMS = {
    NonTarget.IDENTITY: _Transform(lambda c, threshold, t: c, lambda c, threshold, t: 1.0, lambda c, threshold, t: c),
    NonTarget.HARD_LINEAR: _Transform(
        lambda c, threshold, t: torch.where(c > threshold, torch.addcmul(t, c, 1 + t), c),
        lambda c, threshold, t: torch.where(c > threshold, 1 + t, 1.0),
        lambda c, threshold, t: (1 + t.abs()) * c + t.abs(),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.HARD_QUADRATIC: _Transform(
        lambda c, threshold, t: torch.where(c > threshold, c * (t + c), c),
        lambda c, threshold, t: torch.where(c > threshold, torch.add(t, c, alpha=2), 1.0),
        lambda c, threshold, t: c * torch.clamp_min(t.abs() + c, 1),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.FILTERED: _Transform(
        lambda c, threshold, t: torch.where(c > threshold, 0.0, c),
        lambda c, threshold, t: torch.where(c > threshold, torch.zeros_like(c), torch.ones_like(c)),
        lambda c, threshold, t: c,
        needs_threshold=True,
    ),
    NonTarget.HINGE: _Transform(
        lambda c, threshold, t: (c.detach() + t).clamp_min(0) * (c - t),
        lambda c, threshold, t: (c + t).clamp_min(0),
        lambda c, threshold, t: torch.maximum((c * c - t * t).abs(), t * t),
        needs_t=True,
    ),
    NonTarget.ANGLE_PART: _Transform(
        _differentiable_part_of_angle,
        lambda c, threshold, t: _part_of_angle_slope(c, t),
        lambda c, threshold, t: torch.ones_like(c),
        needs_t=True,
    ),
    NonTarget.ANGLE_PART_DETACHED: _Transform(
        lambda c, threshold, t: _part_of_angle(c.detach(), t) + (c - c.detach()),
        lambda c, threshold, t: 1.0,
        lambda c, threshold, t: torch.ones_like(c),
        needs_t=True,
    ),
    NonTarget.CLIPPED: _Transform(
        _clipped,
        lambda c, threshold, t: torch.where((c < threshold) | (c > t), torch.zeros_like(c), torch.ones_like(c)),
        lambda c, threshold, t: torch.maximum(c, torch.maximum(threshold.abs(), t.abs())),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.POWER: _Transform(
        _differentiable_power,
        lambda c, threshold, t: _power_slope(c, t),
        lambda c, threshold, t: _power(c, threshold.abs(), t).clamp_min(1 + threshold.abs()),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.POWER_DETACHED: _Transform(
        lambda c, threshold, t: _power(c.detach(), threshold, t) + (c - c.detach()),
        lambda c, threshold, t: 1.0,
        lambda c, threshold, t: _power(c, threshold.abs(), t).clamp_min(1 + threshold.abs()),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.LIFTED: _Transform(
        lambda c, threshold, t: torch.where(c > threshold, c + t, c),
        lambda c, threshold, t: 1.0,
        lambda c, threshold, t: c + t.abs(),
        needs_threshold=True,
        needs_t=True,
    ),
    NonTarget.LIFTED_ANGLE: _Transform(
        _lifted_angle,
        _lifted_angle_slope,
        lambda c, threshold, t: torch.maximum(c, torch.ones_like(c)),
        needs_threshold=True,
        needs_t=True,
    ),
}
