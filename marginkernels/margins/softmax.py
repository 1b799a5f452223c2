"""No margin: plain and normalized softmax, which differ in what is normalized and in the scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.validation import integer
from .base import BatchInfo, Margin, check_range


def _identity(cos: Tensor) -> tuple[Tensor, Tensor]:
    return cos, torch.ones_like(cos)


class Softmax(Margin):
    """Linear softmax: ``z_j = x . w_j (+ b_j)``; with ``normalize_weight=True`` the W-norm softmax ``z_j = x . w_j/|w_j|``.

    Args:
        normalize_weight: divide each class center by its norm; the embedding's norm is kept and trained either way.
        focal_gamma: see :class:`Margin`.
    """

    normalize_embedding = False

    def __init__(self, normalize_weight: bool = False, *, focal_gamma: float = 0.0):
        super().__init__(1.0, focal_gamma=focal_gamma)
        self.normalize_weight = bool(normalize_weight)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        return _identity(cos)


class NormFace(Margin):
    """NormFace: ``z_j = s cos(theta_j)`` (Wang et al., ACM MM 2017, eq. 6).

    Args:
        scale: s > 0.
        focal_gamma: see :class:`Margin`.
    """

    _fixed_scale = True

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        return _identity(cos)


class L2Softmax(Margin):
    """L2-constrained softmax: ``z_j = alpha w_j . x/|x| (+ b_j)``, the class centers are not normalized (Ranjan et al. 2017, eq. 3).

    Args:
        alpha: the radius, > 0; ``None`` takes the lower bound ``log(p (C - 2) / (1 - p))`` at p = 0.9 (the paper's eq. 8).
        trainable: make alpha a Parameter.
        num_classes: C for the bound, at least 3; where it is ``None`` the head's own number of classes is taken at first use. A bound
            serves heads of that C only: one of another C raises a ``ValueError``.
        focal_gamma: see :class:`Margin`.
    """

    normalize_weight = False
    alpha: float | Tensor | None
    _bound_classes: int | None
    PROBABILITY = 0.9  #: the paper's p: the average probability of the right class that the bound guarantees

    _state_names = ("alpha",)

    def __init__(self, alpha: float | None = None, trainable: bool = False, num_classes: int | None = None, *, focal_gamma: float = 0.0):
        super().__init__(None, focal_gamma=focal_gamma)
        self.trainable = bool(trainable)
        self._bound_classes = None  # C, where alpha is the bound for it
        if alpha is not None:
            alpha = check_range("alpha", alpha, 0.0, open_low=True)
        elif num_classes is not None:
            alpha = self.lower_bound(num_classes)
            self._bound_classes = int(num_classes)
        self._set(alpha)

    def _set(self, alpha: float | None) -> None:
        self._start = alpha
        if self.trainable:
            # Registered as None until the number of classes is known, so that a late bind() can still make it a Parameter.
            self.register_parameter("alpha", None if alpha is None else nn.Parameter(torch.tensor(alpha, dtype=torch.float32)))
        else:
            self.alpha = alpha

    @classmethod
    def lower_bound(cls, num_classes: int) -> float:
        """``log(p (C - 2) / (1 - p))``: below it the right class cannot reach probability p on average."""
        num_classes, p = integer("num_classes", num_classes, 3), cls.PROBABILITY
        return math.log(p * (num_classes - 2) / (1 - p))

    def bind(self, num_classes: int) -> None:
        if self.alpha is None:
            self._set(self.lower_bound(num_classes))
            self._bound_classes = num_classes
        elif self._bound_classes not in (None, num_classes):
            raise ValueError(
                f"num_classes: expected {num_classes} in L2Softmax, as many as the head has, got {self._bound_classes}, for which alpha is "
                "the lower bound; give alpha, or each head its own L2Softmax"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if isinstance(self.alpha, Tensor):
            assert self._start is not None
            self.alpha.fill_(self._start)

    def row_scale(self, batch: BatchInfo) -> float | Tensor:
        assert self.alpha is not None, "bind() comes before the first use"
        return self.alpha

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        return _identity(cos)
