"""Class centres in and out: the layouts of other libraries, and the whole of a sharded head without any rank holding it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import group_of

if TYPE_CHECKING:
    from ..head import MarginHead

#: What the libraries call their class centres, and whether a class is a column there: insightface, face.evoLVe and others;
#: pytorch-metric-learning; CurricularFace, AdaFace, TFace.
NAMES = {"weight": False, "W": True, "kernel": True}
SLAB = 65536


def export_centres(head: MarginHead, path: str | os.PathLike) -> None:
    """Write all class centres (C, D) as ``.npy`` (float32, or float64), in class order; every rank calls it, the first one writes.

    The rows come over a slab at a time. The file appears when it is whole.
    """
    path = Path(path)
    first = _rank(head) == 0
    partial = path.with_name(f".{path.name}.partial")
    out = None
    if first:
        dtype = np.float64 if head.weight.dtype == torch.float64 else np.float32
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(head.num_classes, head.embedding_dim))
    for start, rows in _stream(head, head.weight):
        out[start : start + len(rows)] = rows.to(torch.promote_types(rows.dtype, torch.float32)).numpy()
    if first:
        out.flush()
        del out
        partial.rename(path)


def full_state_dict(head: MarginHead) -> dict[str, Tensor] | None:
    """The state dict that one device with all classes would have, in host memory, on the first rank; None on the others.

    Every rank calls it. Any head with as many classes loads it, sharded ones taking their own rows.
    """
    state = {name: v.detach().cpu() for name, v in head.state_dict().items()}
    for name in ("weight", "bias"):
        held = getattr(head, name)
        if held is None:
            continue
        if _rank(head) == 0:
            state[name] = torch.empty((head.num_classes, *held.shape[1:]), dtype=held.dtype)
        for start, rows in _stream(head, held):
            state[name][start : start + len(rows)] = rows
    return state if _rank(head) == 0 else None


@torch.no_grad()
def import_centres(head: MarginHead, source: Any, *, key: str | None = None, grow: bool = False) -> None:
    """Copy class centres from another library into ``head``, each rank its own rows.

    Args:
        head: on one device or sharded.
        source: one of, or a sequence of these whose classes follow one another (insightface's file of each rank, in rank order):
            a tensor (C, D); a state dict; a file of either that ``torch.load`` reads, or an ``.npy`` file. In a dictionary the centres are
            under ``weight`` (C, D), pytorch-metric-learning's ``W`` (D, C) or ``kernel`` (D, C), with any prefix, nested or not.
        key: the full name, joined by dots, where a dictionary holds several such.
        grow: let ``source`` have fewer classes than ``head``; the others keep what they have.

    Raises:
        ValueError: no centres, several, or of another shape.
    """
    parts = source if isinstance(source, Sequence) and not isinstance(source, str | bytes) else [source]
    parts = [_centres(part, key) for part in parts]
    for part in parts:
        if part.ndim != 2 or part.shape[1] != head.embedding_dim:
            raise ValueError(f"source: expected class centres (C, D) with D = {head.embedding_dim}, got shape {tuple(part.shape)}")
    total = sum(part.shape[0] for part in parts)
    if total > head.num_classes or (total < head.num_classes and not grow):
        raise ValueError(f"source: expected {head.num_classes} classes{' at most' if grow else ''}, got {total}")
    start, stop, first = head.class_start, head.class_start + head.weight.shape[0], 0
    for part in parts:
        low, high = max(start, first), min(stop, first + part.shape[0])
        for slab in range(low, high, SLAB):
            end = min(slab + SLAB, high)
            head.weight[slab - start : end - start] = part[slab - first : end - first].to(head.weight.device)
        first += part.shape[0]


def _centres(source: Any, key: str | None) -> Tensor:
    """(C, D), not copied where that can be helped."""
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
    found = columns or found  # a backbone beside the head has many a "weight", but neither of the other two
    if len(found) != 1:
        wanted = f"a tensor named {key!r}" if key else f"one matrix named {' or '.join(NAMES)}"
        raise ValueError(f"source: expected {wanted}, got {sorted(found) or sorted(name for name, _ in _flat(source))}")
    ((name, v),) = found.items()
    return v.T if NAMES.get(name.rsplit(".", 1)[-1]) else v


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
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
    except RuntimeError:  # the format from before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _rank(head: MarginHead) -> int:
    return 0 if head.shard is None else head.shard.rank


def _stream(head: MarginHead, v: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every rank's ``v`` in class order, on the first rank, in host memory: (class of the first row, rows). Nothing on the others."""
    v = v.detach()
    if head.shard is None:
        yield from ((start, v[start : start + SLAB].cpu()) for start in range(0, v.shape[0], SLAB))
        return
    shard, group, first = head.shard, group_of(head.shard.group), 0
    for rank, width in enumerate(shard.widths()):
        for start in range(0, width, SLAB):
            count = min(SLAB, width - start)
            if shard.rank == rank == 0:
                yield first + start, v[start : start + count].cpu()
            elif shard.rank == rank:
                dist.send(v[start : start + count].contiguous(), group=group, group_dst=0)
            elif shard.rank == 0:
                rows = torch.empty((count, *v.shape[1:]), dtype=v.dtype, device=v.device)
                dist.recv(rows, group=group, group_src=rank)
                yield first + start, rows.cpu()
        first += width
