"""The current device of a launch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on ``x``'s device, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
