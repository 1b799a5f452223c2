"""The nearest class centers of each embedding: checks of the arguments, and the operator that a backend serves."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import ops
from .backend import SEARCH, Agreement, resolve
from .core.numerics import accumulation_dtype, per_row
from .core.types import TopkInputs
from .core.validation import check_centers
from .margins import BatchInfo, Margin, check_margin


def topk(
    embeddings: Tensor,
    weight: Tensor,
    k: int = 5,
    margin: Margin | None = None,
    bias: Tensor | None = None,
    *,
    sub_centers: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k class centers nearest to each embedding, streamed over the class centers; no gradient.

    Args:
        embeddings: (N, D) float, any strides.
        weight: (C, D) float class centers, any strides, at most as precise as the embeddings.
        k: at most C.
        margin: says which sides are normalized, and the scale where there is a bias; None is the cosine, at a scale of 1.
        bias: (C,) or None.
        sub_centers: K: ``weight`` is (C K, D), and a class's score is the highest of its K rows'; see
            :func:`marginkernels.margin_cross_entropy`.
        backend: as :class:`marginkernels.MarginHead` takes it. A backend without a kernel for this, such as ``"cuda"``, serves with
            PyTorch's operators, and so does ``"reference"``.

    Returns:
        scores (N, k) falling, in float32 (float64 for float64), and classes (N, k) int64: what
        :meth:`marginkernels.MarginHead.topk` gives. Among equal scores the lower class comes first. A score that is NaN comes before
        every number, as in :func:`torch.topk`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if margin is not None:
        check_margin(margin)
    return nearest(embeddings, weight, bias, margin, k, backend=backend, sub_centers=sub_centers)


def nearest(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    margin: Margin | None,
    k: int,
    num_classes: int | None = None,
    backend: str = "auto",
    widest: int | None = None,
    agreed: Agreement | None = None,
    sub_centers: int = 1,
) -> tuple[Tensor, Tensor]:
    """The ``min(k, C)`` best classes of ``weight`` (C, D), or ``sub_centers`` rows each, for each row; see :func:`topk`.

    Args:
        num_classes: C of all shards, where ``weight`` is one of them; what ``k`` is checked against.
        widest, agreed: the most classes of any shard, and what the ranks may choose a backend from; see :func:`resolve`.
    """
    check_centers(embeddings, weight, bias, shard=num_classes is not None, sub_centers=sub_centers)
    c = weight.shape[0] if sub_centers == 1 else weight.shape[0] // sub_centers
    limit = c if num_classes is None else num_classes
    if margin is not None:
        margin.bind(limit)
    if isinstance(k, bool) or not isinstance(k, int | Integral) or not 1 <= k <= limit:
        raise ValueError(f"k: expected an integer in [1, {limit}], the number of classes, got {k!r}")
    if torch.is_autocast_enabled(embeddings.device.type) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(embeddings.device.type))
    served = (
        str(embeddings.device),
        embeddings.dtype,
        weight.dtype,
        weight.shape[1],
        embeddings.shape[0],
        widest * sub_centers if widest else weight.shape[0],
    )
    chosen = resolve(backend, *served, agreed, sub_centers, (SEARCH[sub_centers > 1],))
    acc_dtype, scale = accumulation_dtype(embeddings.dtype), None
    if bias is not None:
        bias = bias.detach().to(acc_dtype).contiguous()
        nobody = torch.full((embeddings.shape[0],), -1, dtype=torch.int64, device=embeddings.device)
        given = 1.0 if margin is None else margin.row_scale(BatchInfo(embeddings, nobody, limit))
        scale = per_row(given, embeddings, acc_dtype).detach().contiguous()
    sides = (True, True) if margin is None else (margin.normalize_embedding, margin.normalize_weight)
    inputs = TopkInputs(embeddings.detach(), weight.detach(), bias, scale, *sides, sub_centers)
    found = ops.topk(inputs, min(int(k), c), "torch" if chosen == "reference" else chosen)
    return found.scores, found.classes
