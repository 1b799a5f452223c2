"""pytorch-metric-learning: its losses and weight layout, under autocast for bf16, so that the class centers stay float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import SCALE
from .base import Provider, Work


class MetricLearning(Provider):
    name = "pytorch-metric-learning"
    note = "ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss"
    package = "pytorch-metric-learning"
    logit_copies, weight_copies = 7.0, 5.2  # one of them is its own copy of the centers

    def build(self, case: Case, w: Tensor) -> Work:
        from pytorch_metric_learning import losses

        if case.head == "arcface":
            module = losses.ArcFaceLoss(case.C, case.D, margin=math.degrees(0.5), scale=SCALE, weight_init_func=_leave)
        elif case.head == "cosface":
            module = losses.CosFaceLoss(case.C, case.D, margin=0.35, scale=SCALE, weight_init_func=_leave)
        else:
            module = losses.NormalizedSoftmaxLoss(case.C, case.D, temperature=1 / SCALE, weight_init_func=_leave)
        module.W = torch.nn.Parameter(w.detach().T.contiguous())
        mixed = case.dtype != "fp32"

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(x.device.type, DTYPES[case.dtype], enabled=mixed):
                return module(x.float(), labels)

        return Work(loss, module.W, transposed=True)


def _leave(weight: Tensor) -> None:
    """Skip the random initialization: the class centers are given."""
