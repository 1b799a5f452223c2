"""The registry of backends and the choice among them."""

from __future__ import annotations

import torch

from . import reference
from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .hopper import HopperBackend
from .slab import SlabBackend
from .triton import TritonBackend

#: The fused backends by name, in the order in which ``auto`` prefers them.
FUSED: dict[str, Backend] = {b.name: b for b in (HopperBackend(), CudaBackend(), TritonBackend(), CpuBackend(), SlabBackend())}
NAMES = ("auto", "reference", *FUSED)


def get(name: str) -> Backend:
    return FUSED[name]


@torch._dynamo.assume_constant_result
def resolve(name: str, device_type: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str:
    """The backend that serves; a named one is honoured or refused, never replaced.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve, with each one's reason.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, got {name!r}")
    if name == "reference":
        return name
    refusals = {}
    for candidate in FUSED.values() if name == "auto" else (FUSED[name],):
        reason = candidate.unavailable() or candidate.refuses(device_type, dtype, weight_dtype, dim)
        if reason is None and name == "auto" and not candidate.proven:
            reason = "has not been proven on this hardware; name it to use it"
        if reason is None:
            return candidate.name
        refusals[candidate.name] = reason
    listed = "; ".join(f"{k}: {v}" for k, v in refusals.items())
    raise ValueError(f"backend: no fused backend serves {name!r} for {dtype} embeddings on {device_type} ({listed})")


def backends() -> dict[str, dict]:
    """What each backend is and whether it can serve here.

    Returns:
        name -> ``{"available": bool, "device_types": tuple, "proven": bool, "reason": str | None, "note": str}``; ``reason`` says why
        one that is not available cannot serve.
    """
    listed = {
        "reference": {"available": True, "device_types": reference.DEVICE_TYPES, "proven": True, "reason": None, "note": reference.NOTE}
    }
    for name, b in FUSED.items():
        reason = b.unavailable()
        listed[name] = {
            "available": reason is None,
            "device_types": b.device_types,
            "proven": b.proven,
            "reason": reason,
            "note": b.note,
        }
    return listed
