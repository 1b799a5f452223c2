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
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.nontarget import NonTarget
from ...core.types import PassInputs, PreparedRows, Request, TopkInputs, Upstream
from . import launch, saved_layout
from .launch import Device, Launch

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


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
) -> PassInputs:
    """Inputs of these shapes on the meta device: no data, no memory."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hard = non_target != NonTarget.IDENTITY
    return PassInputs(
        x=new(n, dim, dtype=dtype),
        row_factor=new(n),
        w=new(c, dim, dtype=weight_dtype),
        bias=new(c) if bias else None,
        labels=new(n, dtype=torch.int64),
        scale=new(n),
        threshold=new(n) if hard else None,
        t=new(n) if hard else None,
        non_target=non_target,
        normalize_weight=normalize_weight,
    )


def launches(
    inputs: PassInputs,
    arch: str,
    *,
    need_center: bool = True,
    need_weight: bool = True,
    logit_sum: bool = False,
    saved: float = 0.0,
    processors: int = 132,
) -> list[Launch]:
    """Every launch of one step on ``inputs``.

    Args:
        arch: such as ``"sm_90"``.
        need_center, need_weight: whether the row pass gives its derivative in the row, and the class pass dw.
        logit_sum: the row pass sums logits instead of exponentials, and the class pass has the upstream of such a sum.
        saved: the share of the classes whose weights the row pass saves for the class pass.
        processors: of the GPU.
    """
    found: list[Launch] = []
    device = Device(arch, processors)
    n, c = inputs.x.shape[0], inputs.w.shape[0]
    if logit_sum:
        request = Request.logit_sum(need_center=need_center)
    else:
        workspace = -(-int(saved * c) // saved_layout.GROUP) * saved_layout.group_bytes(n, inputs.x.dtype)
        request = Request.log_sum_exp(need_center=need_center, workspace_bytes=workspace)
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
        )
        launch.class_pass(inputs, upstream, out.class_factor, out.saved, need_weight, need_bias, device, found.append)
    return found


def topk_launch(
    n: int, dim: int, c: int, dtype: torch.dtype, weight_dtype: torch.dtype, k: int, arch: str, processors: int = 132
) -> Launch:
    """The launch of a search for the ``k`` nearest class centers."""
    p = meta_inputs(n, dim, c, dtype, weight_dtype)
    rows = PreparedRows(p.x, p.row_factor, p.row_factor, p.row_factor)
    found: list[Launch] = []
    launch.topk(TopkInputs(p.x, p.w, None, None, True, True), rows, k, Device(arch, processors), found.append)
    return found[0]


def source(one: Launch) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch, specialized as it would at run time, and the options."""
    signature, constants, attributes = {}, dict(one.constants), {}
    for i, name in enumerate(one.kernel.arg_names):
        if name in one.constants:
            signature[name] = "constexpr"
            continue
        value = one.args[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(one.kernel, signature, constants, attributes), {"num_warps": one.warps, "num_stages": one.stages}


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel binary."""
    found: dict[tuple[Any, ...], Launch] = {}
    for one in launches:
        what, options = source(one)
        found.setdefault((what.hash(), *options.values()), one)
    return list(found.values())


def compile(one: Launch, arch: str) -> Any:
    """Triton's compiled kernel of a launch, for ``arch`` such as ``"sm_90"``."""
    what, options = source(one)
    return triton.compile(what, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def resources(compiled: Any) -> Resources:
    """Read from the compiled binary by the ``cuobjdump`` that comes with Triton."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", binary], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", text)[0]) for what in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)
