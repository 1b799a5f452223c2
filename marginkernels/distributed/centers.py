"""Export and import of class centers: layouts of other libraries, and sharded heads without a rank that holds all centers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ._collectives import group_of

if TYPE_CHECKING:
    from ..head import MarginHead

#: The names of class centers in other libraries, and whether a class is a column: "weight" in insightface, face.evoLVe and others; "W" in
#: pytorch-metric-learning; "kernel" in CurricularFace, AdaFace and TFace.
NAMES = {"weight": False, "W": True, "kernel": True}
#: Class centers that are copied or sent at once.
CHUNK = 65536


def export_centers(head: MarginHead, path: str | os.PathLike[str]) -> None:
    """Write all class centers (C, D), or (C K, D) with K sub-centers, to an ``.npy`` file (float32, or float64), in class order. Every rank
    calls it, the first one writes.

    The first rank receives the centers in chunks. The file gets its name when it is complete.
    """
    path = Path(path)
    first = _rank(head) == 0
    partial = path.with_name(f".{path.name}.partial")
    out: np.memmap[Any, Any] | None = None
    if first:
        dtype = np.float64 if head.weight.dtype == torch.float64 else np.float32
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(head.num_classes * head.sub_centers, head.embedding_dim))
    for start, rows in _stream(head, head.weight):
        assert out is not None
        out[start : start + len(rows)] = rows.to(torch.promote_types(rows.dtype, torch.float32)).numpy()
    if out is not None:
        out.flush()
        del out
        partial.rename(path)


def full_state_dict(head: MarginHead) -> dict[str, Tensor] | None:
    """The state dict of the whole head, as of a head on one device, in host memory on the first rank; None on the others.

    Every rank calls it. Any head with the same number of classes can load it; a sharded head takes its own rows.
    """
    state = {name: v.detach().cpu() for name, v in head.state_dict().items()}
    for name in ("weight", "bias"):
        held = getattr(head, name)
        if held is None:
            continue
        if _rank(head) == 0:
            state[name] = torch.empty((head.num_classes * _each(head, held), *held.shape[1:]), dtype=held.dtype)
        for start, rows in _stream(head, held):
            state[name][start : start + len(rows)] = rows
    return state if _rank(head) == 0 else None


@torch.no_grad()
def import_centers(head: MarginHead, source: Any, *, key: str | None = None, grow: bool = False) -> None:
    """Copy class centers from another library into ``head``; each rank copies its own rows.

    Args:
        head: on one device or sharded. With K sub-centers a class has K rows, or K columns, next to each other in ``source``.
        source: a tensor (C, D); a state dict; a file with either, read by ``torch.load(weights_only=True)``; or an ``.npy`` file. Also a
            sequence of these, whose classes are concatenated (such as insightface's files, one per rank, in rank order). In a state dict,
            nested or not, the centers are called ``weight`` (C, D), ``W`` (D, C) as in pytorch-metric-learning, or ``kernel`` (D, C), with
            any prefix.
        key: the full name of the centers, joined by dots, where a state dict has several such names.
        grow: ``source`` may have fewer classes than ``head``; the remaining class centers are not changed.

    Raises:
        ValueError: there are no centers in ``source``, or several, or they have another shape.
        TypeError: ``source`` is nothing of the above.
    """
    sources = source if isinstance(source, Sequence) and not isinstance(source, str | bytes) else [source]
    parts = [_centers(one, key) for one in sources]
    for part in parts:
        if part.ndim != 2 or part.shape[1] != head.embedding_dim:
            raise ValueError(f"source: expected class centers (C, D) with D = {head.embedding_dim}, got shape {tuple(part.shape)}")
    total = sum(part.shape[0] for part in parts)
    each = head.sub_centers
    if total > head.num_classes * each or (total < head.num_classes * each and not grow) or total % each:
        what = "classes" if each == 1 else f"classes of {each} sub-centers"
        raise ValueError(
            f"source: expected {head.num_classes} {what}{' at most' if grow else ''}, got {total}{' rows' if each > 1 else ''}"
        )
    start, first = head.class_start * each, 0
    stop = start + head.weight.shape[0]
    for part in parts:
        low, high = max(start, first), min(stop, first + part.shape[0])
        for chunk in range(low, high, CHUNK):
            end = min(chunk + CHUNK, high)
            head.weight[chunk - start : end - start] = part[chunk - first : end - first].to(head.weight.device)
        first += part.shape[0]


def _centers(source: Any, key: str | None) -> Tensor:
    """The class centers (C, D) in ``source``, without a copy where possible."""
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source))
    if isinstance(source, Tensor):
        return source
    if not isinstance(source, dict):
        raise TypeError(f"source: expected a tensor, a state dict or a file, got {type(source).__name__}")
    found = {name: v for name, v in _flat(source) if name.rsplit(".", 1)[-1] in NAMES and v.ndim == 2}
    if key is not None:
        found = {name: v for name, v in _flat(source) if name == key}
    columns = {name: v for name, v in found.items() if NAMES.get(name.rsplit(".", 1)[-1])}
    found = columns or found  # a backbone in the same state dict may have matrices named "weight", but not "W" or "kernel"
    if len(found) != 1:
        wanted = f"a tensor named {key!r}" if key else f"one matrix named {' or '.join(NAMES)}"
        raise ValueError(f"source: expected {wanted}, got {sorted(found) or sorted(name for name, _ in _flat(source))}")
    ((name, v),) = found.items()
    return v.T if NAMES.get(name.rsplit(".", 1)[-1]) else v


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries, with their keys joined by dots."""
    for name, v in tree.items():
        if isinstance(v, dict):
            yield from _flat(v, f"{prefix}{name}.")
        elif isinstance(v, Tensor):
            yield f"{prefix}{name}", v


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _rank(head: MarginHead) -> int:
    return 0 if head.shard is None else head.shard.rank


def _each(head: MarginHead, v: Tensor) -> int:
    """Rows of ``v``, the weight or the bias, that a class has."""
    return head.sub_centers if v is head.weight else 1


def _stream(head: MarginHead, v: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All ranks' rows of ``v``, the weight or the bias, in class order, as (number of the first, rows) in host memory. Yields only on the
    first rank."""
    each, v = _each(head, v), v.detach()
    if head.shard is None:
        yield from ((start, v[start : start + CHUNK].cpu()) for start in range(0, v.shape[0], CHUNK))
        return
    shard, group, first = head.shard, group_of(head.shard.group), 0
    for rank, classes in enumerate(shard.widths()):
        width = classes * each
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            if shard.rank == rank == 0:
                yield first + start, v[start : start + count].cpu()
            elif shard.rank == rank:
                dist.send(v[start : start + count].contiguous(), group=group, group_dst=0)
            elif shard.rank == 0:
                rows = torch.empty((count, *v.shape[1:]), dtype=v.dtype, device=v.device)
                dist.recv(rows, group=group, group_src=rank)
                yield first + start, rows.cpu()
        first += width
