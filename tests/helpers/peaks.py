"""Measure the peak memory of training steps in this process: prints ``{"measured": bytes, "parts": {...}}`` for each case given as JSON."""

from __future__ import annotations

import ctypes
import json
import sys

import torch

import marginkernels as mk
from marginkernels import optim
from marginkernels.backend.cpu import release_memory
from marginkernels.cli import plan


def resident(name: str) -> int:
    """``VmRSS``, or ``VmHWM``, its maximum since the last :func:`reset`, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def reset() -> None:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def peak(
    classes: int, dim: int, batch: int, sample_rate: float, optimizer: str, backend: str, workspace: int, fused_step: bool = False
) -> int:
    """Peak memory of two steps, minus the memory in use before the head was made, in bytes."""
    release_memory()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by the case before must not hide what this one needs
    before = resident("VmRSS")
    reset()
    head = mk.MarginHead(dim, classes, mk.ArcFace(), sample_rate=sample_rate, backend=backend, workspace_mb=workspace / 2**20)
    kind = {"sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4), "adamw": lambda p: optim.AdamW(p)}
    fused = {"sgd": lambda: optim.FusedSGD(head, lr=0.1, momentum=0.9, weight_decay=1e-4), "adamw": lambda: optim.FusedAdamW(head)}
    update = fused[optimizer]() if fused_step else kind[optimizer](head.parameters())
    x, y = torch.randn(batch, dim, requires_grad=True), torch.randint(classes, (batch,))
    for _ in range(2):
        update.zero_grad()
        head(x, y).backward()
        update.step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(2)
    peak(1000, 64, 8, 0.5, "sgd", "auto", 0)  # warm-up: allocations of the first call that stay
    for case in json.loads(sys.argv[1]):
        measured = peak(**case)
        backend = case.pop("backend")
        print(json.dumps({**case, "backend": backend, "measured": measured, "parts": plan.memory(ranks=1, **case)}), flush=True)
