"""A small network, trained once on identities of its own, and the features that it gives for every image."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

import marginkernels as mk
from marginkernels.demo import heads
from marginkernels.demo.model import GlyphNet
from marginkernels.demo.train import augment, embed

from . import glyphs

#: Whose identities they are: the network's, the heads', or nobody's.
BACKBONE, HEADS, UNSEEN = range(3)


@dataclass(frozen=True)
class Network:
    """The network and its training, which is short and sees few identities: features that are good already leave a head nothing to do.

    Attributes:
        dim: features of an image.
        width: channels of the first convolution.
        share, unseen: of the identities, those that train the network, and those that no training sees.
        steps, batch: of the training, and the images of a step.
    """

    dim: int = 512
    width: int = 16
    share: float = 0.005
    unseen: float = 0.12
    steps: int = 150
    batch: int = 256
    learning_rate: float = 6e-3
    seed: int = 0


def parts(identities: int, network: Network) -> npt.NDArray[np.int64]:
    """(K,) whose each identity is: ``BACKBONE``, ``HEADS`` or ``UNSEEN``, drawn at random."""
    order = np.random.default_rng(network.seed).permutation(identities)
    part = np.full(identities, HEADS)
    unseen, own = round(network.unseen * identities), round(network.share * identities)
    part[order[:unseen]] = UNSEEN
    part[order[unseen : unseen + own]] = BACKBONE
    return part


def train(cache: Path, network: Network) -> dict[str, Any]:
    """Train the network and write ``features.npy`` (M, dim) float16, unless that has been done; gives what ``features.json`` says.

    Raises:
        ValueError: the features there are of another network.
    """
    about = cache / "features.json"
    if about.exists():
        found: dict[str, Any] = json.loads(about.read_text())
        if found["network"] != asdict(network):
            raise ValueError(f"cache: the features in {cache} are of {found['network']}, and {asdict(network)} is asked for")
        return found
    data, _ = glyphs.load(cache)
    part = parts(len(data.characters), network)
    rows = np.flatnonzero((part == BACKBONE)[data.identities])
    images = torch.from_numpy(data.images[rows])
    labels = torch.from_numpy(np.unique(data.identities[rows], return_inverse=True)[1])
    start = time.perf_counter()
    model, losses = _fit(images, labels, network)
    trained = time.perf_counter()
    features = np.lib.format.open_memmap(cache / "features.npy", mode="w+", dtype=np.float16, shape=(len(data.images), network.dim))
    for at in tqdm(range(0, len(features), 4096), desc="features", unit="chunk"):
        features[at : at + 4096] = embed(model, torch.from_numpy(data.images[at : at + 4096].copy())).numpy()
    features.flush()
    found = {
        "network": asdict(network),
        "identities": {name: int((part == k).sum()) for k, name in enumerate(("backbone", "heads", "unseen"))},
        "images": {name: int((part[data.identities] == k).sum()) for k, name in enumerate(("backbone", "heads", "unseen"))},
        "loss": [round(v, 4) for v in losses[:: max(1, network.steps // 100)]],
        "seconds": {"training": round(trained - start, 1), "features": round(time.perf_counter() - trained, 1)},
    }
    about.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _fit(images: Tensor, labels: Tensor, network: Network) -> tuple[GlyphNet, list[float]]:
    """The trained network, and the loss of each step."""
    classes = int(labels.max()) + 1
    torch.manual_seed(network.seed)
    generator = torch.Generator().manual_seed(network.seed)
    model = GlyphNet(network.dim, network.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = mk.MarginHead(network.dim, classes, heads.make("arcface", classes), backend="cpu")
    optimizer = mk.optim.FusedAdamW(head, lr=network.learning_rate, weight_decay=0.05)
    optimizer.add_param_group({"params": list(model.parameters())})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.learning_rate, total_steps=network.steps, pct_start=0.2)
    losses = []
    bar = tqdm(range(network.steps), desc="network", unit="step")
    for i in bar:
        chosen = torch.randint(len(labels), (network.batch,), generator=generator)
        embeddings = model(augment(images[chosen], generator).contiguous(memory_format=torch.channels_last))
        loss = head(embeddings, labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if i % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model, losses


def load(cache: Path) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int64], npt.NDArray[np.int64], dict[str, Any]]:
    """The features (M, dim), each image's identity (M,), whose each identity is (K,), and what ``features.json`` says.

    Raises:
        ValueError: the features have not been made.
    """
    about = cache / "features.json"
    if not about.exists():
        raise ValueError(
            f"cache: expected a folder with features; make them first: python -m examples.study train-features --cache {cache}"
        )
    found = json.loads(about.read_text())
    identities = np.load(cache / "index.npz")["identities"]
    part = parts(int(identities.max()) + 1, Network(**found["network"]))
    return np.load(cache / "features.npy", mmap_mode="r"), identities, part, found
