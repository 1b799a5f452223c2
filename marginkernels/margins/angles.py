"""Angle arithmetic that stays finite at cos = +-1, shared by the angular margins.

``d acos(c)/dc`` is infinite at the ends, but the gradient that reaches an embedding is that slope times sin(theta), which is
finite. So sin(theta) is floored at the square root of the machine epsilon: between the floor and the end the slope is that of
a constant sine, and at the end itself the tangent of the sphere is zero, so the gradient is zero. All of it is in float64,
where the floor lies at 1.5e-8 radians.
"""

import torch
from torch import Tensor


def sine(cos: Tensor) -> tuple[Tensor, Tensor]:
    """sin(theta) for theta = acos(cos) in [0, pi], and its slope in cos, ``-cos/sin`` (0 under the floor)."""
    squared = 1 - cos * cos
    floor = torch.finfo(cos.dtype).eps
    sin = squared.clamp_min(floor).sqrt()
    return sin, torch.where(squared >= floor, -cos / sin, 0.0)


def angle(cos: Tensor) -> tuple[Tensor, Tensor]:
    """theta = acos(cos) in [0, pi] in radians, and its slope in cos, both finite."""
    sin, dsin = sine(cos)
    return torch.atan2(sin, cos), dsin * cos - sin


def added(cos: Tensor, cos_margin: Tensor, sin_margin: Tensor) -> tuple[Tensor, Tensor]:
    """cos(theta + margin), and its slope in cos, without taking the angle: better conditioned and cheaper. The margin comes as its
    cosine and its sine, tensors of shape () or (N,) each, in which the value may be differentiated."""
    sin, dsin = sine(cos)
    return cos * cos_margin - sin * sin_margin, cos_margin - dsin * sin_margin


def detached(cos: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` forward, the gradient of ``cos`` backward: insightface's arcface_torch since December 2022."""
    return cos + (value - cos).detach(), torch.ones_like(cos)
