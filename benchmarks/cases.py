"""What is timed: the cases of each preset, and the inputs of a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

PHASES = ("forward", "step", "train")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One head and one shape. ``dtype`` is that of the embeddings and the products; class centers are always float32."""

    head: str
    N: int
    D: int
    C: int
    dtype: str
    train: bool = False  # also time the optimizer step

    def __str__(self) -> str:
        return f"{self.head} {self.dtype} N={self.N:,} D={self.D:,} C={self.C:,}"

    @property
    def product(self) -> int:
        return self.N * self.D * self.C

    @property
    def phases(self) -> tuple[str, ...]:
        return PHASES if self.train else PHASES[:2]

    def flop(self, phase: str) -> int:
        """Useful floating-point operations, as ``tflops`` counts them: 2NDC for forward, 8NDC for a step."""
        return (2 if phase == "forward" else 8) * self.product

    def gradient_bytes(self) -> int:
        return self.C * self.D * 4 + self.N * self.D * DTYPES[self.dtype].itemsize

    as_dict = asdict


def _sweep(
    cs: Iterable[int],
    ns: Iterable[int],
    ds: Iterable[int],
    dtypes: Iterable[str],
    heads: Iterable[str] = ("arcface",),
    train: bool = False,
) -> list[Case]:
    """Every combination."""
    return [Case(head, n, d, c, dtype, train) for head, c, n, d, dtype in itertools.product(heads, cs, ns, ds, dtypes)]


BOTH = tuple(DTYPES)


def _cpu_quick() -> list[Case]:
    return [
        *_sweep([1_000], [32], [512], BOTH),
        *_sweep([10_000], [256], [512], BOTH),
        *_sweep([10_000], [256], [512], ["bf16"], ["normface"]),
        *_sweep([100_000], [64], [512], BOTH),
    ]


def _cpu_full() -> list[Case]:
    """Ordered by size, so that the time of a smaller case tells which providers would be too slow for a larger one."""
    return [
        *_sweep([1_000], [32], [512], BOTH),
        *_sweep([10_000], [256], [512], BOTH, ["arcface", "normface"]),
        *_sweep([10_000], [128, 1024, 4096], [512], BOTH),
        *_sweep([10_000], [256], [128, 256], ["bf16"]),
        *_sweep([100_000], [256], [512], BOTH, train=True),
        *_sweep([1_000_000], [256], [512], BOTH),
    ]


def _cuda_quick() -> list[Case]:
    """The most important cases come first, because a run with a time limit may not reach the end."""
    return [
        *_sweep([1_000_000], [512, 1024, 4096], [512], ["bf16"]),
        *_sweep([10_000_000], [512], [512], ["bf16"]),
        *_sweep([1_000_000], [1024], [512], ["bf16"], ["normface"]),
        *_sweep([10_000], [256], [512], BOTH),
        *_sweep([1_000], [32], [512], BOTH),
    ]


def _cuda_full() -> list[Case]:
    ns, ds = [128, 512, 1024, 4096], [128, 256, 512]
    return [
        *_sweep([1_000, 10_000, 100_000, 1_000_000, 10_000_000], ns, ds, BOTH),
        *_sweep([100_000, 1_000_000, 10_000_000], ns, [512], ["bf16"], ["normface"]),
        *_sweep([1_000_000, 10_000_000], [512], [512], ["bf16"], train=True),
    ]


PRESETS = {("cpu", "quick"): _cpu_quick, ("cpu", "full"): _cpu_full, ("cuda", "quick"): _cuda_quick, ("cuda", "full"): _cuda_full}


def preset(device: str, name: str) -> list[Case]:
    """The cases of a preset. A case that is listed twice is timed once, with the optimizer step if either entry has it."""
    found: dict[tuple, Case] = {}
    for case in PRESETS[device, name]():
        key = (case.head, case.N, case.D, case.C, case.dtype)
        if key not in found or case.train:
            found[key] = case
    return list(found.values())


def inputs(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D) in the case's dtype, w (C, D) float32 and labels (N,). As in training, every other row lies near its class center."""
    g = torch.Generator(device).manual_seed(seed)
    w = torch.empty(case.C, case.D, device=device).normal_(std=0.1, generator=g)
    labels = torch.randint(case.C, (case.N,), generator=g, device=device)
    x = torch.randn(case.N, case.D, generator=g, device=device)
    x[::2] = 0.6 * x[::2] + 12 * w[labels[::2]]
    return x.to(DTYPES[case.dtype]), w, labels
