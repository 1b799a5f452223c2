"""The running sums of a row pass that takes a chunk of classes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.types import PassInputs, Reduction, Request, RowPassOutput


@dataclass
class OnlineSoftmax:
    """The running sums of a row pass that takes a chunk of classes at a time; :meth:`init` to begin, :meth:`finalize` at the end.

    Attributes, all acc_dtype:
        running_max: (N,) the highest logit so far, -inf before the first.
        total: (N,) ``sum_{j != y} exp(z_ij - running_max_i)``; for LOGIT_SUM and SOFTPLUS_SUM what they sum.
        cos, center: (N,) and (N, D): as ``mean_cos`` and ``mean_center`` of :class:`~marginkernels.core.types.RowPassOutput`, but with the
            weights that ``total`` sums.
        max_logit, class_factor: as there.
    """

    running_max: Tensor
    total: Tensor
    cos: Tensor
    max_logit: Tensor
    center: Tensor
    class_factor: Tensor

    @classmethod
    def init(cls, inputs: PassInputs, request: Request) -> OnlineSoftmax:
        n, d = inputs.x.shape

        def new(*shape: int, fill: float = 0.0) -> Tensor:
            return torch.full(shape, fill, dtype=inputs.acc_dtype, device=inputs.x.device)

        return cls(
            running_max=new(n, fill=-torch.inf),
            total=new(n),
            cos=new(n if request.need_cos else 0),
            max_logit=new(n, fill=-torch.inf),
            center=new(n if request.need_center else 0, d),
            class_factor=new(inputs.w.shape[0] if inputs.normalize_weight else 0),
        )

    def finalize(self, request: Request, saved: Tensor | None = None) -> RowPassOutput:
        value, cos, center = self.total, self.cos, self.center
        if request.reduction == Reduction.LOG_SUM_EXP:
            share = 1 / value.masked_fill(value == 0, 1)
            cos = cos.mul_(share) if request.need_cos else cos
            center = center.mul_(share[:, None]) if request.need_center else center
            value = torch.where(value == 0, -torch.inf, value.to(torch.float64).log() + self.running_max)
        return RowPassOutput.of(
            request, value=value, max_logit=self.max_logit, cos=cos, center=center, class_factor=self.class_factor, saved=saved
        )
