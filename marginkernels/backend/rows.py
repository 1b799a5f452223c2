"""The arithmetic of O(N D) around the passes, with PyTorch's operators in float64: what every backend does unless it has its own."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = torch.float64
#: A row or a centre whose norm lies below this counts as the zero vector: similarity 0 to everything, gradient 0.
TINY = 1e-30


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of ``dtype`` accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v/|v| (N, D) float64 with zero for a zero row, |v| (N,), and 1/|v| (N,) with 0 there. float64 holds the square of any float32."""
    wide = v.to(WIDE)
    norm = torch.linalg.vector_norm(wide, dim=1)
    inverse = norm.reciprocal().masked_fill(norm < TINY, 0.0)
    return wide * inverse[:, None], norm, inverse


def own_centres(w: Tensor, labels: Tensor) -> Tensor:
    """(N, D) float64 centre of each row's label, zero where the label is not one of ``w``'s."""
    if w.shape[0] == 0:
        return torch.zeros(labels.shape[0], w.shape[1], dtype=WIDE, device=w.device)
    near = labels.clamp(0, w.shape[0] - 1)
    return w.index_select(0, near).to(WIDE).masked_fill((near != labels)[:, None], 0.0)


def rows(x: Tensor, w: Tensor, labels: Tensor, normalize_embedding: bool, normalize_weight: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`.base.Backend.rows`."""
    unit, norm, inverse = unit_rows(x)
    power = torch.ldexp(torch.ones_like(norm), torch.frexp(norm).exponent)
    prepared = (x.to(WIDE) / power[:, None]).to(x.dtype).contiguous()
    factor = power * inverse if normalize_embedding else power
    centre = own_centres(w, labels)
    unit_centre = unit_rows(centre)[0]
    cosine = (unit * unit_centre).sum(1).clamp(-1, 1)
    if normalize_embedding and normalize_weight:
        similarity = cosine.clone()
    else:
        side = unit if normalize_embedding else x.to(WIDE)
        similarity = (side * (unit_centre if normalize_weight else centre)).sum(1)
    return prepared, factor.to(accumulator(x.dtype)), similarity, cosine


def row_gradient(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    u: Tensor,
    softmax: Tensor,
    uniform_u: Tensor | None,
    uniform: Tensor | None,
    target: Tensor,
    normalize_embedding: bool,
    normalize_weight: bool,
) -> Tensor:
    """See :meth:`.base.Backend.row_gradient`."""
    centre = own_centres(w, labels)
    if normalize_weight:
        centre = unit_rows(centre)[0]
    d = softmax.to(WIDE)[:, None] * u.to(WIDE) + target.to(WIDE)[:, None] * centre
    if uniform_u is not None:
        d = d + uniform.to(WIDE)[:, None] * uniform_u.to(WIDE)
    if normalize_embedding:
        unit, _, inverse = unit_rows(x)
        d = (d - (d * unit).sum(1, keepdim=True) * unit) * inverse[:, None]
    return d.to(x.dtype)
