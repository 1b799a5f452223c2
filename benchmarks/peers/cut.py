"""Apple's Cut Cross-Entropy in its exact mode: with a million classes its gradient filter would drop nearly all probabilities."""

from __future__ import annotations

from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work, unit_sides


class CutCrossEntropy(Provider):
    name = "cut-cross-entropy"
    note = "exact mode (filter_eps=None)"
    package = "cut-cross-entropy"
    heads = ("normface",)
    device_types = ("cuda",)
    weight_copies = 3.0

    def build(self, case: Case, w: Tensor) -> Work:
        from cut_cross_entropy import linear_cross_entropy

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            x_unit, w_unit = unit_sides(x, w, DTYPES[case.dtype])
            return linear_cross_entropy(SCALE * x_unit, w_unit, labels, filter_eps=None)

        return Work(loss, w)
