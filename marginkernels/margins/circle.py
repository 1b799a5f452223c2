"""Margins whose logits are weighted by how far they are from where they should be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..core.nontarget import NonTarget
from .base import BatchInfo, Margin, check_range, setting


class Circle(Margin):
    """Circle loss with labels of classes: target ``a_p (c - (1 - m))`` with the weight ``a_p = max(1 + m - c, 0)``, other classes
    ``a_n (c - m)`` with ``a_n = max(c + m, 0)`` (Sun et al., CVPR 2020, eq. 4 to 8).

    The weights are not differentiated (the paper's eq. 9 and 10), so that the slopes are the weights themselves: the target's is largest
    where a row is worst.

    Args:
        scale: gamma > 0; 256 in the paper for faces.
        margin: m in [0, 1].
        focal_gamma: see :class:`Margin`.
    """

    non_target = NonTarget.HINGE
    straight_through = True
    _fixed_scale = True
    margin: float = setting("margin", "m, a float; assigning is :meth:`set_margin`.")

    def __init__(self, scale: float = 256.0, margin: float = 0.25, *, focal_gamma: float = 0.0):
        super().__init__(scale, focal_gamma=focal_gamma)
        self.margin = margin
        self._hold()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, 1.0)

    def _numbers(self) -> Iterable[float]:
        return (self.margin,)

    def set_margin(self, margin: float) -> None:
        """Change m; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    @property
    def t(self) -> Tensor:  # type: ignore[override]
        """m, of shape ()."""
        return self._held[0]

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        (margin,) = self._read(cos)
        weight = (1 + margin - cos.detach()).clamp_min(0)
        return weight * (cos - (1 - margin)), weight
