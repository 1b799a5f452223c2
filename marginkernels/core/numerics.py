"""Arithmetic that the layers share: unit rows, inverse norms, products of a chosen accumulation dtype, chunks of classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: A row or a center whose norm lies below this counts as the zero vector: similarity 0 to everything, gradient 0.
TINY = 1e-30
#: A power of two that brings float16 exponentials, at most 1, away from its smallest number 6e-8; leaves room for slopes up to 255.
FLOAT16_POW2 = 256.0
#: Logits, or numbers of its centers, that a chunk holds at once: 4M float32 are 16 MB, small against any weight worth a chunk. On a GPU one
#: for each ``GPU_BYTES`` of its memory, 40M on one of 80 GB: the chip must be busy longer than its launches take.
CHUNK_ELEMENTS, GPU_BYTES = 1 << 22, 1 << 11
#: Classes that a chunk has at the least: below that the products are too narrow to pay.
LEAST_CHUNK = 256


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of ``dtype`` accumulate in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_elements(gpu_memory: int = 0) -> int:
    """How many logits a chunk holds on a GPU of ``gpu_memory`` bytes, or on a CPU (0).

    By all of the memory, not by what is free, since a sum's bits depend on the chunks.
    """
    return max(CHUNK_ELEMENTS, gpu_memory // GPU_BYTES)


def chunks(x: Tensor, c: int, sub_centers: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks of ``c`` classes whose logits for the rows of ``x`` (N, D), and whose centers, are about
    :func:`chunk_elements` numbers or fewer; of ``sub_centers`` logits and centers each."""
    memory = torch.cuda.get_device_properties(x.device).total_memory if x.device.type == "cuda" else 0
    width = max(1, max(LEAST_CHUNK, chunk_elements(memory) // max(*x.shape, 1)) // sub_centers)
    return ((start, min(start + width, c)) for start in range(0, c, width))


def unit_rows(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v/|v| (N, D) float64 with zero for a zero row, |v| (N,), and 1/|v| (N,) with 0 there. float64 holds the square of any float32."""
    v = v.to(torch.float64)
    norm = torch.linalg.vector_norm(v, dim=1)
    inverse = norm.reciprocal().masked_fill(norm < TINY, 0.0)
    return v * inverse[:, None], norm, inverse


def prepared_rows(x: Tensor, norm: Tensor, inverse: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) with norms (N,) and inverse norms, in float64, as the passes take them: times a power of two that brings their
    norm into [1/2, 1), and row_factor (N,), which brings a product to the similarity, of x/|x| if ``normalize``."""
    # float32's largest power of two; where it does not reach, a prepared row is longer than 1.
    pow2 = torch.ldexp(torch.ones_like(norm), torch.frexp(norm).exponent.clamp_max(127))
    prepared = (x.to(torch.float64) / pow2[:, None]).to(x.dtype).contiguous()
    return prepared, (pow2 * inverse if normalize else pow2).to(accumulation_dtype(x.dtype))


def inverse_norm(w: Tensor) -> Tensor:
    """1/|w_j| (C,), 0 for a zero center; squares neither overflow nor vanish, whatever the norm."""
    exponent = torch.frexp(torch.linalg.vector_norm(w, torch.inf, dim=1)).exponent
    norm = torch.ldexp(torch.linalg.vector_norm(torch.ldexp(w, -exponent[:, None]), dim=1), exponent)
    return torch.where(norm < TINY, 0.0, 1 / norm)


def target_centers(w: Tensor, labels: Tensor) -> Tensor:
    """(N, D) float64 center of each row's label, zero where the label is not one of ``w``'s."""
    if w.shape[0] == 0:
        return torch.zeros(labels.shape[0], w.shape[1], dtype=torch.float64, device=w.device)
    near = labels.clamp(0, w.shape[0] - 1)
    return w.index_select(0, near).to(torch.float64).masked_fill((near != labels)[:, None], 0.0)


def target_rows(x: Tensor, w: Tensor, labels: Tensor, sub_centers: int, normalize: bool) -> Tensor:
    """(N,) the row of ``w`` (C K, D) that is most similar to each row of ``x`` (N, D) among the K of its own class, the first of equals;
    -1 where the label is no class. In float64.

    Args:
        labels: (N,) int64 classes.
        normalize: whether the similarity uses w/|w|. Whether it uses x/|x| makes no difference.
    """
    if sub_centers == 1:
        return labels
    classes, x = w.shape[0] // sub_centers, x.detach().to(torch.float64)
    here = (labels >= 0) & (labels < classes)
    first = torch.where(here, labels, 0) * sub_centers
    found = []
    for k in range(sub_centers):
        center = target_centers(w.detach(), first + k)
        found.append((x * (unit_rows(center)[0] if normalize else center)).sum(1))
    return torch.where(here, first + torch.stack(found, 1).argmax(1), -1)


def classes_of(rows: Tensor, sub_centers: int) -> Tensor:
    """(N,) the class that each of ``rows`` (N,) of a weight belongs to, negative where the row is."""
    return rows if sub_centers == 1 else torch.div(rows, sub_centers, rounding_mode="floor")


def target_biases(bias: Tensor | None, labels: Tensor) -> Tensor:
    """(N,) float64 bias of each row's label, 0 where there is none."""
    return torch.zeros_like(labels, dtype=torch.float64) if bias is None else target_centers(bias[:, None], labels)[:, 0]


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in, and returned as, ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def best(scores: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The (at most) k highest ``scores`` (N, M), falling, the lower of ``classes`` (N, M) first among equals, NaN before all numbers.

    Never waits for the device. Classes lie below 2^31.
    """
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64:
        order = falling(scores, classes)[:, :k]
    else:
        # One integer that orders as (score, -class) does: no two are equal, so topk has no choice to make. NaN has a sign: drop it.
        bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32).long()
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        order = torch.topk((ordered << 32) - classes, k, 1).indices
    return scores.gather(1, order), classes.gather(1, order)


def falling(scores: Tensor, classes: Tensor) -> Tensor:
    """(N, M) the order of falling ``scores`` (N, M), the lower of ``classes`` (N, M) first among equals, NaN first."""
    order = classes.argsort(dim=1)
    return order.gather(1, (scores.gather(1, order) + 0.0).argsort(dim=1, descending=True, stable=True))


def per_row(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``value``, a number or a tensor of shape (), (1,) or (N,), as (N,) on the device of ``like`` (N, ...). Never waits for the device."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=dtype, device=like.device)
    return value.to(dtype=dtype, device=like.device).expand(like.shape[0])


def reduce_losses(losses: Tensor, valid: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """(N,) losses by ``reduction``; summed in float64, so that the order of the sum does not show.

    Args:
        losses: (N,), 0 where the row is ignored.
        valid: (N,) bool, False where the row is ignored.
        reduction: ``"none"``, ``"mean"`` over the valid rows (0 where there is none) or ``"sum"``.
        weight: (N,) float64, how much each row counts in the number that a mean divides by; None: 1.
    """
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean" and weight is None:
        total = total / valid.sum().clamp_min(1)
    elif reduction == "mean":
        assert weight is not None
        rows = torch.where(valid, weight, 0).sum()
        total = total / torch.where(rows > 0, rows, 1)
    return total.to(losses.dtype)
