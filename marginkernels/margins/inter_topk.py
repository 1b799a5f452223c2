"""A margin on the target, and a penalty on the non-target classes that are nearest to each row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.nontarget import NonTarget
from ..core.validation import positive
from .angles import added
from .angular import beyond, checked_beyond_pi
from .base import BatchInfo, Margin, check_range, setting

#: Cosines that are no farther apart count as equal.
TIED = 2.0**-20


class InterTopK(Margin):
    """Inter-top-k penalty: target ``cos(theta + m)`` or ``cos(theta) - m``, and the ``k`` non-target classes of the highest cosines of each
    row raised to ``cos(theta_j - m')`` or ``cos(theta_j) + m'`` (Zhao et al., ICASSP 2022, arXiv 2110.05042). The choice is not
    differentiated. With sub-centers (``sub_centers=3`` of the head is usual) the cosine of a class is that of its nearest.

    The classes are found by one more pass over the centers, and the row's threshold lies halfway between the last cosine that is raised
    and the next, so that forward and backward raise the same. Where both are equal neither is raised. With ``sample_rate`` the nearest are
    those of the classes drawn.

    Args:
        kind: ``"arc"``, m and m' are angles in radians, m in [0, pi) and m' in [0, pi / 2]; or ``"cos"``, cosines in [0, 2].
        scale: s > 0.
        margin: m.
        k: how many classes, >= 1; all others where there are fewer.
        penalty: m'. It acts as given: in wespeaker's recipe, which has the same numbers, it grows with the margin from 0 at the start,
            ``penalty = 0.06 * margin / 0.2``.
        beyond_pi: of ``"arc"``, see :class:`CombinedMargin`.
        focal_gamma: see :class:`Margin`.
    """

    def __init__(
        self,
        kind: str = "arc",
        scale: float = 32.0,
        margin: float = 0.2,
        k: int = 5,
        penalty: float = 0.06,
        beyond_pi: str = "continuous",
        *,
        focal_gamma: float = 0.0,
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind: expected 'arc' or 'cos', got {kind!r}")
        self.kind = kind
        self.non_target = NonTarget.LIFTED_ANGLE if kind == "arc" else NonTarget.LIFTED
        self.k = positive("k", k)
        self.beyond_pi = checked_beyond_pi(beyond_pi)
        self._change(margin=margin, penalty=penalty)
        self._hold()

    _fixed_scale = True
    margin: float = setting("margin", "m, a float; assigning is :meth:`set_margin`.")
    penalty: float = setting("penalty", "m', a float; assigning is :meth:`set_margin`.")

    def _checked(self, name: str, value: Any) -> float:
        if self.kind == "cos":
            return check_range(name, value, 0.0, 2.0)
        return check_range(name, value, 0.0, math.nextafter(math.pi, 0) if name == "margin" else math.pi / 2, unit="radians")

    def _numbers(self) -> Iterable[float]:
        m = self.margin
        end = -math.cos(m) if m > 0 else -math.inf
        drop = m * math.sin(m) if self.beyond_pi == "linear" else 1 - math.cos(m)
        return self.penalty, m, math.cos(m), math.sin(m), end, drop

    def set_margin(self, margin: float | None = None, penalty: float | None = None) -> None:
        """Change m, m' or both; see :meth:`Margin.set_margin`."""
        named = {name: value for name, value in (("margin", margin), ("penalty", penalty)) if value is not None}
        if not named:
            raise TypeError("set_margin: expected margin, penalty or both, got neither")
        self._change(**named)

    @property
    def t(self) -> Tensor:  # type: ignore[override]
        return self._held[0]

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        _, margin, cos_margin, sin_margin, end, drop = self._read(cos)
        if self.kind == "cos":
            return cos - margin, torch.ones_like(cos)
        return beyond(cos, *added(cos, cos_margin, sin_margin), self.beyond_pi, end, drop)

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        found = batch.nearest(self.k + 1).to(torch.float64)
        last, following = found[:, -2], found[:, -1]
        # Where the two are equal, those above them are raised: the middle to the next higher.
        above = torch.where(found > last[:, None] + TIED, found, torch.inf).amin(1)
        return torch.where(last - following > TIED, 0.5 * (last + following), 0.5 * (above + last)).to(cos.dtype)

    def extra_repr(self) -> str:
        shown = f"kind={self.kind!r}, scale={self.scale}, margin={self.margin}, k={self.k}, penalty={self.penalty}"
        more = f", beyond_pi={self.beyond_pi!r}" if self.kind == "arc" else ""
        return shown + more + (f", focal_gamma={self.focal_gamma}" if self.focal_gamma else "")
