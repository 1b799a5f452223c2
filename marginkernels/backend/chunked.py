"""The ``torch`` backend: the two passes in plain PyTorch, a chunk of classes at a time; any device, any dtype, flat memory.

What ``auto`` falls back to where no compiled kernel serves, and the plainest reading of the algorithm. Products become logits, and logits
their exponentials, in the same memory: on a GPU each step is a kernel that reads and writes a whole chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import nontarget
from ..core.nontarget import NonTarget
from ..core.numerics import chunks, classes_of, inverse_norm, matmul
from ..core.types import ClassPassOutput, PassInputs, Reduction, Request, RowPassOutput, Upstream
from .base import Backend
from .online_softmax import OnlineSoftmax


class ChunkedBackend(Backend):
    name = "torch"
    device_types = ("cpu", "cuda")
    tested_on = ("cpu",)
    max_sub_centers = None
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    summary = "plain PyTorch, a chunk of classes at a time: any device, library matrix products"

    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        p, sums = inputs, OnlineSoftmax.init(inputs, request)
        labels, k = classes_of(p.labels, p.sub_centers), p.sub_centers
        for start, stop in chunks(p.x, p.num_classes, k):
            w, factor = _centers(p, start * k, stop * k)
            if factor is not None:
                sums.class_factor[start * k : stop * k] = factor
            own = _OwnColumn(labels, start, stop)
            logits, cos, winner = _logits(p, w, start, stop, need_cos=request.need_cos)
            if request.reduction == Reduction.LOGIT_SUM:
                weight = torch.ones_like(logits) if p.class_weight is None else p.class_weight[start:stop].expand_as(logits).clone()
                own.fill(weight, 0.0)
                sums.total += own.fill(logits, 0.0).mul_(weight).sum(1)
            else:
                highest = own.fill(logits, -torch.inf).amax(1)
                raw = highest if p.non_target == NonTarget.IDENTITY else _highest_raw(p, cos, own, start, stop)
                sums.max_logit = torch.maximum(sums.max_logit, raw)
                if request.reduction == Reduction.SOFTPLUS_SUM:
                    sums.total += torch.logaddexp(logits, logits.new_zeros(())).sum(1)
                    weight = logits.sigmoid_()
                else:
                    weight = _exponentials(sums, logits, highest, request)
            if request.need_cos:
                assert cos is not None
                sums.cos += (weight * nontarget.value(p.non_target, cos, p.threshold, p.t)).sum(1)
            if request.need_center:
                if p.non_target != NonTarget.IDENTITY:
                    assert cos is not None
                    weight *= nontarget.slope(p.non_target, cos, p.threshold, p.t)
                sums.center += matmul(_to_winners(weight.to(p.x.dtype), winner, k), w, p.acc_dtype)
        return sums.finalize(request)

    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        p, out = inputs, ClassPassOutput.allocate(inputs, need_weight, need_bias)
        upstream = upstream.rounded(p.acc_dtype)
        target = upstream.d_target_cos * p.row_factor
        labels, k = classes_of(p.labels, p.sub_centers), p.sub_centers
        for start, stop in chunks(p.x, p.num_classes, k):
            rows = slice(start * k, stop * k)
            w, factor = _centers(p, rows.start, rows.stop, class_factor)
            own = _OwnColumn(labels, start, stop)
            logits, cos, winner = _logits(p, w, start, stop)
            factor_of_row = upstream.d_lse
            if upstream.reduction == Reduction.SOFTPLUS_SUM:
                weight = logits.sigmoid_()
            else:
                weight = logits.sub_(upstream.lse[:, None]).exp_()
            if upstream.d_logit_sum is not None:
                each = upstream.d_logit_sum[:, None]
                weight = weight.mul_(upstream.d_lse[:, None]).add_(each if p.class_weight is None else each * p.class_weight[start:stop])
                factor_of_row = torch.ones_like(upstream.d_lse)
            if need_bias:
                assert upstream.d_target_bias is not None
                moved = weight
                if p.non_target == NonTarget.CLIPPED:
                    assert cos is not None
                    moved = weight * nontarget.slope(p.non_target, cos, p.threshold, p.t)
                out.d_bias[start:stop] = own.fill(moved * (factor_of_row / p.scale)[:, None], upstream.d_target_bias).sum(0)
            if need_weight:
                if p.non_target != NonTarget.IDENTITY:
                    assert cos is not None
                    weight *= nontarget.slope(p.non_target, cos, p.threshold, p.t)
                if winner is not None:
                    weight = _to_winners(own.fill(weight, 0.0), winner, k)
                    own = _OwnColumn(p.labels, rows.start, rows.stop)
                v = _weighted_rows(p, weight, factor_of_row * p.row_factor, own, target)
                if factor is None:
                    out.d_weight[rows] = v
                else:
                    unit = _times(p.w[rows], factor, p.acc_dtype)
                    torch.mul(v.addcmul_(unit, (v * unit).sum(1, keepdim=True), value=-1), factor[:, None], out=out.d_weight[rows])
        return out


def _exponentials(sums: OnlineSoftmax, logits: Tensor, highest: Tensor, request: Request) -> Tensor:
    """Exponentials of a chunk's ``logits`` (N, chunk), in their place, against the running maximum, which moves to ``highest`` (N,) where
    that is more; the sums that the request wants shrink with it, and the total grows."""
    higher = torch.maximum(sums.running_max, highest)
    base = higher.masked_fill(higher == -torch.inf, 0)
    decay = torch.exp(sums.running_max - base)
    weight = logits.sub_(base[:, None]).exp_()
    sums.running_max = higher
    sums.total = sums.total * decay + weight.sum(1)
    if request.need_cos:
        sums.cos *= decay
    if request.need_center:
        sums.center *= decay[:, None]
    return weight


class _OwnColumn:
    """Where each row's target lies in a chunk of classes: written without a mask as large as the chunk.

    Args:
        labels: (N,) int64, anything outside [start, stop) for a row whose target is not in the chunk.
    """

    def __init__(self, labels: Tensor, start: int, stop: int) -> None:
        column = labels - start
        self.index = column.clamp(0, stop - start - 1)[:, None]
        self.inside = (self.index[:, 0] == column)[:, None]

    def fill(self, v: Tensor, value: float | Tensor) -> Tensor:
        """``v`` (N, chunk) with ``value``, a number or (N,), in the rows' own columns, in place."""
        value = value[:, None] if isinstance(value, Tensor) else value
        return v.scatter_(1, self.index, torch.where(self.inside, value, v.gather(1, self.index)))


def _centers(p: PassInputs, start: int, stop: int, class_factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows [start, stop) of the centers (normalized where the head wants it) in the product's dtype, and the factor a (chunk,) of each."""
    w = p.w[start:stop]
    if not p.normalize_weight:
        return w.to(p.x.dtype), None
    factor = inverse_norm(w.to(p.acc_dtype)) if class_factor is None else class_factor[start:stop]
    return _times(w, factor, p.x.dtype), factor


def _times(w: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``w`` (chunk, D) times ``factor`` (chunk,), rounded to ``dtype`` once."""
    return torch.mul(w, factor[:, None], out=w.new_empty(w.shape, dtype=dtype))


def _logits(p: PassInputs, w: Tensor, start: int, stop: int, need_cos: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z_ij (N, chunk), of the same bits in both passes; in memory of its own, c_ij where a transform or ``need_cos`` wants it; and which
    sub-center of each class it is, where there are several: (N, chunk) int64, the first of equals."""
    product, winner = matmul(p.x, w.T, p.acc_dtype), None
    if p.sub_centers > 1:
        product, winner = product.unflatten(1, (-1, p.sub_centers)).max(2)
    if p.non_target == NonTarget.IDENTITY:
        value, scale = product, p.scale * p.row_factor
        cos = value * p.row_factor[:, None] if need_cos else None
    else:
        cos = product.mul_(p.row_factor[:, None])
        value, scale = nontarget.value(p.non_target, cos, p.threshold, p.t), p.scale
    if p.bias is None:
        return value.mul_(scale[:, None]), cos, winner
    return torch.addcmul(p.bias[start:stop], value, scale[:, None], out=value), cos, winner


def _to_winners(weight: Tensor, winner: Tensor | None, sub_centers: int) -> Tensor:
    """Weights (N, chunk) of the classes as weights of their sub-centers: each goes to the winner, 0 to the others."""
    if winner is None:
        return weight
    spread = weight.new_zeros(*weight.shape, sub_centers)
    return spread.scatter_(2, winner[:, :, None], weight[:, :, None]).flatten(1)


def _highest_raw(p: PassInputs, cos: Tensor | None, own: _OwnColumn, start: int, stop: int) -> Tensor:
    """(N,) the highest logit of a chunk without the transform, the row's target left out; the target's column of ``cos`` becomes 0."""
    assert cos is not None
    if p.bias is None:
        highest = own.fill(cos, -torch.inf).amax(1) * p.scale
        own.fill(cos, 0.0)
        return highest
    return own.fill(torch.addcmul(p.bias[start:stop], cos, p.scale[:, None]), -torch.inf).amax(1)


def _weighted_rows(p: PassInputs, weight: Tensor, factor: Tensor, own: _OwnColumn, target: Tensor) -> Tensor:
    """(chunk, D) ``sum_i g_ij x_i`` with g_ij = weight_ij factor_i, but target_i in the row's own column; ``weight`` may be overwritten.

    Slopes near a cosine of 1 can be larger than float16 goes, the softmax of a sure row smaller: there each class is taken times a power
    of two that brings its largest to 2^13 and more.
    """
    if p.x.dtype != torch.float16:
        out = weight if weight.dtype == p.x.dtype else torch.empty_like(weight, dtype=p.x.dtype)
        g = own.fill(torch.mul(weight, factor[:, None], out=out), target.to(p.x.dtype))
        return matmul(g.T, p.x, p.acc_dtype)
    g = own.fill(weight.mul_(factor[:, None]), target)
    largest = torch.linalg.vector_norm(g, torch.inf, dim=0)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    pow2 = torch.where(largest.isfinite() & (largest > 0), torch.ldexp(torch.ones_like(largest), 14 - exponent), 1.0)
    return matmul(g.mul_(pow2).to(p.x.dtype).T, p.x, p.acc_dtype).div_(pow2[:, None])
