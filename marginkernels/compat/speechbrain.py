"""speechbrain's speaker classifier and its cost, together: in training no N x C cosines lie between the two.

In a recipe's YAML, ``classifier: !new:marginkernels.compat.speechbrain.Classifier`` and
``compute_cost: !new:marginkernels.compat.speechbrain.LogSoftmaxWrapper``, with the arguments as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..margins import ArcFace, CosFace, Margin
from ._fusible import Fusible

try:
    from speechbrain.lobes.models.ECAPA_TDNN import Classifier as _Classifier
    from speechbrain.nnet import losses as theirs
except ImportError as error:
    raise ImportError("marginkernels.compat.speechbrain subclasses speechbrain's classes: pip install speechbrain") from error

__all__ = ["Classifier", "LogSoftmaxWrapper", "Unclassified"]


@dataclass
class Unclassified:
    """What :class:`Classifier` gives in training: all that the cosines are made of.

    Attributes:
        embedding: (N, D).
        weight: (C, D), of the classifier, differentiable.
    """

    embedding: Tensor
    weight: Tensor

    def cosines(self) -> Tensor:
        """(N, 1, C), as speechbrain's classifier gives them."""
        return F.linear(F.normalize(self.embedding), F.normalize(self.weight)).unsqueeze(1)


class Classifier(_Classifier):
    """``speechbrain.lobes.models.ECAPA_TDNN.Classifier``, whose output in training mode is an :class:`Unclassified` for
    :class:`LogSoftmaxWrapper`; in eval mode it is the cosines (N, 1, C)."""

    def forward(self, x: Tensor) -> Tensor | Unclassified:
        if not self.training:
            cosines: Tensor = super().forward(x)
            return cosines
        for layer in self.blocks:
            x = layer(x)
        # A view, so that DistributedDataParallel finds the weight among what the output depends on.
        return Unclassified(x.squeeze(1), self.weight.view_as(self.weight))


class LogSoftmaxWrapper(Fusible, theirs.LogSoftmaxWrapper):
    """``speechbrain.nnet.losses.LogSoftmaxWrapper``, fused for what :class:`Classifier` gives in training and a ``loss_fn`` that
    is speechbrain's ``AdditiveAngularMargin`` or ``AngularMargin``. Cosines are taken as there."""

    def _margin(self) -> Margin:
        """The margin for ``loss_fn`` as it is now; made anew where its numbers have changed."""
        given: Any = self.loss_fn
        if type(given) is theirs.AngularMargin:
            settings: tuple[Any, ...] = (given.scale, given.margin)
        elif type(given) is theirs.AdditiveAngularMargin:
            m = given.margin
            if (given.cos_m, given.sin_m) != (math.cos(m), math.sin(m)):
                raise ValueError(f"loss_fn: the margin is {m} since it was made, and its cosine that of another")
            settings = (given.scale, m, "easy" if given.easy_margin else "linear")
        else:
            raise TypeError(f"loss_fn is {type(given).__name__}, neither speechbrain's AdditiveAngularMargin nor its AngularMargin")
        return self._kept(settings, lambda: (ArcFace if len(settings) == 3 else CosFace)(*settings))

    def forward(self, outputs: Tensor | Unclassified, targets: Tensor, length: Tensor | None = None) -> Tensor:
        """The mean loss ().

        Args:
            outputs: of :class:`Classifier`: an :class:`Unclassified`, or cosines (N, 1, C).
            targets: (N, 1).
            length: not used, as in speechbrain.
        """
        if not isinstance(outputs, Unclassified) or not self.fused:
            cosines = outputs.cosines() if isinstance(outputs, Unclassified) else outputs
            loss: Tensor = super().forward(cosines, targets, length)
            return loss
        labels = targets.squeeze(1).long()
        return self._losses(outputs.embedding, outputs.weight, labels, self._margin(), reduction="mean").reduce("mean")
