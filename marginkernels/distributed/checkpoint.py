"""Checkpoints of a head and its optimizer that load on any number of ranks, through ``torch.distributed.checkpoint``.

A checkpoint is a folder. It is written under another name, marked as complete when every rank has written its part, and only then renamed.
So a checkpoint that a dying run left half written is never loaded.

Load only checkpoints that you trust. Tensors, the state of the optimizer and its ``param_groups`` are read without running any code of the
checkpoint (``torch.load(weights_only=True)``). But ``torch.distributed.checkpoint`` itself (torch 2.13) unpickles the file ``.metadata``,
and what is not a tensor in ``extra``, without restriction; pickle can run arbitrary code.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ._collectives import group_of

if TYPE_CHECKING:
    from ..head import MarginHead

#: The file that marks a checkpoint as complete and describes it.
MARKER = "marginkernels.json"
#: The format that :func:`save` writes. In format 1, which :func:`load` reads too, the ``param_groups`` were pickled.
FORMAT = 2
PARAM_GROUPS = "optimizer.param_groups"


def save(
    path: str | os.PathLike[str], head: MarginHead, optimizer: torch.optim.Optimizer | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint. With a process group every rank calls it, and the folder must be on a file system that all ranks share.

    Args:
        path: a folder that does not exist yet, such as ``runs/step-1000``.
        head: any head; of a sharded one, each rank writes its own rows.
        optimizer: any torch optimizer whose parameters include those of the head.
        extra: anything else that belongs to the run, such as ``{"model": model.state_dict(), "step": 1000}``: nested dictionaries of
            tensors that are the same on all ranks, DTensors (FSDP2) and small objects.

    Raises:
        FileExistsError: ``path`` exists. It is raised on every rank, like any error of the first rank.
        TypeError: the optimizer's ``param_groups`` hold something other than numbers, strings, tensors and containers of these.
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
        about = {"format": FORMAT, "num_classes": head.num_classes, "embedding_dim": head.embedding_dim, "ranks": _ranks(head)}
        (partial / MARKER).write_text(json.dumps(about))
        _sync(partial / MARKER)
        partial.rename(path)
        _sync(path.parent)

    state = _head_state(head) | _extra_state(extra)
    if optimizer is not None:
        held = optimizer.state_dict()
        state[PARAM_GROUPS] = _pack(held["param_groups"])  # as a whole, because what is in them depends on the optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in held["state"].items():
            for name, v in values.items():
                state[f"optimizer.state.{i}.{name}"] = _whole(head, v) if _is_sharded(head, params[i]) else v
    _on_first(head, begin)
    dcp.save(state, checkpoint_id=partial, **_group(head))  # type: ignore[attr-defined]
    _on_first(head, end)


def load(
    path: str | os.PathLike[str],
    head: MarginHead,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
    *,
    grow: bool = False,
) -> dict[str, Any]:
    """Load what :func:`save` wrote, on any number of ranks. Every rank calls it and reads its own rows.

    Load only checkpoints that you trust: objects in ``extra`` are unpickled, and so is the metadata; see :mod:`.checkpoint`.

    Args:
        path: the folder.
        head, optimizer: made like those that were saved, for the ranks of now; filled in place.
        extra: of the same structure as what was saved; tensors are filled in place.
        grow: let ``head`` have more classes than the checkpoint. The saved classes become the first ones; the others keep their initial
            values and start with an empty optimizer state.

    Returns:
        ``extra`` with everything that was loaded.

    Raises:
        ValueError: there is no complete checkpoint, or it has another shape, another format or no optimizer state.
        pickle.UnpicklingError, CheckpointException: the optimizer's part has objects that could run code.
    """
    path = Path(path)
    if not (path / MARKER).is_file():
        raise ValueError(f"path: expected a complete checkpoint, a folder with {MARKER}, got {path}")
    about = json.loads((path / MARKER).read_text())
    if about["format"] > FORMAT:
        raise ValueError(f"path: expected a checkpoint of format {FORMAT} or older, got format {about['format']} in {path}")
    if about["embedding_dim"] != head.embedding_dim:
        raise ValueError(f"head: expected embedding_dim = {about['embedding_dim']}, as saved in {path}, got {head.embedding_dim}")
    classes = about["num_classes"]
    if classes > head.num_classes or (classes < head.num_classes and not grow):
        hint = "; grow=True adds the missing ones" if classes < head.num_classes else ""
        raise ValueError(f"head: expected num_classes = {classes}, as saved in {path}, got {head.num_classes}{hint}")
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    state = _head_state(head) | _extra_state(extra)
    if optimizer is not None:
        if PARAM_GROUPS not in saved:
            raise ValueError(f"optimizer: expected None, as {path} holds no optimizer state, got {type(optimizer).__name__}")
        groups = saved[PARAM_GROUPS]
        state[PARAM_GROUPS] = torch.empty(groups.size, dtype=torch.uint8) if isinstance(groups, TensorStorageMetadata) else None
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for key, stored in saved.items():
            if match := re.fullmatch(r"optimizer\.state\.(\d+)\.(.+)", key):
                if int(match[1]) >= len(params):
                    raise ValueError(
                        f"optimizer: expected the parameters that were saved in {path}, at least {match[1]} + 1, got {len(params)}"
                    )
                state[key] = _placeholder(head, params[int(match[1])], stored)
    dcp.load(state, checkpoint_id=path, planner=_Planner(), **_group(head))  # type: ignore[attr-defined]
    if optimizer is not None:
        values: dict[int, dict[str, Any]] = {}
        for key, v in state.items():
            if match := re.fullmatch(r"optimizer\.state\.(\d+)\.(.+)", key):
                values.setdefault(int(match[1]), {})[match[2]] = (
                    v.to_local() if _is_sharded(head, params[int(match[1])]) and isinstance(v, DTensor) else v
                )
        optimizer.load_state_dict({"state": values, "param_groups": _unpack(state[PARAM_GROUPS], head.weight.device)})
    loaded: dict[str, Any] = state.get("extra", {})
    return loaded


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint in ``folder`` whose name ends in the largest number (``step-1000`` rather than ``step-900``), or None."""
    found: dict[int, Path] = {}
    for p in Path(folder).glob("*"):
        number = re.search(r"\d+$", p.name)
        if number and (p / MARKER).is_file() and not p.name.startswith("."):
            found[int(number[0])] = p
    return found[max(found)] if found else None


def _pack(groups: list[dict[str, Any]]) -> Tensor:
    """``param_groups`` as a uint8 tensor that :func:`_unpack` reads. Anything but a tensor would be pickled."""
    buffer = io.BytesIO()
    torch.save(_plain(groups), buffer)
    packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        _unpack(packed, torch.device("cpu"))
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            "optimizer: expected param_groups of numbers, strings, tensors and containers of these, "
            f"got {kind[1] if kind else 'another object'}; torch.serialization.add_safe_globals allows more types"
        ) from error
    return packed


def _plain(v: Any) -> Any:
    """``v`` with numpy's numbers as Python's."""
    if type(v).__module__ == "numpy" and getattr(v, "ndim", None) == 0:
        return v.item()
    if type(v) is dict:
        return {k: _plain(x) for k, x in v.items()}
    if type(v) in (list, tuple):
        return type(v)(_plain(x) for x in v)
    return v


def _unpack(packed: Tensor | bytes, device: torch.device) -> list[dict[str, Any]]:
    """The ``param_groups`` that :func:`_pack` packed (or format 1 pickled). Tensors that were not on a CPU go to ``device``."""

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=device)

    if isinstance(packed, bytes):
        groups: list[dict[str, Any]] = _Unpickler(io.BytesIO(packed), place).load()
    else:
        groups = torch.load(io.BytesIO(packed.numpy().tobytes()), map_location=place, weights_only=True)
    return groups


class _Unpickler(pickle.Unpickler):
    """Reads the pickled ``param_groups`` of format 1, as long as they hold plain values, tensors and numpy's numbers only."""

    def __init__(self, file: io.BytesIO, place: Callable[[Any, str], Any]):
        super().__init__(file)
        self.place = place

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # the storage of a tensor, itself pickled
            return lambda b: torch.load(io.BytesIO(b), map_location=self.place, weights_only=True)
        if (module, name) in _PICKLED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"path: expected saved param_groups of numbers, strings, tensors and containers of these, got {module}.{name}"
        )


#: The globals in pickles of plain values, tensors and numpy's numbers, besides the storages of tensors.
_PICKLED = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class _Planner(DefaultLoadPlanner):
    """Reads stored rows into tensors that may have more rows (:func:`load` has checked whether they may), and the optimizer's objects
    without unpickling code."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        super().set_up_planner(state_dict, metadata, is_coordinator)
        sizes = {name: v.size() for name, v in self.state_dict.items() if isinstance(v, Tensor)}
        stored = dict(metadata.state_dict_metadata)
        for name, md in stored.items():
            size = sizes.get(name)
            if isinstance(md, TensorStorageMetadata) and size and md.size[1:] == size[1:] and md.size[0] < size[0] and _grows(name):
                stored[name] = dataclasses.replace(md, size=size)
        self.metadata = dataclasses.replace(metadata, state_dict_metadata=stored)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        if name.startswith("optimizer."):
            self.original_state_dict[name] = torch.load(value, weights_only=True)
        else:
            super().load_bytes(read_item, value)


def _grows(name: str) -> bool:
    """Whether a tensor has a row for each class."""
    return name in ("head.weight", "head.bias") or name.startswith("optimizer.state.")


def _head_state(head: MarginHead) -> dict[str, Any]:
    return {f"head.{k}": _whole(head, v) if k in ("weight", "bias") else v for k, v in head.state_dict().items()}


def _extra_state(extra: dict[str, Any] | None) -> dict[str, Any]:
    return {} if extra is None else {"extra": extra}


def _whole(head: MarginHead, v: Any) -> Any:
    """A tensor with a row for each class of this rank as a DTensor with a row for each class; anything else unchanged."""
    if head.shard is None or not isinstance(v, Tensor) or v.ndim == 0:
        return v
    mesh = DeviceMesh.from_group(group_of(head.shard.group), v.device.type)
    shape = torch.Size((head.num_classes, *v.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(v.detach().contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _is_sharded(head: MarginHead, p: Tensor) -> bool:
    return p is head.weight or p is head.bias


def _placeholder(head: MarginHead, p: Tensor, stored: Any) -> Any:
    """What to load one entry of the optimizer's state of parameter ``p`` into."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if _is_sharded(head, p) and len(stored.size):
        return _whole(head, torch.zeros((p.shape[0], *stored.size[1:]), dtype=dtype, device=p.device))
    if isinstance(p, DTensor) and stored.size == p.size():
        return torch.zeros_like(p, dtype=dtype)
    return torch.zeros(stored.size, dtype=dtype, device=p.device if len(stored.size) else "cpu")


def _group(head: MarginHead) -> dict[str, Any]:
    return {"no_dist": True} if not dist.is_initialized() else {"process_group": None if head.shard is None else group_of(head.shard.group)}


def _ranks(head: MarginHead) -> int:
    return 1 if head.shard is None else head.shard.size


def _on_first(head: MarginHead, do: Callable[[], None]) -> None:
    """Run ``do`` on the first rank. All ranks wait for it, and raise what it raises."""
    if not dist.is_initialized():
        do()
        return
    group = dist.group.WORLD if head.shard is None else group_of(head.shard.group)
    outcome: list[Exception | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            do()
        except Exception as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
