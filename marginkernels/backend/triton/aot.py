"""Compile the launches of a step for a GPU that need not be there, and read what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ...core.nontarget import NonTarget
from ...core.types import HeadInputs, LossInputs, PassInputs, PreparedRows, Reduction, Request, SumsUpstream, TopkInputs, Upstream
from ...core.update import HALVES, MOMENTS, Rule, Update
from . import launch, rows, saved_layout
from .launch import Device, Launch
from .slots import slots


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of stack (spills) a thread, bytes of shared memory a program."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def meta_inputs(
    n: int,
    dim: int,
    c: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    non_target: NonTarget = NonTarget.IDENTITY,
    normalize_weight: bool = True,
    bias: bool = False,
    sub_centers: int = 1,
) -> PassInputs:
    """Inputs of these shapes on the meta device: no data, no memory. ``c`` is of classes."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hard = non_target != NonTarget.IDENTITY
    return PassInputs(
        x=new(n, dim, dtype=dtype),
        row_factor=new(n),
        w=new(c * sub_centers, dim, dtype=weight_dtype),
        bias=new(c) if bias else None,
        labels=new(n, dtype=torch.int64),
        scale=new(n),
        threshold=new(n) if hard else None,
        t=new(n) if hard else None,
        non_target=non_target,
        normalize_weight=normalize_weight,
        sub_centers=sub_centers,
    )


def launches(
    inputs: PassInputs,
    arch: str,
    *,
    need_center: bool = True,
    need_weight: bool = True,
    logit_sum: bool = False,
    softplus: bool = False,
    saved: float = 0.0,
    processors: int = 132,
) -> list[Launch]:
    """Every launch of one step on ``inputs``.

    Args:
        arch: such as ``"sm_90"``.
        need_center, need_weight: whether the row pass gives its derivative in the row, and the class pass dw.
        logit_sum: the row pass sums logits instead of exponentials, and the class pass has the upstream of such a sum.
        softplus: the row pass sums softplus of the logits.
        saved: the share of the classes whose weights the row pass saves for the class pass.
        processors: of the GPU.
    """
    found: list[Launch] = []
    device = Device(arch, processors)
    n, c = inputs.x.shape[0], slots(inputs.w.shape[0], inputs.sub_centers)
    reduction = Reduction.SOFTPLUS_SUM if softplus else Reduction.LOG_SUM_EXP
    if logit_sum:
        request = Request.logit_sum(need_center=need_center)
    else:
        workspace = -(-int(saved * c) // saved_layout.GROUP) * saved_layout.group_bytes(n, inputs.x.dtype)
        request = Request.of_loss(reduction, need_center=need_center, need_cos=False, workspace_bytes=workspace)
    out = launch.row_pass(inputs, request, device, found.append)
    need_bias = inputs.bias is not None
    if need_weight or need_bias:
        like = torch.empty_like(inputs.scale)
        upstream = Upstream(
            lse=like,
            d_lse=like,
            d_logit_sum=like if logit_sum else None,
            d_target_cos=like,
            d_target_bias=like if need_bias else None,
            reduction=reduction,
        )
        launch.class_pass(inputs, upstream, out.class_factor, out.saved, need_weight, need_bias, device, found.append)
    return found


def row_launches(
    n: int,
    dim: int,
    c: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    arch: str,
    *,
    normalize_embedding: bool = True,
    normalize_weight: bool = True,
    bias: bool = False,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    reduction: str = "mean",
    processors: int = 132,
) -> list[Launch]:
    """Every launch of what a step does per row beside its two passes, as :func:`launches`."""
    found: list[Launch] = []
    device, run, smooth = Device(arch, processors), found.append, label_smoothing > 0
    p = meta_inputs(n, dim, c, dtype, weight_dtype, bias=bias, normalize_weight=normalize_weight)
    each, one = p.scale.double(), p.scale.new_empty(1, dtype=torch.float64)
    labels, _ = rows.mark_labels(p.labels, c, -100, run)
    x, bad = rows.replace_rows(p.x, labels, None, 0.0, device, run)
    inputs = HeadInputs(x, p.w, labels, normalize_embedding, normalize_weight)
    prepared = rows.prepare_inputs(inputs, device, run)
    of_loss = LossInputs(
        lse=each,
        value=each,
        slope=each,
        scale=one.expand(n),
        bias=each if bias else None,
        logit_sum=each if smooth else None,
        labels=labels,
        similarity=prepared.target_similarity,
        cos=prepared.target_cos,
        max_logit=p.scale,
        other=p.scale,
        num_classes=c,
        label_smoothing=label_smoothing,
        focal_gamma=focal_gamma,
        reduction=reduction,
    )
    rows.loss(of_loss, run)
    rows.loss_backward(of_loss, one, each if reduction == "none" else one, True, True, run)
    sums = SumsUpstream(
        lse=each,
        scale=p.scale,
        g_lse=each,
        g_similarity=each,
        g_bias=each if bias else None,
        g_logit_sum=each if smooth else None,
    )
    rounded = rows.upstream(sums, bias, smooth, run)
    of_sums = Upstream(
        lse=rounded.lse,
        d_lse=rounded.d_lse,
        d_logit_sum=rounded.d_logit_sum if smooth else None,
        d_target_cos=rounded.d_target_cos,
        d_target_bias=rounded.d_target_bias if bias else None,
    )
    factor = p.scale.new_empty(c if normalize_weight else 0)
    total = rows.center_sum(p.w, factor, device, run) if smooth else None
    dx = rows.row_gradient(inputs, of_sums, p.scale.new_empty((n, dim)), total, device, run)
    rows.replace_rows(dx, None, bad, 0.0, device, run)
    return found


def topk_launch(
    n: int, dim: int, c: int, dtype: torch.dtype, weight_dtype: torch.dtype, k: int, arch: str, processors: int = 132, sub_centers: int = 1
) -> Launch:
    """The launch of a search for the ``k`` nearest classes."""
    p = meta_inputs(n, dim, c, dtype, weight_dtype, sub_centers=sub_centers)
    rows = PreparedRows(p.x, p.row_factor, p.row_factor, p.row_factor)
    found: list[Launch] = []
    launch.topk(TopkInputs(p.x, p.w, None, None, True, True, sub_centers), rows, k, Device(arch, processors), found.append)
    return found[0]


def update_launch(
    c: int, dim: int, weight_dtype: torch.dtype, moment_dtype: torch.dtype, rule: Rule, arch: str, processors: int = 132
) -> Launch:
    """The launch of an optimizer's step of ``c`` rows, rounded at random where a dtype is half precision."""
    p, state = torch.empty((c, dim), dtype=weight_dtype, device="meta"), {"step": torch.empty((c, 1), device="meta")}
    state |= {name: torch.empty((c, dim), dtype=moment_dtype, device="meta") for name in MOMENTS[rule]}
    step = Update(rule, 0.1, 1e-4, 0.9, stochastic=bool({weight_dtype, moment_dtype} & {*HALVES}))
    found: list[Launch] = []
    rows.update(step, p, torch.empty((c, dim), device="meta"), state, 0, Device(arch, processors), found.append)
    return found[0]


class _AbsentGpu:
    """What Triton asks a driver before it launches, of a GPU that need not be there. Triton keeps what it has compiled by device: these are
    devices of their own."""

    def __init__(self, arch: str, what: str):
        self.device, self.target = f"{what} for {arch}", GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0


def _warm_up(one: Launch, arch: str, what: str) -> Any:
    """All that Triton does at a launch but the launch itself: binding, specialization, a look into the caches, compilation."""
    driver = triton.runtime.driver
    before = getattr(driver, "_active", None)
    driver.set_active(_AbsentGpu(arch, what))
    try:
        return one.kernel.warmup(grid=one.grid, **one.args, **one.constants, num_warps=one.warps, num_stages=one.stages)
    finally:
        driver.set_active(before)


def variant(one: Launch, arch: str = "sm_80") -> str:
    """What tells apart the kernels that Triton compiles: the function, and how it specializes its arguments and options for this launch."""
    found: list[str] = []

    def stop(*, key: str, **rest: Any) -> bool:
        found.append(key)
        return True  # that is: do not compile

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, stop
    try:
        _warm_up(one, arch, "listed")
    finally:
        knobs.jit_cache_hook = before
    return f"{one.kernel.__name__} {found[0]}"


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel binary."""
    found: dict[str, Launch] = {}
    for one in launches:
        found.setdefault(variant(one), one)
    return list(found.values())


def compile(one: Launch, arch: str) -> Any:
    """Triton's compiled kernel of a launch, for ``arch`` such as ``"sm_90"``: which a launch on such a GPU then finds on the disk."""
    return _warm_up(one, arch, "compiled")


def resources(compiled: Any) -> Resources:
    """Read from the compiled binary by the ``cuobjdump`` that comes with Triton."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", binary], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", text)[0]) for what in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)
