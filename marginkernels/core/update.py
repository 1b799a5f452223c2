"""What an optimizer's step does to rows of a weight: the rule as a record, in plain PyTorch, and the rounding to half precision.

The random numbers of stochastic rounding are a function of (seed, step, tensor, row, column), so they do not depend on chunks, threads or
ranks, nor on who draws them: the C++ kernels (csrc/cpu/update.h) and the Triton kernel draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .draws import hashed
from .numerics import accumulation_dtype


class Rule(IntEnum):
    """Which optimizer; csrc/scalar.h has the same numbers."""

    SGD = 0
    ADAMW = 1


#: The state of each rule that has a number for each number of the weight. AdamW has besides a count of steps per row, ``step``.
MOMENTS = {Rule.SGD: ("momentum_buffer",), Rule.ADAMW: ("exp_avg", "exp_avg_sq")}
#: Dtypes that are rounded to; whatever is wider is stored as it was computed.
HALVES = (torch.bfloat16, torch.float16)
#: What the number of a tensor is multiplied by in the hash of its random numbers.
TENSOR_STEP = 0x7F4A7C15


@dataclass(frozen=True)
class Update:
    """One step of an optimizer.

    All arithmetic is in float32 (float64 for float64 weights), and what is stored in half precision is rounded once.

    Attributes:
        rule, lr, weight_decay, momentum, nesterov, betas, eps: as the optimizers have them.
        stochastic: round half-precision tensors up or down at random, so that the mean is exact; else to nearest.
        key: of the step's random numbers, from :func:`key_of`.
    """

    rule: Rule
    lr: float
    weight_decay: float
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    stochastic: bool = False
    key: int = 0

    def apply(self, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int = 0) -> None:
        """Update ``p`` (R, ...) or () and its ``state`` in place.

        Args:
            g: the gradient, of p's shape.
            state: by name, each with as many rows as ``p``.
            rows: (R,) int64, the number of each row among those of the whole tensor on all ranks, or that of the first one.
        """
        wide = accumulation_dtype(p.dtype)
        held = {"p": p, **{name: state[name] for name in MOMENTS[self.rule] if name in state}}
        values = {name: v if v.dtype == wide else v.to(wide) for name, v in held.items()}
        moments = {name: v for name, v in values.items() if name != "p"}
        if self.rule == Rule.SGD:
            self._sgd(values["p"], g.to(wide), moments)
        else:
            self._adamw(values["p"], g.to(wide), moments, state["step"])
        for number, (name, v) in enumerate(held.items()):
            if values[name] is not v:
                v.copy_(self._stored(values[name], v.dtype, number, rows))

    def _stored(self, v: Tensor, dtype: torch.dtype, number: int, rows: Tensor | int) -> Tensor:
        """``v`` float32 as ``dtype``; ``number`` is that of the tensor among those of the update, the weight first."""
        if not (self.stochastic and dtype in HALVES and v.ndim):
            return v.to(dtype)
        if not isinstance(rows, Tensor):
            rows = torch.arange(rows, rows + v.shape[0], device=v.device)
        flat = v.reshape(v.shape[0], -1)
        return rounded(flat, dtype, random_bits(self.key, number, rows, flat.shape[1])).view(v.shape)

    def _sgd(self, p: Tensor, g: Tensor, moments: dict[str, Tensor]) -> None:
        if self.weight_decay:
            g = g.add(p, alpha=self.weight_decay)
        if self.momentum:
            m = moments["momentum_buffer"].mul_(self.momentum).add_(g)
            g = g.add(m, alpha=self.momentum) if self.nesterov else m
        p.add_(g, alpha=-self.lr)

    def _adamw(self, p: Tensor, g: Tensor, moments: dict[str, Tensor], step: Tensor) -> None:
        first, second = self.betas
        # In float64, since 1 - 0.999 ** step has few digits in float32 at the first steps; then in what the parameter is updated in.
        steps = step.add_(1).to(torch.float64)
        p.mul_(1 - self.lr * self.weight_decay)
        m = moments["exp_avg"].lerp_(g, 1 - first)
        v = moments["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second)
        root = v.sqrt().div_((1 - second**steps).sqrt().to(p.dtype)).add_(self.eps)
        p.sub_(m.div(root).mul_((self.lr / (1 - first**steps)).to(p.dtype)))


def key_of(seed: int, step: int) -> int:
    """The key of the random numbers of a step."""
    # The 2 keeps these apart from the draws of classes (0) and of margins (1).
    return int(hashed(torch.tensor([step]), hashed(torch.tensor([seed]), 2)))


def _int32(v: int) -> int:
    """The number of 32 bits as PyTorch's int32 has it."""
    return (v + (1 << 31)) % (1 << 32) - (1 << 31)


def _low_half(v: Tensor) -> Tensor:
    """The lower 32 bits of int64 numbers, as int32."""
    return (((v + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)


def row_keys(key: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) int32 each: the lower and the upper half of the hash of each of ``rows`` (R,) int64."""
    of_row = hashed(rows, key)
    return _low_half(of_row), (of_row >> 32).to(torch.int32)


def random_bits(key: int, tensor: int, rows: Tensor, columns: int) -> Tensor:
    """(R, columns) int32 in [0, 2^16): independent, uniform bits of each of ``rows`` (R,) int64, column and ``tensor``.

    A hash of 64 bits a row (SplitMix64's finalizer), and of 32 a number (MurmurHash3's), whose upper half is taken.
    """
    low, high = (v[:, None] for v in row_keys(key, rows))
    column = torch.arange(columns, device=rows.device) * 0x9E3779B1 + tensor * TENSOR_STEP
    h = _low_half(column) + low
    h ^= (h >> 16) & 0xFFFF
    h *= _int32(0x85EBCA6B)
    h ^= high
    h ^= (h >> 13) & 0x7FFFF
    h *= _int32(0xC2B2AE35)
    return (h >> 16) & 0xFFFF


def rounded(v: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """``v`` float32 as bfloat16 or float16, up with the probability of the distance from below, by ``bits`` int32 in [0, 2^16)."""
    number = v.view(torch.int32)
    if dtype == torch.bfloat16:
        out = ((number + bits) >> 16).to(torch.int16).view(torch.bfloat16)
        return torch.where(v.isfinite(), out, v.to(dtype))
    # The last places of float16's normal numbers are a share of the number, those of its subnormal ones all 2^-24.
    normal = ((number + (bits >> 3)) & ~0x1FFF).view(torch.float32)
    units = v * 2.0**24
    whole = units.trunc()
    up = (units - whole).abs() * 65536 >= 65536 - bits
    small = (whole + torch.where(up, units.sign(), 0.0)) * 2.0**-24
    out = torch.where(v.abs() < 2.0**-14, small, normal)
    return torch.where(v.isfinite(), out, v).to(dtype)
