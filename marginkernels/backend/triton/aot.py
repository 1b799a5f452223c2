"""Compile the launches of a problem for a GPU that need not be there, and read what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import forms
from ..base import Problem, RowWeights
from . import keeping, launch
from .launch import Device, Launch

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of stack (spills) a thread, bytes of shared memory a program."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def problem(
    n: int,
    dim: int,
    c: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    form: int = forms.IDENTITY,
    normalize_weight: bool = True,
    bias: bool = False,
) -> Problem:
    """A problem of these shapes on the meta device: no data, no memory."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hard = form != forms.IDENTITY
    return Problem(
        x=new(n, dim, dtype=dtype), row_factor=new(n), w=new(c, dim, dtype=weight_dtype), bias=new(c) if bias else None,
        labels=new(n, dtype=torch.int64), scale=new(n), threshold=new(n) if hard else None, t=new() if hard else None,
        form=form, normalize_weight=normalize_weight,
    )  # fmt: skip


def launches(
    p: Problem, arch: str, *, need_u: bool = True, need_w: bool = True, uniform: bool = False, kept: float = 0.0, processors: int = 132
) -> list[Launch]:
    """Every launch of one step on ``p``; row pass without u and class pass without dw where those are not needed; with the weights of the
    leading share ``kept`` of the classes left between them."""
    found: list[Launch] = []
    device = Device(arch, processors)
    n, c = p.x.shape[0], p.w.shape[0]
    workspace = -(-int(kept * c) // keeping.GROUP) * keeping.group_bytes(n, p.x.dtype)
    r = launch.row_pass(p, device, found.append, uniform=uniform, need_u=need_u, workspace=workspace)
    if need_w or p.bias is not None:
        new = torch.empty_like
        weights = RowWeights(
            lse=new(r.total), softmax=new(r.total), uniform=new(r.total) if uniform else None, target=new(r.total),
            bias=None if p.bias is None else new(r.total),
        )  # fmt: skip
        need_bias = p.bias is not None
        launch.class_pass(p, weights, r.class_factor, device, found.append, need_w=need_w, need_bias=need_bias, kept=r.kept)
    return found


def source(one: Launch) -> tuple[ASTSource, dict[str, int]]:
    """What Triton compiles for a launch, specialised as it would at run time, and the options."""
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
    found = {}
    for one in launches:
        what, options = source(one)
        found.setdefault((what.hash(), *options.values()), one)
    return list(found.values())


def compile(one: Launch, arch: str):
    """Triton's compiled kernel of a launch, for ``arch`` such as ``"sm_90"``."""
    what, options = source(one)
    return triton.compile(what, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)


def resources(compiled) -> Resources:
    """Read from the compiled binary by the ``cuobjdump`` that comes with Triton."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", binary], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"\b{what}:(\d+)", text).group(1)) for what in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)
