"""The registry of backends and the choice among them."""

from __future__ import annotations

from typing import Any

import torch

from .._deprecated import RenamedKeys, backend_name
from .base import Backend
from .chunked import ChunkedBackend
from .cpu import CpuBackend
from .cuda import CudaBackend, HopperBackend
from .triton import TritonBackend

#: The fused backends by name, in the order in which ``auto`` prefers them.
FUSED: dict[str, Backend] = {b.name: b for b in (HopperBackend(), CudaBackend(), TritonBackend(), CpuBackend(), ChunkedBackend())}
NAMES = ("auto", "reference", *FUSED)
REFERENCE_DEVICE_TYPES = ("cpu", "cuda", "any")
REFERENCE_NOTE = "eager, holds the N x C logits; what the others are compared with"


def get(name: str) -> Backend:
    """The fused backend of that name."""
    return FUSED[name]


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(name: str, device: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str:
    """The name of the backend that serves on ``device``, such as ``"cuda:1"``. An explicit one never falls back; it raises and lists the
    reasons.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve, with each one's reason.
    """
    name = backend_name(name)
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, got {name!r}")
    if name == "reference":
        return name
    candidates = list(FUSED.values()) if name == "auto" else [FUSED[name]]

    def why_not(candidate: Backend) -> str | None:
        return candidate.unavailable_reason() or candidate.unsupported_reason(device, dtype, weight_dtype, dim)

    for candidate in candidates:
        if (candidate.verified or name != "auto") and why_not(candidate) is None:
            return candidate.name
    reasons = {one.name: why_not(one) or "has not been verified on this hardware; name it to use it" for one in candidates}
    listed = "; ".join(f"{k}: {v}" for k, v in reasons.items())
    raise ValueError(f"backend: no fused backend serves {name!r} for {dtype} embeddings on {device} ({listed})")


def backends() -> dict[str, dict[str, Any]]:
    """What each backend is and whether it can serve here.

    Returns:
        name -> ``{"available": bool, "device_types": tuple, "verified": bool, "reason": str | None, "note": str}``; ``reason`` says why
        one that is not available cannot serve, ``verified`` whether ``backend="auto"`` may choose it.
    """
    listed = {"reference": _described(REFERENCE_DEVICE_TYPES, True, None, REFERENCE_NOTE)}
    for name, b in FUSED.items():
        listed[name] = _described(b.device_types, b.verified, b.unavailable_reason(), b.note)
    return RenamedKeys(listed)


def _described(device_types: tuple[str, ...], verified: bool, reason: str | None, note: str) -> dict[str, Any]:
    found = {"available": reason is None, "device_types": device_types, "verified": verified, "reason": reason, "note": note}
    return RenamedKeys(found)
