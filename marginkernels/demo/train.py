"""Training of one head, and what is noted on the way."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import margin_cross_entropy
from ..head import MarginHead
from ..progress import tqdm
from . import heads
from .data import Glyphs
from .evaluate import Verification, verify_pairs
from .model import GlyphNet

#: Images whose angles to their class centres are noted at the start, in the middle and at the end.
WATCHED = 4096


@dataclass
class Settings:
    """How to train; ``steps`` overrides ``epochs``."""

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

    def total_steps(self, images: int) -> int:
        return self.steps or max(1, round(self.epochs * images / self.batch_size))


@dataclass
class Trained:
    """One head's run. Angles in degrees, (WATCHED,) or fewer each; ``differences`` are |fused - eager| / eager of each step's loss."""

    head: str
    losses: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    target_angles: dict[str, np.ndarray] = field(default_factory=dict)
    top1: float = 0.0
    seconds: float = 0.0
    verification: Verification | None = None


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 2 pixels, scaled by up to 15%, turned by up to 5 degrees and with noise: (N, S, S) uint8 to (N, 1, S, S) float32."""
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
    found = torch.cat([model(as_input(part)) for part in images.split(1024)])
    model.train(training)
    return found


@torch.no_grad()
def target_angles(model: GlyphNet, head: MarginHead, images: Tensor, labels: Tensor) -> np.ndarray:
    """(M,) degrees between each embedding and its own class centre."""
    cos = F.cosine_similarity(embed(model, images), head.weight[labels])
    return torch.rad2deg(torch.acos(cos.clamp(-1, 1))).cpu().numpy()


def fit(name: str, train: Glyphs, test: Glyphs, settings: Settings) -> Trained:
    """Train the network with the head ``name`` and verify on the identities of ``test``.

    Each step's loss is computed a second time by the eager reference, with the same weights, embeddings and margin state.
    The same seed and thread count give the same numbers.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.deterministic = True
    generator = torch.Generator().manual_seed(settings.seed)
    images, labels = torch.from_numpy(train.images).to(device), torch.from_numpy(train.identities).to(device)
    classes = len(train.characters)
    model = GlyphNet(settings.dim, settings.width).to(device=device, memory_format=torch.channels_last)
    head = MarginHead(settings.dim, classes, heads.make(name, classes), backend=settings.backend, device=device)
    total = settings.total_steps(len(labels))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=max(total, 2), pct_start=0.2)
    run = Trained(name)
    watched = torch.randperm(len(labels), generator=generator)[:WATCHED].to(device)

    def note_angles(when: str) -> None:
        run.target_angles[when] = target_angles(model, head, images[watched], labels[watched])

    note_angles("start")
    losses, differences, top1 = [], [], []
    order = torch.empty(0, dtype=torch.int64)
    start = time.perf_counter()
    bar = tqdm(range(total), desc=name, unit="step")
    for step in bar:
        if len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        chosen, order = order[: settings.batch_size].to(device), order[settings.batch_size :]
        embeddings = model(augment(images[chosen], generator).contiguous(memory_format=torch.channels_last))
        before = copy.deepcopy(head.margin)
        loss = head(embeddings, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            eager = margin_cross_entropy(embeddings.detach(), head.weight, labels[chosen], margin=before, backend="reference")
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        differences.append((loss.detach() - eager).abs() / eager.abs().clamp_min(1e-12))
        top1.append(head.stats["top1"])
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", top1=f"{head.stats['top1'].item():.3f}")
        if step + 1 == (total + 1) // 2:
            note_angles("middle")
    note_angles("end")
    run.seconds = time.perf_counter() - start
    run.losses = torch.stack(losses).tolist()
    run.differences = torch.stack(differences).tolist()
    run.top1 = float(torch.stack(top1[-50:]).double().mean())
    run.verification = verify_pairs(embed(model, torch.from_numpy(test.images).to(device)), torch.from_numpy(test.identities).to(device))
    return run
