"""Open Metric Learning's ArcFace losses, computed without the N x C logits: subclasses of the library's classes of the same names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..margins import ArcFace, Margin
from ._fusible import Fusible, plain_entropy

try:
    from oml.losses import arcface as theirs
except ImportError as error:
    raise ImportError("marginkernels.compat.oml subclasses Open Metric Learning's losses: pip install open-metric-learning") from error

__all__ = ["ArcFaceLoss", "ArcFaceLossWithMLP"]


class ArcFaceLoss(Fusible, theirs.ArcFaceLoss):
    """``oml.losses.ArcFaceLoss``, fused. With ``label2category`` and a smoothing, whose epsilon goes to the classes of one category, it is
    computed by the library's own code."""

    _library = theirs.ArcFaceLoss
    _replaced = ("fc", "smooth_labels")

    def _unfused(self) -> str | None:
        if self.label2category is not None and self.smoothing_epsilon:
            return "smoothing_epsilon goes to the classes of a category (label2category)"
        if not plain_entropy(self.criterion):
            return f"criterion is {self.criterion!r}"
        return None

    def _margin(self) -> Margin:
        settings = (self.rescale, self.m)
        return self._kept(settings, lambda: ArcFace(float(self.rescale), float(self.m), beyond_pi="linear"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss by ``criterion``'s reduction; ``x`` (N, D), ``y`` (N,) int64."""
        if not self.fused:
            loss: Tensor = super().forward(x, y)
            return loss
        reduction: str = self.criterion.reduction
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": self.smoothing_epsilon or 0.0}
        found = self._losses(x, self.weight, y, self._margin(), **options)
        self._last_logs["accuracy"] = found.stats["top1"]
        return found.reduce(reduction)


class ArcFaceLossWithMLP(theirs.ArcFaceLossWithMLP):
    """``oml.losses.ArcFaceLossWithMLP``, whose ``arcface`` is the fused :class:`ArcFaceLoss`."""

    def __init__(self, in_features: int, num_classes: int, mlp_features: list[int], *args: Any, **kwargs: Any):
        super().__init__(in_features, num_classes, mlp_features, *args, **kwargs)
        self.arcface.__class__ = ArcFaceLoss  # which adds methods alone: the weight stays the one that a seed gives

    @property
    def fused(self) -> bool:
        """As that of :class:`ArcFaceLoss`."""
        return self.unfused_reason is None

    @property
    def unfused_reason(self) -> str | None:
        """As that of :class:`ArcFaceLoss`."""
        reason: str | None = self.arcface.unfused_reason
        return reason
