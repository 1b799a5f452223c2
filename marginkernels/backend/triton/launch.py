"""From a problem to kernel launches: output tensors, grids, compile-time switches. Nothing here waits for the device.

The functions hand each :class:`Launch` to ``run``, so that the very launches that run can also be collected, from tensors on the meta device, and
compiled for a GPU that is not there (:mod:`.aot`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import forms
from ..base import TINY, Problem, RowPass, RowWeights
from .class_pass import class_pass_kernel
from .row_pass import class_factor_kernel, combine_kernel, row_pass_kernel
from .table import class_tile, power_of_two, row_tile

#: The largest exponent that is safe without a running maximum: float32 ends at exp(88.7) and exp(-87.3), and slopes take a little more.
LIMIT = 85.0
#: What lifts float16 exponentials, at most 1, away from its smallest number 6e-8; leaves room for slopes up to 255.
FLOAT16_LIFT = 256.0


@dataclass(frozen=True)
class Device:
    """What the launches depend on of the device.

    Attributes:
        arch: ``"sm_90"`` and the like, or ``"interpreter"``.
        processors: how many programs can run at once, at one a processor.
    """

    arch: str
    processors: int

    @classmethod
    def of(cls, x: Tensor) -> Device:
        if x.device.type != "cuda":
            return cls("interpreter", 4)
        p = torch.cuda.get_device_properties(x.device)
        return cls(f"sm_{p.major}{p.minor}", p.multi_processor_count)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        args: run-time arguments by name; None is a compile-time absence.
        constants: ``tl.constexpr`` arguments by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)


def precision(dtype: torch.dtype, device: Device) -> str:
    """How products are taken: float32 ones as one TF32 product where PyTorch's own switch allows that, else at float32's precision."""
    if device.arch == "interpreter":
        return "widen"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def row_pass(
    p: Problem, device: Device, run: Callable[[Launch], None], *, uniform: bool = False, need_u: bool = True, need_moment: bool = False
) -> RowPass:
    """The row pass, by way of ``run``."""
    n, d = p.x.shape
    c = p.w.shape[0]

    def new(*shape: int) -> Tensor:
        return p.x.new_empty(shape, dtype=torch.float32)

    factor = _class_factor(p, device, run)
    tile = row_tile(d, p.x.dtype, p.w.dtype, need_u, device.arch)
    blocks, row_blocks = math.ceil(c / tile.keys), math.ceil(n / tile.queries)
    slices = math.ceil(d / tile.width) if need_u else 1
    per_split = math.ceil(blocks / _splits(row_blocks * slices, blocks, device.processors))
    splits = math.ceil(blocks / per_split)
    parts = {f"part_{k}": new(splits, n) for k in ("sum", "peak", "top")}
    parts |= {"part_moment": new(splits, n) if need_moment else None, "part_u": new(splits, n, d) if need_u else None}
    half = p.x.dtype == torch.float16
    bound = None if uniform or half or not p.normalize_weight else _exponent_bound(p, factor)
    args = {
        "x": p.x, "w": p.w, "row_factor": p.row_factor, "scale": p.scale, "threshold": p.threshold, "labels": p.labels,
        "class_factor": factor if p.normalize_weight else None, "bias": p.bias, "t": p.t, "bound": bound, **parts,
        "n": n, "c": c, "stride_xn": p.x.stride(0), "stride_wc": p.w.stride(0), "blocks_per_split": per_split, "limit": LIMIT,
    }  # fmt: skip
    switches = {"UNIFORM": uniform, "NEED_U": need_u, "NEED_MOMENT": need_moment}
    constants = {
        "DIM": d, "DEPTH": tile.depth, "WIDTH": tile.width, "BLOCK_N": tile.queries, "BLOCK_C": tile.keys,
        "FORM": p.form, "NORMALIZED": p.normalize_weight, "PRESCALE": p.normalize_weight and half, **switches,
        "LIFT": FLOAT16_LIFT if half else 1.0, "PRECISION": precision(p.x.dtype, device),
    }  # fmt: skip
    for online in (False, True) if bound is not None else (not uniform,):
        run(
            Launch(row_pass_kernel, (row_blocks, splits, slices), args, constants | {"ONLINE": online}, tile.warps, tile.stages)
        )
    total, top, moment, u = new(n), new(n), new(n if need_moment else 0), new(n if need_u else 0, d)
    out = {"total": total, "top": top, "moment": moment if need_moment else None, "u": u if need_u else None}
    width = min(128, power_of_two(d))
    constants = {"DIM": d, "WIDTH": width, "BLOCK_N": 16, **switches}
    run(Launch(combine_kernel, (math.ceil(n / 16), math.ceil(d / width) if need_u else 1), {**parts, **out, "n": n, "splits": splits}, constants))
    return RowPass(total, top, moment, u, factor, torch.empty(0, dtype=torch.uint8, device=p.x.device))


def class_pass(
    p: Problem, row: RowWeights, class_factor: Tensor, device: Device, run: Callable[[Launch], None], *, need_w: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The class pass, by way of ``run``."""
    n, d = p.x.shape
    c = p.w.shape[0]
    tile = class_tile(d, p.x.dtype, p.w.dtype, need_w, device.arch)
    dw = torch.empty_like(p.w, memory_format=torch.contiguous_format) if need_w else None
    db = p.x.new_empty(c, dtype=torch.float32) if need_bias else None
    half = p.x.dtype == torch.float16
    args = {
        "x": p.x, "w": p.w, "row_factor": p.row_factor, "scale": p.scale, "threshold": p.threshold, "labels": p.labels,
        "lse": row.lse, "softmax": row.softmax, "uniform": row.uniform, "target": row.target, "bias_weight": row.bias if need_bias else None,
        "class_factor": class_factor if p.normalize_weight else None, "bias": p.bias, "t": p.t,
        "lift": _lift(p, row) if half else None, "dw": dw, "db": db,
        "n": n, "c": c, "stride_xn": p.x.stride(0), "stride_wc": p.w.stride(0),
    }  # fmt: skip
    constants = {
        "DIM": d, "DEPTH": tile.depth, "WIDTH": tile.width, "BLOCK_N": tile.keys, "BLOCK_C": tile.queries,
        "FORM": p.form, "NORMALIZED": p.normalize_weight, "PRESCALE": p.normalize_weight and half, "PRECISION": precision(p.x.dtype, device),
    }  # fmt: skip
    grid = (math.ceil(c / tile.queries), math.ceil(d / tile.width) if need_w else 1)
    run(Launch(class_pass_kernel, grid, args, constants, tile.warps, tile.stages))
    return dw, db


def _class_factor(p: Problem, device: Device, run: Callable[[Launch], None]) -> Tensor:
    """1/|w_j| (C,), or (0,) where the weights are not normalised."""
    c, d = p.w.shape
    factor = p.x.new_empty(c if p.normalize_weight else 0, dtype=torch.float32)
    if p.normalize_weight:
        block = 256 if device.arch == "interpreter" else 16
        args = {"w": p.w, "factor": factor, "c": c, "stride_wc": p.w.stride(0), "tiny": TINY}
        constants = {"DIM": d, "BLOCK_C": block, "WIDTH": power_of_two(d)}
        run(Launch(class_factor_kernel, (math.ceil(c / block),), args, constants))
    return factor


def _splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many splits of the classes to cut, so that ``programs`` times as many fill the device evenly: at most two waves, which also
    bounds the partial results."""
    def busy(splits: int) -> float:
        return programs * splits / (math.ceil(programs * splits / processors) * processors)

    return max(range(1, max(1, min(blocks, 2 * processors // programs)) + 1), key=lambda s: (round(busy(s), 2), -s))


def _exponent_bound(p: Problem, factor: Tensor) -> Tensor:
    """(N,) how far from 0 the exponents of a row's terms, of their sum and of their products with a class factor can lie."""
    reach = p.row_factor * torch.linalg.vector_norm(p.x, dim=1, dtype=torch.float32)  # |c_ij| at most
    if p.form == forms.HARD_LINEAR:
        reach = (1 + p.t.abs()) * reach + p.t.abs()
    elif p.form == forms.HARD_QUADRATIC:
        reach = reach * torch.clamp_min(p.t.abs() + reach, 1)
    low, high = torch.aminmax(torch.where(factor > 0, factor, 1.0))
    spread = torch.maximum(high.log(), -low.log())
    if p.bias is not None:
        spread = spread + p.bias.abs().amax()
    return p.scale.abs() * reach + spread + math.log(p.w.shape[0])


def _lift(p: Problem, row: RowWeights) -> Tensor:
    """() the power of two that brings the largest weight of a row to [64, 128): most room for small terms, and 500 for slopes."""
    weights = [row.softmax, row.target] + ([] if row.uniform is None else [row.uniform])
    largest = (torch.stack(weights).abs() * p.row_factor.abs()).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), 7 - exponent)
