"""Training of one head, with the figures that the report shows."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cli._progress import tqdm
from ..head import MarginHead
from ..loss import margin_cross_entropy
from ..optim import FusedAdamW
from . import heads
from .data import Glyphs
from .evaluate import Verification, verify_pairs
from .model import GlyphNet

#: Number of images whose angles to their class centers are recorded at the start, in the middle and at the end.
WATCHED = 4096
#: Logits that the eager reference may take in a step, on average; with more, it would take longer than the training.
CHECKED_LOGITS = 1 << 21


@dataclass
class Settings:
    """Settings of a training run; ``steps`` overrides ``epochs``. ``fused_step`` is None for the optimizer of torch, or the dtype of the
    class centers in a fused step, ``"fp32"`` or ``"bf16"`` (rounded at random; ``"bf16-nearest"`` to nearest)."""

    epochs: float = 8
    steps: int | None = None
    batch_size: int = 256
    dim: int = 128
    width: int = 16
    learning_rate: float = 6e-3
    weight_decay: float = 0.05
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    fused_step: str | None = None

    def total_steps(self, images: int) -> int:
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * images / self.batch_size))


@dataclass(frozen=True)
class Trained:
    """The results of one run.

    Attributes:
        losses: of each step.
        differences: step, from 0 -> |fused - eager| / eager of its loss, of the steps that were checked.
        target_angles: ``"start"``, ``"middle"``, ``"end"`` -> degrees between embeddings and their class centers, (WATCHED,) or fewer.
        top1: mean share of rows whose target is the top class, over the last steps.
        seconds: of the training.
        verification: on the unseen identities.
    """

    head: str
    losses: list[float]
    differences: dict[int, float]
    target_angles: dict[str, npt.NDArray[np.float32]]
    top1: float
    seconds: float
    verification: Verification


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels, scale by up to 15%, rotate by up to 5 degrees, add noise: (N, S, S) uint8 to (N, 1, S, S) float32."""
    n, size = images.shape[0], images.shape[-1]
    draw = torch.rand(4, n, generator=generator) * 2 - 1
    scale, angle = 1 + 0.15 * draw[0], math.radians(5) * draw[1]
    shift = draw[2:] * (2 * 2 / size)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1).to(images.device)
    grid = F.affine_grid(matrix, [n, 1, size, size], align_corners=False)
    moved = F.grid_sample(as_input(images), grid, align_corners=False)
    noise = torch.randn(moved.shape, generator=generator).to(images.device)
    return moved + 0.05 * noise


def as_input(images: Tensor) -> Tensor:
    """(N, S, S) uint8 to (N, 1, S, S) float32 in [0, 1]."""
    return images[:, None].float().div_(255)


@torch.no_grad()
def embed(model: GlyphNet, images: Tensor) -> Tensor:
    """(M, dim) embeddings of (M, S, S) uint8 images, in eval mode."""
    training = model.training
    model.eval()
    found = torch.cat([model(as_input(part)) for part in torch.split(images, 1024)])
    model.train(training)
    return found


@torch.no_grad()
def target_angles(model: GlyphNet, head: MarginHead, images: Tensor, labels: Tensor) -> npt.NDArray[np.float32]:
    """(M,) degrees between each embedding and its class center."""
    cos = F.cosine_similarity(embed(model, images), head.weight[labels].float())
    degrees: npt.NDArray[np.float32] = torch.rad2deg(torch.acos(cos.clamp(-1, 1))).cpu().numpy()
    return degrees


def _optimizer(model: GlyphNet, head: MarginHead, settings: Settings) -> torch.optim.Optimizer:
    """AdamW of both: torch's, or this package's with a fused step of the head."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.fused_step is None:
        return torch.optim.AdamW([*model.parameters(), *head.parameters()], **options)
    rounding = "nearest" if settings.fused_step == "bf16-nearest" else None
    fused = FusedAdamW(head, **options, rounding=rounding, seed=settings.seed)
    fused.add_param_group({"params": list(model.parameters())})
    return fused


def checked_every(rows: int, classes: int) -> int:
    """Of how many steps with so many rows the eager reference checks one."""
    return max(1, -(-rows * classes // CHECKED_LOGITS))


def fit(name: str, train: Glyphs, test: Glyphs, settings: Settings) -> Trained:
    """Train the network with the head ``name`` and verify on the identities of ``test``.

    A step's loss is also computed by the eager reference, with the same weights, embeddings and margin state: in the first and the last
    step and as many between as :data:`CHECKED_LOGITS` allows.
    The same seed and number of threads give the same results.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.deterministic = True
    generator = torch.Generator().manual_seed(settings.seed)
    images, labels = torch.from_numpy(train.images).to(device), torch.from_numpy(train.identities).to(device)
    classes = len(train.characters)
    model = GlyphNet(settings.dim, settings.width).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if settings.fused_step in ("bf16", "bf16-nearest") else None
    head = MarginHead(settings.dim, classes, heads.make(name, classes), backend=settings.backend, device=device, dtype=dtype)
    total = settings.total_steps(len(labels))
    optimizer = _optimizer(model, head, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=max(total, 2), pct_start=0.2)
    angles: dict[str, npt.NDArray[np.float32]] = {}
    watched = torch.randperm(len(labels), generator=generator)[:WATCHED].to(device)

    def record_angles(when: str) -> None:
        angles[when] = target_angles(model, head, images[watched], labels[watched])

    record_angles("start")
    losses, top1 = [], []
    differences: dict[int, Tensor] = {}
    every = checked_every(settings.batch_size, classes)
    order = torch.empty(0, dtype=torch.int64)
    start = time.perf_counter()
    bar = tqdm(range(total), desc=name, unit="step")
    for step in bar:
        if len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        chosen, order = order[: settings.batch_size].to(device), order[settings.batch_size :]
        embeddings = model(augment(images[chosen], generator).contiguous(memory_format=torch.channels_last))
        checked = step % every == 0 or step + 1 == total
        before = copy.deepcopy(head.margin) if checked else None
        loss = head(embeddings, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if before is not None:
            with torch.no_grad():
                eager = margin_cross_entropy(embeddings.detach(), head.weight, labels[chosen], margin=before, backend="reference")
            differences[step] = (loss.detach() - eager).abs() / eager.abs().clamp_min(1e-12)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        top1.append(head.stats["top1"])
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", top1=f"{head.stats['top1'].item():.3f}")
        if step + 1 == (total + 1) // 2:
            record_angles("middle")
    record_angles("end")
    seconds = time.perf_counter() - start
    return Trained(
        head=name,
        losses=torch.stack(losses).tolist(),
        differences={step: float(v) for step, v in differences.items()},
        target_angles=angles,
        top1=float(torch.stack(top1[-50:]).double().mean()),
        seconds=seconds,
        verification=verify_pairs(embed(model, torch.from_numpy(test.images).to(device)), torch.from_numpy(test.identities).to(device)),
    )
