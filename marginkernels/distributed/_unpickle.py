"""Reads the pickles in a checkpoint, which may be anybody's, without running code of theirs.

A pickle names functions and classes, and calls them. Here each name that a checkpoint needs becomes a record of what it was called with,
and any other name raises. What is wanted is then built from the records by hand, so a pickle that is no checkpoint's raises too.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


class _Record:
    """Stands for an object of a pickle."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Turns what ``names`` lists into records, torch's dtypes into themselves, and refuses everything else."""

    names: frozenset[tuple[str, str]]

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.records: dict[tuple[str, str], Any] = {("torch", "Size"): tuple}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in self.names:
            raise pickle.UnpicklingError(f"path: expected a checkpoint of plain values and tensors, got {module}.{name} in a pickle")
        # A class of this pickle alone: what the pickle does to the class reaches nothing else.
        return self.records.setdefault((module, name), type(name, (_Record,), {"name": name}))


class _MetadataUnpickler(_Unpickler):
    """For the file ``.metadata`` of ``torch.distributed.checkpoint``, as torch 2.10 and later write it."""

    names = frozenset(
        [("torch.distributed.checkpoint.metadata", cls.__name__) for cls in (Metadata, MetadataIndex, TensorProperties)]
        + [("torch.distributed.checkpoint.metadata", cls.__name__) for cls in (TensorStorageMetadata, ChunkStorageMetadata)]
        + [("torch.distributed.checkpoint.metadata", name) for name in ("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")]
        + [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")]
        + [(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows", "PurePosix")]
        + [("builtins", "getattr")]  # how Python 3.11.0 to 3.11.3 pickle a member of an Enum
    )


def read_metadata(data: bytes) -> Metadata:
    """The content of a file ``.metadata``.

    Raises:
        pickle.UnpicklingError: it names something that no such file needs, or has another form.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO(data)).load().state
        tensors = {_of(str, name): _storage(v) for name, v in found["state_dict_metadata"].items()}
        return Metadata(tensors, storage_data={_index(k.state): _place(v.state) for k, v in found["storage_data"].items()})
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # pickles that are damaged raise errors of many kinds
        reason = f"{type(error).__name__}: {error}"
        raise pickle.UnpicklingError(
            f"path: expected the metadata of torch.distributed.checkpoint, got a file without it ({reason})"
        ) from error


def _storage(v: _Record) -> TensorStorageMetadata | BytesStorageMetadata:
    if v.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    chunks = [ChunkStorageMetadata(offsets=_size(c.state["offsets"]), sizes=_size(c.state["sizes"])) for c in v.state["chunks"]]
    properties = TensorProperties(dtype=_of(torch.dtype, v.state["properties"].state[0]))
    return TensorStorageMetadata(properties=properties, size=_size(v.state["size"]), chunks=chunks)


def _index(state: dict[str, Any]) -> MetadataIndex:
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(_of(str, state["fqn"]), None if offset is None else _size(offset), None if index is None else _of(int, index))


def _place(state: dict[str, Any]) -> _StorageInfo:
    """Where an entry lies: in a file of the checkpoint's own folder, and as it is."""
    name, offset, length = _of(str, state["relative_path"]), _of(int, state["offset"]), _of(int, state["length"])
    if not re.fullmatch(r"__\d+_\d+\.distcp", name) or offset < 0 or length < 0 or state.get("transform_descriptors"):
        raise ValueError(f"an entry in {name!r}")
    return _StorageInfo(name, offset, length)


def _size(v: Any) -> torch.Size:
    if any(type(n) is not int or n < 0 for n in _of(tuple, v)):
        raise ValueError(f"a size {v!r}")
    return torch.Size(v)


def _of(kind: type, v: Any) -> Any:
    if type(v) is not kind:
        raise TypeError(f"{type(v).__name__} where {kind.__name__} should be")
    return v


#: numpy's names of the numbers that may stand in ``param_groups``.
_NUMPY = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}


class _GroupsUnpickler(_Unpickler):
    """For the pickled ``param_groups`` of format 1. Tensors are rebuilt by torch, their storages read with ``weights_only``; numbers of
    numpy become Python's."""

    names = frozenset([("numpy", "dtype")])

    def __init__(self, file: IO[bytes], place: Callable[[Any, str], Any]):
        super().__init__(file)
        self.place = place

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # the storage of a tensor, itself pickled
            return lambda data: torch.load(io.BytesIO(data), map_location=self.place, weights_only=True)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _number
        if (module, name) in _TYPES:
            return _TYPES[module, name]
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_tensor_v2"):
            rebuild = getattr(torch._utils, name)
            return lambda *args: rebuild(*args)  # the pickle gets no hold of torch's function itself
        return super().find_class(module, name)


def _number(dtype: _Record, data: bytes) -> float:
    (name, *_), (_, order, *_) = dtype.args, dtype.state
    if name not in _NUMPY or order not in "<|" or len(data) != _NUMPY[name].itemsize:
        raise pickle.UnpicklingError(f"path: expected saved param_groups of numbers, got numpy's {order}{name}")
    value: float = torch.frombuffer(bytearray(data), dtype=_NUMPY[name]).item()
    return value


#: What the pickles of tensors and devices make, besides tensors and their storages.
_TYPES = {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): torch.Size, ("torch", "device"): torch.device}


def read_param_groups(data: bytes, place: Callable[[Any, str], Any]) -> list[dict[str, Any]]:
    """The ``param_groups`` that format 1 pickled; ``place`` as ``map_location`` of ``torch.load``.

    Raises:
        pickle.UnpicklingError: they hold something other than plain values, tensors and numpy's numbers.
    """
    groups: list[dict[str, Any]] = _GroupsUnpickler(io.BytesIO(data), place).load()
    return groups
