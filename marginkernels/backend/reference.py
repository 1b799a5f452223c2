"""The judge: eager, plain and slow, in any float dtype on any device.

It forms all N x C logits from the margin's target *value* and lets autograd differentiate. It uses neither the margin's slope nor any
of the passes. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import forms
from ..margins import Margin, Rows
from .base import TINY

DEVICE_TYPES = ("cpu", "cuda", "any")
NOTE = "eager, holds the N x C logits; the judge of the others"


def normalize(v: Tensor) -> Tensor:
    """Rows of ``v`` over their norms; a row below ``TINY`` becomes zero, with zero gradient."""
    largest = v.detach().abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(v.shape[0], 1)
    zero = largest < TINY / v.shape[1] ** 0.5 if v.shape[1] else largest == 0
    v = v / torch.where(zero, 1, largest)
    v = torch.where(zero, 1, v)
    return torch.where(zero, 0, v / torch.linalg.vector_norm(v, dim=1, keepdim=True))


def losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    bias: Tensor | None,
    label_smoothing: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) loss of each row, 0 where ``labels`` is -1, and the step's statistics; see :func:`marginkernels.head_losses`.

    Computed in ``dtype``; by default the inputs' own, but at least float32.
    """
    dtype = dtype or torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, weight.dtype))
    x, w = embeddings.to(dtype), weight.to(dtype)
    b = 0 if bias is None else bias.to(dtype)
    c = w.shape[0]
    rows = Rows(x, labels, c)
    cos = (normalize(x) if margin.normalize_embedding else x) @ (normalize(w) if margin.normalize_weight else w).T
    own = labels[:, None] == torch.arange(c, device=labels.device)
    column = labels.clamp_min(0)[:, None]
    target = cos.gather(1, column)[:, 0]
    if margin.normalize_embedding and margin.normalize_weight:  # rounding may leave [-1, 1]
        target = target + (target.clamp(-1, 1) - target).detach()
    if margin.training:
        with torch.no_grad():
            margin.update(target, rows, lambda s: torch.logsumexp((s.to(dtype) * cos).masked_fill(own, -torch.inf), 1))
    value, _ = margin.target(target, rows)
    scale = torch.as_tensor(margin.row_scale(rows), dtype=dtype, device=x.device).expand(x.shape[0])[:, None]
    threshold = t = None
    if margin.form != forms.IDENTITY:
        threshold = margin.threshold(target, rows).detach()
        t = torch.as_tensor(margin.t, dtype=dtype, device=x.device).detach().clone().reshape(())
    logits = scale * torch.where(own, value[:, None].to(dtype), forms.value(margin.form, cos, threshold, t)) + b
    log_p = torch.log_softmax(logits, 1)
    log_py = log_p.gather(1, column)[:, 0]
    loss = -(1 - label_smoothing) * log_py - label_smoothing * log_p.mean(1)
    if margin.focal_gamma:
        # A sure row has 1 - p = 0, where a power below one has no derivative.
        loss = loss * (-torch.expm1(log_py)).clamp_min(torch.finfo(dtype).tiny) ** margin.focal_gamma
    with torch.no_grad():
        raw = scale * cos + b
        best = raw.masked_fill(own, -torch.inf).amax(1)
        length = torch.linalg.vector_norm(x, dim=1) if not margin.normalize_embedding else 1
        width = torch.linalg.vector_norm(w, dim=1)[column[:, 0]] if not margin.normalize_weight else 1
        unit = length * width
        stats = {
            "target_cosine": rows.mean(torch.where(torch.as_tensor(unit > 0, device=x.device), target / unit, 0)),
            "scale": rows.mean(scale[:, 0]),
            "top1": rows.mean((raw.gather(1, column)[:, 0] > best).to(dtype)),
        }
    return torch.where(rows.valid, loss, 0), stats
