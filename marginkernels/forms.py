"""The few shapes a non-target logit takes before the scale.

A margin's effect on the *target* logit costs O(N) and stays out of the heavy loop; what the loop must know is only how a
non-target cosine ``c`` becomes a logit ``N(c)``, and there are three ways. Kernels switch on the number and never name a loss.

====================  =====================================================================
``IDENTITY``          ``N(c) = c``
``HARD_LINEAR``       ``N(c) = (1 + t) c + t`` where ``c > threshold_i``, else ``c``
``HARD_QUADRATIC``    ``N(c) = c (t + c)``     where ``c > threshold_i``, else ``c``
====================  =====================================================================

``threshold`` is one number per row, ``t`` one number in all. The mask is never differentiated. ``csrc/forms.h`` holds the same
three for C++ and CUDA, ``backend/triton/tiles.py`` for Triton.
"""

import torch
from torch import Tensor

IDENTITY = 0
HARD_LINEAR = 1
HARD_QUADRATIC = 2

NAMES = {IDENTITY: "identity", HARD_LINEAR: "hard-linear", HARD_QUADRATIC: "hard-quadratic"}


def value(form: int, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N(cos)``; ``cos`` (N, C), ``threshold`` (N,), ``t`` scalar tensor. Differentiable in ``cos``."""
    if form == IDENTITY:
        return cos
    hard = cos > threshold.to(cos.dtype).unsqueeze(1)
    t = t.to(cos.dtype)
    lifted = (1 + t) * cos + t if form == HARD_LINEAR else cos * (t + cos)
    return torch.where(hard, lifted, cos)


def slope(form: int, cos: Tensor, threshold: Tensor | None, t: Tensor | None) -> Tensor:
    """``N'(cos)``, same shapes as :func:`value`."""
    if form == IDENTITY:
        return torch.ones_like(cos)
    hard = cos > threshold.to(cos.dtype).unsqueeze(1)
    t = t.to(cos.dtype)
    lifted = (1 + t).expand_as(cos) if form == HARD_LINEAR else t + 2 * cos
    return torch.where(hard, lifted, torch.ones_like(cos))
