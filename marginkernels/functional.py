"""The public function: checks, the margin, the passes, the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as registry
from . import forms
from .backend import reference
from .checks import check_inputs, check_reduction, checked_labels
from .margins import Margin, Rows
from .ops import WIDE, NonTargetLSE, row_pass_op, rows_op


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
    workspace_mb: float = 0.0,
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
        workspace_mb: how much memory the forward pass may leave to the backward pass to spare it a matrix product. Backends that gain
            nothing from it ignore it. 0 keeps nothing.

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
    workspace_mb: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The per-row losses behind :func:`margin_cross_entropy`, and the step's statistics.

    Returns:
        losses (N,), float32 or float64, 0 for ignored rows; valid (N,) bool; and detached scalar tensors by name: ``target_cosine`` (mean),
        ``scale`` (mean over rows), ``top1`` (share of rows whose target is the top class, margin apart) and the margin's own state.
    """
    check_inputs(embeddings, weight, labels, margin, bias, label_smoothing, workspace_mb)
    device = embeddings.device.type
    if torch.is_autocast_enabled(device) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(device))
    margin.bind(weight.shape[0])
    labels = checked_labels(labels, weight.shape[0], ignore_index)
    name = registry.resolve(backend, device, embeddings.dtype, weight.dtype, weight.shape[1])
    with torch.autocast(device, enabled=False):
        if name == "reference":
            losses, stats = reference.losses(embeddings, weight, labels, margin, bias, label_smoothing)
        else:
            losses, stats = _fused_losses(embeddings, weight, labels, margin, bias, label_smoothing, name, int(workspace_mb * 2**20))
    stats |= {name: buffer.detach().clone() for name, buffer in margin.named_buffers()}
    losses = losses.to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    return losses, labels >= 0, {k: v.detach() for k, v in stats.items()}


def _fused_losses(x, w, labels, margin: Margin, bias, label_smoothing, backend, workspace):
    rows = Rows(x, labels, w.shape[0])
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        prepared, factor, similarity, cosine = rows_op(x.detach(), w.detach(), labels, margin.normalize_embedding, margin.normalize_weight)
        if margin.training:

            def non_target_lse(scale: Tensor) -> Tensor:
                s = scale.to(acc).expand(x.shape[0]).contiguous()
                found = row_pass_op(
                    prepared,
                    factor,
                    w,
                    None,
                    labels,
                    s,
                    None,
                    None,
                    forms.IDENTITY,
                    margin.normalize_weight,
                    False,
                    False,
                    False,
                    0,
                    backend,
                )
                return found[0].to(WIDE)

            margin.update(similarity, rows, non_target_lse)
    value, slope = margin.target(similarity, rows)
    scale = torch.as_tensor(margin.row_scale(rows), dtype=WIDE, device=x.device).expand(x.shape[0])
    threshold = t = None
    if margin.form != forms.IDENTITY:
        threshold = margin.threshold(similarity, rows).detach()
        t = torch.as_tensor(margin.t, dtype=WIDE, device=x.device).detach().clone()
    options = (margin.form, margin.normalize_embedding, margin.normalize_weight, label_smoothing > 0, workspace, backend)
    lse, cos, target_bias, total, top = NonTargetLSE.apply(x, w, bias, scale, labels, similarity, prepared, factor, threshold, t, options)
    # T(cos) to first order about where it stands: its value now, its slope for the backward pass.
    target = scale * (value + slope.detach() * (cos - similarity)) + target_bias
    gap = lse - target
    losses = -F.logsigmoid(-gap)  # softplus, without F.softplus's threshold
    if label_smoothing:
        losses = losses + label_smoothing * (target - (target + total) / w.shape[0])
    if margin.focal_gamma:
        losses = losses * torch.exp(margin.focal_gamma * F.logsigmoid(gap))
    stats = {
        "target_cosine": rows.mean(cosine),
        "scale": rows.mean(scale),
        "top1": rows.mean((scale * similarity + target_bias > top).to(WIDE)),
    }
    return torch.where(rows.valid, losses, 0), stats
