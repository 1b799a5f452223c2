"""Times of ``mk.topk`` against chunks of products and ``torch.topk``: ``python -m benchmarks.topk_times [--save FILE]``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import marginkernels as mk
from benchmarks import environment

#: (N, D, C).
SHAPES = ((128, 64, 1_000_000), (128, 512, 10_000), (1, 512, 100_000), (1, 64, 10_000))
CHUNK, K = 32_768, 5


@dataclass(frozen=True)
class Times:
    """Medians in ms, of runs in turn."""

    n: int
    d: int
    c: int
    normalized: bool
    ms: dict[str, float]

    @property
    def ratio(self) -> float:
        """The default backend's time over eager's."""
        return self.ms["topk"] / self.ms["eager"]


def eager(x: Tensor, w: Tensor, k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """What one would write: a product and ``torch.topk`` for each chunk, and once more over what they found."""
    x = F.normalize(x) if normalized else x
    found = []
    for start in range(0, len(w), CHUNK):
        centers = w[start : start + CHUNK]
        scores, classes = (x @ (F.normalize(centers) if normalized else centers).T).topk(k, 1)
        found.append((scores, classes + start))
    if len(found) == 1:
        return found[0]
    scores, at = torch.cat([one[0] for one in found], 1).topk(k, 1)
    return scores, torch.cat([one[1] for one in found], 1).gather(1, at)


def measure(rounds: int, torch_backend: bool = False) -> Iterator[Times]:
    """Every shape, with and without normalization.

    Args:
        rounds: of the longest shape; shorter ones get more.
        torch_backend: also time the ``torch`` backend.
    """
    for n, d, c in SHAPES:
        torch.manual_seed(0)
        x, w = torch.randn(n, d), torch.randn(c, d)
        for normalized in (True, False):
            margin = None if normalized else mk.Softmax()
            ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
                "topk": lambda margin=margin, x=x, w=w: mk.topk(x, w, K, margin),
                "eager": lambda normalized=normalized, x=x, w=w: eager(x, w, K, normalized),
            }
            if torch_backend:
                ways["torch"] = lambda margin=margin, x=x, w=w: mk.topk(x, w, K, margin, backend="torch")
            spent: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(1 + rounds * (20 if n * d * c < 1e7 else 1)):
                for name, run in ways.items():
                    start = time.perf_counter()
                    run()
                    if turn:
                        spent[name].append((time.perf_counter() - start) * 1e3)
            yield Times(n, d, c, normalized, {name: statistics.median(v) for name, v in spent.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="write a record here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for one in measure(args.rounds, torch_backend=True):
        print(
            f"N={one.n} D={one.d} C={one.c}, {'cosines' if one.normalized else 'products'}: "
            + ", ".join(f"{name} {ms:.3f} ms" for name, ms in one.ms.items())
            + f"; ratio {one.ratio:.2f}",
            flush=True,
        )
        found.append(asdict(one) | {"ratio": one.ratio, "torch_ratio": one.ms["torch"] / one.ms["eager"]})
    if args.save:
        command = f"python -m benchmarks.topk_times --save {args.save} --rounds {args.rounds} --threads {args.threads}"
        machine = {name: v for name, v in environment.describe("cpu").items() if name != "providers"}
        record = {"schema": "marginkernels.topk/1", "command": command, "threads": args.threads, "k": K, "chunk": CHUNK}
        args.save.write_text(json.dumps(record | {"machine": machine, "times": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
