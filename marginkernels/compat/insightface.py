"""insightface's ``recognition/arcface_torch`` head, ``PartialFC_V2``, and its margin objects, without the N x C logits.

insightface's is a folder of scripts, not a package: nothing is imported from it. Margin objects are recognized by their attributes, so that
those of ``losses.py`` serve as well as the ones here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .. import margins
from ..distributed._shard import Shard
from ..loss import LossOptions, local_head_losses, workspace_bytes
from ..margins import Margin
from ..sampling import Sampler

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"]


class _Evenly(Shard):
    """insightface's division: C // R classes for each rank, and one more for each of the first C % R."""

    def bounds(self, rank: int) -> tuple[int, int]:
        width, more = divmod(self.num_classes, self.size)
        start = width * rank + min(rank, more)
        return start, start + width + (rank < more)


class _Settings(nn.Module):
    """A margin as insightface's classes describe it: numbers, no state."""

    def forward(self, logits: Tensor, labels: Tensor) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: expected to be given to PartialFC_V2, which makes no logits, got a call with logits")


class CombinedMarginLoss(_Settings):
    """Scale s; with ``m3 > 0`` CosFace with margin m3, whatever m1 and m2 are; else ``m1 = 1`` and ArcFace with margin m2 in radians. A
    non-target cosine above ``interclass_filtering_threshold``, where that is positive, counts as 0."""

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0):
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.easy_margin = False


class ArcFace(_Settings):
    """ArcFace with scale s and a margin in radians."""

    def __init__(self, s: float = 64.0, margin: float = 0.5):
        super().__init__()
        self.s, self.margin, self.easy_margin = s, margin, False


class CosFace(_Settings):
    """CosFace with scale s and margin m."""

    def __init__(self, s: float = 64.0, m: float = 0.40):
        super().__init__()
        self.s, self.m = s, m


def fused_margin(margin_loss: object) -> Margin:
    """The margin of this package that computes as ``margin_loss`` does.

    Args:
        margin_loss: a :class:`marginkernels.Margin`, or an object with the attributes of insightface's ``CombinedMarginLoss``,
            ``ArcFace`` or ``CosFace``. Their ArcFace has a slope of 1 (the margin is added where autograd does not see it) and no fallback
            past pi.

    Raises:
        TypeError: anything else. ValueError: ``CombinedMarginLoss`` with m1 other than 1 and no m3, which insightface refuses too.
    """
    if isinstance(margin_loss, Margin):
        return margin_loss
    given = vars(margin_loss) if hasattr(margin_loss, "__dict__") else {}
    above = given.get("interclass_filtering_threshold", 0)
    above = above if 0 < above < 1 else None
    if {"s", "m1", "m2", "m3"} <= given.keys():
        if given["m3"] > 0:
            return margins.CosFace(given["s"], given["m3"], filter_above=above)
        if given["m1"] != 1 or given["m3"] < 0:
            raise ValueError(f"margin_loss: expected m1 = 1 where m3 = 0, and m3 >= 0, got m1 = {given['m1']!r}, m3 = {given['m3']!r}")
        return margins.ArcFace(given["s"], given["m2"], beyond_pi="none", gradient="detached", filter_above=above)
    if {"s", "margin", "easy_margin"} <= given.keys():
        return margins.ArcFace(given["s"], given["margin"], beyond_pi="none", gradient="detached")
    if {"s", "m"} <= given.keys():
        return margins.CosFace(given["s"], given["m"])
    raise TypeError(
        "margin_loss: expected a Margin, or CombinedMarginLoss, ArcFace or CosFace of insightface (known by s, m1, m2 and m3; "
        f"s, margin and easy_margin; s and m), got {margin_loss!r}, which would need the N x C logits"
    )


class PartialFC_V2(nn.Module):
    """insightface's ``PartialFC_V2``: class centers divided over the ranks of the default group, where there is one, or all in one process.

    Args:
        margin_loss: see :func:`fused_margin`; read anew in every call.
        embedding_size: D, the size of an embedding.
        num_classes: C, over all ranks.
        sample_rate: the share of each rank's classes that take part in a step, in (0, 1].
        fp16: products of normalized rows and centers in float16.
        batch_size: the most rows that any rank brings; without it the ranks ask each other in every step, which waits for the device.
        backend, workspace_mb: see :func:`marginkernels.margin_cross_entropy`.

    Shapes:
        ``head(local_embeddings (B, D), local_labels (B,) or (B, 1))`` gives the mean loss of the rows of all ranks. A label -1 is ignored.

    Attributes:
        weight: (num_local, D) Parameter, all of ``state_dict()``: insightface's per-rank checkpoints.
        rank, world_size, num_local, class_start, num_sample, embedding_size, sample_rate, fp16, margin_softmax: as insightface's.
        weight_index: the classes of the last step's draw, among this rank's, where classes are sampled.

    The gradient of the weight is that of the loss, and that of the embeddings is ``world_size`` times it, for DDP's mean.
    """

    _version = 2

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        batch_size: int | None = None,
        backend: str = "auto",
        workspace_mb: float | None = None,
    ):
        super().__init__()
        fused_margin(margin_loss)  # what cannot be fused is refused here
        self.shard = None
        if dist.is_available() and dist.is_initialized():
            assert dist.group.WORLD is not None
            self.shard = _Evenly(num_classes, dist.group.WORLD, batch_size)
        self.rank, self.world_size = (0, 1) if self.shard is None else (self.shard.rank, self.shard.size)
        self.class_start, stop = (0, num_classes) if self.shard is None else (self.shard.start, self.shard.stop)
        self.num_local = stop - self.class_start
        self.embedding_size, self.sample_rate, self.fp16 = embedding_size, sample_rate, fp16
        self.num_sample = int(sample_rate * self.num_local)
        self.options = LossOptions(-1, 0.0, backend, workspace_bytes(workspace_mb))
        self.weight = nn.Parameter(torch.normal(0, 0.01, (self.num_local, embedding_size)))
        if self.shard is not None:
            self.shard.mark(self.weight)
        self.margin_softmax = margin_loss
        self.sampler = None
        if sample_rate != 1:
            self.sampler = Sampler(sample_rate, sparse_grad=False)
            for name in ("seed", "draws"):  # drawn from torch's generator in each step, as insightface's: no state
                self.sampler.register_buffer(name, getattr(self.sampler, name), persistent=False)
        self._made: tuple[object, Margin] | None = None

    @property
    def weight_index(self) -> Tensor | None:
        """The classes of the last draw, or None."""
        return None if self.sampler is None else self.sampler.index

    def _margin(self) -> Margin:
        """The margin for ``margin_softmax`` as it is now."""
        given = self.margin_softmax
        if isinstance(given, Margin):
            return given
        values = {name: value for name, value in vars(given).items() if isinstance(value, float | int)}
        if self._made is None or self._made[0] != (type(given), values):
            self._made = (type(given), values), fused_margin(given)
        return self._made[1]

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        labels = local_labels.reshape(-1).long()
        embeddings = local_embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            if self.fp16:
                embeddings = F.normalize(embeddings).half()
            if self.sampler is not None:
                self.sampler.seed.fill_(int(torch.randint(1 << 62, ())))
                self.sampler.draws.zero_()
            found = local_head_losses(
                embeddings, self.weight, labels, self._margin(), None, self.options, shard=self.shard, sampler=self.sampler
            )
        return found.reduce("mean")
