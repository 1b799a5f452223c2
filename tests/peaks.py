"""Measured peaks of training steps, in a process of its own: prints ``{"measured": bytes, "parts": {...}}`` for each case given as JSON."""

from __future__ import annotations

import ctypes
import json
import sys

import torch

import marginkernels as mk
from marginkernels import optim, plan
from marginkernels.backend.cpu import release_memory


def resident(name: str) -> int:
    """``VmRSS``, or ``VmHWM``, the largest that it has been since the last :func:`reset`, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def reset() -> None:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def peak(classes: int, dim: int, batch: int, sample_rate: float, optimizer: str, backend: str, workspace: int) -> int:
    """Bytes above those before the head was made, at the peak of two steps."""
    release_memory()
    ctypes.CDLL(None).malloc_trim(0)  # nothing of the case before may be taken up again unseen
    before = resident("VmRSS")
    reset()
    head = mk.MarginHead(dim, classes, mk.ArcFace(), sample_rate=sample_rate, backend=backend, workspace_mb=workspace / 2**20)
    kind = {"sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4), "adamw": lambda p: optim.AdamW(p)}
    update = kind[optimizer](head.parameters())
    x, y = torch.randn(batch, dim, requires_grad=True), torch.randint(classes, (batch,))
    for _ in range(2):
        update.zero_grad()
        head(x, y).backward()
        update.step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(2)
    peak(1000, 64, 8, 0.5, "sgd", "auto", 0)  # what a first call leaves behind
    for case in json.loads(sys.argv[1]):
        measured = peak(**case)
        backend = case.pop("backend")
        print(json.dumps({**case, "backend": backend, "measured": measured, "parts": plan.memory(ranks=1, **case)}), flush=True)
