"""The public function: checks, the margin, the passes, the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend as registry
from . import forms
from .backend import reference
from .backend.base import accumulator
from .checks import check_inputs, check_reduction, checked_labels
from .margins import Margin, Rows
from .ops import WIDE, NonTargetLSE, bias_of, row_pass_op, rows_op

if TYPE_CHECKING:
    from .distributed.shard import Shard
    from .sampling import Sampler


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """Cross-entropy of a margin head over C classes, without the N x C logits.

    Args:
        embeddings: (N, D), float16, bfloat16, float32 or float64; N may be 0. Under autocast they are cast to its dtype.
        weight: (C, D) class centres, any float dtype, on the same device. Products run in the embeddings' dtype (the weight is converted
            a tile at a time) and accumulate in float32, or float64 for float64 embeddings.
        labels: (N,) int64 in [0, C), or ``ignore_index``.
        margin: a :class:`Margin`; in training mode its state advances by one step.
        bias: (C,), added to every logit after the scale, or None.
        reduction: ``"none"`` (N,), ``"mean"`` over the rows that are not ignored (0 where there is none) or ``"sum"``.
        ignore_index: rows with this label have no loss and no gradient.
        label_smoothing: epsilon in [0, 1]: the target distribution is 1 - eps + eps/C on the label, eps/C elsewhere.
        backend: ``"auto"``, or one of :func:`backends`; a named backend is used or refused, never replaced.
        workspace_mb: how much memory (2^20 bytes) the forward pass may leave to the backward pass: the exponentials of as many classes
            as fit, for which the backward pass then needs one matrix product instead of two. 0 keeps nothing, infinity all; None is the
            backend's own choice: 128 for ``cpu``, where that was measured to pay, else 0. A backend that has no use for it ignores it.

    Returns:
        The loss, float32 (float64 for float64 embeddings).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Out-of-range labels on a GPU are counted there,
            left out of the loss, and reported by a later call (see :func:`marginkernels.checks.checked_labels`), so that no step waits.
    """
    check_reduction(reduction)
    losses, valid, _ = head_losses(
        embeddings,
        weight,
        labels,
        margin=margin,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        backend=backend,
        workspace_mb=workspace_mb,
    )
    return reduce(losses, valid, reduction)


def reduce(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """(N,) losses to the asked reduction; summed in float64, so that the order of the sum does not show."""
    if reduction == "none":
        return losses
    total = losses.sum(dtype=WIDE)
    return (total if reduction == "sum" else total / valid.sum().clamp_min(1)).to(losses.dtype)


def head_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str = "auto",
    workspace_mb: float | None = None,
    shard: Shard | None = None,
    sampler: Sampler | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The per-row losses behind :func:`margin_cross_entropy`, and the step's statistics.

    Args:
        shard: where ``weight`` and ``bias`` are one rank's part of the classes; labels count over all of them. See :class:`MarginHead`.
        sampler: draws the classes that take part. The others are as if they were not there, also to the label smoothing.

    Returns:
        losses (N,), float32 or float64, 0 for ignored rows (with a shard, the rows of all ranks, each rank's padded to one number of rows);
        valid (N,) bool; and detached scalar tensors by name: ``target_cosine`` (mean), ``scale`` (mean over rows), ``top1`` (share of rows
        whose target is the top class, margin apart) and the margin's own state.
    """
    check_inputs(embeddings, weight, labels, margin, bias, label_smoothing, workspace_mb, shard=shard is not None)
    device = embeddings.device.type
    if torch.is_autocast_enabled(device) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(device))
    name = registry.resolve(backend, device, embeddings.dtype, weight.dtype, weight.shape[1])
    if name == "reference" and (shard is not None or sampler is not None):
        raise ValueError("backend: expected a fused backend for a head that is sharded or samples its classes, got 'reference'")
    num_classes = weight.shape[0] if shard is None else shard.num_classes
    if shard is not None:
        embeddings, labels = shard.gather(embeddings, labels, ignore_index)
    margin.bind(num_classes)
    labels = checked_labels(labels, num_classes, ignore_index)
    with torch.autocast(device, enabled=False):
        if name == "reference":
            losses, stats = reference.losses(embeddings, weight, labels, margin, bias, label_smoothing)
        else:
            rows = Rows(embeddings, labels, num_classes)
            part = Part.of(weight, bias, labels, shard, sampler)
            workspace = registry.get(name).workspace_mb if workspace_mb is None else workspace_mb
            workspace = int(min(workspace, 2**40) * 2**20)
            losses, stats = _fused_losses(rows, part, margin, label_smoothing, name, workspace)
    stats |= {name: buffer.reshape(()) for name, buffer in margin.named_buffers() if buffer.numel() == 1}
    losses = losses.to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    return losses, labels >= 0, {k: v.detach().to(torch.float32, copy=True) for k, v in stats.items()}


@dataclass(frozen=True)
class Part:
    """The classes that the passes of this process run over: all C of them, a shard's, or those drawn from either.

    Attributes:
        w: (K, D). bias: (K,) or None, with what sampling adds to it. labels: (N,) within K, -1 where the row's class is not here.
        added: () what sampling has added to the biases in all, or None. count: how many classes take part on all ranks.
        shard: None where all of them are here.
    """

    w: Tensor
    bias: Tensor | None
    labels: Tensor
    added: Tensor | None
    count: int
    shard: Shard | None

    @classmethod
    def of(cls, w: Tensor, bias: Tensor | None, labels: Tensor, shard: Shard | None, sampler: Sampler | None) -> Part:
        widths = [w.shape[0]] if shard is None else shard.widths()
        labels = labels if shard is None else shard.local(labels)
        added = None
        if sampler is not None:
            widths = [sampler.count(labels.shape[0], c) for c in widths]
            w, bias, labels, correction = sampler(w, bias, labels, 0 if shard is None else shard.start)
            if correction is not None:
                bias, added = correction if bias is None else bias + correction, correction.sum(dtype=WIDE)
        return cls(w, bias, labels, added, sum(widths), shard)


def _fused_losses(rows: Rows, part: Part, margin: Margin, label_smoothing: float, backend: str, workspace: int):
    x, w, bias, labels, shard = rows.embeddings, part.w, part.bias, part.labels, part.shard
    acc = accumulator(x.dtype)
    sides = (margin.normalize_embedding, margin.normalize_weight)
    with torch.no_grad():
        prepared, factor, similarity, cosine = rows_op(x.detach(), w.detach(), labels, *sides, backend)
        own_bias = bias_of(bias, labels)
        if shard is not None:
            similarity, cosine, own_bias = shard.from_owner(similarity, cosine, own_bias)
        if margin.training:

            def non_target_lse(scale: Tensor) -> Tensor:
                s = scale.to(acc).expand(x.shape[0]).contiguous()
                options = (forms.IDENTITY, margin.normalize_weight, False, False, False, 0, backend)
                found, top, *_ = row_pass_op(prepared, factor, w, None, labels, s, None, None, *options)
                return found.to(WIDE) if shard is None else shard.combine(found.to(WIDE), None, top)[0]

            margin.update(similarity, rows, non_target_lse)
    value, slope = margin.target(similarity, rows)
    scale = torch.as_tensor(margin.row_scale(rows), dtype=WIDE, device=x.device).expand(x.shape[0])
    threshold = t = None
    if margin.form != forms.IDENTITY:
        threshold = margin.threshold(similarity, rows).detach()
        t = torch.as_tensor(margin.t, dtype=WIDE, device=x.device).detach().clone().reshape(())
    options = (
        margin.form,
        *sides,
        label_smoothing > 0,
        torch.is_grad_enabled(),
        workspace,
        backend,
    )
    lse, cos, target_bias, total, top = NonTargetLSE.apply(x, w, bias, scale, labels, similarity, prepared, factor, threshold, t, options)
    if part.added is not None:
        total = total - part.added
    if shard is not None:
        lse, total, top = shard.combine(lse, total if label_smoothing else None, top)
        target_bias = torch.where(labels >= 0, target_bias, own_bias)
        value, scale = shard.once(value, labels), shard.once(scale, labels)
    # T(cos) to first order about where it stands: its value now, its slope for the backward pass.
    target = scale * (value + slope.detach() * (cos - similarity)) + target_bias
    gap = lse - target
    zero = torch.zeros_like(gap)
    losses = torch.logaddexp(gap, zero)  # softplus, without F.softplus's threshold
    if label_smoothing:
        losses = losses + label_smoothing * (target - (target + total) / part.count)
    if margin.focal_gamma:
        losses = losses * torch.exp(-margin.focal_gamma * torch.logaddexp(-gap, zero))
    with torch.no_grad():
        top1 = (scale * similarity + target_bias > top).to(WIDE)
        means = rows.mean(torch.stack([cosine, scale, top1]))
    stats = dict(zip(("target_cosine", "scale", "top1"), means.unbind(), strict=True))
    return torch.where(rows.valid, losses, 0), stats
