"""Checkpoints of a head and its optimizer that load on any number of ranks, through ``torch.distributed.checkpoint``.

A checkpoint is a folder. It is written under another name, marked as whole when every rank has written its part, and only then renamed,
so that one which a dying run has left half written is never taken for a whole one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .collectives import group_of

if TYPE_CHECKING:
    from ..head import MarginHead

#: The file that says that a checkpoint is whole, and of what.
MARKER = "marginkernels.json"


def save(
    path: str | os.PathLike, head: MarginHead, optimizer: torch.optim.Optimizer | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint; with a process group every rank calls it, and the folder must be one that all of them see.

    Args:
        path: a folder that does not exist yet, such as ``runs/step-1000``.
        head: of any kind; a sharded one writes its own rows from each rank.
        optimizer: any torch optimizer over the head's parameters, also together with others'.
        extra: anything else that belongs to the run, such as ``{"model": model.state_dict(), "step": 1000}``: nested dictionaries of
            tensors that are the same on all ranks, DTensors (FSDP2) and small objects.

    Raises:
        FileExistsError: ``path`` exists; on every rank, as with any error of the first rank's.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        if path.exists():
            raise FileExistsError(f"path: expected a folder that does not exist yet, got {path}")
        if partial.exists():
            shutil.rmtree(partial)
        path.parent.mkdir(parents=True, exist_ok=True)

    def end() -> None:
        about = {"format": 1, "num_classes": head.num_classes, "embedding_dim": head.embedding_dim, "ranks": _ranks(head)}
        (partial / MARKER).write_text(json.dumps(about))
        _sync(partial / MARKER)
        partial.rename(path)
        _sync(path.parent)

    state = _head_state(head) | _extra_state(extra)
    if optimizer is not None:
        held = optimizer.state_dict()
        state["optimizer.param_groups"] = pickle.dumps(held["param_groups"])  # as one object: their form is the optimizer's own
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in held["state"].items():
            for name, v in values.items():
                state[f"optimizer.state.{i}.{name}"] = _whole(head, v) if _is_sharded(head, params[i]) else v
    _on_first(head, begin)
    dcp.save(state, checkpoint_id=partial, **_group(head))
    _on_first(head, end)


def load(
    path: str | os.PathLike,
    head: MarginHead,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
    *,
    grow: bool = False,
) -> dict[str, Any]:
    """Load what :func:`save` wrote, on any number of ranks, each reading its own rows; every rank calls it.

    Args:
        path: the folder.
        head, optimizer: made as those that were saved, on these ranks; filled in place.
        extra: of the same form as what was saved; tensors are filled in place.
        grow: let ``head`` have more classes than the checkpoint. The saved ones become the first, the others keep what they were
            initialised with and start with an empty optimizer state.

    Returns:
        ``extra`` with everything that was loaded.

    Raises:
        ValueError: no whole checkpoint there, or one of another shape or without an optimizer.
    """
    path = Path(path)
    if not (path / MARKER).is_file():
        raise ValueError(f"path: expected a whole checkpoint, a folder with {MARKER}, got {path}")
    about = json.loads((path / MARKER).read_text())
    if about["embedding_dim"] != head.embedding_dim:
        raise ValueError(f"head: expected embedding_dim = {about['embedding_dim']}, as saved in {path}, got {head.embedding_dim}")
    classes = about["num_classes"]
    if classes > head.num_classes or (classes < head.num_classes and not grow):
        hint = "; grow=True adds the missing ones" if classes < head.num_classes else ""
        raise ValueError(f"head: expected num_classes = {classes}, as saved in {path}, got {head.num_classes}{hint}")
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = _head_state(head) | _extra_state(extra)
    if optimizer is not None:
        if "optimizer.param_groups" not in saved:
            raise ValueError(f"optimizer: expected None, as {path} holds no optimizer state, got {type(optimizer).__name__}")
        state["optimizer.param_groups"] = None
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, stored in saved.items():
            if match := re.fullmatch(r"optimizer\.state\.(\d+)\.(.+)", key):
                if int(match[1]) >= len(params):
                    raise ValueError(
                        f"optimizer: expected the parameters that were saved in {path}, at least {match[1]} + 1, got {len(params)}"
                    )
                state[key] = _room(head, params[int(match[1])], stored)
    dcp.load(state, checkpoint_id=path, planner=_Planner(), **_group(head))
    if optimizer is not None:
        values: dict[int, dict] = {}
        for key, v in state.items():
            if match := re.fullmatch(r"optimizer\.state\.(\d+)\.(.+)", key):
                values.setdefault(int(match[1]), {})[match[2]] = (
                    v.to_local() if _is_sharded(head, params[int(match[1])]) and isinstance(v, DTensor) else v
                )
        optimizer.load_state_dict({"state": values, "param_groups": pickle.loads(state["optimizer.param_groups"])})
    return state.get("extra", {})


def latest(folder: str | os.PathLike) -> Path | None:
    """The whole checkpoint in ``folder`` whose name ends in the largest number (``step-900`` before ``step-1000``), or None."""
    found = [p for p in Path(folder).glob("*") if (p / MARKER).is_file() and re.search(r"\d+$", p.name) and not p.name.startswith(".")]
    return max(found, key=lambda p: int(re.search(r"\d+$", p.name)[0]), default=None)


class _Planner(DefaultLoadPlanner):
    """Reads the rows that are stored into a tensor that may have more of them; :func:`load` has checked where that is meant."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        super().set_up_planner(state_dict, metadata, is_coordinator)
        sizes = {name: v.size() for name, v in self.state_dict.items() if isinstance(v, Tensor)}
        stored = dict(metadata.state_dict_metadata)
        for name, md in stored.items():
            size = sizes.get(name)
            if isinstance(md, TensorStorageMetadata) and size and md.size[1:] == size[1:] and md.size[0] < size[0] and _grows(name):
                stored[name] = dataclasses.replace(md, size=size)
        self.metadata = dataclasses.replace(metadata, state_dict_metadata=stored)


def _grows(name: str) -> bool:
    return name in ("head.weight", "head.bias") or name.startswith("optimizer.state.")


def _head_state(head: MarginHead) -> dict[str, Any]:
    return {f"head.{k}": _whole(head, v) if k in ("weight", "bias") else v for k, v in head.state_dict().items()}


def _extra_state(extra: dict[str, Any] | None) -> dict[str, Any]:
    return {} if extra is None else {"extra": extra}


def _whole(head: MarginHead, v: Any) -> Any:
    """A tensor of one row per class here, as a part of one with a row per class; anything else as it is."""
    if head.shard is None or not isinstance(v, Tensor) or v.ndim == 0:
        return v
    mesh = DeviceMesh.from_group(group_of(head.shard.group), v.device.type)
    shape = torch.Size((head.num_classes, *v.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(v.detach().contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _is_sharded(head: MarginHead, p: Tensor) -> bool:
    return p is head.weight or p is head.bias


def _room(head: MarginHead, p: Tensor, stored: Any) -> Any:
    """A place for one entry of the optimizer's state of parameter ``p``."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    make = {"dtype": stored.properties.dtype, "device": p.device}
    if _is_sharded(head, p) and len(stored.size):
        return _whole(head, torch.zeros((p.shape[0], *stored.size[1:]), **make))
    if isinstance(p, DTensor) and stored.size == p.size():
        return torch.zeros_like(p, dtype=stored.properties.dtype)
    return torch.zeros(stored.size, **(make if len(stored.size) else make | {"device": "cpu"}))


def _group(head: MarginHead) -> dict[str, Any]:
    return {"no_dist": True} if not dist.is_initialized() else {"process_group": None if head.shard is None else group_of(head.shard.group)}


def _ranks(head: MarginHead) -> int:
    return 1 if head.shard is None else head.shard.size


def _on_first(head: MarginHead, do) -> None:
    """Run ``do`` on the first rank; all ranks wait for it, and raise what it raises."""
    if not dist.is_initialized():
        do()
        return
    group = dist.group.WORLD if head.shard is None else group_of(head.shard.group)
    outcome = [None]
    if dist.get_rank(group) == 0:
        try:
            do()
        except Exception as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _sync(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
