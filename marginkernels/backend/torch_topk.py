"""The search for the nearest class centers in plain PyTorch, a chunk of classes at a time: of every backend that has no kernel for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.numerics import best, chunks, falling, inverse_norm, matmul, prepared_rows, unit_rows
from ..core.types import TopkInputs, TopkOutput

#: Scores of a chunk on a processor, in its last cache, and the fewest classes worth a step of Python.
CHUNK_SCORES, LEAST_WIDTH = 1 << 20, 4096
#: Columns of a chunk whose maximum is looked at before the columns themselves; see :func:`_candidates`.
GROUP = 32
Scores = Callable[[int, int], Tensor]


def topk(inputs: TopkInputs, k: int) -> TopkOutput:
    """See :meth:`marginkernels.backend.Backend.topk`."""
    with torch.autocast(inputs.x.device.type, enabled=False):
        return _search(inputs, k)


def _search(inputs: TopkInputs, k: int) -> TopkOutput:
    """Holds N x chunk scores, never N x C. Reads values on a processor only."""
    p, (n, d), c = inputs, inputs.x.shape, inputs.w.shape[0] // inputs.sub_centers
    on_cpu = p.x.device.type == "cpu"
    # Processors have no products of half precision worth the rounding of unit vectors to it.
    rounds = p.as_in_passes and p.x.dtype != p.acc_dtype
    dtype = p.acc_dtype if on_cpu and not rounds else p.x.dtype
    if rounds:
        x, row_factor = prepared_rows(p.x, *unit_rows(p.x)[1:], p.normalize_embedding)
    else:
        x, row_factor = unit_rows(p.x)[0].to(dtype) if p.normalize_embedding else p.x.to(dtype), None
    # Of the products and the centers, the fewer numbers are multiplied by 1/|w|. An embedding that keeps its norm could overflow first.
    after = on_cpu and not rounds and p.normalize_weight and p.normalize_embedding and n <= d

    def scores_of(start: int, stop: int) -> Tensor:
        w, factor = p.w[start * p.sub_centers : stop * p.sub_centers].to(p.acc_dtype), None
        if p.normalize_weight:
            w, factor = _almost_unit(w) if on_cpu and not rounds else (w, inverse_norm(w))
            if not after:
                w = w * factor[:, None]
        found = matmul(x, w.to(dtype).T, p.acc_dtype)
        if after and factor is not None:
            found *= factor
        if row_factor is not None:
            found *= row_factor[:, None]
        if p.sub_centers > 1:
            found = found.unflatten(1, (-1, p.sub_centers)).amax(2)
        return found if p.bias is None or p.scale is None else torch.addcmul(p.bias[start:stop], p.scale[:, None], found)

    if on_cpu:
        return _on_processor(scores_of, n, c, k, p.acc_dtype, p.sub_centers)
    scores, classes = p.x.new_empty((n, 0), dtype=p.acc_dtype), p.x.new_empty((n, 0), dtype=torch.int64)
    for start, stop in chunks(p.x, c, p.sub_centers):
        here = torch.arange(start, stop, device=x.device).expand(n, -1)
        scores, classes = best(torch.cat([scores, scores_of(start, stop)], 1), torch.cat([classes, here], 1), k)
    return TopkOutput(scores, classes)


def _almost_unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` (C, D) and 1/|w_j| (C,), in one pass over ``w`` where all norms are ordinary. Centers so long or so short that a square or
    a product with a unit vector could overflow or vanish come back as unit vectors, with a factor of 1. Reads values."""
    norm = torch.linalg.vector_norm(w, dim=1)
    low, high = norm.aminmax()
    if low > 1e-10 and high < 1e15:
        return w, norm.reciprocal_()
    odd = ~((norm > 1e-10) & (norm < 1e15))
    safe = torch.where(odd, inverse_norm(w), 1.0)
    return w * safe[:, None], torch.where(odd, 1.0, norm.reciprocal())


def _on_processor(scores_of: Scores, n: int, c: int, k: int, dtype: torch.dtype, sub_centers: int = 1) -> TopkOutput:
    """The k best of c classes for n rows, by the scores (N, stop - start) that ``scores_of(start, stop)`` gives, from ``sub_centers``
    products each."""
    scores, classes = torch.empty(n, 0, dtype=dtype), torch.empty(n, 0, dtype=torch.int64)
    width = max(1, max(LEAST_WIDTH, CHUNK_SCORES // n) // sub_centers)
    for start in range(0, c, width):
        found = scores_of(start, min(start + width, c))
        columns = _candidates(found, min(k, found.shape[1]))
        scores, classes = torch.cat([scores, found.gather(1, columns)], 1), torch.cat([classes, columns + start], 1)
        order = falling(scores, classes)[:, :k]
        scores, classes = scores.gather(1, order), classes.gather(1, order)
    return TopkOutput(scores, classes)


def _candidates(found: Tensor, k: int) -> Tensor:
    """(N, k) the k best columns of each row of ``found`` (N, M), in any order, the lower column of equals. Reads values."""
    groups = found.shape[1] // GROUP
    if groups >= 8 * k:
        # The k best columns lie in the k groups of the highest maxima, unless the next group's maximum is as high: to find the maxima costs
        # a fraction of torch.topk. Group g has the columns g, G + g, 2 G + g, ...
        top, group = torch.topk(found[:, : groups * GROUP].view(-1, GROUP, groups).amax(1), k + 1, 1)
        unsure = _equal(top[:, -1], top[:, -2])
        members = (group[:, None, :k] + torch.arange(0, GROUP * groups, groups)[:, None]).flatten(1)
        rest = torch.arange(GROUP * groups, found.shape[1]).expand(found.shape[0], -1)
        among = torch.cat([members, rest], 1)
        top, at = torch.topk(found.gather(1, among), k + 1, 1)
        columns = among.gather(1, at[:, :k])
        unsure |= _equal(top[:, -1], top[:, -2])
    else:
        top, at = torch.topk(found, min(k + 1, found.shape[1]), 1)
        columns = at[:, :k]
        unsure = _equal(top[:, -1], top[:, -2]) if top.shape[1] > k else torch.zeros(found.shape[0], dtype=torch.bool)
    if unsure.any():
        # The k-th score occurs more often than there are places: the lowest columns that have it get them.
        every = found[unsure]
        last = torch.topk(every, k, 1).values[:, -1:]
        nan = every.isnan()
        above = torch.where(last.isnan(), False, (every > last) | nan)
        equal = torch.where(last.isnan(), nan, every == last)
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns[unsure] = taken.nonzero()[:, 1].view(-1, k)
    return columns


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether they tie; NaNs do."""
    return (a == b) | (a.isnan() & b.isnan())
