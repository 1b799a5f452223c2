"""The loss of a step from its sums, and what comes before the passes, where a backend has kernels for it: one launch each.

Only in plain eager calls: a compiler fuses PyTorch code itself, and transforms of ``torch.func`` want to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from ..core.labels import checked_labels as labels_checked
from ..core.labels import marked_and_watched
from ..core.transforms import transforming
from ..core.types import LossInputs, LossOutput, LossUpstream
from .schema import observed, operator


def fuses_rows(x: Tensor, backend: str) -> bool:
    """Whether ``backend`` has kernels for the O(N) work of this call on embeddings like ``x``."""
    plain = not torch.compiler.is_compiling() and not transforming()
    return plain and backend in backends.FUSED and backends.get(backend).fuses_rows(x)


def _mark_labels_fake(labels: Tensor, num_classes: int, ignore_index: int, backend: str) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


@operator(_mark_labels_fake)
def mark_labels(labels: Tensor, num_classes: int, ignore_index: int, backend: str) -> Tensor:
    """:func:`marginkernels.core.labels.checked_labels` on a GPU by a kernel of ``backend``."""
    return marked_and_watched(labels, num_classes, ignore_index, backends.get(backend).mark_labels)


def checked_labels(labels: Tensor, num_classes: int, ignore_index: int, x: Tensor, backend: str) -> Tensor:
    """:func:`marginkernels.core.labels.checked_labels` for embeddings ``x``; on a CPU it reads the labels and launches nothing."""
    if labels.device.type == "cpu" or not fuses_rows(x, backend):
        return labels_checked(labels, num_classes, ignore_index, direct=not observed((labels,)))
    return mark_labels(labels, num_classes, ignore_index, backend)


def none_ignored(labels: Tensor) -> bool:
    """Whether it is known, without waiting for a device, that no checked label is -1."""
    return labels.device.type == "cpu" and not observed((labels,)) and not bool((labels < 0).any())


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, backend: str) -> Tensor:
        out, bad = backends.get(backend).replace_rows(x, labels, None, 1.0)
        ctx.save_for_backward(bad)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (bad,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return g.masked_fill(bad[:, None] != 0, 0.0), None, None
        return backends.get(ctx.backend).replace_rows(g, None, bad, 0.0)[0], None, None


def without_bad_ignored_rows(x: Tensor, labels: Tensor, backend: str) -> Tensor:
    """``x`` (N, D) with ones in the ignored rows that hold NaN or infinity; the gradient of such a row is 0."""
    apply: Callable[..., Tensor] = _Replaced.apply
    return apply(x, labels, backend)


def _loss_fake(inputs: LossInputs, backend: str) -> LossOutput:
    return LossOutput.allocate(inputs)


@operator(_loss_fake)
def loss(inputs: LossInputs, backend: str) -> LossOutput:
    """See :meth:`marginkernels.backend.Backend.loss`."""
    return backends.get(backend).loss(inputs)


def _loss_backward_fake(
    inputs: LossInputs, count: Tensor, upstream: Tensor, need_value: bool, need_scale: bool, backend: str
) -> LossUpstream:
    return LossUpstream.allocate(inputs, need_value, need_scale)


@operator(_loss_backward_fake)
def loss_backward(inputs: LossInputs, count: Tensor, upstream: Tensor, need_value: bool, need_scale: bool, backend: str) -> LossUpstream:
    """See :meth:`marginkernels.backend.Backend.loss_backward`."""
    return backends.get(backend).loss_backward(inputs, count, upstream, need_value, need_scale)


_GIVEN = ("lse", "value", "slope", "scale", "bias", "logit_sum", "labels", "similarity", "cos", "max_logit", "other")


def _with(p: LossInputs, given: Sequence[Tensor | None]) -> LossInputs:
    """``p`` with other tensors."""
    fields: dict[str, Any] = dict(zip(_GIVEN, given, strict=True))
    return replace(p, **fields)


class _Loss(torch.autograd.Function):
    """``given`` are the tensors of :class:`LossInputs`, by which ``p`` is otherwise known; ``own`` is the similarity that the sums gave
    back, equal to ``similarity``, whose gradient goes by way of the slope."""

    @staticmethod
    def forward(ctx: Any, p: LossInputs, backend: str, own: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        p = _with(p, given)
        out = loss(p, backend)
        ctx.save_for_backward(out.count, *given)
        ctx.p, ctx.backend = _with(p, [None] * len(_GIVEN)), backend
        ctx.mark_non_differentiable(out.stats)
        ctx.set_materialize_grads(False)
        return out.loss if p.reduction == "none" else out.loss.view(()), out.stats

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        if g is None:
            return (None,) * (3 + len(_GIVEN))
        count, *given = ctx.saved_tensors
        p = _with(ctx.p, given)
        need = dict(zip(_GIVEN, ctx.needs_input_grad[3:], strict=True))
        found = loss_backward(p, count, g, need["value"], need["scale"], ctx.backend)
        gradients = {"lse": found.d_lse, "value": found.d_value, "scale": found.d_scale}
        gradients |= {"bias": found.d_bias, "logit_sum": found.d_logit_sum}
        return None, None, found.d_similarity, *(gradients.get(name) if need[name] else None for name in _GIVEN)


def fused_loss(p: LossInputs, own: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The loss, (N,) or reduced to (), and the statistics (5,) of :class:`LossOutput`.

    Args:
        p: float64 tensors may carry gradients; that in c_y is given to ``own``.
        own: (N,) the similarity as the sums over the classes gave it back.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _Loss.apply
    return apply(p, backend, own, *(getattr(p, name) for name in _GIVEN))
