"""The ``torch`` backend: the two passes in plain PyTorch, a chunk of classes at a time; any device, any dtype, flat memory.

What ``auto`` falls back to where no compiled kernel serves, and the plainest reading of the algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import nontarget
from ..core.nontarget import NonTarget
from ..core.numerics import chunks, inverse_norm, matmul
from ..core.types import ClassPassOutput, PassInputs, Reduction, Request, RowPassOutput, Upstream
from .base import Backend
from .online_softmax import OnlineSoftmax


class ChunkedBackend(Backend):
    name = "torch"
    device_types = ("cpu", "cuda")
    tested_on = ("cpu",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    summary = "plain PyTorch, a chunk of classes at a time: any device, library matrix products"

    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        p, sums = inputs, OnlineSoftmax.init(inputs, request)
        for start, stop in chunks(p.x.shape[0], p.w.shape[0]):
            w, factor = _centers(p, start, stop)
            if factor is not None:
                sums.class_factor[start:stop] = factor
            cos, is_target = _similarity(p, w, start, stop)
            logits = _logits(p, p.non_target, cos, start, stop)
            raw = logits if p.non_target == NonTarget.IDENTITY else _logits(p, NonTarget.IDENTITY, cos, start, stop)
            sums.max_logit = torch.maximum(sums.max_logit, raw.masked_fill(is_target, -torch.inf).amax(1))
            if request.reduction == Reduction.LOGIT_SUM:
                weight = torch.ones_like(logits).masked_fill_(is_target, 0)
                sums.total += (logits * weight).sum(1)
            else:
                logits = logits.masked_fill(is_target, -torch.inf)
                higher = torch.maximum(sums.running_max, logits.amax(1))
                base = higher.masked_fill(higher == -torch.inf, 0)
                decay = torch.exp(sums.running_max - base)
                weight = torch.exp(logits - base[:, None])
                sums.running_max = higher
                sums.total = sums.total * decay + weight.sum(1)
                if request.need_cos:
                    sums.cos *= decay
                if request.need_center:
                    sums.center *= decay[:, None]
            if request.need_cos:
                sums.cos += (weight * nontarget.value(p.non_target, cos, p.threshold, p.t)).sum(1)
            if request.need_center:
                weight = weight * nontarget.slope(p.non_target, cos, p.threshold, p.t)
                sums.center += matmul(weight.to(p.x.dtype), w, p.acc_dtype)
        return sums.finalize(request)

    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        p, out = inputs, ClassPassOutput.allocate(inputs, need_weight, need_bias)
        upstream = upstream.rounded(p.acc_dtype)
        for start, stop in chunks(p.x.shape[0], p.w.shape[0]):
            w, factor = _centers(p, start, stop, class_factor)
            cos, is_target = _similarity(p, w, start, stop)
            logits = _logits(p, p.non_target, cos, start, stop)
            weight = upstream.d_lse[:, None] * torch.exp(logits - upstream.lse[:, None])
            if upstream.d_logit_sum is not None:
                weight = weight + upstream.d_logit_sum[:, None]
            if need_bias:
                assert upstream.d_target_bias is not None
                out.d_bias[start:stop] = torch.where(is_target, upstream.d_target_bias[:, None], weight / p.scale[:, None]).sum(0)
            if need_weight:
                g = torch.where(is_target, upstream.d_target_cos[:, None], weight * nontarget.slope(p.non_target, cos, p.threshold, p.t))
                v = _weighted_rows(p, g * p.row_factor[:, None])
                if factor is not None:
                    unit = p.w[start:stop].to(p.acc_dtype) * factor[:, None]
                    v = factor[:, None] * (v - (v * unit).sum(1, keepdim=True) * unit)
                out.d_weight[start:stop] = v
        return out


def _centers(p: PassInputs, start: int, stop: int, class_factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A chunk of centers (normalized where the head wants it) in the product's dtype, and the factor a (chunk,) of each."""
    w = p.w[start:stop]
    if not p.normalize_weight:
        return w.to(p.x.dtype), None
    w = w.to(p.acc_dtype)
    factor = inverse_norm(w) if class_factor is None else class_factor[start:stop]
    return (w * factor[:, None]).to(p.x.dtype), factor


def _similarity(p: PassInputs, w: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """c_ij (N, chunk) in acc_dtype, and where the column is the row's own target (N, chunk) bool."""
    cos = matmul(p.x, w.T, p.acc_dtype) * p.row_factor[:, None]
    return cos, p.labels[:, None] == torch.arange(start, stop, device=p.labels.device)


def _weighted_rows(p: PassInputs, g: Tensor) -> Tensor:
    """(chunk, D) ``sum_i g_ij x_i`` for g (N, chunk). Slopes near a cosine of 1 can be larger than float16 goes, the softmax of a sure row
    smaller: there each class is taken times a power of two that brings its largest to 2^13 and more."""
    if p.x.dtype != torch.float16:
        return matmul(g.to(p.x.dtype).T, p.x, p.acc_dtype)
    largest = g.abs().amax(0)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    pow2 = torch.where(largest.isfinite() & (largest > 0), torch.ldexp(torch.ones_like(largest), 14 - exponent), 1.0)
    return matmul((g * pow2).to(p.x.dtype).T, p.x, p.acc_dtype) / pow2[:, None]


def _logits(p: PassInputs, non_target: NonTarget, cos: Tensor, start: int, stop: int) -> Tensor:
    z = p.scale[:, None] * nontarget.value(non_target, cos, p.threshold, p.t)
    return z if p.bias is None else z + p.bias[start:stop]
