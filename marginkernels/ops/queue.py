"""What backward passes leave to ``optimizer.step()`` where a fused optimizer is attached to a head: rows, never a gradient of the weight.

A backward pass appends a :class:`Record`, O(N D). The class pass runs over all records at once, in the step. In between the *probe*, a
parameter without a part in the loss, stands for the weight wherever gradients are looked at: its ``.grad`` is a number, the norm of the
weight's gradient, which gradient scalers and clipping multiply, and the step multiplies the rows by what became of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.types import PassInputs, Upstream

#: What may be done to a probe's gradient without taking the norm: it is scaled, tested or cleared. By the name of the function, or of the
#: attribute that is read.
_SCALING = {"mul_", "div_", "imul", "itruediv", "__imul__", "__itruediv__", "_foreach_mul_", "_foreach_div_"}
_SCALING |= {"_amp_foreach_non_finite_check_and_unscale_", "_amp_non_finite_check_and_unscale_"}
_TESTS = {"isfinite", "isinf", "isnan"}
_CLEARING = {"zero_", "_foreach_zero_"}
_FACTS = {"dtype", "device", "shape", "ndim", "layout", "is_sparse", "is_cuda", "is_cpu", "is_meta", "requires_grad", "grad_fn", "grad"}
_FACTS |= {"is_leaf", "_version", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps", "is_xla", "names"}
_FACTS |= {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_complex", "is_contiguous", "data_ptr", "detach_"}
_FACTS |= {"requires_grad_", "__len__", "__hash__", "is_same_size", "nelement", "get_device", "untyped_storage"}
_CUTTING = ("clamp", "clip", "_foreach_clamp", "minimum", "maximum", "_foreach_minimum", "_foreach_maximum")
_NORMS = {"linalg_vector_norm", "vector_norm", "norm", "_foreach_norm", "linalg_norm"}


class ProbeGradient(torch.Tensor):
    """() float64, the gradient of a probe. Until somebody looks at it, it holds an upper bound of the norm that costs nothing, which is
    finite where the norm is; whoever reads the number gets the norm itself, which costs a pass over the classes, once.

    Raises:
        RuntimeError: it is cut element by element (``clip_grad_value_``), or asked for another norm than the 2-norm: one number cannot
            stand for that.
    """

    _queue: Callable[[], StepQueue | None]

    @staticmethod
    def of(value: Tensor, queue: StepQueue) -> ProbeGradient:
        made: ProbeGradient = torch.Tensor._make_subclass(ProbeGradient, value)
        made._queue = weakref.ref(queue)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FACTS | _SCALING | _TESTS:
                return func(*args, **kwargs)
            probes = [v for v in _tensors((args, tuple(kwargs.values()))) if isinstance(v, ProbeGradient)]
            queues = {id(v): queue for v in probes if (queue := v._queue()) is not None and queue.shown is v}
            if name in _CLEARING:
                out = func(*args, **kwargs)
                for queue in queues.values():
                    queue.clear()
                return out
            if name.startswith(_CUTTING):
                raise RuntimeError(
                    "clip_grad_value_: expected a head without a fused optimizer, whose weight has no gradient to cut element by element: "
                    "use clip_grad_norm_, or mk.optim.SGD or AdamW"
                )
            if name in _NORMS:
                order = kwargs.get("ord", kwargs.get("p", args[1] if len(args) > 1 else 2.0))
                if order not in (None, 2, "fro"):
                    raise RuntimeError(
                        f"norm_type: expected 2 for a head with a fused optimizer, whose weight's gradient only its norm stands for, "
                        f"got {order!r}"
                    )
            for queue in queues.values():
                queue.take_norm()
            return func(*args, **kwargs)


def _tensors(v: Any) -> Iterator[Tensor]:
    if isinstance(v, Tensor):
        yield v
    elif isinstance(v, list | tuple):
        for one in v:
            yield from _tensors(one)


@dataclass
class Record:
    """The rows of one backward pass, as the class pass takes them.

    Attributes:
        inputs: without its ``w``, of which there are no rows.
        upstream: without ``d_target_bias``.
        class_factor: of the rows of the weight that took part.
        saved: what the row pass left; only a queue of one record can use it.
        class_weight: (C,) of the label smoothing, or None.
        d_norm: (N,) the gradient of |w_y|, or None.
        rows: (K,) int64 the rows of the weight that were drawn, or None for all.
        backend: its name.
        written: the version of the weight that the rows were multiplied with.
        about: what else must be the same in two records whose rows share a pass.
        factor: () float64 what became of the gradient since: None for 1.
    """

    inputs: PassInputs
    upstream: Upstream
    class_factor: Tensor
    saved: Tensor
    class_weight: Tensor | None
    d_norm: Tensor | None
    rows: Tensor | None
    backend: str
    written: tuple[int, int]
    about: tuple[Any, ...]
    factor: Tensor | None = field(default=None)

    def scaled(self) -> Record:
        """The same with ``factor`` multiplied in."""
        if self.factor is None:
            return self
        f, up = self.factor, self.upstream
        names = ("d_lse", "d_logit_sum", "d_target_cos", "rounded_d_lse")
        values = {name: (v.to(torch.float64) * f).to(v.dtype) for name in names if (v := getattr(up, name)) is not None}
        d_norm = None if self.d_norm is None else self.d_norm * f
        return replace(self, upstream=replace(up, **values), d_norm=d_norm, factor=None)

    def kind(self) -> tuple[Any, ...]:
        """Records of one kind can share a pass."""
        p, up = self.inputs, self.upstream
        there = (p.bias, p.threshold, p.t, up.d_logit_sum, up.rounded_lse, self.class_weight, self.d_norm)
        plain = (p.x.dtype, p.non_target, p.normalize_weight, p.sub_centers, up.reduction, self.backend, self.about)
        return (*plain, *(v is None for v in there))

    def bound(self) -> Tensor:
        """() float64, at least the norm of the gradient with respect to the normalized centers; not finite where any part is not."""
        p, up = self.inputs, self.upstream
        of_row = up.d_lse.to(torch.float64).abs() + up.d_target_cos.to(torch.float64).abs()
        if up.d_logit_sum is not None:
            of_row = of_row + up.d_logit_sum.to(torch.float64).abs() * self.class_factor.numel()
        length = torch.linalg.vector_norm(p.x, dim=1, dtype=torch.promote_types(p.x.dtype, torch.float32)).to(torch.float64)
        total: Tensor = (of_row * length * p.row_factor.to(torch.float64)).sum()
        return total if self.d_norm is None else total + self.d_norm.abs().sum()


def joined(records: list[Record]) -> list[Record]:
    """The records with their factors multiplied in, and those of one kind made one. Records without rows are left out, but for draws of
    classes, whose momentum and decay go on without a gradient too."""
    by_kind: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.inputs.x.shape[0] or record.rows is not None:
            by_kind.setdefault(record.kind(), []).append(record.scaled())
    found = [_one(same) for same in by_kind.values()]
    return found if len(found) == 1 else [replace(record, saved=record.saved.new_empty(0)) for record in found]


def _one(records: list[Record]) -> Record:
    first = records[0]
    if len(records) == 1:
        return first

    def cat(of: Callable[[Record], Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: None if getattr(of(first), name) is None else torch.cat([getattr(of(r), name) for r in records]) for name in names}

    inputs = replace(first.inputs, **cat(lambda r: r.inputs, ("x", "row_factor", "labels", "scale", "threshold", "t")))
    each = ("lse", "d_lse", "d_logit_sum", "d_target_cos", "rounded_lse", "rounded_d_lse")
    upstream = replace(first.upstream, **cat(lambda r: r.upstream, each))
    d_norm = cat(lambda r: r, ("d_norm",))["d_norm"]
    return replace(first, inputs=inputs, upstream=upstream, d_norm=d_norm, saved=first.saved.new_empty(0))


class StepQueue:
    """The records between a head's backward passes and the step of the fused optimizer that owns this.

    Args:
        weight: the class centers.
        probe: () the parameter that stands for them.
        norm: gives the norm of the gradient of some records, () float64, by a pass over the classes.
        exact: take the norm after each backward pass, also where nobody looks.
        marks: gives a number of the head's other parameters that changes when they do.
    """

    def __init__(
        self, weight: nn.Parameter, probe: nn.Parameter, norm: Callable[[list[Record]], Tensor], exact: bool, marks: Callable[[], Any]
    ):
        self.weight, self.probe, self._norm, self.exact, self.marks = weight, probe, norm, exact, marks
        self.records: list[Record] = []
        self.shown: Tensor | None = None  # the gradient of the probe that this made
        self._left: tuple[Tensor, bool] | None = None  # its value as this left it, and whether that is the norm
        self._stepped = False

    def written(self) -> tuple[int, int]:
        """Changes with the values of the weight."""
        return self.weight._version, self.weight.data_ptr()

    def clear(self) -> None:
        """Forget all records, as after ``zero_grad``."""
        self.records, self._stepped, self._left = [], False, None

    def wanted(self) -> bool:
        """Whether the backward pass that is running would add to the weight's gradient: not ``torch.autograd.grad``."""
        node = torch.autograd.graph.get_gradient_edge(self.probe).node
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # torch.autograd.grad, which accumulates nothing
            return False

    @torch.no_grad()
    def add(self, record: Record) -> None:
        """Append a record, in a backward pass.

        Raises:
            RuntimeError: the records of before were stepped with, and nobody has called ``zero_grad`` since.
        """
        if self.probe.grad is None:
            self.clear()
        elif self._stepped:
            raise RuntimeError(
                "zero_grad: expected a call between the fused optimizer's step() and the next backward pass, got none: the weight's "
                "gradient was used up by the step and cannot be added to"
            )
        self._settle()
        if self.records:
            self.records = [replace(one, saved=one.saved.new_empty(0)) for one in self.records]
            record = replace(record, saved=record.saved.new_empty(0))
        self.records.append(record)
        bound = record.bound()
        self._show(bound if self._left is None else self._left[0] + bound, False)
        if self.exact:
            self.take_norm()

    def take_norm(self) -> None:
        """Make the probe's gradient the norm of what the records stand for, if it is not yet.

        Raises:
            RuntimeError: the weight has another gradient besides, or has changed.
        """
        self._settle()
        if not self.records or (self._left is not None and self._left[1]):
            return
        if self.weight.grad is not None:
            raise RuntimeError(
                "clip_grad_norm_: expected a weight whose whole gradient comes from its head with the fused optimizer, got another loss's "
                "besides, and the norm of the sum cannot be told from two norms: clip with mk.optim.SGD or AdamW"
            )
        self.check_unwritten()
        self._show(self._norm(self.records), True)

    def check_unwritten(self) -> None:
        """Raise where the weight has changed since a record's forward pass."""
        now = self.written()
        if any(record.written != now for record in self.records):
            raise RuntimeError(
                "weight: expected the class centers as they were in the forward pass until the fused optimizer's step(), got changed ones: "
                "the step computes the gradient, and must find what the loss was computed from. Change them after step(), or use "
                "mk.optim.SGD or AdamW"
            )

    def due(self) -> bool:
        """Whether the weight has a gradient from its head.

        Raises:
            RuntimeError: one that a step has used up.
        """
        if self.probe.grad is None:
            self.clear()
            return False
        if self._stepped:
            raise RuntimeError(
                "step: expected a backward pass since the fused optimizer's last step(), got none: the weight's gradient was used up"
            )
        return True

    def take(self) -> list[Record]:
        """The records, with their factors; they are gone after this."""
        self._settle()
        self.check_unwritten()
        records, self.records, self._stepped = self.records, [], True
        return records

    def _settle(self) -> None:
        """Multiply the factors of all records by what became of the probe's gradient."""
        g = self.probe.grad
        if not self.records or g is None or self._left is None:
            return
        left, is_norm = self._left
        with torch._C.DisableTorchFunctionSubclass():
            # By its value: not all that scales a gradient moves its version.
            now = g.detach().as_subclass(Tensor).to(torch.float64).clone()
            untouched = (now == left) | (now.isnan() & left.isnan())
            if g.device.type == "cpu" and bool(untouched):
                return
            factor = torch.where(untouched, 1.0, now / left)
            self.records = [replace(r, factor=factor if r.factor is None else r.factor * factor) for r in self.records]
            self.shown, self._left = g, (now, is_norm)

    def _show(self, value: Tensor, is_norm: bool) -> None:
        """Have the probe's gradient be ``value``."""
        with torch._C.DisableTorchFunctionSubclass():
            g = self.probe.grad
            value = value.to(self.probe.dtype)
            if isinstance(g, ProbeGradient) and g is self.shown:
                g.copy_(value)
            else:
                self.probe.grad = g = ProbeGradient.of(value.clone(), self)
            self.shown, self._left = g, (value.to(torch.float64), is_norm)


@dataclass(frozen=True)
class Sink:
    """Where the gradient of a call's weight goes.

    Attributes:
        queue: gives the queue, or None once its optimizer is gone.
        probe: the queue's probe, an input of the function whose gradient the queue takes.
        rows: (K,) int64 the rows of the weight that were drawn, or None for all.
        written: as :meth:`StepQueue.written` gave it at the forward pass.
        about: :class:`Record`'s.
    """

    queue: Callable[[], StepQueue | None]
    probe: nn.Parameter
    rows: Tensor | None
    written: tuple[int, int]
    about: tuple[Any, ...]
