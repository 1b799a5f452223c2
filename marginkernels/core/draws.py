"""Random numbers that are a function of counters, without a generator: the same under ``torch.compile``, in CUDA graphs, on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import loops_under_vmap


def hashed(counter: Tensor, key: Tensor | int) -> Tensor:
    """(...) int64 in [0, 2^63): the finalizer of SplitMix64 (Steele et al. 2014) of counter and key, in wrapping int64 arithmetic."""
    z = counter * -0x61C8864680B583EB
    z += key
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= -0x40A7B892E31B1A47
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= -0x6B2FB644ECCEEE15
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z & ((1 << 63) - 1)


def check_seed(name: str, seed: object) -> int:
    """``seed``, or a ``ValueError`` where it is no integer of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {seed!r}")
    return seed


@torch.library.custom_op("marginkernels::normal", mutates_args=())
def normal(seed: int, step: Tensor, place: Tensor) -> Tensor:
    """(N,) float64 numbers of the standard normal distribution: of each ``place`` (N,) int64 that of the step () int64."""
    # The 1 keeps these apart from the draws of classes, whose innermost key is 0.
    key = hashed(place, hashed(step.view(1), hashed(torch.full((1,), seed, device=place.device), 1)))
    drawn: Tensor = torch.special.ndtri(((key >> 11).to(torch.float64) + 0.5) * 2.0**-52)
    return drawn


@normal.register_fake
def _(seed: int, step: Tensor, place: Tensor) -> Tensor:
    return torch.empty_like(place, dtype=torch.float64)


loops_under_vmap(normal)
