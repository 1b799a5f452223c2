"""The nearest class centers of each embedding, a chunk of classes at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .core.numerics import accumulation_dtype, chunks, inverse_norm, matmul, per_row, unit_rows
from .core.validation import check_embeddings
from .margins import BatchInfo, Margin


def nearest(
    embeddings: Tensor, weight: Tensor, bias: Tensor | None, margin: Margin, k: int, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The ``min(k, C)`` best classes of ``weight`` (C, D) for each row; see :meth:`marginkernels.MarginHead.topk`.

    ``k`` is checked against ``num_classes``, by default C. Holds N x chunk scores, never N x C.
    """
    c = weight.shape[0]
    limit = c if num_classes is None else num_classes
    check_embeddings(embeddings, weight, shard=num_classes is not None)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= limit:
        raise ValueError(f"k: expected an integer in [1, {limit}], the number of classes, got {k!r}")
    if torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
    n, k, acc_dtype = embeddings.shape[0], min(k, c), accumulation_dtype(embeddings.dtype)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = unit_rows(embeddings)[0].to(embeddings.dtype) if margin.normalize_embedding else embeddings
        scale = None
        if bias is not None:
            nobody = torch.full((n,), -1, dtype=torch.int64, device=x.device)
            scale = per_row(margin.row_scale(BatchInfo(embeddings, nobody, limit)), x, acc_dtype)[:, None]
        scores = torch.empty(n, 0, dtype=acc_dtype, device=x.device)
        classes = torch.empty(n, 0, dtype=torch.int64, device=x.device)
        for start, stop in chunks(n, c):
            w = weight[start:stop].to(acc_dtype)
            if margin.normalize_weight:
                w = w * inverse_norm(w)[:, None]
            found = matmul(x, w.to(x.dtype).T, acc_dtype)
            if scale is not None and bias is not None:
                found = scale * found + bias[start:stop].to(acc_dtype)
            here = torch.arange(start, stop, device=x.device).expand(n, -1)
            scores, classes = best(torch.cat([scores, found], 1), torch.cat([classes, here], 1), k)
    return scores, classes


def best(scores: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The (at most) k highest ``scores`` (N, M), falling, the lower of ``classes`` (N, M) first among equals. Classes lie below 2^31."""
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64:
        order = classes.argsort(dim=1)
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    else:
        # One integer that orders as (score, -class) does: no two are equal, so topk has no choice to make.
        bits = (scores + 0.0).view(torch.int32).long()
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        order = torch.topk((ordered << 32) - classes, k, 1).indices
    return scores.gather(1, order), classes.gather(1, order)
