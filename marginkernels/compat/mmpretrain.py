"""mmpretrain's ``ArcFaceClsHead``, whose ``loss()`` is computed without the N x C logits.

Importing this module registers it in ``mmpretrain.registry.MODELS`` under that name, in the place of mmpretrain's: a config gains one line,
``custom_imports = dict(imports=["marginkernels.compat.mmpretrain"], allow_failed_imports=False)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..margins import ArcFace, Margin
from ._fusible import Fusible, uncast

try:
    from mmpretrain.models.heads import ArcFaceClsHead as _ArcFaceClsHead
    from mmpretrain.models.losses import CrossEntropyLoss
    from mmpretrain.registry import MODELS
except ImportError as error:
    raise ImportError("marginkernels.compat.mmpretrain subclasses mmpretrain's head: pip install mmpretrain mmcv-lite") from error

__all__ = ["ArcFaceClsHead"]


class ArcFaceClsHead(Fusible, _ArcFaceClsHead):
    """``mmpretrain.models.heads.ArcFaceClsHead``; ``loss()`` is fused where ``loss_module`` is a cross-entropy over labels without class
    weights, and the samples have no scores (mixup, CutMix). ``forward`` and ``predict`` are mmpretrain's."""

    _library = _ArcFaceClsHead
    _replaced = ("forward", "_get_logit_with_margin")

    def _unfused(self) -> str | None:
        entropy = self.loss_module
        plain = type(entropy) is CrossEntropyLoss and not (entropy.use_sigmoid or entropy.use_soft) and entropy.reduction == "mean"
        if not plain or entropy.class_weight is not None:
            return f"loss_module is {entropy!r}"
        return None

    def _margin(self) -> Margin:
        """The margin for ``margins`` (C,) as they are now; made anew, which reads them, where :meth:`set_margins` has been called."""
        settings = (self.margins, self.margins._version, self.scale, self.easy_margin)
        held = self.__dict__.get("_held")
        if held is None or held[0][0] is not settings[0] or held[0][1:] != settings[1:]:
            beyond = "easy" if self.easy_margin else "linear"
            held = settings, ArcFace(float(self.scale), self.margins, beyond_pi=beyond)
            self.__dict__["_held"] = held
        margin: Margin = held[1]
        return margin

    def loss(self, feats: tuple[Tensor, ...], data_samples: list[Any], **kwargs: Any) -> dict[str, Tensor]:
        """``{"loss": ...}``, as mmpretrain's.

        Args:
            feats: of which the last (N, D) is used.
            data_samples: N, with ``gt_label``, or with ``gt_score`` too, for which mmpretrain's own code computes.
            **kwargs: for ``loss_module``; where there are some, mmpretrain's own code computes.
        """
        if kwargs or "gt_score" in data_samples[0] or not self.fused:
            found: dict[str, Tensor] = super().loss(feats, data_samples, **kwargs)
            return found
        embeddings = self.pre_logits(feats)
        labels = torch.cat([sample.gt_label for sample in data_samples])
        product = self.norm_product
        with uncast(embeddings.device):
            options = {"reduction": "sum", "sub_centers": product.k}
            total = self._losses(embeddings, product.weight, labels, self._margin(), **options).reduce("sum")
        return {"loss": self.loss_module.loss_weight * total / len(labels)}


MODELS.register_module(name="ArcFaceClsHead", module=ArcFaceClsHead, force=True)
