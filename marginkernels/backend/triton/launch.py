"""From the inputs of a pass to kernel launches: output tensors, grids, compile-time switches. Nothing here waits for the device.

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

from ...core import nontarget
from ...core.nontarget import NonTarget
from ...core.numerics import FLOAT16_POW2, TINY
from ...core.types import ClassPassOutput, PassInputs, PreparedRows, Reduction, Request, RowPassOutput, TopkInputs, TopkOutput, Upstream
from . import saved_layout
from .class_kernel import class_pass_kernel, saved_pass_kernel
from .heuristics import Key, Tile, by_registers, padded, parts, power_of_two
from .heuristics import tile as tile_for
from .row_kernel import combine_kernel, prepare_kernel, row_pass_kernel
from .rows_kernel import reach_kernel
from .slots import centers_before, slots
from .topk_kernel import topk_kernel

#: The largest exponent that is safe without a running maximum: float32 ends at exp(88.7) and exp(-87.3), and slopes take a little more.
LIMIT = 85.0
#: Of converted class centers held at once: some stay in the cache of any GPU that is worth it, and a million classes take 25 of them. One
#: buffer, converted and read by turns: two of half the size, on two streams, would double the launches of a step that the host bounds, and
#: share the memory's bandwidth with a pass that needs it; which wins is for a GPU to say.
CHUNK_BYTES = 40 << 20
#: Numbers of a tile of the kernel that bounds the exponents.
REACH_TILE = 2048
Run = Callable[["Launch"], None]


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
        """Launch on PyTorch's current stream."""
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)


def saved_pow2(dtype: torch.dtype) -> float:
    """The power of two that the row pass's weights are multiplied by."""
    return FLOAT16_POW2 if dtype == torch.float16 else 1.0


def precision(dtype: torch.dtype) -> str:
    """How products are taken. Those of float32 follow PyTorch's own switch: one TF32 product where that is ``"tf32"``, and float32's own,
    without tensor cores, where it is ``"ieee"``. Where nobody has asked for either they are three TF32 products, which are as exact: what
    those leave out is below float32's last place, and long sums are added up in float32 a block at a time."""
    if dtype != torch.float32:
        return "ieee"
    # Reading allow_tf32 raises once a user has set fp32_precision; the latter follows both.
    asked = torch.backends.cuda.matmul.fp32_precision
    return asked if asked in ("tf32", "ieee") else "tf32x3"


def converts(p: PassInputs | TopkInputs, device: Device) -> bool:
    """Whether the row pass takes a converted copy of the centers: those of another dtype, those that may not fit it (float16), those
    whose rows begin where wide loads cannot, and several of a class, which the copy has in their slots."""
    half = p.x.dtype == torch.float16 and p.normalize_weight
    return p.w.dtype != p.x.dtype or half or p.sub_centers > 1 or not begins_wide(p.w, device)


def begins_wide(v: Tensor, device: Device) -> bool:
    """Whether every row of ``v`` begins where wide loads can, and ends so."""
    return v.data_ptr() % 16 == 0 and all(padded(size, v.dtype, device.arch) == size for size in (v.stride(0), v.shape[1]))


def with_wide_rows(p: PassInputs, device: Device) -> PassInputs:
    """The same, with a padded copy of the embeddings where their rows do not begin so: they are read again and again."""
    if begins_wide(p.x, device):
        return p
    n, d = p.x.shape
    copy = p.x.new_zeros(n, padded(d, p.x.dtype, device.arch))
    copy[:, :d] = p.x
    return replace(p, x=copy[:, :d])


def row_pass(inputs: PassInputs, request: Request, device: Device, run: Run) -> RowPassOutput:
    """The row pass, by way of ``run``.

    Centers that are not in the product's dtype, may not fit it (float16), or are several of a class, are first converted, and normalized, a
    chunk at a time into a buffer of ``CHUNK_BYTES`` that stays in the cache, and the kernel goes on from chunk to chunk; the others are
    read where they are. Chunks are counted in slots (:mod:`.slots`), which with one center a class are centers.
    """
    p, (n, d), k = with_wide_rows(inputs, device), inputs.x.shape, inputs.sub_centers
    c = slots(inputs.w.shape[0], k)

    def new(*shape: int, fill: float | None = None) -> Tensor:
        v = p.x.new_empty(shape, dtype=torch.float32)
        return v if fill is None else v.fill_(fill)

    half = p.x.dtype == torch.float16
    logit_sum, softplus = (request.reduction == one for one in (Reduction.LOGIT_SUM, Reduction.SOFTPLUS_SUM))
    plain_sum = logit_sum or softplus
    convert, wide = converts(p, device), padded(d, p.x.dtype, device.arch)
    saved = p.x.new_empty(request.workspace_bytes, dtype=torch.uint8)
    saved_weights, saved_base = saved_layout.parts(saved, n, p.x.dtype)
    saved_count = 0 if logit_sum else saved_weights.shape[0]
    factor = new(p.w.shape[0] if p.normalize_weight else 0)
    bounded = p.normalize_weight and not plain_sum and not half
    busy = p.non_target != NonTarget.IDENTITY or p.bias is not None or request.need_cos or softplus
    ways = (False, True) if bounded else (not plain_sum,)
    asked = {"accumulates": request.need_center, "busy": busy, "saves": saved_count > 0}
    tiles = [tile_for(Key.of("row", d, p.x.dtype, device.arch, online=online, **asked)) for online in ways]
    tile = tiles[0]
    chunk = max(1, CHUNK_BYTES // (wide * p.x.element_size() * saved_layout.GROUP)) * saved_layout.GROUP if convert else c
    chunk = min(chunk, math.ceil(c / tile.keys) * tile.keys)
    copy = p.x.new_empty(chunk, wide) if convert else None
    slices = [math.ceil(d / t.width) if request.need_center else 1 for t in tiles]
    splits = _splits(math.ceil(n / tile.queries) * slices[0], math.ceil(chunk / tile.keys), device.processors)
    # Two tensors in all, since chunks of converted centers add to what stands there; each part on 16 bytes, or it were a variant.
    peaks, size = max(slices) if convert else 1, splits * n
    centers, spaced = size * d if request.need_center else 0, -(-size // 4) * 4
    first_sum, first_logit = -(-centers // 4) * 4, -(-peaks * size // 4) * 4
    sums = new(first_sum + spaced + size, fill=0.0 if convert else None)
    lowest = new(first_logit + size, fill=-math.inf if convert else None)
    parts = {
        "part_sum": sums[first_sum : first_sum + size].view(splits, n),
        "part_cos": sums[first_sum + spaced :].view(splits, n),
        "part_running_max": lowest[: peaks * size].view(peaks, splits, n),
        "part_max_logit": lowest[first_logit:].view(splits, n),
        "part_center": sums[:centers].view(splits, n, d) if request.need_center else None,
    }
    rows = {name: getattr(p, name) for name in ("x", "row_factor", "scale", "threshold", "t", "labels", "bias")}
    args = {
        **rows,
        **parts,
        "class_factor": factor if p.normalize_weight and not convert else None,
        "n": n,
        "stride_xn": p.x.stride(0),
        "limit": LIMIT,
    }
    switches = {"NEED_CENTER": request.need_center, "NEED_COS": request.need_cos}
    constants = {
        **switches,
        "LOGIT_SUM": logit_sum,
        "SOFTPLUS": softplus,
        "NON_TARGET": int(p.non_target),
        "RESUME": convert,
        "POW2": saved_pow2(p.x.dtype),
        "PRECISION": precision(p.x.dtype),
        "SUB": k,
    }
    bound = None
    for first in range(0, c, chunk):
        count = min(chunk, c - first)
        centers = min(centers_before(first + chunk, k), p.w.shape[0]) - centers_before(first, k)
        if convert or p.normalize_weight:
            _prepare(p, factor, copy, first, centers, device, run)
        if first == 0 and bounded:
            bound = _exponent_bound(p, None if convert else factor, run)
        w = copy[:count] if copy is not None else p.w
        saves = first < saved_count
        chunk_args = args | {
            "w": w,
            "bound": bound,
            "first_class": first,
            "count": centers,
            "stride_wc": w.stride(0),
            "saved": saved_weights if saves else None,
            "saved_base": saved_base if saves else None,
            "saved_count": saved_count,
            "saved_stride": saved_weights.shape[1],
        }
        for online, t, z in zip(ways, tiles, slices, strict=True):
            grid = (math.ceil(n / t.queries), splits, z)
            tile_args = {
                "saved_box": boxes(saved_weights, t.keys, t.queries, device) if saves else None,
                "x_box": boxes(p.x, t.queries, t.depth, device) if d > t.depth else None,
                "w_box": boxes(w, t.keys, t.depth, device),
                "blocks_per_split": math.ceil(math.ceil(count / t.keys) / splits),
            }
            switch = constants | cut("row", p, t, device) | {"ONLINE": online}
            run(Launch(row_pass_kernel, grid, chunk_args | tile_args, switch, t.warps, t.stages))

    out = {
        "value": p.x.new_empty(n, dtype=torch.float64),
        "max_logit": new(n),
        "cos": new(n if request.need_cos else 0),
        "center": new(n if request.need_center else 0, d),
    }
    width = min(128, power_of_two(d))
    constants = {"DIM": d, "WIDTH": width, "BLOCK_N": 16, "PLAIN_SUM": plain_sum, "SOFTPLUS": softplus, **switches}
    tiles_of = (math.ceil(n / 16), math.ceil(d / width) if request.need_center else 1)
    run(Launch(combine_kernel, tiles_of, {**parts, **out, "n": n, "splits": splits}, constants))
    return RowPassOutput.of(request, **out, class_factor=factor, saved=saved)


def class_pass(
    inputs: PassInputs,
    upstream: Upstream,
    class_factor: Tensor,
    saved: Tensor,
    need_weight: bool,
    need_bias: bool,
    device: Device,
    run: Run,
) -> ClassPassOutput:
    """The class pass, by way of ``run``.

    Weights were saved as exp(z) N'(c): enough for dw of the log-sum-exp alone, so all is computed again where more is asked for.
    """
    p, c, k = with_wide_rows(inputs, device), inputs.w.shape[0], inputs.sub_centers
    upstream = upstream.rounded(torch.float32)
    out = ClassPassOutput.allocate(p, need_weight, need_bias)
    first = 0
    if saved.numel() and need_weight and not need_bias and upstream.d_logit_sum is None:
        weights, bases = saved_layout.parts(saved, p.x.shape[0], p.x.dtype)
        first = min(centers_before(weights.shape[0], k), c)
        _class_pass_saved(p, upstream, class_factor, weights[: slots(first, k)], bases, out.d_weight[:first], device, run)
    if first < c:
        bias = None if p.bias is None else p.bias[first // k :]
        rest = replace(p, w=p.w[first:], labels=p.labels - first, bias=bias) if first else p
        dw, db = out.d_weight[first:] if need_weight else None, out.d_bias if need_bias else None
        _class_pass(rest, upstream, class_factor[first:], dw, db, device, run)
    return out


def _class_pass_saved(
    p: PassInputs, upstream: Upstream, class_factor: Tensor, weights: Tensor, bases: Tensor, dw: Tensor, device: Device, run: Run
) -> None:
    """dw of the leading classes, from the weights (slots, stride) that the row pass saved."""
    n, d = p.x.shape
    tile = tile_for(Key.of("saved", d, p.x.dtype, device.arch))
    args = {
        **{name: getattr(p, name) for name in ("x", "w", "row_factor", "labels")},
        **{name: getattr(upstream, name) for name in ("lse", "d_lse", "d_target_cos")},
        "x_box": boxes(p.x, tile.keys, tile.depth, device),
        "class_factor": class_factor if p.normalize_weight else None,
        "pow2": _pow2(p, upstream) if p.x.dtype == torch.float16 else None,
        "saved": weights,
        "saved_base": bases,
        "dw": dw,
        "n": n,
        "c": dw.shape[0],
        "stride_xn": p.x.stride(0),
        "stride_wc": p.w.stride(0),
        "saved_stride": weights.shape[1],
    }
    shape = cut("saved", p, tile, device)
    constants = {
        **{name: value for name, value in shape.items() if name != "DEPTH"},
        "NORMALIZED": p.normalize_weight,
        "FACTORED": p.normalize_weight and not converts(p, device),
        "SAVED_POW2": saved_pow2(p.x.dtype),
        "PRECISION": precision(p.x.dtype),
        "SUB": p.sub_centers,
    }
    run(Launch(saved_pass_kernel, (math.ceil(weights.shape[0] / tile.queries),), args, constants, tile.warps, tile.stages))


def _class_pass(
    p: PassInputs, upstream: Upstream, class_factor: Tensor, dw: Tensor | None, db: Tensor | None, device: Device, run: Run
) -> None:
    (n, d), c, k = p.x.shape, p.w.shape[0], p.sub_centers
    softplus = upstream.reduction == Reduction.SOFTPLUS_SUM
    busy = p.non_target != NonTarget.IDENTITY or p.bias is not None or upstream.d_logit_sum is not None or softplus
    tile = tile_for(Key.of("class", d, p.x.dtype, device.arch, accumulates=dw is not None, busy=busy))
    half = p.x.dtype == torch.float16
    args = {
        **{name: getattr(p, name) for name in ("x", "w", "row_factor", "scale", "threshold", "t", "labels", "bias")},
        **{name: getattr(upstream, name) for name in ("lse", "d_lse", "d_logit_sum", "d_target_cos")},
        "d_target_bias": upstream.d_target_bias if db is not None else None,
        "x_box": boxes(p.x, tile.keys, tile.depth, device),
        "w_box": boxes(p.w, tile.queries, tile.depth, device) if d > tile.depth and k == 1 else None,
        "class_factor": class_factor if p.normalize_weight else None,
        "pow2": _pow2(p, upstream) if half else None,
        "dw": dw,
        "db": db,
        "n": n,
        "c": c,
        "stride_xn": p.x.stride(0),
        "stride_wc": p.w.stride(0),
    }
    constants = {
        **cut("class", p, tile, device),
        "NON_TARGET": int(p.non_target),
        "SOFTPLUS": softplus,
        "NORMALIZED": p.normalize_weight,
        "PRESCALE": p.normalize_weight and (half or k > 1),  # with several centers, the products of the row pass choose among them
        "PRECISION": precision(p.x.dtype),
        "SUB": k,
    }
    grid = (math.ceil(slots(c, k) / tile.queries), math.ceil(d / tile.width) if dw is not None else 1)
    run(Launch(class_pass_kernel, grid, args, constants, tile.warps, tile.stages))


def _prepare(p: PassInputs, factor: Tensor, copy: Tensor | None, first: int, count: int, device: Device, run: Run) -> None:
    """1/|w_j| of ``count`` centers from slot ``first`` to ``factor``, and the converted centers, in their slots, to ``copy``."""
    d = p.w.shape[1]
    block = 256 if device.arch == "interpreter" else 16
    args = {
        "w": p.w,
        "factor": factor if p.normalize_weight else None,
        "copy": copy,
        "first_class": first,
        "count": count,
        "stride_wc": p.w.stride(0),
        "tiny": TINY,
    }
    row = d if copy is None else copy.shape[1]
    constants = {"DIM": d, "PADDED": row, "BLOCK_C": block, "WIDTH": power_of_two(row), "SUB": p.sub_centers}
    run(Launch(prepare_kernel, (math.ceil(slots(count, p.sub_centers) / block),), args, constants))


def cut(kernel: str, p: PassInputs, tile: Tile, device: Device) -> dict[str, int]:
    """A tile as the compile-time arguments of a kernel, named as in :class:`Key`."""
    dim, dtype, arch = p.x.shape[1], p.x.dtype, device.arch
    block_n, block_c = (tile.queries, tile.keys) if kernel == "row" else (tile.keys, tile.queries)
    shape = {"DIM": dim, "PADDED": padded(dim, dtype, arch), "DEPTH": tile.depth, "WIDTH": tile.width}
    return shape | {"PARTS": parts(kernel, dim, tile, dtype, arch), "BLOCK_N": block_n, "BLOCK_C": block_c}


def boxes(v: Tensor, rows: int, columns: int, device: Device) -> TensorDescriptor | None:
    """``v`` in boxes of so many rows and columns, for loads and stores by TMA, which takes address arithmetic out
    of the loop; None where there is none, or rows are not 16-byte aligned."""
    if by_registers(device.arch) or v.data_ptr() % 16 or v.stride(0) * v.element_size() % 16 or v.stride(0) < v.shape[1]:
        return None
    return TensorDescriptor(v, list(v.shape), list(v.stride()), [rows, columns])


def _splits(programs: int, blocks: int, processors: int) -> int:
    """Into how many splits of the classes to cut, so that ``programs`` times as many fill the device evenly: at most two waves, which also
    bounds the partial results."""

    def busy(splits: int) -> float:
        return programs * splits / (math.ceil(programs * splits / processors) * processors)

    return max(range(1, max(1, min(blocks, 2 * processors // programs)) + 1), key=lambda s: (round(busy(s), 2), -s))


def _exponent_bound(p: PassInputs, factor: Tensor | None, run: Run) -> Tensor:
    """() how far from 0 the exponents of any row's terms, of their sum and, if given, of their products with a class factor can lie."""
    if p.non_target == NonTarget.IDENTITY:
        bound = _reach(p, run).amax()
    else:
        reach = p.row_factor * torch.linalg.vector_norm(p.x, dim=1, dtype=torch.float32)  # |c_ij| at most
        reach = nontarget.reach(p.non_target, reach, p.threshold, p.t)
        bound = (p.scale.abs() * reach).amax() + math.log(p.num_classes)
    if factor is not None:
        low, high = torch.aminmax(torch.where(factor > 0, factor, 1.0))
        bound = bound + torch.maximum(high.log(), -low.log())
    return bound if p.bias is None else bound + p.bias.abs().amax()


def _reach(p: PassInputs, run: Run) -> Tensor:
    """(N,) ``s_i max_j |c_ij| + log C`` at most, by one kernel."""
    (n, d), width = p.x.shape, min(power_of_two(p.x.shape[1]), REACH_TILE)
    reach = p.scale.new_empty(n)
    args: dict[str, Any] = {"x": p.x, "row_factor": p.row_factor, "scale": p.scale, "out": reach}
    args |= {"n": n, "stride_xn": p.x.stride(0), "added": math.log(p.num_classes)}
    constants = {"DIM": d, "WIDTH": width, "BLOCK_N": max(1, REACH_TILE // width)}
    run(Launch(reach_kernel, (math.ceil(n / constants["BLOCK_N"]),), args, constants))
    return reach


def _pow2(p: PassInputs, upstream: Upstream) -> Tensor:
    """() the power of two that brings the largest weight of a row to [64, 128): most room for small terms, and 500 for slopes."""
    weights = [upstream.d_lse, upstream.d_target_cos] + ([] if upstream.d_logit_sum is None else [upstream.d_logit_sum])
    largest = (torch.stack(weights).abs() * p.row_factor.abs()).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), 7 - exponent)


def topk(inputs: TopkInputs, rows: PreparedRows, k: int, device: Device, run: Run) -> TopkOutput:
    """The search for the nearest class centers, by way of ``run``: each program finds k of its split, and PyTorch the best of them."""
    p, (n, d), c = inputs, inputs.x.shape, slots(inputs.w.shape[0], inputs.sub_centers)
    block_n, block_c = 32, 64
    programs, blocks = math.ceil(n / block_n), math.ceil(c / block_c)
    per_split = math.ceil(blocks / _splits(programs, blocks, device.processors))
    splits = math.ceil(blocks / per_split)
    keys = p.x.new_empty((splits, n, k), dtype=torch.int64)
    # Rows that begin anywhere are read number by number, and each number's address takes registers.
    scattered = d % 16 > 0 or p.w.stride(0) % 16 > 0
    args = {
        "x": rows.x,
        "w": p.w,
        "row_factor": rows.row_factor,
        "scale": p.scale,
        "bias": p.bias,
        "best": keys,
        "n": n,
        "c": p.w.shape[0],
        "stride_wc": p.w.stride(0),
        "blocks_per_split": per_split,
        "tiny": TINY,
    }
    constants = {
        "DIM": d,
        "DEPTH": 16 if scattered else min(128 // p.x.element_size(), power_of_two(d)),
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "K": k,
        "PLACES": 1 << (k - 1).bit_length(),
        "NORMALIZED": p.normalize_weight,
        "PRESCALE": p.normalize_weight and (p.x.dtype == torch.float16 or (p.as_in_passes and converts(p, device))),
        "PRECISION": precision(p.x.dtype),
        "SUB": p.sub_centers,
    }
    run(Launch(topk_kernel, (programs, splits), args, constants, warps=8 if scattered else 4))
    # The reverse of topk_kernel's keys_of.
    best = keys.transpose(0, 1).flatten(1).topk(k, 1).values
    classes = -best & 0xFFFFFFFF
    ordered = (best + classes) >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return TopkOutput(bits.to(torch.int32).view(torch.float32), classes)
