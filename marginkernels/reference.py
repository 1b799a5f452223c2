"""The reference: eager, plain and slow, in any float dtype on any device; what every backend is compared with.

It forms all N x C logits from the margin's target *value* and lets autograd differentiate. It uses neither the margin's slope nor any
of the passes. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .core import nontarget
from .core.numerics import TINY
from .core.types import Reduction, RowLogits
from .margins import BatchInfo, Margin
from .margins.contract import advance, evaluate


def normalize(v: Tensor) -> Tensor:
    """Rows of ``v`` over their norms; a row below ``TINY`` becomes zero, with zero gradient."""
    largest = v.detach().abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(v.shape[0], 1)
    zero = largest < TINY / v.shape[1] ** 0.5 if v.shape[1] else largest == 0
    v = v / torch.where(zero, 1, largest)
    v = torch.where(zero, 1, v)
    return torch.where(zero, 0, v / torch.linalg.vector_norm(v, dim=1, keepdim=True))


def _cross_entropy(
    logits: Tensor, own: Tensor, column: Tensor, label_smoothing: float, focal_gamma: float, class_weight: Tensor | None
) -> Tensor:
    """(N,) of ``logits`` (N, C); ``own`` (N, C) is where a row's own class is, ``column`` (N, 1) its number."""
    log_p = torch.log_softmax(logits, 1)
    log_py = log_p.gather(1, column)[:, 0]
    loss = -(1 - label_smoothing) * log_py
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
        loss = class_weight[column[:, 0]] * loss
    if label_smoothing:  # 0 times the -inf of a masked class would be NaN
        loss = loss - label_smoothing * (log_p if class_weight is None else class_weight * log_p).mean(1)
    if focal_gamma:
        # log(1 - p) as a sum over the other classes: 1 - p itself has no digits left where the row is sure.
        rest = log_p.masked_fill(own, -torch.inf).clamp_min(math.log(torch.finfo(logits.dtype).tiny))
        loss = loss * torch.exp(focal_gamma * torch.logsumexp(rest, 1))
    return loss


def _binary(logits: Tensor, own: Tensor, margin: Margin) -> Tensor:
    """(N,) of ``logits`` (N, C), where each class has a binary classifier."""
    signed = torch.where(own, -logits, logits)
    terms = torch.logaddexp(signed, torch.zeros_like(signed))
    return torch.where(own, margin.target_weight * terms, margin.other_weight * terms).sum(1)


def losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    bias: Tensor | None,
    label_smoothing: float,
    dtype: torch.dtype | None = None,
    class_weight: Tensor | None = None,
    advances: bool = True,
    sub_centers: int = 1,
) -> tuple[Tensor, dict[str, Tensor], RowLogits]:
    """(N,) loss of each row, 0 where ``labels`` is -1, the step's statistics (see :func:`marginkernels.head_losses`) and the rows' logits.

    Computed in ``dtype``; by default the inputs' own, but at least float32. In training mode the margin's state moves, if it ``advances``.
    With ``sub_centers`` rows of ``weight`` for each class, a class has the highest of their similarities, the first of equals.
    """
    dtype = dtype or torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, weight.dtype))
    x, w = embeddings.to(dtype), weight.to(dtype)
    b = torch.zeros((), dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    shared = margin.class_bias()
    b = b if shared is None else b + shared.to(b)
    c = w.shape[0] // sub_centers
    cos = (normalize(x) if margin.normalize_embedding else x) @ (normalize(w) if margin.normalize_weight else w).T
    own = labels[:, None] == torch.arange(c, device=labels.device)
    column = labels.clamp_min(0)[:, None]
    row = column[:, 0]
    if sub_centers > 1:
        cos, nearest = cos.unflatten(1, (c, sub_centers)).max(2)
        row = (column * sub_centers + nearest.gather(1, column))[:, 0]
    center_norm = torch.linalg.vector_norm(w, dim=1)[row] if margin.needs_center_norm else None

    def highest(count: int) -> Tensor:
        others = torch.nn.functional.pad(cos.detach().masked_fill(own, -torch.inf), (0, count), value=-torch.inf)
        return others.topk(count, 1).values

    batch = BatchInfo(x, labels, c, center_norm=center_norm, nearest=highest)
    target = cos.gather(1, column)[:, 0]
    if margin.normalize_embedding and margin.normalize_weight:  # rounding may leave [-1, 1]
        target = target + (target.clamp(-1, 1) - target).detach()
    if margin.training and advances:
        with torch.no_grad():
            advance(margin, target, batch, lambda s: torch.logsumexp((s.to(dtype) * cos).masked_fill(own, -torch.inf), 1))
    at = evaluate(margin, target, batch, dtype)
    scale = at.scale[:, None]
    others = nontarget.value(margin.non_target, cos, at.threshold, at.t)
    moves = nontarget.moves(margin.non_target, cos, at.threshold, at.t)
    moved = b if moves is None else torch.where(own | moves, b, b.detach())
    logits = scale * torch.where(own, at.value[:, None].to(dtype), others) + moved
    if margin.reduction == Reduction.SOFTPLUS_SUM:
        loss = _binary(logits, own, margin)
    else:
        loss = _cross_entropy(logits, own, column, label_smoothing, margin.focal_gamma, class_weight)
    if margin.loss_factor != 1:
        loss = loss * margin.loss_factor
    if at.regularizer is not None:
        loss = loss + at.regularizer.to(dtype)
    with torch.no_grad():
        raw = scale * cos + b
        nearest = raw.masked_fill(own, -torch.inf).amax(1)
        other = RowLogits.transformed(margin.non_target, nearest, at.scale, shared, at.threshold, at.t)
        of_rows = RowLogits(raw.gather(1, column)[:, 0], logits.gather(1, column)[:, 0], nearest, other)
        length = torch.linalg.vector_norm(x, dim=1) if not margin.normalize_embedding else 1
        width = torch.linalg.vector_norm(w, dim=1)[row] if not margin.normalize_weight else 1
        unit = length * width
        to_center = torch.where(torch.as_tensor(unit > 0, device=x.device), target / unit, 0)
        stats = {
            "target_cosine": batch.mean(to_center),
            "target_angle": batch.mean(torch.acos(to_center.clamp(-1, 1))),
            "scale": batch.mean(scale[:, 0]),
            "top1": batch.mean((of_rows.plain > of_rows.nearest).to(dtype)),
            "beyond_margin": batch.mean((of_rows.own > of_rows.other).to(dtype)),
        }
    return torch.where(batch.valid, loss, 0), stats, of_rows
