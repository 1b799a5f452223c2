"""Devices: which one a launch is on, what a GPU can do, and the values that lie on one, in short."""

from __future__ import annotations

import contextlib
import hashlib

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on ``x``'s device, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def capability(device: str) -> tuple[int, int] | None:
    """The compute capability of a GPU such as ``"cuda:1"`` (``"cuda"`` is the current one); None where there is none to ask."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") and torch.cuda.is_available() else None


def capabilities() -> list[tuple[int, int]]:
    """The compute capability of every GPU that PyTorch sees."""
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def digest(v: Tensor) -> str:
    """Twelve digits that stand for the bytes of ``v``; "" where there are none. Reads them, so it waits for the device."""
    held = v.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()[:12] if v.numel() else ""
