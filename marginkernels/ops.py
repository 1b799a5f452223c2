"""The operators, registered with ``torch.library``, and the one ``autograd.Function`` on top of them.

All but ``class_sum`` hand over to the backend named in their last argument. All O(N) and O(N D) arithmetic is in float64: it costs little
beside the passes, keeps 1 - cos exact where the margins need it, and rounds to the same float32 bits whoever compiles it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as registry
from . import forms
from .backend.base import Problem, RowWeights, accumulator
from .backend.rows import WIDE, own_centres, unit_rows
from .backend.slab import inverse_norm


def bias_of(bias: Tensor | None, labels: Tensor) -> Tensor:
    """(N,) float64 bias of each row's label, 0 where there is none."""
    return torch.zeros_like(labels, dtype=WIDE) if bias is None else own_centres(bias[:, None], labels)[:, 0]


@torch.library.custom_op("marginkernels::rows", mutates_args=())
def rows_op(
    x: Tensor, w: Tensor, labels: Tensor, normalize_embedding: bool, normalize_weight: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`marginkernels.backend.base.Backend.rows`."""
    return registry.get(backend).rows(x, w, labels, normalize_embedding, normalize_weight)


@rows_op.register_fake
def _(x, w, labels, normalize_embedding, normalize_weight, backend):
    n = x.shape[0]
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(n, dtype=accumulator(x.dtype)),
        x.new_empty(n, dtype=WIDE),
        x.new_empty(n, dtype=WIDE),
    )


@torch.library.custom_op("marginkernels::row_pass", mutates_args=())
def row_pass_op(
    x: Tensor,
    row_factor: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    form: int,
    normalize_weight: bool,
    uniform: bool,
    need_u: bool,
    need_moment: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`marginkernels.backend.base.RowPass`, field by field."""
    problem = Problem(x, row_factor, w, bias, labels, scale, threshold, t, form, normalize_weight)
    if x.shape[0] == 0 or w.shape[0] == 0:
        out = [torch.zeros_like(v) for v in _row_pass_shapes(x, w, normalize_weight, need_u, need_moment, 0)]
        if not uniform:
            out[0].fill_(-torch.inf)
        out[1].fill_(-torch.inf)
        if normalize_weight and w.shape[0]:
            out[4] = inverse_norm(w.to(out[4].dtype))
        return tuple(out)
    with torch.autocast(x.device.type, enabled=False):
        r = registry.get(backend).row_pass(problem, uniform=uniform, need_u=need_u, need_moment=need_moment, workspace=workspace)
    return r.total, r.top, r.moment, r.u, r.class_factor, r.kept


def _row_pass_shapes(x, w, normalize_weight, need_u, need_moment, workspace):
    acc = accumulator(x.dtype)
    n, d = x.shape
    return (
        x.new_empty(n, dtype=acc),
        x.new_empty(n, dtype=acc),
        x.new_empty(n if need_moment else 0, dtype=acc),
        x.new_empty((n if need_u else 0, d), dtype=acc),
        x.new_empty(w.shape[0] if normalize_weight else 0, dtype=acc),
        x.new_empty(workspace, dtype=torch.uint8),
    )


@row_pass_op.register_fake
def _(x, row_factor, w, bias, labels, scale, threshold, t, form, normalize_weight, uniform, need_u, need_moment, workspace, backend):
    return _row_pass_shapes(x, w, normalize_weight, need_u, need_moment, workspace)


@torch.library.custom_op("marginkernels::class_pass", mutates_args=())
def class_pass_op(
    x: Tensor,
    row_factor: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    form: int,
    normalize_weight: bool,
    class_factor: Tensor,
    kept: Tensor,
    lse: Tensor,
    softmax_weight: Tensor,
    uniform_weight: Tensor | None,
    target_weight: Tensor,
    bias_weight: Tensor | None,
    need_w: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dw (C, D) in w's dtype and db (C,) acc; (0, D) and (0,) where not needed. See :class:`marginkernels.backend.base.RowWeights`."""
    dw_shape, db_shape = _class_pass_shapes(x, w, need_w, need_bias)
    if x.shape[0] == 0 or w.shape[0] == 0:
        return torch.zeros_like(dw_shape), torch.zeros_like(db_shape)
    problem = Problem(x, row_factor, w, bias, labels, scale, threshold, t, form, normalize_weight)
    row = RowWeights(lse, softmax_weight, uniform_weight, target_weight, bias_weight)
    with torch.autocast(x.device.type, enabled=False):
        dw, db = registry.get(backend).class_pass(problem, row, class_factor, kept, need_w=need_w, need_bias=need_bias)
    return dw if need_w else dw_shape, db if need_bias else db_shape


def _class_pass_shapes(x, w, need_w, need_bias):
    return w.new_empty((w.shape[0] if need_w else 0, w.shape[1])), x.new_empty(w.shape[0] if need_bias else 0, dtype=accumulator(x.dtype))


@class_pass_op.register_fake
def _(x, row_factor, w, *rest):
    need_w, need_bias, _ = rest[-3:]
    return _class_pass_shapes(x, w, need_w, need_bias)


@torch.library.custom_op("marginkernels::class_sum", mutates_args=())
def class_sum_op(w: Tensor, class_factor: Tensor) -> Tensor:
    """(D,) float64 ``sum_j a_j w_j``, with a_j = 1 where ``class_factor`` is empty."""
    total = torch.zeros(w.shape[1], dtype=WIDE, device=w.device)
    for start in range(0, w.shape[0], 8192):
        slab = w[start : start + 8192].to(WIDE)
        total += slab.sum(0) if class_factor.numel() == 0 else class_factor[start : start + 8192].to(WIDE) @ slab
    return total


@class_sum_op.register_fake
def _(w, class_factor):
    return w.new_empty(w.shape[1], dtype=WIDE)


@torch.library.custom_op("marginkernels::row_gradient", mutates_args=())
def row_gradient_op(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    u: Tensor,
    softmax_weight: Tensor,
    uniform_u: Tensor | None,
    uniform_weight: Tensor | None,
    target_weight: Tensor,
    normalize_embedding: bool,
    normalize_weight: bool,
    backend: str,
) -> Tensor:
    """See :meth:`marginkernels.backend.base.Backend.row_gradient`."""
    return registry.get(backend).row_gradient(
        x, w, labels, u, softmax_weight, uniform_u, uniform_weight, target_weight, normalize_embedding, normalize_weight
    )


@row_gradient_op.register_fake
def _(x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "marginkernels: the fused head has no second derivative; for double backward (gradient penalties, Hessians) use "
        "backend='reference', which autograd differentiates any number of times"
    )


for _op in (rows_op, row_pass_op, class_pass_op, class_sum_op, row_gradient_op):
    _op.register_autograd(_no_second_derivative)


class NonTargetLSE(torch.autograd.Function):
    """What a head needs of all classes, as a differentiable function of the rows, the class centres, the bias and the row scales.

    Outputs, (N,) float64 each: the non-target log-sum-exp lambda; the target similarity c_y and target bias b_y, passed through so that
    the gradients that come back for them join the one write of dw; the sum of the non-target logits (0 unless asked for). Last, (N,)
    and not differentiable: the row pass's top.
    """

    @staticmethod
    def forward(ctx, x, w, bias, scale, labels, similarity, prepared, row_factor, threshold, t, options):
        form, normalize_embedding, normalize_weight, with_sum, with_gradient, workspace, backend = options
        acc = accumulator(x.dtype)
        need_x, need_w, _, need_scale = (with_gradient and need for need in ctx.needs_input_grad[:4])
        # A zero embedding whose norm is its scale has s = 0; the class pass divides by s, and at 1e-20 its logits are as zero.
        narrow = [None if v is None else v.to(acc).contiguous() for v in (bias, scale.clamp_min(1e-20), threshold, t)]
        problem = (prepared, row_factor, w, narrow[0], labels, *narrow[1:], form, normalize_weight)
        # For the identity form the moment is x^ . u; only the hard forms need a sum of their own.
        own_moment = need_scale and form != forms.IDENTITY
        need_u = need_x or (need_scale and not own_moment)
        keep = workspace if need_w else 0
        if keep:
            keep = registry.get(backend).workspace_bytes(x.shape[0], w.shape[0], x.dtype, keep)
        lse, top, moment, u, class_factor, kept = row_pass_op(*problem, False, need_u, own_moment, keep, backend)
        total = uniform_u = uniform_moment = None
        if with_sum:
            if form == forms.IDENTITY:
                total, uniform_u = _plain_sum(x, w, bias, labels, scale, similarity, class_factor, normalize_embedding, normalize_weight)
            else:
                total, _, uniform_moment, uniform_u, _, _ = row_pass_op(*problem, True, need_x, own_moment, 0, backend)
        ctx.options = options
        ctx.keep_bias = bias is not None
        ctx.save_for_backward(x, w, labels, prepared, row_factor, *narrow, lse, u, moment, class_factor, kept, uniform_u, uniform_moment)
        ctx.mark_non_differentiable(top)
        target_bias = bias_of(bias, labels)
        total = torch.zeros_like(similarity) if total is None else total.to(WIDE)
        return lse.to(WIDE), similarity.clone(), target_bias, total, top

    @staticmethod
    def backward(ctx, g_lse, g_similarity, g_bias, g_sum, _):
        form, normalize_embedding, normalize_weight, with_sum, _, _, backend = ctx.options
        (x, w, labels, prepared, row_factor, bias, scale, threshold, t, lse, u, moment, class_factor, kept, uniform_u, uniform_moment) = (
            ctx.saved_tensors
        )
        need_x, need_w, need_bias, need_scale = ctx.needs_input_grad[:4]
        acc = lse.dtype
        softmax_weight = (g_lse * scale).to(acc)
        uniform_weight = (g_sum * scale).to(acc) if with_sum else None
        target_weight = g_similarity.to(acc)
        dx = dw = db = ds = None
        if need_x:
            dx = row_gradient_op(
                x, w, labels, u, softmax_weight, uniform_u, uniform_weight, target_weight, normalize_embedding, normalize_weight,
                backend,
            )  # fmt: skip
        if need_w or need_bias:
            dw, db = class_pass_op(
                prepared, row_factor, w, bias, labels, scale, threshold, t, form, normalize_weight, class_factor, kept,
                torch.where(lse == -torch.inf, torch.inf, lse), softmax_weight, uniform_weight, target_weight,
                g_bias.to(acc) if need_bias else None, need_w, need_bias, backend,
            )  # fmt: skip
        if need_scale:
            side = prepared.to(WIDE) * row_factor.to(WIDE)[:, None]
            mean = (side * u.to(WIDE)).sum(1) if form == forms.IDENTITY else moment.to(WIDE)
            ds = g_lse * mean
            if with_sum:
                ds = ds + g_sum * ((side * uniform_u.to(WIDE)).sum(1) if form == forms.IDENTITY else uniform_moment.to(WIDE))
        return dx, dw if need_w else None, db if need_bias else None, ds, *([None] * 7)


def _plain_sum(x, w, bias, labels, scale, similarity, class_factor, normalize_embedding, normalize_weight):
    """``sum_{j != y} z_ij`` (N,) and ``sum_{j != y} a_j w_j`` (N, D) for the identity form, from one sum over the classes: O(C D)."""
    centre = own_centres(w, labels)
    if normalize_weight:
        centre = unit_rows(centre)[0]
    rest = class_sum_op(w, class_factor) - centre
    side = unit_rows(x)[0] if normalize_embedding else x.to(WIDE)
    total = scale.to(WIDE) * (side * rest).sum(1)
    if bias is not None:
        total = total + bias.to(WIDE).sum() - bias_of(bias, labels)
    return total, rest
