"""Margins that are drawn anew for each row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.draws import check_seed, normal
from ..core.transforms import transforming
from .angles import added
from .base import BatchInfo, Margin, NonTargetLSE, _arguments, check_range, setting, settled


class ElasticFace(Margin):
    """ElasticFace: target ``cos(theta + m_i)``, or ``cos(theta) - m_i`` for ``kind="cos"``, with a margin for each row that is drawn in
    each step from a normal distribution (Boutros et al., CVPRW 2022, ElasticFace-Arc and ElasticFace-Cos).

    The margins are not clipped, and there is no fallback past pi, as in the published code. The draw is not differentiated.

    Args:
        kind: ``"arc"``, or ``"cos"`` (whose margin in the paper is 0.35).
        scale: s > 0.
        margin: the mean of the margins, radians in [0, pi), or in [0, 2] for ``"cos"``.
        std: their standard deviation, >= 0. With 0 all margins are ``margin``.
        plus: ``None``: a row gets its own draw. ``"paper"``: ElasticFace+, the draws of a step are sorted, so that the farther a row lies
            from its class center, the larger its margin. ``"code"``: as the published code does it, which applies the permutation of that
            sort where its inverse is meant, so that rows get nearly arbitrary margins.
        seed: of the draws, an integer of 64 bits.
        focal_gamma: see :class:`Margin`.

    ``draws``, an int64 buffer (), counts the training steps. The draw of a row follows from the seed, the count, and its place among the
    rows that are not ignored, those of all ranks in order of rank: so it is the same on all ranks, on any number of them, and in a resumed
    run. In eval mode the margins are drawn as well, with the count as it stands.

    Attributes:
        drawn: (N,) float64, what the last call applied to each row, NaN to an ignored one; this rank's rows. None before the first call and
            under the transforms of torch.func.
    """

    draws: Tensor

    _state_names = ("draws",)
    _fixed_scale = True
    margin: float = setting("margin", "The mean, a float; assigning is :meth:`set_margin`.")

    def __init__(
        self,
        kind: str = "arc",
        scale: float = 64.0,
        margin: float = 0.5,
        std: float = 0.0125,
        plus: str | None = None,
        seed: int = 0,
        *,
        focal_gamma: float = 0.0,
    ):
        super().__init__(scale, focal_gamma=focal_gamma)
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind: expected 'arc' or 'cos', got {kind!r}")
        if plus not in (None, "paper", "code"):
            raise ValueError(f"plus: expected None, 'paper' or 'code', got {plus!r}")
        self.kind = kind
        self.margin = margin
        self.std = check_range("std", std, 0.0)
        self.plus = plus
        self.seed = check_seed("seed", seed)
        # In a dict, since torch.compile does not let an attribute change before the buffers are read.
        self._last: dict[str, Tensor | None] = {"drawn": None}
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._hold()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, math.nextafter(math.pi, 0) if self.kind == "arc" else 2.0)

    def _numbers(self) -> Iterable[float]:
        return self.margin, self.std

    def set_margin(self, margin: float) -> None:
        """Change the mean; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    def reset_parameters(self) -> None:
        self.draws.zero_()

    @property
    def drawn(self) -> Tensor | None:
        """See above."""
        return self._last["drawn"]

    def update(self, cos: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
        self.draws += 1

    @torch.no_grad()
    def _draw(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        """(N,) the margins of the rows."""
        margin, std = self._read(cos)
        place = batch.valid.cumsum(0) - 1
        margins = margin + std * normal(self.seed, self.draws, place).to(cos.dtype)
        if self.plus is not None:
            # Ignored rows come last in both orders. sorted_margins[k] is for the row that is the k-th nearest to its center.
            # Rows that are as near but for rounding, as all that lie on their center, keep their order.
            near = torch.where(batch.valid, settled(cos.detach()), -math.inf).argsort(descending=True, stable=True)
            sorted_margins = torch.where(batch.valid, margins, math.inf).sort().values
            if self.plus == "paper":
                margins = torch.empty_like(margins).scatter(0, near, sorted_margins)
            else:
                place = place.clamp_min(0)
                margins = sorted_margins[place[near][place]]
        return torch.where(batch.valid, margins, math.nan)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        margins = self._draw(cos, batch)
        self._last["drawn"] = None if transforming() else margins[batch.own].to(torch.float64)
        margins = torch.where(batch.valid, margins, 0.0)
        return (cos - margins, torch.ones_like(cos)) if self.kind == "cos" else added(cos, margins.cos(), margins.sin())

    def extra_repr(self) -> str:
        shown = ("kind", "scale", "margin", "std", "plus", "seed", "focal_gamma")
        return _arguments({name: getattr(self, name) for name in shown})
