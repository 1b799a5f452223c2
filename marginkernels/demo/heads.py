"""The demo's heads, and their time and memory compared with the same loss in eager PyTorch."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import margins as m
from .. import testing
from ..core import nontarget
from ..core.types import Reduction
from ..head import MarginHead
from ..margins import BatchInfo, Margin
from ..margins.contract import evaluate

#: Scale and margins for a small network and a few thousand identities; smaller than those of :data:`marginkernels.testing.HEADS`.
SCALE, ANGLE, COSINE = 32.0, 0.3, 0.2
TRAINING: dict[str, Callable[[int], Margin]] = {
    "lsoftmax": lambda c: m.LSoftmax(margin=2),
    "sphereface": lambda c: m.SphereFace(margin=2),
    "sphereface-fnorm": lambda c: m.SphereFace(margin=2, scale=SCALE),
    "cosface": lambda c: m.CosFace(SCALE, COSINE),
    "arcface": lambda c: m.ArcFace(SCALE, ANGLE),
    "arcface-none": lambda c: m.ArcFace(SCALE, ANGLE, beyond_pi="none"),
    "arcface-easy": lambda c: m.ArcFace(SCALE, ANGLE, beyond_pi="easy"),
    "arcface-continuous": lambda c: m.ArcFace(SCALE, ANGLE, beyond_pi="continuous"),
    "arcface-clip": lambda c: m.ArcFace(SCALE, ANGLE, beyond_pi="clip"),
    "arcface-detached": lambda c: m.ArcFace(SCALE, ANGLE, gradient="detached"),
    "cosface-filtered": lambda c: m.CosFace(SCALE, COSINE, filter_above=0.5),
    "arcface-filtered": lambda c: m.ArcFace(SCALE, ANGLE, filter_above=0.5),
    "sphereface-r": lambda c: m.SphereFaceR("v0", SCALE, 1.2),
    "sphereface-r-v1": lambda c: m.SphereFaceR("v1", SCALE, 1.2),
    "sphereface-r-v2": lambda c: m.SphereFaceR("v2", SCALE, 1.2),
    "sphereface-r-v2-exact": lambda c: m.SphereFaceR("v2", SCALE, 1.2, gradient="exact"),
    "sphereface-r-soft": lambda c: m.SphereFaceR("v2", SCALE, 1.2, "soft", loss_weight=SCALE),
    "circle": lambda c: m.Circle(4 * SCALE),
    "sphereface2": lambda c: m.SphereFace2(c, SCALE, COSINE, loss_weight=SCALE),
    "sphereface2-arc": lambda c: m.SphereFace2(c, SCALE, ANGLE, kind="A", gradient="exact", loss_weight=SCALE),
    "uniface": lambda c: m.UniFace(c, SCALE, COSINE),
    "combined": lambda c: m.CombinedMargin(SCALE, m1=1.1, m2=0.15, m3=0.1),
    "mv-arc": lambda c: m.MVSoftmax("arc", SCALE, ANGLE),
    "mv-am": lambda c: m.MVSoftmax("am", SCALE, COSINE),
    "inter-topk": lambda c: m.InterTopK("arc", SCALE, ANGLE),
    "inter-topk-cos": lambda c: m.InterTopK("cos", SCALE, COSINE),
    "curricularface": lambda c: m.CurricularFace(SCALE, ANGLE),
    "arcface-focal": lambda c: m.ArcFace(SCALE, ANGLE, focal_gamma=2.0),
    "cosface-per-class": lambda c: m.CosFace(SCALE, torch.linspace(0.5 * COSINE, COSINE, c)),
    "arcface-per-class": lambda c: m.ArcFace(SCALE, m.margins_from_counts(torch.arange(1, c + 1), high=ANGLE)),
    "adaface": lambda c: m.AdaFace(SCALE, ANGLE),
    "elasticface": lambda c: m.ElasticFace("arc", SCALE, ANGLE, 0.05),
    "elasticface-plus": lambda c: m.ElasticFace("cos", SCALE, COSINE, 0.05, "paper"),
    "magface": lambda c: m.MagFace(SCALE, (1.0, 30.0), (ANGLE, 2 * ANGLE), 1.0),
}


def names() -> list[str]:
    """The heads that :func:`make` knows."""
    return list(testing.HEADS)


def make(name: str, num_classes: int) -> Margin:
    """A margin by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in testing.HEADS:
        raise ValueError(f"head: expected one of {', '.join(testing.HEADS)}, got {name!r}")
    return TRAINING.get(name, testing.HEADS[name])(num_classes)


#: What the usual value of a setting is meant for, where the demo has another.
MEANT_FOR = {
    **dict.fromkeys(("scale", "margin", "m1", "m2", "m3", "margin_range", "loss_weight"), "far more identities"),
    **dict.fromkeys(("norm_range", "norm_weight"), "longer embeddings"),
}


def unusual(name: str, num_classes: int) -> str | None:
    """A sentence on the settings of a head that are not the usual ones, and what those are for; None where all are."""
    margin = make(name, num_classes)
    found = []
    for setting, parameter in inspect.signature(type(margin)).parameters.items():
        mine: Any = getattr(margin, setting, None)
        usual: Any = parameter.default
        both_known = all(isinstance(value, (int, float, tuple)) for value in (mine, usual))
        if setting in MEANT_FOR and both_known and mine != usual:
            reason = f", for {MEANT_FOR[setting]}" if usual > mine else ""
            found.append(f"{setting} {_number(mine)} (usually {_number(usual)}{reason})")
    return f"{name} has {', '.join(found)}." if found else None


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def eager_loss(x: Tensor, w: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """The mean loss as it is usually written: all N x C logits, with the target column replaced, then cross-entropy."""
    cos = (F.normalize(x) if margin.normalize_embedding else x) @ (F.normalize(w) if margin.normalize_weight else w).T
    column, similarity = labels[:, None], cos.detach()
    batch = BatchInfo(
        x,
        labels,
        len(w),
        center_norm=w.double().norm(dim=1)[labels] if margin.needs_center_norm else None,
        nearest=lambda count: F.pad(similarity.scatter(1, column, -torch.inf), (0, count), value=-torch.inf).topk(count, 1).values,
    )
    target = cos.gather(1, column)[:, 0]
    if margin.training:
        with torch.no_grad():
            margin.update(target.double(), batch, lambda s: (s * cos).scatter(1, column, -torch.inf).logsumexp(1))
    at = evaluate(margin, target.detach().double(), batch, torch.float64)
    value = (at.value + at.slope.detach() * (target - target.detach())).to(cos.dtype)
    cos = nontarget.value(margin.non_target, cos, at.threshold, at.t)
    logits = cos.scatter(1, column, value[:, None]) * at.scale[:, None].to(cos.dtype)
    shared = margin.class_bias()
    logits = logits if shared is None else logits + shared.to(logits.dtype)
    if margin.reduction == Reduction.SOFTPLUS_SUM:
        terms = F.softplus(logits.scatter(1, column, -logits.gather(1, column)))
        own = terms.gather(1, column)[:, 0]
        losses = margin.other_weight * terms.sum(1) + (margin.target_weight - margin.other_weight) * own
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    if margin.focal_gamma:
        losses = (1 - torch.exp(-losses)).clamp_min(0) ** margin.focal_gamma * losses
    if margin.loss_factor != 1:
        losses = losses * margin.loss_factor
    if at.regularizer is not None:
        losses = losses + at.regularizer.to(losses.dtype)
    return losses.mean()


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """Peak memory on ``device`` during ``step``, minus the memory in use before. On a CPU it is that of the process, or None where the
    system does not report it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that are not returned would hide what the step needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    """A field of Linux's ``/proc/self/status`` in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def compare(
    margin: Margin, n: int, d: int, c: int, *, device: torch.device, backend: str, repeats: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Time and peak memory of the loss and both gradients, fused and eager in turn on the same float32 inputs.

    Args:
        margin: deep-copied, so that its state does not change.
        n, d, c: rows, embedding dimensions, classes.
        repeats: timed runs of each, after one that is not timed.

    Returns:
        For each of ``"fused"`` and ``"eager"``: ``{"kind", "n", "d", "c", "seconds" (median), "peak_bytes"}``. The peak includes the
        gradients, but not the inputs and class centers.
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
        peak = peak_bytes(functools.partial(step, fused), device)
        x.grad = head.weight.grad = None
        found.append(
            {"kind": "fused" if fused else "eager", "n": n, "d": d, "c": c, "seconds": statistics.median(taken), "peak_bytes": peak}
        )
    return found
