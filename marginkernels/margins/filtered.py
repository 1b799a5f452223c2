"""Margins that may leave non-target classes that look like the row's own out of its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.nontarget import NonTarget
from .base import BatchInfo, Margin, check_range


class Filtered(Margin):
    """Base of the margins with ``filter_above``: the cosine of a non-target class that exceeds it counts as 0, since such a class is taken
    for the row's own under another label (insightface's arcface_torch, ``interclass_filtering_threshold``). The class still adds exp(0) to
    the sum of exponentials, and gets no gradient."""

    filter_above: float | None = None

    def _filter(self, above: float | None) -> None:
        """For the constructor."""
        if above is not None:
            self.filter_above = check_range("filter_above", above, -1.0, 1.0)
            self.non_target = NonTarget.FILTERED

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        if self.filter_above is None:
            return super().threshold(cos, batch)
        return torch.full_like(cos, self.filter_above)
