"""What a margin's hooks are asked for and must return: called here, and checked from shapes and dtypes alone, without the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.nontarget import NonTarget
from ..core.numerics import per_row
from ..core.transforms import writable
from ..core.types import Reduction
from .base import BatchInfo, Margin, NonTargetLSE


@dataclass(frozen=True)
class Evaluated:
    """A margin at N target similarities: (N,) each.

    Attributes:
        value, slope: of the target logit before the scale, and its derivative in the similarity, at least as precise as the similarity.
        scale: s_i.
        threshold, t: of the non-target transform, detached; None for the identity.
        regularizer: what is added to each row's loss, at least as precise as the similarity; None where nothing is.
    """

    value: Tensor
    slope: Tensor
    scale: Tensor
    threshold: Tensor | None
    t: Tensor | None
    regularizer: Tensor | None

    @classmethod
    def joined(cls, parts: list[Evaluated]) -> Evaluated:
        """Of the rows of several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        found = {name: [getattr(part, name) for part in parts] for name in _EVALUATED}
        joined: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in found.items()}
        return cls(**joined)


#: Its fields, by a name that a traced call can read.
_EVALUATED = tuple(f.name for f in fields(Evaluated))


def evaluate(margin: Margin, similarity: Tensor, batch: BatchInfo, dtype: torch.dtype) -> Evaluated:
    """The margin at the target similarities (N,), with ``scale`` and ``t`` in ``dtype``.

    Raises:
        ValueError, TypeError: a hook returned something else than its contract says; names the margin's class and the hook.
    """
    name, n = type(margin).__name__, similarity.shape[0]
    returned: Any = margin.target(similarity, batch)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        came = f"{len(returned)} values" if isinstance(returned, tuple | list) else type(returned).__name__
        raise TypeError(f"{name}.target: expected two values, the target's value and its slope, got {came}")
    value, slope = returned
    if _is_number(slope):
        slope = torch.full_like(similarity, slope)
    for what, v in (("value", value), ("slope", slope)):
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}.target: expected a tensor as the {what}, got {type(v).__name__}")
    if value.shape != similarity.shape or slope.shape != similarity.shape:
        shape = tuple(value.shape) if value.shape != similarity.shape else tuple(slope.shape)
        raise ValueError(f"{name}.target: expected value and slope of shape ({n},), got {shape}")
    for what, v in (("value", value), ("slope", slope)):
        if not v.dtype.is_floating_point or torch.promote_types(v.dtype, similarity.dtype) != v.dtype:
            raise TypeError(f"{name}.target: expected the {what} in {similarity.dtype}, as the cosines are, got {v.dtype}")
    scale = _one_per_row(f"{name}.row_scale", margin.row_scale(batch), similarity, dtype, positive=True)
    threshold = t = None
    if margin.non_target != NonTarget.IDENTITY:  # what the transform does not read is zero
        threshold, t = (torch.zeros(n, dtype=dtype, device=similarity.device) for _ in range(2))
    if margin.non_target.needs_threshold:
        limit: Any = margin.threshold(similarity, batch)
        if not isinstance(limit, Tensor) or not limit.dtype.is_floating_point:
            kind = str(limit.dtype) if isinstance(limit, Tensor) else type(limit).__name__
            raise TypeError(f"{name}.threshold: expected a floating tensor of shape ({n},), got {kind}")
        if limit.shape != similarity.shape:
            raise ValueError(f"{name}.threshold: expected shape ({n},), got {tuple(limit.shape)}")
        threshold = limit.detach()
    if margin.non_target.needs_t:
        # A copy: the state moves on before the backward pass.
        t = _one_per_row(f"{name}.t", getattr(margin, "t", None), similarity, dtype).detach().clone()
    return Evaluated(value, slope, scale, threshold, t, _regularizer(name, margin.regularizer(batch), similarity))


def check_binary(margin: Margin, label_smoothing: float, class_weight: Tensor | None, mix: object, log_q: bool, bias: bool) -> None:
    """A ``ValueError`` where one of these options, or a focal factor, is on for a margin that is a binary classifier for each class: they
    are made for a distribution over the classes, which it has none of; or where the classes have biases of their own (``bias``) and the
    margin clips exponents, which they are no part of."""
    if margin.reduction == Reduction.LOG_SUM_EXP:
        return
    name = type(margin).__name__
    for option, value, off in (("label_smoothing", label_smoothing, 0), ("focal_gamma", margin.focal_gamma, 0), ("log_q", log_q, False)):
        if value != off:
            raise ValueError(f"{option}: expected {off} with {name}, which is a binary classifier for each class, got {value!r}")
    for option, given in (("class_weight", class_weight), ("mix", mix)):
        if given is not None:
            kind = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{option}: expected None with {name}, which is a binary classifier for each class, got {kind}")
    if bias and margin.non_target == NonTarget.CLIPPED:
        raise ValueError(f"bias: expected none with {name}(clamp=True), whose exponents are clipped without it, got one")


def _regularizer(name: str, term: Any, like: Tensor) -> Tensor | None:
    if term is None:
        return None
    if not isinstance(term, Tensor) or not term.dtype.is_floating_point:
        kind = str(term.dtype) if isinstance(term, Tensor) else type(term).__name__
        raise TypeError(f"{name}.regularizer: expected None or a floating tensor of shape ({like.shape[0]},), got {kind}")
    if term.shape != like.shape:
        raise ValueError(f"{name}.regularizer: expected shape ({like.shape[0]},), got {tuple(term.shape)}")
    return term


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Real) and not isinstance(value, bool)


def _one_per_row(name: str, value: Any, like: Tensor, dtype: torch.dtype, *, positive: bool = False) -> Tensor:
    """A number or a tensor of shape (), (1,) or (N,) as (N,); the number itself is checked, the values of a tensor are not read."""

    def expected() -> str:  # made only for an error: a traced call that formats N would be compiled for that N alone
        number = "a finite number > 0" if positive else "a finite number"
        return f"{name}: expected {number} or a floating tensor of shape (), (1,) or ({like.shape[0]},)"

    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{expected()}, got a tensor of {value.dtype}")
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != 1 and value.shape[0] != like.shape[0]):
            raise ValueError(f"{expected()}, got shape {tuple(value.shape)}")
    elif not _is_number(value):
        raise TypeError(f"{expected()}, got {value!r} of type {type(value).__name__}")
    elif not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{expected()}, got {value!r}")
    return per_row(value, like, dtype)


@contextlib.contextmanager
def restored_on_error(margin: Margin) -> Iterator[None]:
    """The margin's buffers as they were, where what runs inside raises, KeyboardInterrupt included. Copies them, and waits for nothing."""
    before = {name: v.clone() for name, v in margin.named_buffers()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, v in margin.named_buffers():
                if name in before and writable(v):
                    v.copy_(before[name])
        raise


@torch.no_grad()
def advance(margin: Margin, similarity: Tensor, batch: BatchInfo, non_target_lse: NonTargetLSE) -> None:
    """Advance the margin's state by one step, with finite statistics only.

    A row whose similarity is not finite is to ``update`` an ignored row with similarity 0. Where no valid row is left of those that came,
    or a buffer is not finite afterwards, all buffers keep their old values. Nothing waits for the device, and as ``similarity`` has the
    rows of all ranks, every rank does the same.

    Args:
        similarity: (N,) target similarities.
        batch: the rows they belong to.
        non_target_lse: see :meth:`Margin.update`.
    """
    if not margin._moves:
        return
    finite = torch.isfinite(similarity)
    usable = batch.with_labels(torch.where(finite, batch.labels, -1))
    if not all(writable(v) for v in margin.buffers()):
        raise RuntimeError(
            f"margin: expected a state that torch.func may write, got that of {type(margin).__name__}, captured from outside the "
            "transformed function: call eval() on the head, or pass its buffers as an argument, through torch.func.functional_call"
        )
    before = {name: v.clone() for name, v in margin.named_buffers()}
    margin.update(torch.where(finite, similarity, 0), usable, non_target_lse)
    moved = usable.valid.any() | ~batch.valid.any()
    after = {name: v for name, v in margin.named_buffers() if name in before and v.shape == before[name].shape}
    for v in after.values():
        if v.is_floating_point():
            moved = moved & torch.isfinite(v).all().to(moved.device)
    for name, v in after.items():
        v.copy_(torch.where(moved.to(v.device), v, before[name].to(v.device)))
