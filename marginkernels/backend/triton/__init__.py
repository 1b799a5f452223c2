"""The two passes as Triton kernels: logits in registers only, no atomics, no wait of the host."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import torch
from torch import Tensor

from ..base import Backend, Problem, RowPass, RowWeights
from ..cuda import on_its_device
from . import keeping
from .table import MAX_DIM, use_tiles

__all__ = ["TritonBackend", "interpreting", "use_tiles"]

#: Offsets inside a tile are 32-bit; a centre farther from the next than this is copied together first.
MAX_STRIDE = 1 << 22


def interpreting() -> bool:
    """Whether Triton's interpreter is on (``triton.knobs.runtime.interpret``, or TRITON_INTERPRET=1 when Triton is first imported)."""
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:  # Triton is not imported for nothing
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


class TritonBackend(Backend):
    """Triton 3.6 or newer on a GPU from sm_80 on, or on CPU tensors under Triton's interpreter.

    float16 and bfloat16 products accumulate in float32. float32 products are taken at float32's precision, or as one TF32 product where
    ``torch.backends.cuda.matmul.allow_tf32`` is on.
    """

    name = "triton"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    proven = False
    summary = "Triton: one kernel per pass, logits in registers only"
    note = "fused Triton kernels, proven under Triton's interpreter and compiled for sm_80, sm_90 and sm_100; they have never run on a GPU"

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if self.unavailable() is None and interpreting() else ("cuda",)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install 'triton>=3.6', Linux only)"
        return None

    def refuses(self, device_type: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        if device_type == "cpu" and not interpreting():
            return "runs on cuda, and on cpu only under Triton's interpreter, which is off"
        if dim > MAX_DIM:
            return f"has tiles for embeddings of at most {MAX_DIM} dimensions, not {dim}"
        return super().refuses(device_type, dtype, weight_dtype, dim)

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int) -> int:
        group = keeping.group_bytes(n, dtype)
        return min(limit // group, -(-c // keeping.GROUP)) * group

    @on_its_device
    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        from . import launch

        options = {"uniform": uniform, "need_u": need_u, "need_moment": need_moment, "workspace": workspace}
        return launch.row_pass(_reachable(p), launch.Device.of(p.x), launch.Launch.run, **options)

    @on_its_device
    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        from . import launch

        options = {"need_w": need_w, "need_bias": need_bias, "kept": kept}
        return launch.class_pass(_reachable(p), row, class_factor, launch.Device.of(p.x), launch.Launch.run, **options)


def _reachable(p: Problem) -> Problem:
    return replace(p, w=p.w.contiguous()) if p.w.stride(0) > MAX_STRIDE else p
