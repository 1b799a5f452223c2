"""The row arithmetic of the backends that run on a GPU: Triton kernels, which the CUDA C++ backends share; PyTorch without Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..core.device import on_device_of
from ..core.types import HeadInputs, LossInputs, LossOutput, LossUpstream, PreparedRows, RoundedUpstream, SumsUpstream, Upstream
from ..core.update import MOMENTS, Update
from .base import Backend


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class GpuRows(Backend):
    """A backend whose O(N D) work is done by the kernels of :mod:`.triton.rows`, one launch each, where they serve."""

    def fuses_rows(self, x: Tensor) -> bool:
        return x.device.type == "cuda" and x.dtype != torch.float64 and _has_triton()

    def prepare_inputs(self, inputs: HeadInputs) -> PreparedRows:
        if not self.fuses_rows(inputs.x):
            return super().prepare_inputs(inputs)
        from .triton import rows

        with on_device_of(inputs.x):
            return rows.prepare_inputs(inputs)

    def row_gradient(self, inputs: HeadInputs, upstream: Upstream, mean_center: Tensor, center_sum: Tensor | None) -> Tensor:
        if not self.fuses_rows(inputs.x):
            return super().row_gradient(inputs, upstream, mean_center, center_sum)
        from .triton import rows

        with on_device_of(inputs.x):
            return rows.row_gradient(inputs, upstream, mean_center, center_sum)

    def center_sum(self, w: Tensor, class_factor: Tensor) -> Tensor:
        if not self.fuses_rows(w):
            return super().center_sum(w, class_factor)
        from .triton import rows

        with on_device_of(w):
            return rows.center_sum(w, class_factor)

    def mark_labels(self, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        from .triton import rows

        with on_device_of(labels):
            return rows.mark_labels(labels, num_classes, ignore_index)

    def replace_rows(self, x: Tensor, labels: Tensor | None, bad: Tensor | None, fill: float) -> tuple[Tensor, Tensor]:
        from .triton import rows

        with on_device_of(x):
            return rows.replace_rows(x, labels, bad, fill)

    def loss(self, inputs: LossInputs) -> LossOutput:
        from .triton import rows

        with on_device_of(inputs.lse):
            return rows.loss(inputs)

    def loss_backward(self, inputs: LossInputs, count: Tensor, upstream: Tensor, need_value: bool, need_scale: bool) -> LossUpstream:
        from .triton import rows

        with on_device_of(inputs.lse):
            return rows.loss_backward(inputs, count, upstream, need_value, need_scale)

    def upstream(self, inputs: SumsUpstream, need_bias: bool, need_logit_sum: bool) -> RoundedUpstream:
        from .triton import rows

        with on_device_of(inputs.lse):
            return rows.upstream(inputs, need_bias, need_logit_sum)

    def update(self, update: Update, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int = 0) -> None:
        """One kernel for rows of numbers, whose random bits are those of every backend; else PyTorch."""
        moments = [state[name] for name in MOMENTS[update.rule] if name in state]
        if not self.fuses_rows(p) or p.ndim != 2 or not all(v.is_contiguous() for v in (p, *moments)):
            return super().update(update, p, g, state, rows)
        from .triton import rows as launches

        with on_device_of(p):
            return launches.update(update, p, g.contiguous(), state, rows)
