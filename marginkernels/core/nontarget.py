"""The few transforms of a non-target similarity before the scale.

A margin's effect on the *target* logit costs O(N) and stays out of the heavy loop; what the loop must know is only how a non-target
similarity ``c`` becomes a logit ``N(c)``, and there are three ways. Kernels switch on the number and never name a loss.

====================  =====================================================================
``IDENTITY``          ``N(c) = c``
``HARD_LINEAR``       ``N(c) = (1 + t) c + t`` where ``c > threshold_i``, else ``c``
``HARD_QUADRATIC``    ``N(c) = c (t + c)``     where ``c > threshold_i``, else ``c``
====================  =====================================================================

``threshold`` and the parameter ``t`` are one number a row. The mask is never differentiated. ``csrc/scalar.h`` holds the same three for
C++ and CUDA, ``backend/triton/primitives.py`` for Triton.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class NonTarget(IntEnum):
    """The transform of non-target similarities; see the module's table."""

    IDENTITY = 0
    HARD_LINEAR = 1
    HARD_QUADRATIC = 2

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


def value(non_target: NonTarget, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N(cos)``; ``cos`` (N, C), ``threshold`` and ``t`` (N,). Differentiable in ``cos``."""
    if non_target == NonTarget.IDENTITY:
        return cos
    assert threshold is not None
    assert t is not None
    hard = cos > threshold.to(cos.dtype).unsqueeze(1)
    t = t.to(cos.dtype).unsqueeze(1)
    raised = (1 + t) * cos + t if non_target == NonTarget.HARD_LINEAR else cos * (t + cos)
    return torch.where(hard, raised, cos)


def slope(non_target: NonTarget, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N'(cos)``, same shapes as :func:`value`."""
    if non_target == NonTarget.IDENTITY:
        return torch.ones_like(cos)
    assert threshold is not None
    assert t is not None
    hard = cos > threshold.to(cos.dtype).unsqueeze(1)
    t = t.to(cos.dtype).unsqueeze(1)
    raised = (1 + t).expand_as(cos) if non_target == NonTarget.HARD_LINEAR else t + 2 * cos
    return torch.where(hard, raised, torch.ones_like(cos))
