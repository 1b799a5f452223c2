"""The two passes in plain PyTorch, a slab of classes at a time: any device, any dtype, library matrix products, flat memory.

What `auto` falls back to where no compiled kernel serves, and the plainest reading of the algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import forms
from .base import TINY, Backend, Problem, RowPass, RowSums, RowWeights

#: Logits held at once; 4M float32 are 16 MB, small against any weight worth a slab.
SLAB_ELEMENTS = 1 << 22


class SlabBackend(Backend):
    name = "slab"
    device_types = ("cpu", "cuda")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    summary = note = "plain PyTorch, a slab of classes at a time: any device, library matrix products"

    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        sums = RowSums.start(p, need_u=need_u, need_moment=need_moment)
        for start, stop in slabs(p.x.shape[0], p.w.shape[0]):
            w, a = _centres(p, start, stop)
            if a is not None:
                sums.class_factor[start:stop] = a
            cos, own = _similarity(p, w, start, stop)
            logits = _logits(p, cos, start, stop)
            raw = logits if p.form == forms.IDENTITY else _logits(p, cos, start, stop, form=forms.IDENTITY)
            sums.top = torch.maximum(sums.top, raw.masked_fill(own, -torch.inf).amax(1))
            if uniform:
                weight = torch.ones_like(logits).masked_fill_(own, 0)
                sums.total += (logits * weight).sum(1)
            else:
                logits = logits.masked_fill(own, -torch.inf)
                higher = torch.maximum(sums.peak, logits.amax(1))
                base = higher.masked_fill(higher == -torch.inf, 0)
                decay = torch.exp(sums.peak - base)
                weight = torch.exp(logits - base[:, None])
                sums.peak = higher
                sums.total = sums.total * decay + weight.sum(1)
                if need_moment:
                    sums.moment *= decay
                if need_u:
                    sums.u *= decay[:, None]
            if need_moment:
                sums.moment += (weight * forms.value(p.form, cos, p.threshold, p.t)).sum(1)
            if need_u:
                weight = weight * forms.slope(p.form, cos, p.threshold, p.t)
                sums.u += product(weight.to(p.x.dtype), w, p.acc)
        return sums.done(uniform=uniform)

    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        n, c = p.x.shape[0], p.w.shape[0]
        dw = torch.empty_like(p.w, memory_format=torch.contiguous_format) if need_w else None
        db = torch.empty(c, dtype=p.acc, device=p.x.device) if need_bias else None
        for start, stop in slabs(n, c):
            w, a = _centres(p, start, stop, class_factor)
            cos, own = _similarity(p, w, start, stop)
            weight = row.softmax[:, None] * torch.exp(_logits(p, cos, start, stop) - row.lse[:, None])
            if row.uniform is not None:
                weight = weight + row.uniform[:, None]
            if need_bias:
                db[start:stop] = torch.where(own, row.bias[:, None], weight / p.scale[:, None]).sum(0)
            if need_w:
                g = torch.where(own, row.target[:, None], weight * forms.slope(p.form, cos, p.threshold, p.t))
                v = product((g * p.row_factor[:, None]).to(p.x.dtype).T, p.x, p.acc)
                if a is not None:
                    unit = p.w[start:stop].to(p.acc) * a[:, None]
                    v = a[:, None] * (v - (v * unit).sum(1, keepdim=True) * unit)
                dw[start:stop] = v
        return dw, db


def slabs(n: int, c: int):
    width = max(256, SLAB_ELEMENTS // max(n, 1))
    return ((start, min(start + width, c)) for start in range(0, c, width))


def _centres(p: Problem, start: int, stop: int, class_factor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A slab of centres (normalised where the head wants it) in the product's dtype, and the factor a (slab,) of each."""
    w = p.w[start:stop]
    if not p.normalize_weight:
        return w.to(p.x.dtype), None
    w = w.to(p.acc)
    a = inverse_norm(w) if class_factor is None else class_factor[start:stop]
    return (w * a[:, None]).to(p.x.dtype), a


def inverse_norm(w: Tensor) -> Tensor:
    """1/|w_j| (C,), 0 for a zero centre; squares neither overflow nor vanish, whatever the norm."""
    exponent = torch.frexp(w.abs().amax(1)).exponent
    norm = torch.ldexp(torch.linalg.vector_norm(torch.ldexp(w, -exponent[:, None]), dim=1), exponent)
    return torch.where(norm < TINY, 0.0, 1 / norm)


def _similarity(p: Problem, w: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """c_ij (N, slab) in acc, and where the column is the row's own target (N, slab) bool."""
    cos = product(p.x, w.T, p.acc) * p.row_factor[:, None]
    return cos, p.labels[:, None] == torch.arange(start, stop, device=p.labels.device)


def _logits(p: Problem, cos: Tensor, start: int, stop: int, form: int | None = None) -> Tensor:
    z = p.scale[:, None] * forms.value(p.form if form is None else form, cos, p.threshold, p.t)
    return z if p.bias is None else z + p.bias[start:stop]


def product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b accumulated in, and given as, ``acc``."""
    if a.dtype == acc:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)
