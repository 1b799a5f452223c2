"""The two passes as Triton kernels: logits in registers only, no atomics, no wait of the host."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ...core.device import on_device_of
from ...core.types import ClassPassOutput, HeadInputs, PassInputs, Request, RowPassOutput, TopkInputs, TopkOutput, Upstream
from ..gpu_rows import GpuRows
from . import saved_layout
from .heuristics import MAX_DIM
from .slots import MOST, slots

if TYPE_CHECKING:
    from .launch import Device, Launch

#: Offsets inside a tile are 32-bit; a center farther from the next than this is copied together first.
MAX_STRIDE = 1 << 22
#: The most candidates that a row keeps in registers, and the most classes that a key holds.
MAX_K, MAX_CLASSES = 64, 2**31 - 1


def interpreting() -> bool:
    """Whether Triton's interpreter is on (``triton.knobs.runtime.interpret``, or TRITON_INTERPRET=1 when Triton is first imported)."""
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:  # Triton is not imported for nothing
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


class TritonBackend(GpuRows):
    """Triton 3.6 or newer on a GPU from sm_80 on, or on CPU tensors under Triton's interpreter.

    float16 and bfloat16 products accumulate in float32. float32 products are taken as three TF32 products, which are as
    exact; as one where ``torch.backends.cuda.matmul`` says so, by ``allow_tf32`` or, the newer switch, ``fp32_precision = "tf32"``; and
    without tensor cores where that is ``"ieee"``.
    """

    name = "triton"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    max_sub_centers = MOST
    summary = "Triton: one kernel per pass, logits in registers only"

    @property
    def note(self) -> str:
        archs = "sm_80, sm_89, sm_90, sm_100 and sm_120"
        return f"fused Triton kernels, tested under Triton's interpreter and compiled for {archs}; never run on a GPU so far"

    @property
    def device_types(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if self.unavailable_reason() is None and interpreting() else ("cuda",)

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install 'triton>=3.6', Linux only)"
        return None if interpreting() else self._no_gpu_does()

    def capability_reason(self, found: tuple[int, int] | None) -> str | None:
        return f"needs compute capability 8.0 or later, not {found[0]}.{found[1]}" if found is not None and found < (8, 0) else None

    def unsupported_reason(self, device: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        if device == "cpu" and not interpreting():
            return "runs on cuda, and on cpu only under Triton's interpreter, which is off"
        if dim > MAX_DIM:
            return f"has tiles for embeddings of at most {MAX_DIM} dimensions, not {dim}"
        return super().unsupported_reason(device, dtype, weight_dtype, dim)

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int, sub_centers: int = 1) -> int:
        group = saved_layout.group_bytes(n, dtype)
        return min(limit // max(group, 1), -(-slots(c, sub_centers) // saved_layout.GROUP)) * group

    def fuses_rows(self, x: Tensor) -> bool:
        return x.dtype in self.dtypes and (x.device.type == "cuda" or interpreting())

    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        from . import launch

        with on_device_of(inputs.x):
            return launch.row_pass(_within_reach(inputs), request, self._device(inputs.x), self._run)

    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        from . import launch

        p, device = _within_reach(inputs), self._device(inputs.x)
        with on_device_of(inputs.x):
            return launch.class_pass(p, upstream, class_factor, saved, need_weight, need_bias, device, self._run)

    def topk(self, inputs: TopkInputs, k: int) -> TopkOutput:
        """The same bits for one shape on one device. Plain PyTorch beyond ``MAX_K``."""
        if k > MAX_K or inputs.w.shape[0] > MAX_CLASSES:
            return super().topk(inputs, k)
        from . import launch

        nobody = torch.full((inputs.x.shape[0],), -1, dtype=torch.int64, device=inputs.x.device)
        rows = self.prepare_inputs(HeadInputs(inputs.x, inputs.w, nobody, inputs.normalize_embedding, inputs.normalize_weight))
        with on_device_of(inputs.x):
            return launch.topk(_within_reach(inputs), rows, k, self._device(inputs.x), self._run)

    def _device(self, x: Tensor) -> Device:
        from .launch import Device

        return Device.of(x)

    def _run(self, one: Launch) -> None:
        one.run()


T = TypeVar("T", PassInputs, TopkInputs)


def _within_reach(inputs: T) -> T:
    """Centers as rows of a contiguous tensor where they lie too far apart, or their own numbers do."""
    w = inputs.w
    apart = w.stride(0) > MAX_STRIDE or (w.stride(1) != 1 and w.shape[1] > 1)
    return replace(inputs, w=w.contiguous()) if apart else inputs
