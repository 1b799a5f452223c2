"""The nearest class centers of each embedding, a chunk of classes at a time."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from .core.numerics import accumulation_dtype, chunks, inverse_norm, matmul, per_row, unit_rows
from .core.validation import check_centers, check_embeddings
from .margins import BatchInfo, Margin, NormFace, check_margin

#: Columns of a chunk whose maximum is looked at before the columns themselves; see :func:`_search`.
GROUP = 32
#: Of a chunk on a processor: scores and elements of the centers that its caches hold, and the fewest classes worth a step of Python.
CACHED_SCORES, CACHED_CENTERS, LEAST_WIDTH = 1 << 18, 1 << 19, 4096
#: So many scores are found in one chunk.
ONE_CHUNK = 1 << 22


@torch.no_grad()
def topk(embeddings: Tensor, weight: Tensor, k: int = 5, margin: Margin | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k class centers nearest to each embedding, streamed over the class centers; no gradient.

    Args:
        embeddings: (N, D) float, any strides.
        weight: (C, D) float class centers, any strides, at most as precise as the embeddings.
        k: at most C.
        margin: says which sides are normalized, and the scale where there is a bias; None is the cosine, at a scale of 1.
        bias: (C,) or None.

    Returns:
        scores (N, k) falling, in float32 (float64 for float64), and classes (N, k) int64: what
        :meth:`marginkernels.MarginHead.topk` gives. Among equal scores the lower class comes first. A score that is NaN comes before
        every number, as in :func:`torch.topk`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_centers(embeddings, weight, bias)
    if margin is None:
        margin = NormFace(scale=1.0)
    check_margin(margin)
    margin.bind(weight.shape[0])
    return nearest(embeddings, weight, bias, margin, k)


def nearest(
    embeddings: Tensor, weight: Tensor, bias: Tensor | None, margin: Margin, k: int, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The ``min(k, C)`` best classes of ``weight`` (C, D) for each row; see :func:`topk`.

    ``k`` is checked against ``num_classes``, by default C. Holds N x chunk scores, never N x C.
    """
    c = weight.shape[0]
    limit = c if num_classes is None else num_classes
    check_embeddings(embeddings, weight, shard=num_classes is not None)
    if isinstance(k, bool) or not isinstance(k, int | Integral) or not 1 <= k <= limit:
        raise ValueError(f"k: expected an integer in [1, {limit}], the number of classes, got {k!r}")
    if torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
    (n, d), k, acc_dtype = embeddings.shape, min(int(k), c), accumulation_dtype(embeddings.dtype)
    on_cpu = embeddings.device.type == "cpu"
    # Processors have no products of half precision worth the rounding of unit vectors to it.
    dtype = acc_dtype if on_cpu else embeddings.dtype
    with torch.autocast(embeddings.device.type, enabled=False):
        x = unit_rows(embeddings)[0].to(dtype) if margin.normalize_embedding else embeddings.to(dtype)
        scale = None
        if bias is not None:
            nobody = torch.full((n,), -1, dtype=torch.int64, device=x.device)
            scale = per_row(margin.row_scale(BatchInfo(embeddings, nobody, limit)), x, acc_dtype)[:, None]
        # Of the products and the centers, the fewer numbers are multiplied by 1/|w|. An embedding that keeps its norm could overflow first.
        after = on_cpu and margin.normalize_weight and margin.normalize_embedding and n <= d

        def scores_of(start: int, stop: int, out: Tensor | None = None) -> Tensor:
            w = weight[start:stop].to(acc_dtype)
            factor = None
            if margin.normalize_weight:
                w, factor = _almost_unit(w) if on_cpu else (w, inverse_norm(w))
                if not after:
                    w = w * factor[:, None]
            found = matmul(x, w.to(dtype).T, acc_dtype) if out is None else torch.mm(x, w.T, out=out)
            if after and factor is not None:
                found *= factor
            if scale is not None and bias is not None:
                found = torch.addcmul(bias[start:stop].to(acc_dtype), scale, found, out=out)
            return found

        if on_cpu:
            return _search(scores_of, n, d, c, k, acc_dtype)
        scores = torch.empty(n, 0, dtype=acc_dtype, device=x.device)
        classes = torch.empty(n, 0, dtype=torch.int64, device=x.device)
        for start, stop in chunks(n, c):
            here = torch.arange(start, stop, device=x.device).expand(n, -1)
            scores, classes = best(torch.cat([scores, scores_of(start, stop)], 1), torch.cat([classes, here], 1), k)
    return scores, classes


def best(scores: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The (at most) k highest ``scores`` (N, M), falling, the lower of ``classes`` (N, M) first among equals, NaN before all numbers.

    Never waits for the device. Classes lie below 2^31.
    """
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64:
        order = _falling(scores, classes)[:, :k]
    else:
        # One integer that orders as (score, -class) does: no two are equal, so topk has no choice to make. NaN has a sign: drop it.
        bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32).long()
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        order = torch.topk((ordered << 32) - classes, k, 1).indices
    return scores.gather(1, order), classes.gather(1, order)


def _falling(scores: Tensor, classes: Tensor) -> Tensor:
    """(N, M) the order of falling ``scores`` (N, M), the lower of ``classes`` (N, M) first among equals, NaN first."""
    order = classes.argsort(dim=1)
    return order.gather(1, (scores.gather(1, order) + 0.0).argsort(dim=1, descending=True, stable=True))


def _almost_unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w`` (C, D) and 1/|w_j| (C,), in one pass over ``w`` where all norms are ordinary. Centers so long or so short that a square or
    a product with a unit vector could overflow or vanish come back as unit vectors, with a factor of 1. Reads values."""
    norm = torch.linalg.vector_norm(w, dim=1)
    if norm.numel() == 0:
        return w, norm
    low, high = norm.aminmax()
    if low > 1e-10 and high < 1e15:
        return w, norm.reciprocal_()
    odd = ~((norm > 1e-10) & (norm < 1e15))
    safe = torch.where(odd, inverse_norm(w), 1.0)
    return w * safe[:, None], torch.where(odd, 1.0, norm.reciprocal())


def _search(scores_of: Callable[[int, int, Tensor], Tensor], n: int, d: int, c: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k best of c classes for n rows, on a processor: chunks that fit its cache, in one buffer. Reads values.

    Most chunks change few rows' candidates once some chunks have been seen, and most columns of a chunk are in none. So first the maxima of
    groups of columns are compared with the worst candidate, which costs a fraction of :func:`torch.topk`.

    Args:
        scores_of: ``scores_of(start, stop, out)`` fills ``out`` (N, stop - start) of ``dtype``, and returns it.
    """
    scores, classes = torch.empty(n, 0, dtype=dtype), torch.empty(n, 0, dtype=torch.int64)
    if n == 0 or k == 0:
        return torch.empty(n, k, dtype=dtype), torch.empty(n, k, dtype=torch.int64)
    width = c if n * c <= ONE_CHUNK else min(max(LEAST_WIDTH, k, min(CACHED_SCORES // n, CACHED_CENTERS // d)), c)
    buffer = torch.empty(n * width, dtype=dtype)
    everyone = torch.arange(n)
    for start in range(0, c, width):
        count = min(width, c - start)
        found = scores_of(start, start + count, buffer[: n * count].view(n, count))
        groups = count // GROUP
        maxima = None
        rows = everyone
        if start > 0 or groups >= 16 * k:
            maxima = found[:, : groups * GROUP].view(n, GROUP, groups).amax(1)
        if start > 0 and maxima is not None:
            highest = maxima.amax(1) if groups * GROUP == count else torch.cat([maxima, found[:, groups * GROUP :]], 1).amax(1)
            # An equal score of a later class is no better. A NaN compares as False.
            rows = (~(highest <= scores[:, -1])).nonzero()[:, 0]
            if rows.numel() == 0:
                continue
        columns = _candidates(found, maxima, rows, min(k, count))
        new_scores, new_classes = _pick(found, rows, columns), columns + start
        if start > 0:
            new_scores, new_classes = torch.cat([scores[rows], new_scores], 1), torch.cat([classes[rows], new_classes], 1)
        order = _falling(new_scores, new_classes)[:, :k]
        new_scores, new_classes = new_scores.gather(1, order), new_classes.gather(1, order)
        if start == 0:
            scores, classes = new_scores, new_classes
        else:
            scores[rows], classes[rows] = new_scores, new_classes
    return scores, classes


def _candidates(found: Tensor, maxima: Tensor | None, rows: Tensor, k: int) -> Tensor:
    """(R, k) the k best columns of each of ``rows`` (R,), in any order, the lower column of equals.

    Args:
        found: (N, M) scores.
        maxima: (N, G), the maxima of columns g, G + g, 2 G + g, ... of the first ``GROUP`` G columns, or None.
        k: at most M.
    """
    groups = 0 if maxima is None else maxima.shape[1]
    unsure = torch.zeros(rows.shape[0], dtype=torch.bool)
    if maxima is not None and groups >= 8 * k:
        # The k best columns lie in the k groups of the highest maxima, unless the next group's maximum is as high.
        top, group = torch.topk(maxima[rows], k + 1, 1)
        unsure |= _equal(top[:, -1], top[:, -2])
        members = (group[:, None, :k] + torch.arange(0, GROUP * groups, groups)[:, None]).flatten(1)
        rest = torch.arange(GROUP * groups, found.shape[1]).expand(rows.shape[0], -1)
        columns = torch.cat([members, rest], 1)
        top, at = torch.topk(_pick(found, rows, columns), k + 1, 1)
        best_columns = columns.gather(1, at[:, :k])
    else:
        top, at = torch.topk(found if rows.shape[0] == found.shape[0] else found[rows], min(k + 1, found.shape[1]), 1)
        best_columns = at[:, :k]
    if top.shape[1] > k:
        unsure |= _equal(top[:, -1], top[:, -2])
    if unsure.any():
        # The k-th score occurs more often than there are places: the lowest columns that have it get them.
        every = found[rows[unsure]]
        last = torch.topk(every, k, 1).values[:, -1:]
        nan = every.isnan()
        above = torch.where(last.isnan(), False, (every > last) | nan)
        equal = torch.where(last.isnan(), nan, every == last)
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        best_columns[unsure] = taken.nonzero()[:, 1].view(-1, k)
    return best_columns


def _pick(found: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(R, M) of ``found`` (N, C): the ``columns`` (R, M) of each of ``rows`` (R,), which are rising."""
    return found.gather(1, columns) if rows.shape[0] == found.shape[0] else found[rows[:, None], columns]


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether they tie; NaNs do."""
    return (a == b) | (a.isnan() & b.isnan())
