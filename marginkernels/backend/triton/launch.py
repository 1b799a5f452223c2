"""From a problem to kernel launches: output tensors, grids, compile-time switches. Nothing here waits for the device.

The functions hand each :class:`Launch` to ``run``, so that the very launches that run can also be collected, from tensors on the meta
device, and compiled for a GPU that is not there (:mod:`.aot`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import forms
from ..base import TINY, Problem, RowPass, RowWeights
from . import keeping
from .class_pass import class_pass_kernel, kept_pass_kernel
from .row_pass import combine_kernel, prepare_kernel, row_pass_kernel
from .table import Key, Tile, power_of_two
from .table import tile as tile_for

#: The largest exponent that is safe without a running maximum: float32 ends at exp(88.7) and exp(-87.3), and slopes take a little more.
LIMIT = 85.0
#: Of converted class centres held at once: some stay in the cache of any GPU that is worth it, and a million classes take 25 of them.
SLAB_BYTES = 40 << 20
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


def kept_lift(dtype: torch.dtype) -> float:
    """What the row pass's weights are multiplied by."""
    return FLOAT16_LIFT if dtype == torch.float16 else 1.0


def precision(dtype: torch.dtype) -> str:
    """How products are taken: float32 ones as one TF32 product where PyTorch's own switch allows that, else at float32's precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def converts(p: Problem) -> bool:
    """Whether the row pass takes a converted copy of the centres: those of another dtype, or that may not fit it (float16)."""
    return p.w.dtype != p.x.dtype or (p.x.dtype == torch.float16 and p.normalize_weight)


def row_pass(
    p: Problem,
    device: Device,
    run: Callable[[Launch], None],
    *,
    uniform: bool = False,
    need_u: bool = True,
    need_moment: bool = False,
    workspace: int = 0,
) -> RowPass:
    """The row pass, by way of ``run``.

    Centres that are not in the product's dtype, or may not fit it (float16), are first converted, and normalised, a slab at a time into a
    buffer of ``SLAB_BYTES`` that stays in the cache, and the kernel goes on from slab to slab; the others are read where they are.
    """
    n, d = p.x.shape
    c = p.w.shape[0]

    def new(*shape: int, fill: float | None = None) -> Tensor:
        v = p.x.new_empty(shape, dtype=torch.float32)
        return v if fill is None else v.fill_(fill)

    half = p.x.dtype == torch.float16
    convert = converts(p)
    kept = p.x.new_empty(workspace, dtype=torch.uint8)
    keep, keep_base = keeping.parts(kept, n, p.x.dtype)
    keep_count = 0 if uniform else keep.shape[0]
    factor = new(c if p.normalize_weight else 0)
    bounded = p.normalize_weight and not uniform and not half
    busy = p.form != forms.IDENTITY or p.bias is not None or need_moment
    ways = (False, True) if bounded else (not uniform,)
    asked = {"accumulates": need_u, "busy": busy, "keeps": keep_count > 0}
    tiles = [tile_for(Key.of("row", d, p.x.dtype, device.arch, online=online, **asked)) for online in ways]
    tile = tiles[0]
    slab = max(1, SLAB_BYTES // (d * p.x.element_size() * keeping.GROUP)) * keeping.GROUP if convert else c
    slab = min(slab, math.ceil(c / tile.keys) * tile.keys)
    copy = p.x.new_empty(slab, d) if convert else None
    blocks = math.ceil(slab / tile.keys)
    splits = _splits(math.ceil(n / tile.queries) * (math.ceil(d / tile.width) if need_u else 1), blocks, device.processors)
    start = 0.0 if convert else None
    parts = {f"part_{k}": new(splits, n, fill=start) for k in ("sum", "moment")}
    parts |= {f"part_{k}": new(splits, n, fill=None if start is None else -math.inf) for k in ("peak", "top")}
    parts["part_u"] = new(splits, n, d, fill=start) if need_u else None

    bound = None
    args = {
        "x": p.x, "row_factor": p.row_factor, "scale": p.scale, "threshold": p.threshold, "labels": p.labels, "bias": p.bias, "t": p.t,
        **parts, "n": n, "stride_xn": p.x.stride(0), "limit": LIMIT, "class_factor": factor if p.normalize_weight and not convert else None,
    }  # fmt: skip
    switches = {"UNIFORM": uniform, "NEED_U": need_u, "NEED_MOMENT": need_moment}
    constants = {
        **switches, "FORM": p.form, "RESUME": convert, "LIFT": kept_lift(p.x.dtype), "PRECISION": precision(p.x.dtype),
    }  # fmt: skip
    for first in range(0, c, slab):
        count = min(slab, c - first)
        if convert or p.normalize_weight:
            _prepare(p, factor, copy, first, count, device, run)
        if first == 0 and bounded:
            bound = _exponent_bound(p, None if convert else factor)
        w = copy[:count] if convert else p.w
        keeps = first < keep_count
        slab_args = args | {
            "w": w, "bound": bound, "first_class": first, "count": count, "stride_wc": w.stride(0), "kept": keep if keeps else None,
            "kept_base": keep_base if keeps else None, "kept_count": keep_count, "kept_stride": keep.shape[1],
        }  # fmt: skip
        for online, t in zip(ways, tiles, strict=True):
            grid = (math.ceil(n / t.queries), splits, math.ceil(d / t.width) if need_u else 1)
            tile_args = {
                "kept_box": boxes(keep, t.keys, t.queries, device) if keeps else None,
                "x_box": boxes(p.x, t.queries, t.depth, device) if d > t.depth else None, "w_box": boxes(w, t.keys, t.depth, device),
                "blocks_per_split": math.ceil(math.ceil(count / t.keys) / splits),
            }  # fmt: skip
            switch = constants | cut(d, t, t.queries, t.keys) | {"ONLINE": online}
            run(Launch(row_pass_kernel, grid, slab_args | tile_args, switch, t.warps, t.stages))

    total, top, moment, u = new(n), new(n), new(n if need_moment else 0), new(n if need_u else 0, d)
    out = {"total": total, "top": top, "moment": moment, "u": u}
    width = min(128, power_of_two(d))
    constants = {"DIM": d, "WIDTH": width, "BLOCK_N": 16, **switches}
    grid = (math.ceil(n / 16), math.ceil(d / width) if need_u else 1)
    run(Launch(combine_kernel, grid, {**parts, **out, "n": n, "splits": splits}, constants))
    return RowPass(total, top, moment, u, factor, kept)


def class_pass(
    p: Problem,
    row: RowWeights,
    class_factor: Tensor,
    device: Device,
    run: Callable[[Launch], None],
    *,
    need_w: bool,
    need_bias: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The class pass, by way of ``run``.

    Weights were kept as exp(z) N'(c): enough for dw of the softmax alone, so all is computed again where more is asked for.
    """
    dw = torch.empty_like(p.w, memory_format=torch.contiguous_format) if need_w else None
    db = p.x.new_empty(p.w.shape[0], dtype=torch.float32) if need_bias else None
    first, c = 0, p.w.shape[0]
    if kept is not None and kept.numel() and need_w and not need_bias and row.uniform is None:
        keep, keep_base = keeping.parts(kept, p.x.shape[0], p.x.dtype)
        first = min(keep.shape[0], c)
        _class_pass_kept(p, row, class_factor, keep[:first], keep_base, dw[:first], device, run)
    if first < c:
        rest = replace(p, w=p.w[first:], labels=p.labels - first, bias=None if p.bias is None else p.bias[first:]) if first else p
        _class_pass(rest, row, class_factor[first:], None if dw is None else dw[first:], db, device, run)
    return dw, db


def _class_pass_kept(
    p: Problem, row: RowWeights, class_factor: Tensor, keep: Tensor, keep_base: Tensor, dw: Tensor, device: Device, run
) -> None:
    """dw of the leading classes, from the weights (K, stride) that were kept."""
    n, d = p.x.shape
    tile = tile_for(Key.of("kept", d, p.x.dtype, device.arch))
    args = {
        "x": p.x, "w": p.w, "x_box": boxes(p.x, tile.keys, tile.depth, device),
        "row_factor": p.row_factor, "labels": p.labels, "lse": row.lse,
        "softmax": row.softmax, "target": row.target, "class_factor": class_factor if p.normalize_weight else None,
        "lift": _lift(p, row) if p.x.dtype == torch.float16 else None, "kept": keep, "kept_base": keep_base, "dw": dw,
        "n": n, "c": keep.shape[0], "stride_xn": p.x.stride(0), "stride_wc": p.w.stride(0), "kept_stride": keep.shape[1],
    }  # fmt: skip
    constants = {
        "DIM": d, "WIDTH": tile.width, "BLOCK_N": tile.keys, "BLOCK_C": tile.queries, "NORMALIZED": p.normalize_weight,
        "FACTORED": p.normalize_weight and not converts(p), "KEPT_LIFT": kept_lift(p.x.dtype), "PRECISION": precision(p.x.dtype),
    }  # fmt: skip
    run(Launch(kept_pass_kernel, (math.ceil(keep.shape[0] / tile.queries),), args, constants, tile.warps, tile.stages))


def _class_pass(p: Problem, row: RowWeights, class_factor: Tensor, dw: Tensor | None, db: Tensor | None, device: Device, run) -> None:
    n, d = p.x.shape
    c = p.w.shape[0]
    need_w, need_bias = dw is not None, db is not None
    busy = p.form != forms.IDENTITY or p.bias is not None or row.uniform is not None
    tile = tile_for(Key.of("class", d, p.x.dtype, device.arch, accumulates=need_w, busy=busy))
    half = p.x.dtype == torch.float16
    args = {
        "x": p.x, "w": p.w, "x_box": boxes(p.x, tile.keys, tile.depth, device),
        "w_box": boxes(p.w, tile.queries, tile.depth, device) if d > tile.depth else None,
        "row_factor": p.row_factor, "scale": p.scale, "threshold": p.threshold,
        "labels": p.labels, "lse": row.lse, "softmax": row.softmax, "uniform": row.uniform, "target": row.target,
        "bias_weight": row.bias if need_bias else None,
        "class_factor": class_factor if p.normalize_weight else None, "bias": p.bias, "t": p.t,
        "lift": _lift(p, row) if half else None, "dw": dw, "db": db,
        "n": n, "c": c, "stride_xn": p.x.stride(0), "stride_wc": p.w.stride(0),
    }  # fmt: skip
    constants = {
        **cut(d, tile, tile.keys, tile.queries),
        "FORM": p.form, "NORMALIZED": p.normalize_weight, "PRESCALE": p.normalize_weight and half, "PRECISION": precision(p.x.dtype),
    }  # fmt: skip
    grid = (math.ceil(c / tile.queries), math.ceil(d / tile.width) if need_w else 1)
    run(Launch(class_pass_kernel, grid, args, constants, tile.warps, tile.stages))


def _prepare(
    p: Problem, factor: Tensor, copy: Tensor | None, first: int, count: int, device: Device, run: Callable[[Launch], None]
) -> None:
    d = p.w.shape[1]
    block = 256 if device.arch == "interpreter" else 16
    args = {
        "w": p.w, "factor": factor if p.normalize_weight else None, "copy": copy,
        "first_class": first, "count": count, "stride_wc": p.w.stride(0), "tiny": TINY,
    }  # fmt: skip
    constants = {"DIM": d, "BLOCK_C": block, "WIDTH": power_of_two(d)}
    run(Launch(prepare_kernel, (math.ceil(count / block),), args, constants))


def cut(dim: int, tile: Tile, block_n: int, block_c: int) -> dict[str, int]:
    """A tile as the kernels' compile-time arguments."""
    return {"DIM": dim, "DEPTH": tile.depth, "WIDTH": tile.width, "BLOCK_N": block_n, "BLOCK_C": block_c}


def boxes(v: Tensor, rows: int, columns: int, device: Device) -> TensorDescriptor | None:
    """``v`` in boxes of so many rows and columns, for loads and stores by the memory accelerator (TMA), which takes address arithmetic out
    of the loop; None where there is none, or rows are not 16-byte aligned."""
    if device.arch.startswith("sm_8") or v.data_ptr() % 16 or v.stride(0) * v.element_size() % 16 or v.stride(0) < v.shape[1]:
        return None
    return TensorDescriptor(v, list(v.shape), list(v.stride()), [rows, columns])


def _splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many splits of the classes to cut, so that ``programs`` times as many fill the device evenly: at most two waves, which also
    bounds the partial results."""

    def busy(splits: int) -> float:
        return programs * splits / (math.ceil(programs * splits / processors) * processors)

    return max(range(1, max(1, min(blocks, 2 * processors // programs)) + 1), key=lambda s: (round(busy(s), 2), -s))


def _exponent_bound(p: Problem, factor: Tensor | None) -> Tensor:
    """() how far from 0 the exponents of any row's terms, of their sum and, if given, of their products with a class factor can lie."""
    reach = p.row_factor * torch.linalg.vector_norm(p.x, dim=1, dtype=torch.float32)  # |c_ij| at most
    if p.form == forms.HARD_LINEAR:
        reach = (1 + p.t.abs()) * reach + p.t.abs()
    elif p.form == forms.HARD_QUADRATIC:
        reach = reach * torch.clamp_min(p.t.abs() + reach, 1)
    bound = (p.scale.abs() * reach).amax() + math.log(p.w.shape[0])
    if factor is not None:
        low, high = torch.aminmax(torch.where(factor > 0, factor, 1.0))
        bound = bound + torch.maximum(high.log(), -low.log())
    return bound if p.bias is None else bound + p.bias.abs().amax()


def _lift(p: Problem, row: RowWeights) -> Tensor:
    """() the power of two that brings the largest weight of a row to [64, 128): most room for small terms, and 500 for slopes."""
    weights = [row.softmax, row.target] + ([] if row.uniform is None else [row.uniform])
    largest = (torch.stack(weights).abs() * p.row_factor.abs()).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), 7 - exponent)
