"""The registry of backends and the choice among them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch._dynamo.comptime import comptime

from .._deprecated import RenamedKeys, backend_name
from . import records
from .base import Backend
from .chunked import ChunkedBackend
from .cpu import CpuBackend
from .cuda import CudaBackend, HopperBackend
from .records import FALLBACK, Machine, Reading, Record
from .triton import TritonBackend, heuristics

#: The fused backends by name, in the order in which ``auto`` prefers them on a CPU.
FUSED: dict[str, Backend] = {b.name: b for b in (HopperBackend(), CudaBackend(), TritonBackend(), CpuBackend(), ChunkedBackend())}
NAMES = ("auto", "reference", *FUSED)
REFERENCE_DEVICE_TYPES = ("cpu", "cuda", "any")
REFERENCE_NOTE = "eager, holds the N x C logits; what the others are compared with"
#: Device types whose kernels nothing but a record proves; on the others the project's own tests do.
RECORDED = ("cuda",)

#: What the ranks of a job may choose from, where they have compared it: whether all read the same record, and what any rank's takes away.
Agreement = tuple[bool, tuple[str, ...]]

#: The record of each device, read once; and whether the process has been told that there is none.
_READINGS: dict[str, Reading] = {}
_WARNED: list[str] = []
#: N and C of the call that is being traced.
_TRACED: list[tuple[int | None, int | None]] = [(None, None)]


def get(name: str) -> Backend:
    """The fused backend of that name."""
    return FUSED[name]


def resolve(
    name: str,
    device: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dim: int,
    rows: int | None = None,
    classes: int | None = None,
    agreed: Agreement | None = None,
    sub_centers: int = 1,
    features: tuple[str, ...] = (),
) -> str:
    """The name of the backend that serves. An explicit backend never falls back; it raises and lists the reasons.

    Args:
        device: of the tensors, such as ``"cuda:1"``; its type will do.
        dtype, weight_dtype, dim: of embeddings, weight, and D.
        rows, classes: N and C, of which ``auto`` on a GPU takes the size class; while tracing, those that are traced, without a guard.
        agreed: what the ranks of a sharded head may choose from; None where this process decides for itself.
        sub_centers: rows of the weight that a class has.
        features: what else is asked of a backend, as :func:`records.features` or :data:`records.SEARCH` names it: a record that lacks it
            does not count.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve, with each one's reason.
    """
    if torch.compiler.is_dynamo_compiling():
        comptime(_note_sizes)
        traced: str = _resolve_traced(name, device, dtype, weight_dtype, dim, agreed, sub_centers, features)
        return traced
    return _resolve(name, device, dtype, weight_dtype, dim, _hint(rows), _hint(classes), agreed, sub_centers, features)


def _note_sizes(context: Any) -> None:
    """While TorchDynamo traces :func:`resolve`: its sizes as they are in this call, which makes them neither constants nor bounds."""
    found = (context.get_local(name) for name in ("rows", "classes"))
    rows, classes = (_hint(v.as_python_constant() if v.is_python_constant() else v.as_fake()) for v in found)
    _TRACED[0] = (rows, classes)


def _hint(size: Any) -> int | None:
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return size if isinstance(size, int) else None


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve_traced(
    name: str,
    device: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dim: int,
    agreed: Agreement | None,
    sub_centers: int,
    features: tuple[str, ...],
) -> str:
    return _resolve(name, device, dtype, weight_dtype, dim, *_TRACED[0], agreed, sub_centers, features)


def _resolve(
    name: str,
    device: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dim: int,
    rows: int | None,
    classes: int | None,
    agreed: Agreement | None,
    sub_centers: int,
    features: tuple[str, ...],
) -> str:
    name, kind = backend_name(name), device.partition(":")[0]
    if name not in NAMES and name not in FUSED:
        raise ValueError(f"backend: expected one of {NAMES}, got {name!r}")
    if name == "reference":
        return name

    def why_not(candidate: Backend) -> str | None:
        reason = candidate.unavailable_reason() or candidate.unsupported_reason(device, dtype, weight_dtype, dim)
        return reason or candidate.sub_centers_reason(sub_centers)

    found, taken_away = Reading(None, None, ()), dict[str, str]()
    if name != "auto":
        candidates = [name]
    else:
        found = reading(device)
        taken_away = records.bad(found.record) if agreed is None else dict.fromkeys(agreed[1], "found wrong on one of the ranks")
        candidates = [one for one in FUSED if one not in taken_away and (kind in RECORDED or kind in FUSED[one].tested_on)]
    chosen = None
    if name != "auto" or kind not in RECORDED:
        chosen = next((one for one in candidates if why_not(FUSED[one]) is None), None)
    else:
        serving = [one for one in candidates if why_not(FUSED[one]) is None]
        if found.record is None:
            if any(one != FALLBACK for one in serving):
                _warn_once(found)
        elif agreed is None or agreed[0]:
            size = records.size_class(rows, classes, dim)
            chosen = records.fastest(found.record, serving, records.pair(dtype, weight_dtype), size, features)
        if chosen is None and FALLBACK in serving:
            chosen = FALLBACK
    if chosen is None:
        reasons = {one: taken_away.get(one) or why_not(FUSED[one]) for one in (FUSED if name == "auto" else [name])}
        listed = "; ".join(f"{k}: {reason or 'has not been verified here; name it to use it'}" for k, reason in reasons.items())
        raise ValueError(f"backend: no fused backend serves {name!r} for {dtype} embeddings on {device} ({listed})")
    if chosen == "triton" and kind in RECORDED:
        _take_tiles(reading(device).record)
    return chosen


def _warn_once(found: Reading) -> None:
    if not _WARNED:
        stale = "".join(f" {path.name} is {reason}." for path, reason in found.ignored if reason.startswith("stale"))
        _WARNED.append(
            f"marginkernels: backend='auto' takes {FALLBACK!r} on this GPU, because no record says which of the faster backends are "
            f"right on it; 'python -m marginkernels verify --device cuda' makes one.{stale}"
        )
        warnings.warn(_WARNED[0], UserWarning, stacklevel=2)


def gpu_is_here() -> bool:
    return torch.cuda.is_available()


def machine(device: str) -> Machine:
    """What records of ``device`` are about here."""
    return records.here(torch.device(device))


def reading(device: str) -> Reading:
    """The record that serves ``device`` here, if there is one; files are read once in a process."""
    if device not in _READINGS:
        kind = device.partition(":")[0]
        known = kind == "cpu" or (kind in RECORDED and gpu_is_here())
        # Without any record, most often, the kernels' sources need not be hashed.
        _READINGS[device] = records.read(machine(device)) if known and records.files() else Reading(None, None, ())
    return _READINGS[device]


def forget() -> None:
    """Read the records anew at the next call."""
    _READINGS.clear()
    _WARNED.clear()


def offer(device: str) -> tuple[str, tuple[str, ...]]:
    """What this process would choose from on ``device``, for comparison between ranks: what must be the same for all to use their records,
    and the backends that this one's record takes away."""
    found = reading(device)
    available = ",".join(name for name, b in FUSED.items() if b.unavailable_reason() is None)
    return f"{found.record.digest() if found.record else 'no record'}; {available}", tuple(sorted(records.bad(found.record)))


def agreement(offers: list[tuple[str, tuple[str, ...]]]) -> Agreement:
    """What ranks with these offers may choose from, the same on all of them."""
    return len({same for same, _ in offers}) == 1, tuple(sorted({name for _, names in offers for name in names}))


def _take_tiles(record: Record | None) -> None:
    if record is not None and record.tiles:
        heuristics.take_recorded(record.tiles)


def backends() -> dict[str, dict[str, Any]]:
    """What each backend is and whether it can serve here.

    Returns:
        name -> ``{"available": bool, "device_types": tuple, "verified": bool, "reason": str | None, "note": str}``; ``reason`` says why
        one that is not available cannot serve, ``verified`` whether ``backend="auto"`` may choose it: on a CPU what the project's tests
        prove and no record takes away, on a GPU what a record proves.
    """
    listed = {"reference": _described(REFERENCE_DEVICE_TYPES, True, None, REFERENCE_NOTE)}
    for name, b in FUSED.items():
        listed[name] = _described(b.device_types, verified(b), b.unavailable_reason(), b.note)
    return RenamedKeys(listed)


def verified(b: Backend) -> bool:
    """Whether ``auto`` may choose a backend here, on a CPU or on the current GPU."""
    if any(b.name not in records.bad(reading(kind).record) for kind in b.tested_on):
        return True
    if "cuda" not in b.device_types or b.unavailable_reason() is not None or not gpu_is_here():
        return False
    record = reading("cuda").record
    return record is not None and b.name in record.backends and record.backends[b.name].verdict == records.RIGHT


def _described(device_types: tuple[str, ...], verified: bool, reason: str | None, note: str) -> dict[str, Any]:
    found = {"available": reason is None, "device_types": device_types, "verified": verified, "reason": reason, "note": note}
    return RenamedKeys(found)
