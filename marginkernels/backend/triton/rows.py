"""The launches of :mod:`.rows_kernel`: what a step does per row beside its two passes, for every backend that runs on a GPU.

As in :mod:`.launch`, each goes by way of ``run``; nothing waits for the device."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from ...core.types import HeadInputs, LossInputs, LossOutput, LossUpstream, PreparedRows, RoundedUpstream, SumsUpstream, Upstream
from ...core.update import MOMENTS, TENSOR_STEP, Rule, Update, row_keys
from . import rows_kernel as kernels
from .heuristics import power_of_two
from .launch import Device, Launch, Run
from .update_kernel import update_kernel

#: Rows of a block in kernels of O(N) numbers, and numbers of a tile in those of O(N D).
BLOCK_N, TILE = 128, 512
#: Rows that the one program of the loss takes at a time, and labels of a block.
LOSS_BLOCK, LABEL_BLOCK = 256, 1024
#: A tile of the sum over the class centers, and programs for each multiprocessor.
SUM_CLASSES, SUM_WIDTH, SUM_PROGRAMS = 16, 128, 4
REDUCTIONS = {"none": kernels.NONE.value, "sum": kernels.SUM.value, "mean": kernels.MEAN.value}


def launched(one: Launch) -> None:
    one.run()


def _tile(x: Tensor, device: Device | None) -> dict[str, int]:
    """Rows and columns of a tile over the numbers of ``x`` (N, D)."""
    dim, device = x.shape[1], device or Device.of(x)
    width = min(power_of_two(dim), TILE)
    return {"DIM": dim, "WIDTH": width, "BLOCK_N": 32 if device.arch == "interpreter" else max(1, TILE // width)}


def _over_rows(n: int, tile: dict[str, int]) -> tuple[int]:
    return (math.ceil(n / tile["BLOCK_N"]),)


def _head(inputs: HeadInputs, tile: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of what reads the rows and their own class centers, from where they are."""
    x, w = inputs.x, inputs.w
    args = {"x": x, "w": w, "labels": inputs.labels, "n": x.shape[0], "c": w.shape[0]}
    args |= {"stride_xn": x.stride(0), "stride_xd": x.stride(1), "stride_wc": w.stride(0), "stride_wd": w.stride(1)}
    return args, {"NORMALIZE_X": inputs.normalize_embedding, "NORMALIZE_W": inputs.normalize_weight, **tile}


def prepare_inputs(inputs: HeadInputs, device: Device | None = None, run: Run = launched) -> PreparedRows:
    """See :meth:`marginkernels.backend.Backend.prepare_inputs`."""
    (n, d), new = inputs.x.shape, inputs.x.new_empty
    tile = _tile(inputs.x, device)
    args, constants = _head(inputs, tile)
    rows = PreparedRows(new((n, d)), new(n, dtype=torch.float32), new(n, dtype=torch.float64), new(n, dtype=torch.float64))
    out = {"out": rows.x, "row_factor": rows.row_factor, "similarity": rows.target_similarity, "cos": rows.target_cos}
    if n:
        run(Launch(kernels.prepare_rows_kernel, _over_rows(n, tile), args | out, constants))
    return rows


def row_gradient(
    inputs: HeadInputs,
    upstream: Upstream,
    mean_center: Tensor,
    center_sum: Tensor | None,
    device: Device | None = None,
    run: Run = launched,
) -> Tensor:
    """See :meth:`marginkernels.backend.Backend.row_gradient`."""
    n, d = inputs.x.shape
    tile = _tile(inputs.x, device)
    args, constants = _head(inputs, tile)
    dx = inputs.x.new_empty((n, d))
    args |= {
        "mean_center": mean_center.contiguous(),
        "center_sum": None if center_sum is None else center_sum.contiguous(),
        "d_lse": upstream.d_lse.contiguous(),
        "d_logit_sum": None if center_sum is None or upstream.d_logit_sum is None else upstream.d_logit_sum.contiguous(),
        "d_target_cos": upstream.d_target_cos.contiguous(),
        "dx": dx,
    }
    if n:
        run(Launch(kernels.row_gradient_kernel, _over_rows(n, tile), args, constants))
    return dx


def mark_labels(labels: Tensor, num_classes: int, ignore_index: int, run: Run = launched) -> tuple[Tensor, Tensor]:
    """``labels`` (N,) with -1 where they are ignored or out of range; and (blocks, 2) bounds, those that are out of range among them."""
    n = labels.shape[0]
    blocks = math.ceil(n / LABEL_BLOCK)
    out, bounds = labels.new_empty(n), labels.new_empty((blocks, 2))
    args = {"labels": labels.contiguous(), "out": out, "bounds": bounds, "n": n, "c": num_classes, "ignore_index": ignore_index}
    if n:
        run(Launch(kernels.labels_kernel, (blocks,), args, {"BLOCK_N": LABEL_BLOCK}))
    return out, bounds


def replace_rows(
    x: Tensor, labels: Tensor | None, bad: Tensor | None, fill: float, device: Device | None = None, run: Run = launched
) -> tuple[Tensor, Tensor]:
    """``x`` (N, D) with ``fill`` in the rows that are ``bad`` (N,) int8; where that is None, those with a negative label that hold NaN or
    infinity. And ``bad``."""
    n, d = x.shape
    tile = _tile(x, device)
    mark = bad is None
    bad = x.new_empty(n, dtype=torch.int8) if bad is None else bad
    out = x.new_empty((n, d))
    args = {"x": x, "labels": labels, "bad": bad, "out": out, "n": n, "stride_xn": x.stride(0), "stride_xd": x.stride(1)}
    if n:
        run(Launch(kernels.replace_rows_kernel, _over_rows(n, tile), args | {"fill": fill}, {"MARK": mark, **tile}))
    return out, bad


def _numbers(p: LossInputs) -> tuple[dict[str, Any], dict[str, Any]]:
    def halves(name: str, value: float) -> dict[str, float]:  # Triton's scalars are float32
        (high,) = struct.unpack("f", struct.pack("f", value))
        return {name: high, f"{name}_rest": value - high}

    each = {name: getattr(p, name) for name in ("lse", "value", "scale", "bias", "logit_sum")}
    # The scale is most often one number, seen N times.
    args: dict[str, Any] = {name: v if v is None or name == "scale" else v.contiguous() for name, v in each.items()}
    args |= {"stride_scale": p.scale.stride(0), "labels": p.labels, "n": p.labels.shape[0], "num_classes": p.num_classes}
    args |= halves("smoothing", p.label_smoothing) | halves("focal_gamma", p.focal_gamma)
    return args, {"SMOOTH": p.label_smoothing > 0, "FOCAL": p.focal_gamma > 0, "REDUCTION": REDUCTIONS[p.reduction]}


def loss(p: LossInputs, run: Run = launched) -> LossOutput:
    """See :meth:`marginkernels.backend.Backend.loss`."""
    args, constants = _numbers(p)
    out = LossOutput.allocate(p)
    rows = {"similarity": p.similarity, "cos": p.cos, "max_logit": p.max_logit, "other": p.other}
    to = {"loss": out.loss, "stats": out.stats, "count": out.count}
    run(Launch(kernels.loss_kernel, (1,), args | rows | to, constants | {"BLOCK_N": LOSS_BLOCK}))
    return out


def loss_backward(p: LossInputs, count: Tensor, upstream: Tensor, need_value: bool, need_scale: bool, run: Run = launched) -> LossUpstream:
    """See :meth:`marginkernels.backend.Backend.loss_backward`."""
    n = p.labels.shape[0]
    args, constants = _numbers(p)
    out = LossUpstream.allocate(p, need_value, need_scale)
    to = {name: v if v.shape[0] else None for name, v in vars(out).items()}
    given = {"slope": p.slope.contiguous(), "count": count, "upstream": upstream.contiguous()}
    if n:
        grid = (math.ceil(n / BLOCK_N),)
        run(Launch(kernels.loss_backward_kernel, grid, args | given | to, constants | {"BLOCK_N": BLOCK_N}))
    return out


def upstream(inputs: SumsUpstream, need_bias: bool, need_logit_sum: bool, run: Run = launched) -> RoundedUpstream:
    """See :meth:`marginkernels.backend.Backend.upstream`."""
    n = inputs.lse.shape[0]
    out = RoundedUpstream.allocate(inputs, need_bias, need_logit_sum)
    args: dict[str, Any] = {name: None if v is None else v.contiguous() for name, v in vars(inputs).items()}
    to: dict[str, Any] = {name: v if v.shape[0] else None for name, v in vars(out).items()}
    args |= {**to, "lse": args["lse"], "out_lse": out.lse, "n": n}
    if n:
        run(Launch(kernels.upstream_kernel, (math.ceil(n / BLOCK_N),), args, {"BLOCK_N": BLOCK_N}))
    return out


def center_sum(w: Tensor, class_factor: Tensor, device: Device | None = None, run: Run = launched) -> Tensor:
    """See :meth:`marginkernels.backend.Backend.center_sum`: one launch over splits of the classes, one to add these up in their order."""
    (c, d), device = w.shape, device or Device.of(w)
    wide, blocks = math.ceil(d / SUM_WIDTH), math.ceil(c / SUM_CLASSES)
    per_split = math.ceil(blocks / max(1, SUM_PROGRAMS * device.processors // wide))
    splits = math.ceil(blocks / per_split)
    parts, out = w.new_empty((splits, d), dtype=torch.float64), w.new_empty(d, dtype=torch.float64)
    args = {"w": w, "factor": class_factor if class_factor.shape[0] else None, "parts": parts, "c": c, "blocks_per_split": per_split}
    args |= {"stride_wc": w.stride(0), "stride_wd": w.stride(1)}
    run(Launch(kernels.center_sum_kernel, (splits, wide), args, {"DIM": d, "BLOCK_C": SUM_CLASSES, "WIDTH": SUM_WIDTH}))
    tile = {"DIM": d, "BLOCK": 32, "WIDTH": 32}
    run(Launch(kernels.add_splits_kernel, (math.ceil(d / 32),), {"parts": parts, "out": out, "splits": splits}, tile))
    return out


def update(
    step: Update, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int, device: Device | None = None, run: Run = launched
) -> None:
    """See :meth:`marginkernels.core.update.Update.apply`; ``p`` (R, D), ``g`` and the moments are contiguous."""
    count, adamw = p.shape[0], step.rule == Rule.ADAMW
    first, second = step.betas
    moments = [state[name] for name in MOMENTS[step.rule]] if adamw or step.momentum else []
    moment, variance = [*moments, None, None][:2]
    low = high = rate = root = None
    if step.stochastic:
        low, high = row_keys(step.key, rows if isinstance(rows, Tensor) else torch.arange(rows, rows + count, device=p.device))
    if adamw:
        steps = state["step"].add_(1).to(torch.float64).flatten()
        rate = (step.lr / (1 - first**steps)).to(torch.float32)
        root = (1 - second**steps).sqrt().to(torch.float32)
    args: dict[str, Any] = {
        "p": p,
        "g": g,
        "moment": moment,
        "variance": variance,
        "low": low,
        "high": high,
        "rate": rate,
        "root": root,
        "rows": count,
    }
    args |= {"lr": step.lr, "decay": step.weight_decay, "momentum": step.momentum, "keep": 1 - step.lr * step.weight_decay}
    args |= {"first_rest": 1 - first, "second": second, "second_rest": 1 - second, "eps": step.eps}
    tile = _tile(p, device)
    constants: dict[str, Any] = {"ADAMW": adamw, "NESTEROV": step.nesterov, "STOCHASTIC": step.stochastic}
    constants |= {"SECOND": TENSOR_STEP, "THIRD": 2 * TENSOR_STEP & 0xFFFFFFFF, **tile}
    if p.numel():
        grid = (*_over_rows(count, tile), math.ceil(p.shape[1] / tile["WIDTH"]))
        run(Launch(update_kernel, grid, args, constants))
