"""What a backend implements: the row pass and the class pass; see :mod:`marginkernels.core.types` for notation and shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..core.device import capabilities, capability
from ..core.numerics import prepared_rows, target_centers, unit_rows
from ..core.types import (
    ClassPassOutput,
    HeadInputs,
    LossInputs,
    LossOutput,
    LossUpstream,
    PassInputs,
    PreparedRows,
    Request,
    RoundedUpstream,
    RowPassOutput,
    SumsUpstream,
    TopkInputs,
    TopkOutput,
    Upstream,
)
from ..core.update import Update
from . import torch_topk


class Backend(ABC):
    """A way to run the two passes. Stateless; one instance of each lives in the registry.

    Class attributes:
        name: what ``backend=`` takes.
        device_types: of the tensors that it serves, such as ``("cpu",)``.
        dtypes: of embeddings and weight.
        tested_on: device types on which the project's own tests prove it, so that ``auto`` may choose it there without a record.
        max_sub_centers: how many sub-centers a class may have, or None for any number.
        step_takes_saved: whether :meth:`class_step` can use what the row pass saved.
        workspace_mb: what ``workspace_mb=None`` stands for: more than 0 only where that has been measured to pay.
        summary: one line for the documentation: what it is, on any machine.
        note: one line for ``doctor``: what it is here, and what it has never run on.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    tested_on: tuple[str, ...] = ()
    max_sub_centers: int | None = 1
    step_takes_saved: bool = False
    workspace_mb: int = 0
    summary: str = ""

    @property
    @abstractmethod
    def device_types(self) -> tuple[str, ...]: ...

    @property
    def note(self) -> str:
        return self.summary

    def unavailable_reason(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def unsupported_reason(self, device: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        """Why it cannot serve a head of these dtypes and this D on ``device``, such as ``"cuda:1"``, or None. Asked only where
        :meth:`unavailable_reason` is None."""
        device_type = device.partition(":")[0]
        if device_type not in self.device_types:
            return f"runs on {' and '.join(self.device_types)}, not on {device_type}"
        for what, got in (("embeddings", dtype), ("weight", weight_dtype)):
            if got not in self.dtypes:
                return f"has no {str(got).removeprefix('torch.')} {what}"
        return self.capability_reason(capability(device))

    def sub_centers_reason(self, sub_centers: int) -> str | None:
        """Why it cannot serve a head of so many sub-centers a class, or None."""
        if self.max_sub_centers is None or sub_centers <= self.max_sub_centers:
            return None
        limit = "has no sub-centers" if self.max_sub_centers == 1 else f"serves at most {self.max_sub_centers} sub-centers a class"
        return f"{limit}, not {sub_centers}"

    def capability_reason(self, found: tuple[int, int] | None) -> str | None:
        """Why a GPU of compute capability ``found`` does not do, or None; also None for None, where there is no GPU to ask."""
        return None

    def _no_gpu_does(self) -> str | None:
        """Why none of the GPUs here does, or None: one may, or there is none."""
        reasons = [self.capability_reason(found) for found in capabilities()]
        return reasons[0] if reasons and all(reasons) else None

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int, sub_centers: int = 1) -> int:
        """How many of ``limit`` bytes the row pass would save for the class pass, of ``c`` rows of the weight, ``sub_centers`` a class."""
        return 0

    def fuses_rows(self, x: Tensor) -> bool:
        """Whether :meth:`mark_labels`, :meth:`replace_rows`, :meth:`loss`, :meth:`loss_backward` and :meth:`upstream` exist for embeddings
        like ``x``; where they do not, the layers above do the same in PyTorch."""
        return False

    def mark_labels(self, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """``labels`` (N,) with -1 where they are ignored or out of range, and (blocks, 2) the smallest and the largest label out of range
        of each of some blocks, or any label in range."""
        raise NotImplementedError

    def replace_rows(self, x: Tensor, labels: Tensor | None, bad: Tensor | None, fill: float) -> tuple[Tensor, Tensor]:
        """``x`` (N, D) with ``fill`` in the rows that are ``bad`` (N,) int8, and ``bad``; where that is None, in those with a negative
        label that hold NaN or infinity."""
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The loss of a step, reduced, and its statistics."""
        raise NotImplementedError

    def loss_backward(self, inputs: LossInputs, count: Tensor, upstream: Tensor, need_value: bool, need_scale: bool) -> LossUpstream:
        """The gradients of :meth:`loss`, whose ``count`` this is, for ``upstream`` float32, of the loss's shape."""
        raise NotImplementedError

    def upstream(self, inputs: SumsUpstream, need_bias: bool, need_logit_sum: bool) -> RoundedUpstream:
        """What the two passes' backward takes, also as :meth:`Upstream.rounded` gives it in float32."""
        raise NotImplementedError

    def prepare_inputs(self, inputs: HeadInputs) -> PreparedRows:
        """Prepare the embeddings for the passes and take their similarities to their own class centers, in float64."""
        x = inputs.x
        unit, norm, inverse = unit_rows(x)
        prepared, factor = prepared_rows(x, norm, inverse, inputs.normalize_embedding)
        center = target_centers(inputs.w, inputs.labels)
        unit_center = unit_rows(center)[0]
        cos = (unit * unit_center).sum(1).clamp(-1, 1)
        if inputs.normalize_embedding and inputs.normalize_weight:
            similarity = cos.clone()
        else:
            side = unit if inputs.normalize_embedding else x.to(torch.float64)
            similarity = (side * (unit_center if inputs.normalize_weight else center)).sum(1)
        return PreparedRows(prepared, factor, similarity, cos)

    def row_gradient(self, inputs: HeadInputs, upstream: Upstream, mean_center: Tensor, center_sum: Tensor | None) -> Tensor:
        """dx (N, D) in x's dtype: ``d_lse mean_center + d_logit_sum center_sum + d_target_cos w_y`` through the normalization's
        Jacobian, in float64. ``center_sum`` is None where ``upstream.d_logit_sum`` is."""
        center = target_centers(inputs.w, inputs.labels)
        if inputs.normalize_weight:
            center = unit_rows(center)[0]
        d_lse, d_target = upstream.d_lse.to(torch.float64), upstream.d_target_cos.to(torch.float64)
        d = d_lse[:, None] * mean_center.to(torch.float64) + d_target[:, None] * center
        if center_sum is not None:
            assert upstream.d_logit_sum is not None
            d = d + upstream.d_logit_sum.to(torch.float64)[:, None] * center_sum.to(torch.float64)
        if inputs.normalize_embedding:
            unit, _, inverse = unit_rows(inputs.x)
            d = (d - (d * unit).sum(1, keepdim=True) * unit) * inverse[:, None]
        return d.to(inputs.x.dtype)

    def center_sum(self, w: Tensor, class_factor: Tensor) -> Tensor:
        """(D,) float64 ``sum_j a_j w_j`` over w (C, D), C >= 1, with a_j = 1 where ``class_factor`` is (0,)."""
        total = torch.zeros(w.shape[1], dtype=torch.float64, device=w.device)
        for start in range(0, w.shape[0], 8192):
            chunk = w[start : start + 8192].to(torch.float64)
            total += chunk.sum(0) if class_factor.numel() == 0 else class_factor[start : start + 8192].to(torch.float64) @ chunk
        return total

    def topk(self, inputs: TopkInputs, k: int) -> TopkOutput:
        """The k best classes of each row: see :class:`TopkOutput`. N, C and k are at least 1, and k at most C.

        Plain PyTorch, unless a backend has a kernel for it.
        """
        return torch_topk.topk(inputs, k)

    @abstractmethod
    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        """Stream over the classes. N and C are at least 1."""

    @abstractmethod
    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        """Stream over the rows for each block of classes. N and C are at least 1.

        Args:
            class_factor, saved: as the row pass of LOG_SUM_EXP gave them.
            need_weight, need_bias: which of the two gradients is wanted.
        """

    def class_step(
        self,
        inputs: PassInputs,
        upstream: Upstream,
        class_factor: Tensor,
        saved: Tensor,
        update: Update,
        state: dict[str, Tensor],
        first_row: int,
    ) -> bool:
        """The class pass, whose gradient goes into ``inputs.w`` and ``state`` by ``update`` at once. Gives False, having done nothing,
        where there is no such kernel: then the layers above run :meth:`class_pass` and :meth:`update` a chunk of classes at a time.

        Args:
            state: of the rows of ``inputs.w``, as :meth:`update` takes it.
            first_row: the number of the first of these rows among those of all ranks.
        """
        return False

    def update(self, update: Update, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int = 0) -> None:
        """See :meth:`marginkernels.core.update.Update.apply`."""
        update.apply(p, g, state, rows)
