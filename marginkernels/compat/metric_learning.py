"""pytorch-metric-learning's classification losses, computed without the N x C logits.

Each class here is a subclass of the library's class of the same name (2.8 and later) and replaces ``compute_loss`` alone. Arguments, the
parameter ``W`` (D, C), ``state_dict``, miners' weights, reducers, regularizers, distances, statistics and ``get_logits`` are the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..margins import ArcFace, CosFace, LSoftmax, Margin, NormFace, Softmax, SphereFace
from ._fusible import Fusible, plain_entropy

try:
    from pytorch_metric_learning import losses as theirs
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.utils import common_functions as c_f
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
except ImportError as error:
    raise ImportError(
        "marginkernels.compat.metric_learning subclasses pytorch-metric-learning's losses: pip install pytorch-metric-learning"
    ) from error

__all__ = ["ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"]


class _Fused(Fusible):
    """What all six have in common; comes before the library's class among the bases."""

    _distances: tuple[type, ...] = (CosineSimilarity,)
    #: Attributes that make the margin.
    _settings: tuple[str, ...] = ("scale", "margin")

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Drawn by the library, so that a seed gives its numbers; then laid out so that W.t(), the centers (C, D), is contiguous.
        self.W.data = self.W.data.t().contiguous().t()

    def _unfused(self: Any) -> str | None:
        distance, entropy = self.distance, self.cross_entropy
        if type(distance) not in self._distances or not distance.is_inverted or (distance.p, distance.power) != (2, 1):
            return f"distance is {distance!r} with p={distance.p}, power={distance.power}, is_inverted={distance.is_inverted}"
        if not plain_entropy(entropy, "none"):
            return f"cross_entropy is {entropy!r}"
        return None

    def _margin(self: Any) -> Margin:
        values = tuple(getattr(self, name) for name in self._settings)
        for name, value in zip(self._settings, values, strict=True):
            if isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a number, got a tensor")
        margin: Margin = self._kept((values, self._kind()), lambda: self._made(*(float(value) for value in values)))
        return margin

    def _kind(self) -> object:
        """What else decides which margin it is."""
        return None

    def _made(self, scale: float, margin: float) -> Margin:
        raise NotImplementedError

    def _taken(self, embeddings: Tensor) -> Tensor:
        """The embeddings as the margin takes them."""
        return embeddings

    def _collect(self: Any, embeddings: Tensor, labels: Tensor) -> None:
        """The statistics that the library takes while it computes, where they are asked for."""
        with torch.no_grad():
            if self.distance.collect_stats:
                self.distance.reset_stats()
                pair = embeddings, self.W.t()
                self.distance.set_default_stats(*pair, *(self.distance.maybe_normalize(x) for x in pair))
            if self.collect_stats and hasattr(self, "get_angles"):
                centers = self.W.t().unflatten(0, (self.num_classes, -1))[labels]  # (N, K, D)
                cosines = self.distance.normalize(embeddings, dim=-1)[:, None] * self.distance.normalize(centers, dim=-1)
                self.get_angles(cosines.sum(-1).amax(1))

    def compute_loss(
        self: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor | None, ref_labels: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        """Overrides the library's; ``embeddings`` (N, D), ``labels`` (N,) int64."""
        if not self.fused:
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)  # type: ignore[misc,no-any-return]
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        self._collect(embeddings, labels)
        centers = {"sub_centers": getattr(self, "sub_centers", 1)}
        losses = self._losses(self._taken(embeddings), self.W.t(), labels, self._margin(), **centers).reduce("none")
        if not torch.is_autocast_enabled(embeddings.device.type):
            losses = losses.to(embeddings.dtype)
        found = {
            "loss": {
                "losses": losses * convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype),
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(found, self.W.t())
        return found


class _FusedMargin(_Fused):
    _replaced = ("get_cosine", "get_target_mask", "modify_cosine_of_target_classes", "get_cos_with_margin", "get_angles", "scale_logits")


class ArcFaceLoss(_FusedMargin, theirs.ArcFaceLoss):
    """``pytorch_metric_learning.losses.ArcFaceLoss``, fused: ``margin`` in degrees when it is made, an attribute in radians then."""

    _library = theirs.ArcFaceLoss

    def _made(self, scale: float, margin: float) -> Margin:
        return ArcFace(scale, margin, beyond_pi="linear")


class SubCenterArcFaceLoss(_FusedMargin, theirs.SubCenterArcFaceLoss):
    """``pytorch_metric_learning.losses.SubCenterArcFaceLoss``, fused: ``W`` is (D, C K), class c in its columns c K to c K + K - 1;
    ``num_classes`` and ``embedding_size`` by name only, and ``get_outliers``, are the library's."""

    _library = theirs.SubCenterArcFaceLoss

    def _made(self, scale: float, margin: float) -> Margin:
        return ArcFace(scale, margin, beyond_pi="linear")


class CosFaceLoss(_FusedMargin, theirs.CosFaceLoss):
    """``pytorch_metric_learning.losses.CosFaceLoss``, fused."""

    _library = theirs.CosFaceLoss

    def _made(self, scale: float, margin: float) -> Margin:
        return CosFace(scale, margin)


class LargeMarginSoftmaxLoss(_FusedMargin, theirs.LargeMarginSoftmaxLoss):
    """``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``, fused."""

    _library = theirs.LargeMarginSoftmaxLoss

    def _made(self, scale: float, margin: float) -> Margin:
        return LSoftmax(int(margin), scale)


class SphereFaceLoss(_FusedMargin, theirs.SphereFaceLoss):
    """``pytorch_metric_learning.losses.SphereFaceLoss``, fused."""

    _library = theirs.SphereFaceLoss

    def _made(self, scale: float, margin: float) -> Margin:
        LSoftmax(int(margin), scale)  # its checks of the scale, which is the embeddings' here
        return SphereFace(int(margin))

    def _taken(self: Any, embeddings: Tensor) -> Tensor:
        return embeddings if self.scale == 1 else embeddings * self.scale  # |s x| = s |x|, and the angle stays


class NormalizedSoftmaxLoss(_Fused, theirs.NormalizedSoftmaxLoss):
    """``pytorch_metric_learning.losses.NormalizedSoftmaxLoss``, fused for cosine and dot-product similarities."""

    _library = theirs.NormalizedSoftmaxLoss
    _replaced = ("get_logits",)
    _distances = (DotProductSimilarity, CosineSimilarity)
    _settings = ("temperature",)

    def _kind(self: Any) -> object:
        return self.distance.normalize_embeddings

    def _made(self: Any, temperature: float) -> Margin:  # type: ignore[override]
        cosine = NormFace(1 / temperature)
        return cosine if self.distance.normalize_embeddings else Softmax(normalize_weight=True)

    def _taken(self: Any, embeddings: Tensor) -> Tensor:
        return embeddings if self.distance.normalize_embeddings else embeddings / self.temperature
