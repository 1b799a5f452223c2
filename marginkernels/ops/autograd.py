"""The sums that a head needs over all classes, as one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from ..core.nontarget import NonTarget
from ..core.numerics import accumulation_dtype, target_biases, target_centers, unit_rows
from ..core.types import HeadInputs, PassInputs, PreparedRows, Request, Upstream
from .operators import center_sum, class_pass, row_gradient, row_pass


@dataclass(frozen=True)
class SumOptions:
    """What a call of :func:`sum_over_classes` computes.

    Attributes:
        non_target: the transform of non-target similarities.
        normalize_embedding, normalize_weight: as the margin has them.
        logit_sum: also the sum of the non-target logits, for label smoothing.
        grad: whether a backward pass may follow.
        workspace_bytes: what the row pass may save for the class pass.
        backend: its name.
    """

    non_target: NonTarget
    normalize_embedding: bool
    normalize_weight: bool
    logit_sum: bool
    grad: bool
    workspace_bytes: int
    backend: str


@dataclass(frozen=True)
class ClassSums:
    """(N,) each, float64 but for ``max_logit``.

    Attributes:
        lse: the non-target log-sum-exp lambda.
        target_similarity, target_bias: c_y and b_y, passed through so that the gradients that come back for them join the one write of dw.
        logit_sum: the sum of the non-target logits, 0 where it was not asked for.
        max_logit: the highest non-target logit without transform, acc_dtype, not differentiable.
    """

    lse: Tensor
    target_similarity: Tensor
    target_bias: Tensor
    logit_sum: Tensor
    max_logit: Tensor


def sum_over_classes(
    inputs: HeadInputs,
    rows: PreparedRows,
    bias: Tensor | None,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    options: SumOptions,
) -> ClassSums:
    """Differentiable in the embeddings, the class centers, ``bias`` (C,) and ``scale`` (N,).

    Args:
        inputs, rows: the embeddings as they came, and prepared.
        bias: (C,) or None.
        scale: (N,) float64.
        threshold, t: (N,) float64, or None where the transform is the identity.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _SumOverClasses.apply
    return ClassSums(*apply(inputs.x, inputs.w, bias, scale, inputs.labels, rows, threshold, t, options))


@dataclass(frozen=True)
class _Saved:
    """What the forward pass leaves to the backward pass, by the names of :mod:`marginkernels.core.types`."""

    x: Tensor
    w: Tensor
    labels: Tensor
    prepared: Tensor
    row_factor: Tensor
    bias: Tensor | None
    scale: Tensor
    threshold: Tensor | None
    t: Tensor | None
    lse: Tensor
    mean_cos: Tensor
    mean_center: Tensor
    cos_sum: Tensor | None
    center_sum: Tensor | None
    class_factor: Tensor
    saved: Tensor


_SAVED = tuple(f.name for f in fields(_Saved))


class _SumOverClasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        rows: PreparedRows,
        threshold: Tensor | None,
        t: Tensor | None,
        options: SumOptions,
    ) -> tuple[Tensor, ...]:
        acc_dtype = accumulation_dtype(x.dtype)
        need_x, need_w, _, need_scale = (options.grad and need for need in ctx.needs_input_grad[:4])

        def narrow(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(acc_dtype).contiguous()

        inputs = PassInputs(
            x=rows.x,
            row_factor=rows.row_factor,
            w=w,
            bias=narrow(bias),
            labels=labels,
            # A zero embedding whose norm is its scale has s = 0; the class pass divides by s, and at 1e-20 its logits are as zero.
            scale=scale.clamp_min(1e-20).to(acc_dtype).contiguous(),
            threshold=narrow(threshold),
            t=narrow(t),
            non_target=options.non_target,
            normalize_weight=options.normalize_weight,
        )
        # For the identity the mean cosine is x^ . mean_center; only the hard transforms need a sum of their own.
        identity = options.non_target == NonTarget.IDENTITY
        need_cos = need_scale and not identity
        need_center = need_x or (need_scale and identity)
        workspace = options.workspace_bytes if need_w else 0
        if workspace:
            workspace = backends.get(options.backend).workspace_bytes(x.shape[0], w.shape[0], x.dtype, workspace)
        request = Request.log_sum_exp(need_center=need_center, need_cos=need_cos, workspace_bytes=workspace)
        out = row_pass(inputs, request, options.backend)
        logit_sum, cos_sum, all_centers = torch.zeros_like(rows.target_similarity), None, None
        if options.logit_sum and identity:
            head_inputs = HeadInputs(x, w, labels, options.normalize_embedding, options.normalize_weight)
            logit_sum, all_centers = _identity_logit_sum(head_inputs, bias, scale, out.class_factor)
        elif options.logit_sum:
            total = row_pass(inputs, Request.logit_sum(need_center=need_x, need_cos=need_cos), options.backend)
            logit_sum, cos_sum, all_centers = total.logit_sum.to(torch.float64), total.cos_sum, total.center_sum
        saved = _Saved(
            x=x,
            w=w,
            labels=labels,
            prepared=inputs.x,
            row_factor=inputs.row_factor,
            bias=inputs.bias,
            scale=inputs.scale,
            threshold=inputs.threshold,
            t=inputs.t,
            lse=out.lse,
            mean_cos=out.mean_cos,
            mean_center=out.mean_center,
            cos_sum=cos_sum,
            center_sum=all_centers,
            class_factor=out.class_factor,
            saved=out.saved,
        )
        ctx.save_for_backward(*(getattr(saved, name) for name in _SAVED))
        ctx.options = options
        ctx.mark_non_differentiable(out.max_logit)
        return out.lse.clone(), rows.target_similarity.clone(), target_biases(bias, labels), logit_sum, out.max_logit

    @staticmethod
    def backward(ctx: Any, g_lse: Tensor, g_similarity: Tensor, g_bias: Tensor, g_logit_sum: Tensor, _: Tensor) -> tuple[Any, ...]:
        o: SumOptions = ctx.options
        s = _Saved(**dict(zip(_SAVED, ctx.saved_tensors, strict=True)))
        need_x, need_w, need_bias, need_scale = ctx.needs_input_grad[:4]
        acc_dtype = accumulation_dtype(s.x.dtype)
        upstream = Upstream(
            lse=torch.where(s.lse == -torch.inf, torch.inf, s.lse),
            d_lse=(g_lse * s.scale).to(acc_dtype),
            d_logit_sum=(g_logit_sum * s.scale).to(acc_dtype) if o.logit_sum else None,
            d_target_cos=g_similarity.to(acc_dtype),
            d_target_bias=g_bias.to(acc_dtype) if need_bias else None,
        )
        dx = dw = db = ds = None
        if need_x:
            inputs = HeadInputs(s.x, s.w, s.labels, o.normalize_embedding, o.normalize_weight)
            dx = row_gradient(inputs, upstream, s.mean_center, s.center_sum, o.backend)
        if need_w or need_bias:
            pass_inputs = PassInputs(
                x=s.prepared,
                row_factor=s.row_factor,
                w=s.w,
                bias=s.bias,
                labels=s.labels,
                scale=s.scale,
                threshold=s.threshold,
                t=s.t,
                non_target=o.non_target,
                normalize_weight=o.normalize_weight,
            )
            grads = class_pass(pass_inputs, upstream, s.class_factor, s.saved, need_w, need_bias, o.backend)
            dw, db = grads.d_weight if need_w else None, grads.d_bias if need_bias else None
        if need_scale:
            side = s.prepared.to(torch.float64) * s.row_factor.to(torch.float64)[:, None]

            def in_scale(center: Tensor | None, cos: Tensor | None) -> Tensor:
                """A sum's derivative in s_i, from its derivative in the row or, where there is one, its sum of cosines."""
                if o.non_target != NonTarget.IDENTITY:
                    assert cos is not None
                    return cos.to(torch.float64)
                assert center is not None
                return (side * center.to(torch.float64)).sum(1)

            ds = g_lse * in_scale(s.mean_center, s.mean_cos)
            if o.logit_sum:
                ds = ds + g_logit_sum * in_scale(s.center_sum, s.cos_sum)
        return dx, dw, db, ds, None, None, None, None, None


def _identity_logit_sum(inputs: HeadInputs, bias: Tensor | None, scale: Tensor, class_factor: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_{j != y} z_ij`` (N,) and ``sum_{j != y} a_j w_j`` (N, D) for the identity, from one sum over the classes: O(C D)."""
    center = target_centers(inputs.w, inputs.labels)
    if inputs.normalize_weight:
        center = unit_rows(center)[0]
    rest = center_sum(inputs.w, class_factor) - center
    side = unit_rows(inputs.x)[0] if inputs.normalize_embedding else inputs.x.to(torch.float64)
    total = scale.to(torch.float64) * (side * rest).sum(1)
    if bias is not None:
        total = total + bias.to(torch.float64).sum() - target_biases(bias, inputs.labels)
    return total, rest
