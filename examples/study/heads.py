"""The runs: each trains a head, and a projection below it, on the cached features, and measures it on unseen identities."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import marginkernels as mk
from marginkernels.demo import heads

from . import features, metrics

#: The heads that are trained with several seeds.
MAIN = ("normface", "cosface", "arcface", "curricularface", "adaface", "sphereface2")
#: Name -> what differs from the run ``arcface``.
VARIANTS: dict[str, dict[str, Any]] = {
    "arcface-detached": {"head": "arcface-detached"},
    "sampled-0.3": {"sample_rate": 0.3},
    "sampled-0.1": {"sample_rate": 0.1},
    "bf16-embeddings": {"embeddings": "bfloat16"},
    "bf16-centers": {"embeddings": "bfloat16", "centers": "bfloat16"},
    "bf16-centers-nearest": {"embeddings": "bfloat16", "centers": "bfloat16", "rounding": "nearest"},
}
#: Name of the record of the features as they are, without a head.
BARE = "features"
#: Time of a step, as a multiple of ArcFace's, where it is another.
COST = {"inter-topk": 1.5, "inter-topk-cos": 1.5, "sphereface2": 1.2, "sphereface2-arc": 1.2, "uniface": 1.2}
#: Of a series: this many values in a record.
KEPT = 100
#: Training images whose angles are recorded, and the width of the histograms in degrees.
WATCHED, WIDTH = 2048, 2.0
#: Held-out images of training identities that are identified, at most.
CLOSED = 10_000


@dataclass(frozen=True)
class Plan:
    """What all runs share; ``plan.json`` of the folder with the records.

    Attributes:
        identities: C, drawn at random from those that are there for the heads.
        views: images of an unseen identity that are compared.
        dropout: of the features.
        learning_rate, momentum, weight_decay: of :class:`marginkernels.optim.FusedSGD`; the rate rises in the first tenth of the steps and
            then falls to zero.
        seeds: of the main heads and the variants; other heads have one.
    """

    steps: int
    identities: int
    batch: int = 512
    dim: int = 128
    hidden: int = 512
    views: int = 3
    dropout: float = 0.1
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seeds: int = 3


@dataclass(frozen=True)
class Run:
    """One training: a head by its name in :mod:`marginkernels.demo.heads`, a seed, and how the centers are drawn and stored."""

    name: str
    head: str
    seed: int
    sample_rate: float = 1.0
    embeddings: str = "float32"
    centers: str = "float32"
    rounding: str | None = None

    @property
    def file(self) -> str:
        return f"{self.name}-{self.seed}.json"

    @property
    def cost(self) -> float:
        """Time of a step as a multiple of ArcFace's, roughly."""
        return COST.get(self.head, 1.0) * (0.2 + 0.8 * self.sample_rate)


def runs(seeds: int, only: Sequence[str] | None = None) -> list[Run]:
    """All runs, or those of the names in ``only``: first seed 0 of everything, the main heads before the others."""
    named = {name: {"head": name} for name in MAIN} | {name: {"head": "arcface"} | about for name, about in VARIANTS.items()}
    rest = {name: {"head": name} for name in heads.names() if name not in named}
    found = [Run(name=name, seed=0, **about) for name, about in (named | rest).items()]
    found += [Run(name=name, seed=seed, **about) for seed in range(1, seeds) for name, about in named.items()]
    return [run for run in found if only is None or run.name in only]


@dataclass
class Data:
    """The features that runs take, drawn in the same way for all of them.

    Attributes:
        train, labels: (M, dim) float16 and (M,) in [0, C).
        closed, closed_labels: held-out images of the same identities.
        unseen, identities: images of identities that nothing was trained on, and (M',) in [0, K).
        others: one image of each identity that is not an unseen one.
    """

    train: Tensor
    labels: Tensor
    closed: Tensor
    closed_labels: Tensor
    unseen: Tensor
    identities: Tensor
    others: Tensor
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, cache: Path, identities: int, views: int) -> Data:
        every, owner, part, _ = features.load(cache)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(owner))
        order = order[np.argsort(owner[order], kind="stable")]  # by identity, its images in random order
        first = np.searchsorted(owner[order], np.arange(len(part)))
        place = np.arange(len(order)) - first[owner[order]]  # of an image among those of its identity
        of = owner[order]
        chosen = np.sort(rng.permutation(np.flatnonzero(part == features.HEADS))[:identities])
        number = np.full(len(part), -1)
        number[chosen] = np.arange(len(chosen))
        unseen = np.full(len(part), -1)
        unseen[part == features.UNSEEN] = np.arange(int((part == features.UNSEEN).sum()))

        def rows(mask: Any) -> Tensor:
            at = order[mask]
            by_file = np.argsort(at)
            taken = np.empty((len(at), every.shape[1]), dtype=np.float16)
            taken[by_file] = every[at[by_file]]
            return torch.from_numpy(taken)

        def numbers(table: Any, mask: Any) -> Tensor:
            return torch.from_numpy(table[of[mask]])

        training, held = (number[of] >= 0) & (place > 0), (number[of] >= 0) & (place == 0)
        held &= number[of] < CLOSED
        compared = (unseen[of] >= 0) & (place < views)
        found = cls(
            rows(training), numbers(number, training), rows(held), numbers(number, held),
            rows(compared), numbers(unseen, compared), rows((part[of] != features.UNSEEN) & (place == 0)),
        )  # fmt: skip
        found.about = {
            "training": {"identities": len(chosen), "images": len(found.train)},
            "closed": {"images": len(found.closed)},
            "unseen": {"identities": int(unseen.max()) + 1, "images": len(found.unseen)},
            "distractors": len(found.others),
        }
        return found


class Projection(nn.Sequential):
    """Features (N, inputs) to embeddings (N, dim), whose initial norm is near sqrt(dim)."""

    def __init__(self, inputs: int, plan: Plan):
        super().__init__(
            nn.Dropout(plan.dropout),
            nn.Linear(inputs, plan.hidden, bias=False),
            nn.BatchNorm1d(plan.hidden),
            nn.ReLU(),
            nn.Linear(plan.hidden, plan.dim, bias=False),
            nn.BatchNorm1d(plan.dim),
        )

    @torch.no_grad()
    def embed(self, rows: Tensor) -> Tensor:
        """(M, dim) in eval mode."""
        training = self.training
        self.eval()
        found = torch.cat([self(part.float()) for part in torch.split(rows, 4096)])
        self.train(training)
        return found


@dataclass
class Trained:
    """A run's projection and head after its steps, and what was seen meanwhile; ``seconds`` of each step."""

    projection: Projection
    head: mk.MarginHead
    losses: list[float]
    series: dict[str, list[float]]
    angles: dict[str, dict[str, Any]]
    seconds: list[float]


def train(run: Run, plan: Plan, data: Data, steps: int | None = None, bar: Callable[..., Any] = tqdm) -> Trained:
    """Train for the plan's steps, or ``steps``. The same seed and number of threads give the same bits."""
    steps = plan.steps if steps is None else steps
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    classes, dtype = data.about["training"]["identities"], getattr(torch, run.embeddings)
    projection = Projection(data.train.shape[1], plan)
    margin = heads.make(run.head, classes)
    sampled = {"sample_rate": run.sample_rate, "sample_seed": run.seed} if run.sample_rate < 1 else {}
    head = mk.MarginHead(plan.dim, classes, margin, backend="cpu", dtype=getattr(torch, run.centers), **sampled)
    options = {"lr": plan.learning_rate, "momentum": plan.momentum, "weight_decay": plan.weight_decay}
    optimizer = mk.optim.FusedSGD(head, **options, rounding=run.rounding, seed=run.seed)
    optimizer.add_param_group({"params": list(projection.parameters())})
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    watched = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:WATCHED]
    found = Trained(projection, head, [], {}, {"start": _angles(projection, head, data, watched)}, [])
    every = max(1, steps // KEPT)
    order = torch.empty(0, dtype=torch.int64)
    for step in bar(range(steps), desc=f"{run.name} {run.seed}", unit="step", leave=False):
        start = time.perf_counter()
        if len(order) < plan.batch:
            order = torch.cat([order, torch.randperm(len(data.labels), generator=generator)])
        chosen, order = order[: plan.batch], order[plan.batch :]
        loss = head(projection(data.train[chosen].float()).to(dtype), data.labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        found.losses.append(float(loss.detach()))
        found.seconds.append(time.perf_counter() - start)
        if step % every == 0:
            for name, value in head.stats.items():
                found.series.setdefault(name, []).append(float(value))
        if step + 1 == (steps + 1) // 2:
            found.angles["middle"] = _angles(projection, head, data, watched)
    found.angles["end"] = _angles(projection, head, data, watched)
    return found


def _angles(projection: Projection, head: mk.MarginHead, data: Data, watched: Tensor) -> dict[str, Any]:
    """Angles in degrees of watched training images to their own class center and to the nearest other one: histograms and medians."""
    x, labels, w = projection.embed(data.train[watched]), data.labels[watched], head.weight.detach()
    own = torch.rad2deg(torch.acos(F.cosine_similarity(x, w[labels].float()).clamp(-1, 1)))
    scores, classes = mk.topk(x, w, k=2, backend="cpu")
    nearest = torch.rad2deg(torch.acos(torch.where(classes[:, 0] == labels, scores[:, 1], scores[:, 0]).clamp(-1, 1)))
    sides = {"target": own, "other": nearest}
    return {side: {"median": round(float(v.median()), 2), "counts": metrics.histogram(v, WIDTH)} for side, v in sides.items()}


def evaluate(embed: Callable[[Tensor], Tensor], data: Data) -> dict[str, Any]:
    """What embeddings of unseen identities are worth."""
    unseen = embed(data.unseen)
    return {
        "verification": metrics.verification(unseen, data.identities),
        "identification": metrics.identification(unseen, data.identities, embed(data.others)),
    }


def closed(trained: Trained, data: Data) -> dict[str, float]:
    """Shares of the held-out images of training identities whose class center is the nearest, or among the nearest five."""
    _, classes = trained.head.topk(trained.projection.embed(data.closed), k=5)
    hit = classes == data.closed_labels[:, None]
    return {"rank1": round(float(hit[:, 0].double().mean()), 5), "rank5": round(float(hit.any(1).double().mean()), 5)}


def record(run: Run, plan: Plan, data: Data) -> dict[str, Any]:
    """Train and measure: what the run's file holds."""
    start = time.perf_counter()
    trained = train(run, plan, data)
    middle = time.perf_counter()
    trained.projection.eval()
    trained.head.eval()
    found = evaluate(trained.projection.embed, data)
    return {
        "run": asdict(run),
        "settings": heads.unusual(run.head, data.about["training"]["identities"]),
        "seconds": {"training": round(middle - start, 1), "evaluation": round(time.perf_counter() - middle, 1)},
        "ms": round(1e3 * statistics.median(trained.seconds), 2),
        "loss": thinned(trained.losses),
        "series": {name: thinned(values) for name, values in trained.series.items()},
        "angles": trained.angles,
        "closed": closed(trained, data),
        **found,
    }


def thinned(values: Sequence[float]) -> list[float]:
    """At most ``KEPT`` values: means of equally many neighbors, to five digits."""
    width = -(-len(values) // KEPT)
    return [float(f"{statistics.fmean(values[i : i + width]):.5g}") for i in range(0, len(values), width)]


def step_seconds(plan: Plan, data: Data) -> float:
    """A step of ArcFace here, the fastest of a few."""
    return min(train(Run("arcface", "arcface", 0), plan, data, steps=5, bar=lambda steps, **_: steps).seconds)


def estimate(todo: Sequence[Run], steps: int, step: float, evaluation: float) -> float:
    """Seconds of the runs."""
    return sum(run.cost * steps * step + evaluation for run in todo)


def affordable(todo: Sequence[Run], budget: float, step: float, evaluation: float) -> int:
    """The steps of each run in a budget of seconds: a multiple of 50, or fewer than 50."""
    steps = (budget - evaluation * len(todo)) / (step * sum(run.cost for run in todo))
    return int(steps) // 50 * 50 if steps >= 50 else max(2, int(steps))


def complete(todo: Sequence[Run], folder: Path, plan: Plan, data: Data) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Run those whose record is not in ``folder`` yet, and write each as it is done. Other processes may write to it as well."""
    for run in tqdm(todo, desc="study", unit="run"):
        if (folder / run.file).exists():
            continue
        found = record(run, plan, data)
        write(folder / run.file, found)
        yield run, found


def write(path: Path, found: dict[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    part.replace(path)
