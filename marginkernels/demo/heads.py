"""The demo's heads, and what they are measured against: the same loss as it is usually written, eagerly."""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forms, verify
from .. import margins as m
from ..head import MarginHead
from ..margins import Margin, Rows

#: Scale and margins fit for a small network and a few thousand identities: milder than those that :mod:`marginkernels.verify` compares.
SCALE, ANGLE, COSINE = 32.0, 0.3, 0.2
TRAINING: dict[str, Callable[[int], Margin]] = {
    "sphereface": lambda c: m.SphereFace(margin=2),
    "sphereface-fnorm": lambda c: m.SphereFace(margin=2, scale=SCALE),
    "cosface": lambda c: m.CosFace(SCALE, COSINE),
    "arcface": lambda c: m.ArcFace(SCALE, ANGLE),
    **{f"arcface-{how}": lambda c, how=how: m.ArcFace(SCALE, ANGLE, beyond_pi=how) for how in ("none", "easy", "continuous", "clip")},
    "arcface-detached": lambda c: m.ArcFace(SCALE, ANGLE, gradient="detached"),
    "combined": lambda c: m.CombinedMargin(SCALE, m1=1.1, m2=0.15, m3=0.1),
    "mv-arc": lambda c: m.MVSoftmax("arc", SCALE, ANGLE),
    "mv-am": lambda c: m.MVSoftmax("am", SCALE, COSINE),
    "curricularface": lambda c: m.CurricularFace(SCALE, ANGLE),
    "arcface-focal": lambda c: m.ArcFace(SCALE, ANGLE, focal_gamma=2.0),
}


def names() -> list[str]:
    return list(verify.HEADS)


def make(name: str, num_classes: int) -> Margin:
    """A margin by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in verify.HEADS:
        raise ValueError(f"head: expected one of {', '.join(verify.HEADS)}, got {name!r}")
    return TRAINING.get(name, verify.HEADS[name])(num_classes)


def eager_loss(x: Tensor, w: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """The mean loss as it is usually written: all N x C logits, the target column replaced, cross-entropy."""
    cos = (F.normalize(x) if margin.normalize_embedding else x) @ (F.normalize(w) if margin.normalize_weight else w).T
    rows = Rows(x, labels, len(w))
    column = labels[:, None]
    target = cos.gather(1, column)[:, 0]
    if margin.training:
        with torch.no_grad():
            margin.update(target.double(), rows, lambda s: (s * cos).scatter(1, column, -torch.inf).logsumexp(1))
    value, slope = margin.target(target.detach().double(), rows)
    value = (value + slope.detach() * (target - target.detach())).to(cos.dtype)
    if margin.form != forms.IDENTITY:
        threshold = margin.threshold(target.detach().double(), rows).to(cos.dtype)
        cos = forms.value(margin.form, cos, threshold, torch.as_tensor(margin.t, dtype=cos.dtype, device=cos.device))
    scale = margin.row_scale(rows)
    scale = scale.to(cos.dtype).reshape(-1, 1) if isinstance(scale, Tensor) else scale
    logits = cos.scatter(1, column, value[:, None]) * scale
    losses = F.cross_entropy(logits, labels, reduction="none")
    if margin.focal_gamma:
        losses = (1 - torch.exp(-losses)).clamp_min(0) ** margin.focal_gamma * losses
    return losses.mean()


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """How far the memory of ``device`` rises while ``step`` runs; on a CPU the whole process's, None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that the allocator kept would hide what the step needs
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def compare(margin: Margin, n: int, d: int, c: int, *, device: torch.device, backend: str, repeats: int, seed: int = 0) -> list[dict]:
    """Time and peak memory of loss and both gradients, fused and eager in turn on the same float32 inputs.

    Args:
        margin: deep-copied; its state does not move.
        n, d, c: rows, embedding dimensions, classes.
        repeats: timed runs of each, after one that is not counted.

    Returns:
        For each of ``"fused"`` and ``"eager"``: ``{"kind", "n", "d", "c", "seconds" (median), "peak_bytes"}``; what is held beforehand
        (inputs and class centres) does not count, the gradients do.
    """
    g = torch.Generator().manual_seed(seed)
    head = MarginHead(d, c, copy.deepcopy(margin), backend=backend, device=device)
    x = torch.randn(n, d, generator=g).to(device).requires_grad_()
    labels = torch.randint(c, (n,), generator=g).to(device)

    def step(fused: bool) -> None:
        x.grad = head.weight.grad = None
        loss = head(x, labels) if fused else eager_loss(x, head.weight, labels, head.margin)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for fused, taken in times.items():
            start = time.perf_counter()
            step(fused)
            if repeat:
                taken.append(time.perf_counter() - start)
    x.grad = head.weight.grad = None
    found = []
    for fused, taken in times.items():
        peak = peak_bytes(lambda fused=fused: step(fused), device)
        x.grad = head.weight.grad = None
        found.append(
            {"kind": "fused" if fused else "eager", "n": n, "d": d, "c": c, "seconds": statistics.median(taken), "peak_bytes": peak}
        )
    return found
