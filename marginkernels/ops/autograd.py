"""The sums that a head needs over all classes, as one differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from ..core.nontarget import NonTarget
from ..core.numerics import accumulation_dtype, classes_of, target_biases, target_centers, unit_rows
from ..core.transforms import looped, transforming
from ..core.types import HeadInputs, PassInputs, PreparedRows, Reduction, Request, SumsUpstream, Upstream
from .operators import center_sum, class_pass, row_gradient, row_pass, scale_gradient
from .operators import upstream as upstream_of
from .queue import Record, Sink


@dataclass(frozen=True)
class SumOptions:
    """What a call of :func:`sum_over_classes` computes.

    Attributes:
        non_target: the transform of non-target similarities.
        normalize_embedding, normalize_weight: as the margin has them.
        reduction: the sum that is wanted, LOG_SUM_EXP or SOFTPLUS_SUM.
        logit_sum: also the sum of the non-target logits, for label smoothing.
        center_norm: also the norm of each row's own class center, for its gradient.
        grad: whether a backward pass may follow.
        workspace_bytes: what the row pass may save for the class pass.
        backend: its name.
        fused: the backend has kernels for what comes after (:mod:`.rows`), and what was not asked for is (0,).
        sub_centers: rows of the centers that a class has; labels are rows.
    """

    non_target: NonTarget
    normalize_embedding: bool
    normalize_weight: bool
    reduction: Reduction
    logit_sum: bool
    center_norm: bool
    grad: bool
    workspace_bytes: int
    backend: str
    fused: bool = False
    sub_centers: int = 1


@dataclass(frozen=True)
class ClassSums:
    """(N,) each, float64 but for ``max_logit``.

    Attributes:
        lse: the non-target log-sum-exp lambda, or the sum that is wanted in its place.
        target_similarity, target_bias: c_y and b_y, passed through so that the gradients that come back for them join the one write of dw.
        logit_sum: the sum of the non-target logits, 0 where it was not asked for.
        center_norm: |w_y|, passed through like the two, 0 where it was not asked for.
        max_logit: the highest non-target logit without transform, acc_dtype, not differentiable.
    """

    lse: Tensor
    target_similarity: Tensor
    target_bias: Tensor
    logit_sum: Tensor
    center_norm: Tensor
    max_logit: Tensor


def sum_over_classes(
    inputs: HeadInputs,
    rows: PreparedRows,
    center_norm: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    class_weight: Tensor | None,
    options: SumOptions,
    sink: Sink | None = None,
) -> ClassSums:
    """Differentiable in the embeddings, the class centers, ``bias`` (C,) and ``scale`` (N,).

    Args:
        inputs, rows: the embeddings as they came, and prepared.
        center_norm: (N,) |w_y|, which is then differentiated, or None.
        bias: (C,) or None.
        scale: (N,) float64.
        threshold, t: (N,) float64, or None where the transform is the identity.
        class_weight: (C,) how much each class counts in the sum of logits, or None for 1. Whatever the backend, such a sum and its gradient
            are a pass of their own of ``torch``.
        sink: where the rows of the backward pass go for the class pass in an optimizer's step; the class centers, then detached, get no
            gradient here. None: they get it.
    """
    if sink is not None:
        queued: ClassSums = _queued_sum(inputs, rows, center_norm, bias, scale, threshold, t, class_weight, options, sink)
        return queued
    apply: Callable[..., tuple[Tensor, ...]] = _SumUnderTransforms.apply if transforming() else _SumOverClasses.apply
    if transforming():
        each = (rows.x, rows.row_factor, rows.target_similarity, rows.target_cos, center_norm)
        return ClassSums(*apply(inputs.x, inputs.w, bias, scale, inputs.labels, threshold, t, class_weight, *each, options)[:6])
    return ClassSums(*apply(inputs.x, inputs.w, bias, scale, inputs.labels, rows, center_norm, threshold, t, class_weight, options))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled graph would not see what a backward pass leaves to the step
def _queued_sum(
    inputs: HeadInputs,
    rows: PreparedRows,
    center_norm: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    class_weight: Tensor | None,
    options: SumOptions,
    sink: Sink,
) -> ClassSums:
    apply: Callable[..., tuple[Tensor, ...]] = _QueuedSum.apply
    rest = (rows, center_norm, threshold, t, class_weight, options, sink)
    return ClassSums(*apply(inputs.x, sink.probe, bias, scale, inputs, *rest))


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
    class_weight: Tensor | None
    lse: Tensor
    mean_cos: Tensor
    mean_center: Tensor
    cos_sum: Tensor | None
    center_sum: Tensor | None
    class_factor: Tensor
    saved: Tensor


_SAVED = tuple(f.name for f in fields(_Saved))
#: Those that the forward pass makes.
_MADE = ("lse", "mean_cos", "mean_center", "cos_sum", "center_sum", "class_factor", "saved")


#: (N,) each: the fields of :class:`ClassSums`.
_Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
#: Which of x, w, bias and scale get a gradient.
_Needs = tuple[bool, bool, bool, bool]


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
        center_norm: Tensor | None,
        threshold: Tensor | None,
        t: Tensor | None,
        class_weight: Tensor | None,
        options: SumOptions,
    ) -> _Sums:
        need_x, need_w, need_bias, need_scale = (options.grad and need for need in ctx.needs_input_grad[:4])
        needs = (need_x, need_w, need_bias, need_scale)
        given = (rows, center_norm, bias, scale, threshold, t, class_weight, options, needs)
        sums, saved = _forward(HeadInputs(x, w, labels, *_sides(options)), *given)
        ctx.save_for_backward(*(getattr(saved, name) for name in _SAVED))
        ctx.options = options
        ctx.mark_non_differentiable(sums[-1])
        ctx.set_materialize_grads(not options.fused)
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        saved = _Saved(**dict(zip(_SAVED, ctx.saved_tensors, strict=True)))
        return *_backward(saved, ctx.options, ctx.needs_input_grad[:4], *upstream[:5]), *(None,) * 7


class _QueuedSum(torch.autograd.Function):
    """:class:`_SumOverClasses` whose weight's gradient is left to an optimizer's step: its probe takes the place of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probe: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        inputs: HeadInputs,
        rows: PreparedRows,
        center_norm: Tensor | None,
        threshold: Tensor | None,
        t: Tensor | None,
        class_weight: Tensor | None,
        options: SumOptions,
        sink: Sink,
    ) -> _Sums:
        need_x, need_w, need_bias, need_scale = (options.grad and need for need in ctx.needs_input_grad[:4])
        needs = (need_x, need_w, need_bias, need_scale)
        if not backends.get(options.backend).step_takes_saved:
            options = replace(options, workspace_bytes=0)
        sums, saved = _forward(inputs, rows, center_norm, bias, scale, threshold, t, class_weight, options, needs)
        ctx.save_for_backward(*(getattr(saved, name) for name in _SAVED))
        ctx.options, ctx.sink = options, sink
        ctx.mark_non_differentiable(sums[-1])
        ctx.set_materialize_grads(not options.fused)
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        saved = _Saved(**dict(zip(_SAVED, ctx.saved_tensors, strict=True)))
        return *_backward(saved, ctx.options, ctx.needs_input_grad[:4], *upstream[:5], sink=ctx.sink), *(None,) * 8


class _SumUnderTransforms(torch.autograd.Function):
    """:class:`_SumOverClasses` as ``torch.func`` wants it: without a context in the forward pass, so that what the backward pass needs is
    a result, and no record among the arguments. What needs a gradient cannot be told then: all that may."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        threshold: Tensor | None,
        t: Tensor | None,
        class_weight: Tensor | None,
        prepared: Tensor,
        row_factor: Tensor,
        target_similarity: Tensor,
        target_cos: Tensor,
        center_norm: Tensor | None,
        options: SumOptions,
    ) -> tuple[Tensor | None, ...]:
        rows = PreparedRows(prepared, row_factor, target_similarity, target_cos)
        needs = (options.grad, options.grad, options.grad and bias is not None, options.grad)
        given = (rows, center_norm, bias, scale, threshold, t, class_weight, options, needs)
        sums, saved = _forward(HeadInputs(x, w, labels, *_sides(options)), *given)
        return *sums, *(getattr(saved, name) for name in _MADE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, w, bias, scale, labels, threshold, t, class_weight, prepared, row_factor, _, _, _, options = inputs
        made = output[6:]
        ctx.save_for_backward(x, w, labels, prepared, row_factor, bias, scale, threshold, t, class_weight, *made)
        ctx.options = options
        ctx.mark_non_differentiable(*(v for v in output[5:] if v is not None))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        x, w, labels, prepared, row_factor, bias, scale, threshold, t, class_weight, *made = ctx.saved_tensors
        n = _Narrowed.of(accumulation_dtype(x.dtype), bias, scale, threshold, t, class_weight if ctx.options.logit_sum else None)
        saved = _Saved(x, w, labels, prepared, row_factor, n.bias, n.scale, n.threshold, n.t, n.class_weight, *made)
        return *_backward(saved, ctx.options, ctx.needs_input_grad[:4], *upstream[:5]), *(None,) * 10

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return looped(_SumUnderTransforms.apply, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_NO_FORWARD_MODE)


_NO_FORWARD_MODE = (
    "marginkernels: the fused head has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad); use "
    "reverse mode (torch.func.grad, vjp, jacrev), or backend='reference', which has both"
)


@dataclass(frozen=True)
class _Narrowed:
    """What the passes take per row or class in acc_dtype, detached."""

    bias: Tensor | None
    scale: Tensor
    threshold: Tensor | None
    t: Tensor | None
    class_weight: Tensor | None

    @classmethod
    def of(
        cls,
        acc_dtype: torch.dtype,
        bias: Tensor | None,
        scale: Tensor,
        threshold: Tensor | None,
        t: Tensor | None,
        class_weight: Tensor | None,
        *,
        fused: bool = False,
    ) -> _Narrowed:
        def narrow(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.detach().to(acc_dtype).contiguous()

        # A zero embedding whose norm is its scale has s = 0; the class pass divides by s, and at 1e-20 its logits are as zero.
        if fused:  # in one launch: in float64, rounded as it is written
            narrowed = torch.add(scale.detach(), 1e-20, out=scale.new_empty(scale.shape, dtype=acc_dtype))
        else:
            narrowed = scale.detach().clamp_min(1e-20).to(acc_dtype).contiguous()
        return cls(narrow(bias), narrowed, narrow(threshold), narrow(t), narrow(class_weight))


def _sides(options: SumOptions) -> tuple[bool, bool]:
    return options.normalize_embedding, options.normalize_weight


def _forward(
    inputs: HeadInputs,
    rows: PreparedRows,
    center_norm: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    threshold: Tensor | None,
    t: Tensor | None,
    class_weight: Tensor | None,
    options: SumOptions,
    needs: _Needs,
) -> tuple[_Sums, _Saved]:
    """The row pass, and what the class pass needs of it."""
    x, w, labels = inputs.x, inputs.w, inputs.labels
    need_x, need_w, _, need_scale = needs
    weights = class_weight if options.logit_sum else None
    narrowed = _Narrowed.of(accumulation_dtype(x.dtype), bias, scale, threshold, t, weights, fused=options.fused)
    pass_inputs = PassInputs(
        x=rows.x,
        row_factor=rows.row_factor,
        w=w,
        bias=narrowed.bias,
        labels=labels,
        scale=narrowed.scale,
        threshold=narrowed.threshold,
        t=narrowed.t,
        non_target=options.non_target,
        normalize_weight=options.normalize_weight,
        sub_centers=options.sub_centers,
    )
    # For the identity the mean cosine is x^ . mean_center; only the hard transforms need a sum of their own.
    identity = options.non_target == NonTarget.IDENTITY
    need_cos = need_scale and not identity
    need_center = need_x or (need_scale and identity)
    workspace = options.workspace_bytes if need_w else 0
    if workspace:
        workspace = backends.get(options.backend).workspace_bytes(x.shape[0], w.shape[0], x.dtype, workspace, options.sub_centers)
    request = Request.of_loss(options.reduction, need_center=need_center, need_cos=need_cos, workspace_bytes=workspace)
    out = row_pass(pass_inputs, request, options.backend)
    zeros = _nothing if options.fused else torch.zeros_like
    logit_sum, cos_sum, all_centers = out.lse, None, None
    if not options.logit_sum:
        logit_sum = zeros(rows.target_similarity)
    classes = classes_of(labels, options.sub_centers)
    if options.logit_sum and identity and class_weight is None and options.sub_centers == 1:
        logit_sum, all_centers = _identity_logit_sum(inputs, bias, scale, out.class_factor, options.backend)
    elif options.logit_sum:
        weighted, backend = _weighted(pass_inputs, narrowed.class_weight, options.backend)
        total = row_pass(weighted, Request.logit_sum(need_center=need_center, need_cos=need_cos), backend)
        logit_sum, cos_sum, all_centers = total.logit_sum.to(torch.float64), total.cos_sum, total.center_sum
    if options.logit_sum and bias is not None:  # the sum of logits is infinite where another class is masked, whatever a backend adds up
        masked = bias == -torch.inf
        others = masked.sum() - target_biases(masked.to(torch.float64), classes)
        logit_sum = torch.where(others > 0, -torch.inf, logit_sum)
    saved = _Saved(
        x=x,
        w=w,
        labels=labels,
        prepared=rows.x,
        row_factor=rows.row_factor,
        bias=narrowed.bias,
        scale=narrowed.scale,
        threshold=narrowed.threshold,
        t=narrowed.t,
        class_weight=narrowed.class_weight,
        lse=out.lse,
        mean_cos=out.mean_cos,
        mean_center=out.mean_center,
        cos_sum=cos_sum,
        center_sum=all_centers,
        class_factor=out.class_factor,
        saved=out.saved,
    )
    own_bias = zeros(rows.target_similarity) if bias is None else target_biases(bias, classes)
    norm = zeros(rows.target_similarity) if center_norm is None else center_norm.clone()
    if options.fused:  # tensors of their own for autograd, which nobody writes
        return (out.lse.view_as(out.lse), rows.target_similarity.view_as(out.lse), own_bias, logit_sum, norm, out.max_logit), saved
    return (out.lse.to(torch.float64, copy=True), rows.target_similarity.clone(), own_bias, logit_sum, norm, out.max_logit), saved


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _upstream(
    s: _Saved,
    o: SumOptions,
    need_bias: bool,
    g_lse: Tensor | None,
    g_similarity: Tensor | None,
    g_bias: Tensor | None,
    g_logit_sum: Tensor | None,
) -> Upstream:
    if o.fused:
        given = SumsUpstream(s.lse, s.scale, g_lse, g_similarity, g_bias if need_bias else None, g_logit_sum if o.logit_sum else None)
        return upstream_of(given, need_bias, o.logit_sum, o.backend).upstream(need_bias, o.logit_sum)
    assert g_lse is not None
    assert g_similarity is not None
    assert g_bias is not None
    assert g_logit_sum is not None
    acc_dtype = accumulation_dtype(s.x.dtype)
    lse = torch.zeros_like(s.lse) if o.reduction == Reduction.SOFTPLUS_SUM else torch.where(s.lse == -torch.inf, torch.inf, s.lse)
    return Upstream(
        lse=lse,
        d_lse=(g_lse * s.scale).to(acc_dtype),
        d_logit_sum=(g_logit_sum * s.scale).to(acc_dtype) if o.logit_sum else None,
        d_target_cos=g_similarity.to(acc_dtype),
        d_target_bias=g_bias.to(acc_dtype) if need_bias else None,
        reduction=o.reduction,
    )


def _backward(
    s: _Saved,
    o: SumOptions,
    needs: _Needs,
    g_lse: Tensor | None,
    g_similarity: Tensor | None,
    g_bias: Tensor | None,
    g_logit_sum: Tensor | None,
    g_norm: Tensor | None,
    *,
    sink: Sink | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, w, bias and scale. Each is the result of an operator, which refuses a second derivative. With a ``sink`` w gets
    none, and the sink what the class pass needs."""
    need_x, need_w, need_bias, need_scale = needs
    upstream = _upstream(s, o, need_bias, g_lse, g_similarity, g_bias, g_logit_sum)
    dx = dw = db = ds = None
    if need_x:
        dx = row_gradient(HeadInputs(s.x, s.w, s.labels, *_sides(o)), upstream, s.mean_center, s.center_sum, o.backend)
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
            sub_centers=o.sub_centers,
        )
        d_norm = g_norm if o.center_norm else None
        if need_w and sink is not None:
            _leave(pass_inputs, upstream, s, d_norm, o.backend, sink)
        of_weight = need_w and sink is None
        if of_weight or need_bias:
            given = (s.class_factor, s.saved, s.class_weight, d_norm if of_weight else None, of_weight, need_bias, o.backend)
            dw, db = class_gradients(pass_inputs, upstream, *given)
            dw = None if dw is None else dw.to(s.w.dtype)
    if need_scale:
        identity = o.non_target == NonTarget.IDENTITY
        prepared, row_factor = (s.prepared, s.row_factor) if identity else (None, None)
        g_lse = torch.zeros_like(s.lse) if g_lse is None else g_lse
        ds = scale_gradient(g_lse, prepared, row_factor, s.mean_cos, s.mean_center)
        if o.logit_sum and g_logit_sum is not None:
            ds = ds + scale_gradient(g_logit_sum, prepared, row_factor, s.cos_sum, s.center_sum)
    return dx, dw, db, ds


def _leave(p: PassInputs, upstream: Upstream, s: _Saved, d_norm: Tensor | None, backend: str, sink: Sink) -> None:
    """Leave to the queue of ``sink`` what the class pass needs, where this backward pass is to accumulate the weight's gradient."""
    queue = sink.queue()
    if queue is None:
        raise RuntimeError(
            "optimizer: expected the fused optimizer that was attached to the head in the forward pass, got one that is gone: keep it "
            "until the backward pass has run"
        )
    if queue.wanted():
        record = Record(
            inputs=replace(p, w=p.w[:0]),
            upstream=replace(upstream, d_target_bias=None),
            class_factor=s.class_factor,
            saved=s.saved,
            class_weight=s.class_weight,
            d_norm=d_norm,
            rows=sink.rows,
            backend=backend,
            written=sink.written,
            about=sink.about,
        )
        queue.add(record)


def class_gradients(
    p: PassInputs,
    upstream: Upstream,
    class_factor: Tensor,
    saved: Tensor,
    class_weight: Tensor | None,
    d_norm: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``p.w``, in its dtype or acc_dtype, and of the biases, by the class pass and what comes beside it.

    Args:
        class_weight: (C,) acc_dtype of the label smoothing, or None.
        d_norm: (N,) the gradient of each |w_y|, or None.
    """
    if d_norm is not None and p.w.dtype != p.acc_dtype:
        # Two parts of the gradient may nearly cancel: both in acc_dtype, and the sum is rounded once.
        p = replace(p, w=p.w.to(p.acc_dtype))
    of_lse = upstream if class_weight is None else replace(upstream, d_logit_sum=None)
    grads = class_pass(p, of_lse, class_factor, saved, need_weight, need_bias, backend)
    dw, db = grads.d_weight if need_weight else None, grads.d_bias if need_bias else None
    if class_weight is not None:
        weighted, of_weights = _weighted(p, class_weight, backend)
        zero = torch.zeros_like(upstream.d_lse)
        no_bias = None if upstream.d_target_bias is None else zero
        of_sum = Upstream(upstream.lse, zero, upstream.d_logit_sum, zero, no_bias)
        more = class_pass(weighted, of_sum, class_factor, saved.new_empty(0), need_weight, need_bias, of_weights)
        dw, db = (a if a is None else a + b for a, b in ((dw, more.d_weight), (db, more.d_bias)))
    if dw is not None and d_norm is not None:
        dw = _along_own_centers(dw, p.w, p.labels, d_norm)
    return dw, db


def _weighted(inputs: PassInputs, class_weight: Tensor | None, backend: str) -> tuple[PassInputs, str]:
    """``inputs`` for a pass that sums logits, and the backend that knows the weights of the classes."""
    return (inputs, backend) if class_weight is None else (replace(inputs, class_weight=class_weight), "torch")


def _along_own_centers(dw: Tensor, w: Tensor, labels: Tensor, g: Tensor) -> Tensor:
    """``dw`` (C, D), in place, plus the gradient that ``g`` (N,), that of each |w_y|, gives the class centers: ``g w_y/|w_y|``. O(N D + C).

    Rows of one class write the same numbers, so their order does not matter."""
    if w.shape[0] == 0:
        return dw
    near = labels.clamp(0, w.shape[0] - 1)
    total = g.new_zeros(w.shape[0]).index_add(0, near, torch.where(near == labels, g, 0.0))
    own = dw.index_select(0, near).to(torch.float64) + total[near][:, None] * unit_rows(w.index_select(0, near))[0]
    own = own.to(dw.dtype)
    return dw.index_copy(0, near, own) if transforming() else dw.index_copy_(0, near, own)


def _identity_logit_sum(
    inputs: HeadInputs, bias: Tensor | None, scale: Tensor, class_factor: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """``sum_{j != y} z_ij`` (N,) and ``sum_{j != y} a_j w_j`` (N, D) for the identity, from one sum over the classes: O(C D)."""
    center = target_centers(inputs.w, inputs.labels)
    if inputs.normalize_weight:  # with the factor that the sum has, so that a lone class leaves nothing
        center = center * target_centers(class_factor[:, None], inputs.labels)
    rest = center_sum(inputs.w, class_factor, backend) - center
    side = unit_rows(inputs.x)[0] if inputs.normalize_embedding else inputs.x.to(torch.float64)
    total = scale.to(torch.float64) * (side * rest).sum(1)
    if bias is not None:
        bias = bias.to(torch.float64).masked_fill(bias == -torch.inf, 0.0)
        total = total + bias.sum() - target_biases(bias, inputs.labels)
    return total, rest
