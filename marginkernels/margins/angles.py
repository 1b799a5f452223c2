"""Angle arithmetic that stays finite at cos = +-1, shared by the angular margins.

``d acos(c)/dc`` is infinite at the ends, but the gradient that reaches an embedding is that slope times sin(theta), which is
finite. So sin(theta) is floored at the square root of the machine epsilon: between the floor and the end the slope is that of
a constant sine, and at the end itself the tangent of the sphere is zero, so the gradient is zero. All of it is in float64,
where the floor lies at 1.5e-8 radians.
"""

import math

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


def psi(cos: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The monotone ``(-1)^k cos(m theta) - 2k`` on theta in [k pi/m, (k+1) pi/m], and its slope in cos."""
    # cos(m theta) and sin(m theta)/sin(theta) are Chebyshev polynomials of cos(theta): exact and finite at both ends, and beyond them.
    first, second = torch.ones_like(cos), cos  # T_0, T_1
    ratio_before, ratio = torch.zeros_like(cos), torch.ones_like(cos)  # U_-1, U_0
    for _ in range(m - 1):
        first, second = second, 2 * cos * second - first
        ratio_before, ratio = ratio, 2 * cos * ratio - ratio_before
    k = torch.zeros_like(cos)
    for i in range(1, m):
        k = k + (cos < math.cos(i * math.pi / m)).to(cos.dtype)
    sign = 1 - 2 * (k % 2)
    return sign * second - 2 * k, sign * m * ratio


def detached(cos: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` forward, the gradient of ``cos`` backward: insightface's arcface_torch since December 2022."""
    return cos + (value - cos).detach(), torch.ones_like(cos)
