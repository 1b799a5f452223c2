"""The operators. All but :func:`center_sum` hand over to the backend named in their last argument.

All O(N) and O(N D) arithmetic is in float64: it costs little beside the passes, keeps 1 - cos exact where the margins need it, and rounds
to the same float32 bits whoever compiles it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from ..core.numerics import accumulation_dtype, inverse_norm
from ..core.types import (
    ClassPassOutput,
    HeadInputs,
    PassInputs,
    PreparedRows,
    Reduction,
    Request,
    RoundedUpstream,
    RowPassOutput,
    SumsUpstream,
    TopkInputs,
    TopkOutput,
    Upstream,
)
from .schema import operator


def _prepare_inputs_fake(inputs: HeadInputs, backend: str) -> PreparedRows:
    x, n = inputs.x, inputs.x.shape[0]
    return PreparedRows(
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(n, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(n, dtype=torch.float64),
        x.new_empty(n, dtype=torch.float64),
    )


@operator(_prepare_inputs_fake)
def prepare_inputs(inputs: HeadInputs, backend: str) -> PreparedRows:
    """See :meth:`marginkernels.backend.Backend.prepare_inputs`."""
    return backends.get(backend).prepare_inputs(inputs)


def _row_pass_fake(inputs: PassInputs, request: Request, backend: str) -> RowPassOutput:
    return RowPassOutput.allocate(inputs, request)


@operator(_row_pass_fake)
def row_pass(inputs: PassInputs, request: Request, backend: str) -> RowPassOutput:
    """See :meth:`marginkernels.backend.Backend.row_pass`; here N and C may be 0."""
    if inputs.x.shape[0] == 0 or inputs.w.shape[0] == 0:
        return _empty_row_pass(inputs, request)
    with torch.autocast(inputs.x.device.type, enabled=False):
        return backends.get(backend).row_pass(inputs, request)


def _empty_row_pass(inputs: PassInputs, request: Request) -> RowPassOutput:
    (n, d), acc_dtype = inputs.x.shape, inputs.acc_dtype

    def full(*shape: int, fill: float = 0.0) -> Tensor:
        return inputs.x.new_full(shape, fill, dtype=acc_dtype)

    factor = full(inputs.w.shape[0] if inputs.normalize_weight else 0)
    if factor.shape[0]:
        factor = inverse_norm(inputs.w.to(acc_dtype))
    return RowPassOutput.of(
        request,
        value=full(n, fill=-torch.inf if request.reduction == Reduction.LOG_SUM_EXP else 0.0),
        max_logit=full(n, fill=-torch.inf),
        cos=full(n if request.need_cos else 0),
        center=full(n if request.need_center else 0, d),
        class_factor=factor,
        # As many bytes as were promised, since shapes must not depend on the values of N and C.
        saved=inputs.x.new_zeros(request.workspace_bytes, dtype=torch.uint8),
    )


def _class_pass_fake(
    inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool, backend: str
) -> ClassPassOutput:
    return ClassPassOutput.allocate(inputs, need_weight, need_bias)


@operator(_class_pass_fake)
def class_pass(
    inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool, backend: str
) -> ClassPassOutput:
    """See :meth:`marginkernels.backend.Backend.class_pass`; here N and C may be 0."""
    if inputs.x.shape[0] == 0 or inputs.w.shape[0] == 0:
        out = ClassPassOutput.allocate(inputs, need_weight, need_bias)
        return ClassPassOutput(out.d_weight.zero_(), out.d_bias.zero_())
    with torch.autocast(inputs.x.device.type, enabled=False):
        return backends.get(backend).class_pass(inputs, upstream, class_factor, saved, need_weight, need_bias)


def _row_gradient_fake(inputs: HeadInputs, upstream: Upstream, mean_center: Tensor, center_sum: Tensor | None, backend: str) -> Tensor:
    return torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)


@operator(_row_gradient_fake)
def row_gradient(inputs: HeadInputs, upstream: Upstream, mean_center: Tensor, center_sum: Tensor | None, backend: str) -> Tensor:
    """See :meth:`marginkernels.backend.Backend.row_gradient`."""
    return backends.get(backend).row_gradient(inputs, upstream, mean_center, center_sum)


def _scale_gradient_fake(
    upstream: Tensor, prepared: Tensor | None, row_factor: Tensor | None, cos: Tensor | None, center: Tensor | None
) -> Tensor:
    return torch.empty_like(upstream)


@operator(_scale_gradient_fake)
def scale_gradient(
    upstream: Tensor, prepared: Tensor | None, row_factor: Tensor | None, cos: Tensor | None, center: Tensor | None
) -> Tensor:
    """(N,) the gradient of the scales from that of a sum over the classes, ``upstream`` (N,), and the sum's derivative: where ``prepared``
    is None, ``cos`` (N,); else the product of the row (``prepared`` (N, D) times ``row_factor`` (N,)) with ``center`` (N, D)."""
    if prepared is None:
        assert cos is not None
        return upstream * cos.to(torch.float64)
    assert row_factor is not None
    assert center is not None
    side = prepared.to(torch.float64) * row_factor.to(torch.float64)[:, None]
    return upstream * (side * center.to(torch.float64)).sum(1)


def _upstream_fake(inputs: SumsUpstream, need_bias: bool, need_logit_sum: bool, backend: str) -> RoundedUpstream:
    return RoundedUpstream.allocate(inputs, need_bias, need_logit_sum)


@operator(_upstream_fake)
def upstream(inputs: SumsUpstream, need_bias: bool, need_logit_sum: bool, backend: str) -> RoundedUpstream:
    """See :meth:`marginkernels.backend.Backend.upstream`."""
    return backends.get(backend).upstream(inputs, need_bias, need_logit_sum)


def _center_sum_fake(w: Tensor, class_factor: Tensor, backend: str) -> Tensor:
    return w.new_empty(w.shape[1], dtype=torch.float64)


@operator(_center_sum_fake)
def center_sum(w: Tensor, class_factor: Tensor, backend: str) -> Tensor:
    """See :meth:`marginkernels.backend.Backend.center_sum`; here C may be 0."""
    if w.shape[0] == 0:
        return w.new_zeros(w.shape[1], dtype=torch.float64)
    return backends.get(backend).center_sum(w, class_factor)


def _topk_fake(inputs: TopkInputs, k: int, backend: str) -> TopkOutput:
    return TopkOutput.allocate(inputs, k)


@operator(_topk_fake)
def topk(inputs: TopkInputs, k: int, backend: str) -> TopkOutput:
    """See :meth:`marginkernels.backend.Backend.topk`; here N and k may be 0."""
    if inputs.x.shape[0] == 0 or k == 0:
        return TopkOutput.allocate(inputs, k)
    return backends.get(backend).topk(inputs, k)
