"""Checkpoints of a head and its optimizer that load on any number of ranks, through ``torch.distributed.checkpoint``.

A checkpoint is a folder. It is written under another name, marked as complete when every rank has written its part, and only then renamed.
So a checkpoint that a dying run left half written is never loaded. The mark holds a checksum of every part, and loading compares them
before it changes anything.

Nothing in a checkpoint runs code when it is loaded: tensors, plain values and containers of these come out, or an error. The numbers are
believed as they are; a checksum tells damage, not malice.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from ._collectives import group_of
from ._unpickle import read_metadata, read_param_groups

if TYPE_CHECKING:
    from ..head import MarginHead

T = TypeVar("T")
#: The file that marks a checkpoint as complete and describes it.
MARKER = "marginkernels.json"
#: The file in which ``torch.distributed.checkpoint`` says what lies where.
METADATA = ".metadata"
#: The format that :func:`save` writes; :func:`load` reads the earlier ones too. Format 2 has no checksums and does not name the margin. In
#: format 1 the ``param_groups`` were pickled.
FORMAT = 3
PARAM_GROUPS = "optimizer.param_groups"
#: Bytes that are read at once for a checksum.
BLOCK = 1 << 20


def save(
    path: str | os.PathLike[str], head: MarginHead, optimizer: torch.optim.Optimizer | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint. With a process group every rank calls it, and the folder must be on a file system that all ranks share.

    An error leaves nothing behind under ``path``, and other checkpoints as they were.

    Args:
        path: a folder that does not exist yet, such as ``runs/step-1000``.
        head: any head; of a sharded one, each rank writes its own rows.
        optimizer: any torch optimizer whose parameters include those of the head.
        extra: anything else that belongs to the run, such as ``{"model": model.state_dict(), "step": 1000}``: nested dictionaries of
            tensors that are the same on all ranks, DTensors (FSDP2) and plain values (numbers, strings, None, and containers of these).

    Raises:
        FileExistsError: ``path`` exists.
        TypeError: the optimizer or ``extra`` hold something other than numbers, strings, tensors and containers of these.
        OSError: it could not be written, for example because the disk is full.
        RuntimeError: another rank has died or is stuck.
            All of these are raised on every rank that is alive.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        if path.exists():
            raise FileExistsError(f"path: expected a folder that does not exist yet, got {path}")
        if partial.exists():
            shutil.rmtree(partial)
        path.parent.mkdir(parents=True, exist_ok=True)

    def end(parts: list[dict[str, list[_Part]]]) -> None:
        files = {name: entries for of_rank in parts for name, entries in of_rank.items()}
        files[METADATA] = [_part(partial / METADATA)]
        for name, entries in files.items():
            size, found = max(offset + length for offset, length, _ in entries), partial / name
            if not found.is_file() or found.stat().st_size < size:
                raise OSError(f"path: expected a folder on a file system that all ranks share, got {path}, without {name} of another rank")
        about = {"format": FORMAT, "num_classes": head.num_classes, "embedding_dim": head.embedding_dim, "ranks": _ranks(head)}
        about |= {"sub_centers": head.sub_centers} if head.sub_centers > 1 else {}
        (partial / MARKER).write_text(_sealed(about | {"margin": type(head.margin).__name__, "files": files}))
        _sync(partial / MARKER)
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)

    with _errors(head, "save", path):
        state = _head_state(head) | _extra_state(extra)
        if optimizer is not None:
            held = optimizer.state_dict()
            # As a whole, because what is in them depends on the optimizer.
            state[PARAM_GROUPS] = _on_every(head, lambda: _pack(held["param_groups"]))
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in held["state"].items():
                for name, v in values.items():
                    state[f"optimizer.state.{i}.{name}"] = _whole(head, params[i], v) if _is_sharded(head, params[i]) else v
        _on_first(head, begin)
        try:
            writer = _Writer(partial)
            dcp.save(state, storage_writer=writer, planner=_SavePlanner(), **_group(head))  # type: ignore[attr-defined]
            parts = _gathered(head, writer.parts)
            _on_first(head, lambda: end(parts))
        except BaseException:
            if _is_first(head):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def load(
    path: str | os.PathLike[str],
    head: MarginHead,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
    *,
    grow: bool = False,
) -> dict[str, Any]:
    """Load what :func:`save` wrote, on any number of ranks. Every rank calls it and reads its own rows.

    Nothing in the checkpoint runs code. What does not fit or is damaged raises before anything is changed. (Formats 1 and 2 have no
    checksums: damage of their tensors may pass unnoticed.)

    Args:
        path: the folder.
        head, optimizer: made like those that were saved, for the ranks of now; filled in place.
        extra: of the same structure as what was saved; tensors are filled in place.
        grow: let ``head`` have more classes than the checkpoint. The saved classes become the first ones; the others keep their initial
            values and start with an empty optimizer state.

    Returns:
        ``extra`` with everything that was loaded.

    Raises:
        ValueError: there is no complete checkpoint, it is damaged, or it is of another shape, another margin, another format, or without
            optimizer state.
        pickle.UnpicklingError: it holds objects other than plain values and tensors, which could run code.
        RuntimeError: another rank has died or is stuck.
            All of these are raised on every rank that is alive.
    """
    path = Path(path)
    with _errors(head, "load", path):
        about, metadata = _on_every(head, lambda: _opened(path, head, grow))
        saved = metadata.state_dict_metadata
        state = _head_state(head) | _extra_state(extra)
        params: list[Tensor] = []
        if optimizer is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            _on_every(head, lambda: _check_optimizer(path, saved, optimizer, params))
            groups = saved[PARAM_GROUPS]
            state[PARAM_GROUPS] = torch.empty(groups.size, dtype=torch.uint8) if isinstance(groups, TensorStorageMetadata) else None
            for key, stored in saved.items():
                if match := _OPTIMIZER_STATE.fullmatch(key):
                    state[key] = _placeholder(head, params[int(match[1])], stored)
        reader = _Reader(path, metadata, about.get("files"))
        dcp.load(state, storage_reader=reader, planner=_LoadPlanner(path), **_group(head))  # type: ignore[attr-defined]
    if optimizer is not None:
        values: dict[int, dict[str, Any]] = {}
        for key, v in state.items():
            if match := _OPTIMIZER_STATE.fullmatch(key):
                p = params[int(match[1])]
                values.setdefault(int(match[1]), {})[match[2]] = _rows(head, p, v) if _is_sharded(head, p) else v
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


_OPTIMIZER_STATE = re.compile(r"optimizer\.state\.(\d+)\.(.+)")


def _opened(path: Path, head: MarginHead, grow: bool) -> tuple[dict[str, Any], Metadata]:
    """The marker and the metadata of a checkpoint, if it is complete and one of such a head."""
    if not (path / MARKER).is_file():
        raise ValueError(f"path: expected a complete checkpoint, a folder with {MARKER}, got {path}")
    about = _unsealed(path)
    if about["embedding_dim"] != head.embedding_dim:
        raise ValueError(f"head: expected embedding_dim = {about['embedding_dim']}, as saved in {path}, got {head.embedding_dim}")
    if about.get("sub_centers", 1) != head.sub_centers:
        raise ValueError(f"head: expected sub_centers = {about.get('sub_centers', 1)}, as saved in {path}, got {head.sub_centers}")
    classes = about["num_classes"]
    if classes > head.num_classes or (classes < head.num_classes and not grow):
        hint = "; grow=True adds the missing ones" if classes < head.num_classes else ""
        raise ValueError(f"head: expected num_classes = {classes}, as saved in {path}, got {head.num_classes}{hint}")
    if about.get("margin", type(head.margin).__name__) != type(head.margin).__name__:
        raise ValueError(
            f"head: expected a margin of class {about['margin']}, as saved in {path}, got {type(head.margin).__name__}; "
            "to train on with another one, load into a head with the saved one and assign head.margin"
        )
    try:
        data = (path / METADATA).read_bytes()
    except OSError as error:
        raise _damaged(path, f"{METADATA} cannot be read: {error.strerror}") from error
    if "files" in about:
        _compare(path, METADATA, io.BytesIO(data), about["files"].get(METADATA, [[0, 0, 0]])[0])
    metadata = read_metadata(data)
    names = {name for name in metadata.state_dict_metadata if name.startswith(("head.margin.", "head.bias"))}
    if more := sorted(names - set(_head_state(head))):
        raise ValueError(f"head: expected one with {', '.join(n[5:] for n in more)}, as saved in {path}, got {head}")
    return about, metadata


def _check_optimizer(path: Path, saved: dict[str, Any], optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    if PARAM_GROUPS not in saved:
        raise ValueError(f"optimizer: expected None, as {path} holds no optimizer state, got {type(optimizer).__name__}")
    numbers = [int(match[1]) for match in map(_OPTIMIZER_STATE.fullmatch, saved) if match]
    if max(numbers, default=-1) >= len(params):
        raise ValueError(f"optimizer: expected the parameters that were saved in {path}, at least {max(numbers)} + 1, got {len(params)}")


#: Where a part of a file begins, how many bytes it has, and their CRC-32.
_Part = list[int]


def _crc(file: IO[bytes], offset: int, length: int) -> int | None:
    """The CRC-32 of a part of a file, or None if the file ends before."""
    file.seek(offset)
    crc = 0
    while length and (block := file.read(min(length, BLOCK))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return None if length else crc


def _part(path: Path) -> _Part:
    """A whole file."""
    data = path.read_bytes()
    return [0, len(data), zlib.crc32(data)]


def _compare(path: Path, name: str, file: IO[bytes], part: _Part) -> None:
    """Raise where a part of the file ``name`` is not as it was written."""
    crc = _crc(file, part[0], part[1])
    if crc is None:
        raise _damaged(path, f"{name} ends before byte {part[0] + part[1]}")
    if crc != part[2]:
        raise _damaged(path, f"{name} is not as it was written, in bytes {part[0]} to {part[0] + part[1] - 1}")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"path: expected a whole checkpoint, got a damaged one in {path}: {reason}")


def _sealed(about: dict[str, Any]) -> str:
    """The text of the marker, with its own checksum."""
    return json.dumps(about | {"crc32": zlib.crc32(json.dumps(about).encode())})


def _unsealed(path: Path) -> dict[str, Any]:
    """The content of the marker."""
    try:
        about: dict[str, Any] = json.loads((path / MARKER).read_text())
        if about["format"] > FORMAT:
            raise ValueError(f"path: expected a checkpoint of format {FORMAT} or older, got format {about['format']} in {path}")
        if about["format"] >= 3 and about.pop("crc32", None) != zlib.crc32(json.dumps(about).encode()):
            raise _damaged(path, f"{MARKER} is not as it was written")
        return {name: about[name] for name in ("num_classes", "embedding_dim")} | about
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if str(error).startswith("path:"):
            raise
        raise _damaged(path, f"{MARKER} cannot be read: {error}") from error


def _pack(groups: list[dict[str, Any]]) -> Tensor:
    """``param_groups`` as a uint8 tensor that :func:`_unpack` reads. Anything but a tensor would be pickled."""
    buffer = _checked("optimizer: expected param_groups", groups)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _checked(expected: str, v: Any) -> io.BytesIO:
    """``v`` as ``torch.save`` writes it, if ``torch.load(weights_only=True)`` reads it."""
    buffer = io.BytesIO()
    try:
        torch.save(_plain(v), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"{expected} of numbers, strings, tensors and containers of these, got {kind[1] if kind else type(v).__name__}; "
            "torch.serialization.add_safe_globals allows more types"
        ) from error
    buffer.seek(0)
    return buffer


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
        return read_param_groups(packed, place)
    groups: list[dict[str, Any]] = torch.load(io.BytesIO(packed.numpy().tobytes()), map_location=place, weights_only=True)
    return groups


class _SavePlanner(DefaultSavePlanner):
    """Writes only what :class:`_LoadPlanner` reads back."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        if isinstance(object, Tensor):
            return super().transform_object(write_item, object)
        name = write_item.index.fqn
        return _checked(f"{name.split('.')[0]}: expected {name}", object)


class _Writer(FileSystemWriter):
    """Notes the checksum of what it has written: ``parts`` by file."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.parts: dict[str, list[_Part]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written: Future[list[WriteResult]] = super().write_data(plan, planner)
        except Exception as error:  # torch.save hides the system's error behind one about the position in its file
            if (reason := _os_error(error)) is None:
                raise
            raise OSError(reason.errno, reason.strerror) from error
        for result in sorted(written.wait(), key=lambda r: (r.storage_data.relative_path, r.storage_data.offset)):
            at = result.storage_data
            with open(Path(self.path, at.relative_path), "rb") as file:
                crc = _crc(file, at.offset, at.length)
            if crc is None:
                raise OSError(errno.EIO, f"{at.relative_path} is shorter than what was written to it")
            self.parts.setdefault(at.relative_path, []).append([at.offset, at.length, crc])
        return written


class _Reader(FileSystemReader):
    """Reads by the metadata that it is given, after it has compared checksums, where the checkpoint has any."""

    def __init__(self, path: Path, metadata: Metadata, files: dict[str, list[_Part]] | None):
        super().__init__(path)
        self.folder, self.metadata, self.files = path, metadata, files

    def read_metadata(self) -> Metadata:  # without the fallback to one file per rank
        return dataclasses.replace(self.metadata, storage_meta=StorageMeta(load_id=self.load_id))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        # Here rather than when the data is read: a rank that finds damage now stops all ranks before they change anything.
        known = {(name, offset, length): crc for name, parts in (self.files or {}).items() for offset, length, crc in parts}
        for at in {id(at): at for at in (self.storage_data[item.storage_index] for item in plan.items)}.values():
            name, offset, length = at.relative_path, at.offset, at.length
            if self.files is not None and (name, offset, length) not in known:
                raise _damaged(self.folder, f"{MARKER} does not know bytes {offset} to {offset + length - 1} of {name}")
            try:
                with open(self.folder / name, "rb") as file:
                    if self.files is not None:
                        _compare(self.folder, name, file, [offset, length, known[name, offset, length]])
            except OSError as error:
                raise _damaged(self.folder, f"{name} cannot be read: {error.strerror}") from error
        return plan


class _LoadPlanner(DefaultLoadPlanner):
    """Reads stored rows into tensors that may have more rows (:func:`load` has checked whether they may), and objects without running
    code."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

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

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for name, v in self.state_dict.items():
            part, md = name.split(".")[0], saved.get(name)
            here = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            if md is None:
                raise ValueError(f"{part}: expected only what was saved in {self.path}, got {name} besides")
            if isinstance(md, TensorStorageMetadata) and here != tuple(md.size):
                raise ValueError(f"{part}: expected a tensor of shape {tuple(md.size)} as {name}, as saved in {self.path}, got {here}")
            if not isinstance(md, TensorStorageMetadata) and isinstance(v, Tensor) and part != "extra":
                raise ValueError(f"path: expected a tensor as {name}, got another object in {self.path}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            kind = re.search(r"GLOBAL (\S+)", str(error))
            raise pickle.UnpicklingError(
                f"path: expected plain values and tensors, got {kind[1] if kind else 'another object'} as {name} in {self.path}; "
                "if you trust it, torch.serialization.safe_globals allows more types"
            ) from error
        *parents, last = self.mappings[name]
        into: Any = self.original_state_dict
        for key in parents:
            into = into[key]
        into[last] = loaded


def _grows(name: str) -> bool:
    """Whether a tensor has a row for each class."""
    return name in ("head.weight", "head.bias") or name.startswith("optimizer.state.")


def _head_state(head: MarginHead) -> dict[str, Any]:
    found = {f"head.{k}": v for k, v in head.state_dict().items()}
    for name in ("weight", "bias"):
        if (held := getattr(head, name)) is not None:
            found[f"head.{name}"] = _whole(head, held, found[f"head.{name}"])
    return found


def _extra_state(extra: dict[str, Any] | None) -> dict[str, Any]:
    return {} if extra is None else {"extra": extra}


def _whole(head: MarginHead, p: Tensor, v: Any) -> Any:
    """A tensor with a row for each row of ``p``, the weight or the bias, as a DTensor with those of all classes, (C, K, ...) where a class
    has K sub-centers; anything else unchanged."""
    if not isinstance(v, Tensor) or v.ndim == 0:
        return v
    if _sub_centers(head, p) > 1:
        v = v.view(v.shape[0] // head.sub_centers, head.sub_centers, *v.shape[1:])
    if head.shard is None:
        return v
    mesh = DeviceMesh.from_group(group_of(head.shard.group), v.device.type)
    shape = torch.Size((head.num_classes, *v.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(v.detach().contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _rows(head: MarginHead, p: Tensor, v: Any) -> Any:
    """The reverse of :func:`_whole`: the rows of this rank."""
    if isinstance(v, DTensor):
        v = v.to_local()
    return v.flatten(0, 1) if _sub_centers(head, p) > 1 and isinstance(v, Tensor) and v.ndim > 1 else v


def _sub_centers(head: MarginHead, p: Tensor) -> int:
    return head.sub_centers if p is head.weight else 1


def _is_sharded(head: MarginHead, p: Tensor) -> bool:
    return p is head.weight or p is head.bias


def _placeholder(head: MarginHead, p: Tensor, stored: Any) -> Any:
    """What to load one entry of the optimizer's state of parameter ``p`` into."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if _is_sharded(head, p) and len(stored.size):
        each = stored.size[2:] if _sub_centers(head, p) > 1 else stored.size[1:]
        return _whole(head, p, torch.zeros((p.shape[0], *each), dtype=dtype, device=p.device))
    if isinstance(p, DTensor) and stored.size == p.size():
        return torch.zeros_like(p, dtype=dtype)
    return torch.zeros(stored.size, dtype=dtype, device=p.device if len(stored.size) else "cpu")


def _group(head: MarginHead) -> dict[str, Any]:
    return {"no_dist": True} if not dist.is_initialized() else {"process_group": None if head.shard is None else group_of(head.shard.group)}


def _ranks(head: MarginHead) -> int:
    return 1 if head.shard is None else head.shard.size


def _process_group(head: MarginHead) -> dist.ProcessGroup | None:
    """The ranks that call :func:`save` and :func:`load` together, or None for a single process."""
    if not dist.is_initialized():
        return None
    return dist.group.WORLD if head.shard is None else group_of(head.shard.group)


def _is_first(head: MarginHead) -> bool:
    group = _process_group(head)
    return group is None or dist.get_rank(group) == 0


def _gathered(head: MarginHead, v: T) -> list[T]:
    """``v`` of every rank."""
    group = _process_group(head)
    if group is None:
        return [v]
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, v, group=group)
    return every


def _on_every(head: MarginHead, do: Callable[[], T]) -> T:
    """Run ``do`` on every rank. If it raises on any, all ranks raise what the first of those raised."""
    result, error = None, None
    try:
        result = do()
    except Exception as raised:
        error = raised
    for raised_there in _gathered(head, error):
        if raised_there is not None:
            raise raised_there
    return result  # type: ignore[return-value]


def _on_first(head: MarginHead, do: Callable[[], None]) -> None:
    """Run ``do`` on the first rank. All ranks wait for it, and raise what it raises."""
    _on_every(head, do if _is_first(head) else lambda: None)


@contextmanager
def _errors(head: MarginHead, what: str, path: Path) -> Iterator[None]:
    """Errors of ``torch.distributed.checkpoint`` as those of :func:`save` and :func:`load`, the same on all ranks."""
    group = _process_group(head)
    try:
        yield
    except CheckpointException as error:  # what ranks have raised, known to all of them
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, Exception):  # Ctrl-C
            if group is None or dist.get_rank(group) == rank:
                raise cause from None
            raise RuntimeError(f"process_group: rank {rank} was stopped by {type(cause).__name__} in {what}") from error
        if re.match(r"\w+: expected ", str(cause)):
            raise cause from error
        where = f" on rank {rank} of {group.size()}" if group is not None else ""
        reason = f"{type(cause).__name__}{where}: {str(cause).splitlines()[0] if str(cause) else ''}"
        if what == "load":
            raise _damaged(path, reason) from error
        number = (_os_error(cause) or OSError()).errno or errno.EIO
        raise OSError(number, f"path: expected room and leave to write a checkpoint, got {reason}", str(path)) from error
    except OSError as error:
        if what == "load" or str(error).startswith("path:"):
            raise
        text = f"path: expected room and leave to write a checkpoint, got {type(error).__name__}: {error}"
        raise OSError(error.errno, text, str(path)) from error
    except RuntimeError as error:
        if group is None or re.match(r"\w+: expected ", str(error)):
            raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RuntimeError(
            f"process_group: rank {dist.get_rank(group)} of {group.size()} could not {what} {path} with the others: another rank has died, "
            f"has raised an error or is stuck ({reason}). Stop every rank and resume from the last checkpoint."
        ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error that led to ``error``, if one did."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
