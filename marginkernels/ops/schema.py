"""Operators over records: a function of dataclasses becomes an operator of ``torch.library``, whose schema is made from their fields.

``torch.library`` takes tensors and numbers; the layers speak in records (:mod:`marginkernels.core.types`). :func:`operator` closes the
gap in one place: the arguments are flattened field by field on the way in, made whole again inside the operator, and likewise the
results. A field that is added to a record is in the schema at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..core.transforms import loops_under_vmap, transforming

#: Types of the schema language by those of Python; an ``IntEnum`` is an int.
_TYPES: dict[Any, str] = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}


class _Leaf(typing.NamedTuple):
    """One argument of an operator: parameter ``param``, or its field ``field`` where that is a record."""

    param: str
    field: str
    kind: Any
    optional: bool

    def declared(self) -> str:
        kind = "int" if issubclass(self.kind, IntEnum) else _TYPES[self.kind]
        return f"{kind}{'?' if self.optional else ''} {self.param}{'_' if self.field else ''}{self.field}"


def _plain(kind: Any) -> tuple[Any, bool]:
    """``Tensor, True`` of ``Tensor | None``."""
    if isinstance(kind, types.UnionType):
        (one,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        return one, True
    return kind, False


def _leaves(param: str, kind: Any) -> Iterator[_Leaf]:
    if not dataclasses.is_dataclass(kind):
        yield _Leaf(param, "", *_plain(kind))
        return
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        yield _Leaf(param, f.name, *_plain(hints[f.name]))


def flatten(leaves: Iterable[_Leaf], arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The operator's arguments, from records and plain values by parameter name."""
    found = []
    for leaf in leaves:
        v = arguments[leaf.param]
        if leaf.field:
            v = getattr(v, leaf.field)
        found.append(int(v) if isinstance(v, IntEnum) else v)
    return tuple(found)


def unflatten(params: dict[str, Any], leaves: Iterable[_Leaf], values: Iterable[Any]) -> list[Any]:
    """The reverse of :func:`flatten`: one record or plain value for each of ``params`` (name -> type)."""
    plain: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {name: {} for name in params}
    for leaf, v in zip(leaves, values, strict=True):
        v = leaf.kind(v) if issubclass(leaf.kind, IntEnum) else v
        if leaf.field:
            fields[leaf.param][leaf.field] = v
        else:
            plain[leaf.param] = v
    return [kind(**fields[name]) if fields[name] else plain[name] for name, kind in params.items()]


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "marginkernels: the fused head has no second derivative; for double backward (gradient penalties, Hessians) use "
        "backend='reference', which autograd differentiates any number of times"
    )


_ORDINARY = (Tensor, torch.nn.Parameter)


def observed(args: Iterable[Any]) -> bool:
    """Whether anything wants to see an operator's call: a compiler, a tracer, a profiler, a mode, or a tensor that is not what it seems."""
    return (
        torch.compiler.is_compiling()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(v, Tensor) and type(v) not in _ORDINARY for v in _values(args))
    )


def _values(args: Iterable[Any]) -> Iterator[Any]:
    return (v for one in args for v in (vars(one).values() if dataclasses.is_dataclass(one) else (one,)))


def _requires_grad(args: Iterable[Any]) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in _values(args))


class _Final(torch.autograd.Function):
    """``result`` as a result of ``inputs`` that has no derivative: under the transforms of ``torch.func``, which do not take the autograd
    formula of an operator of ``torch.library``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivative)


def _call_under_transforms(op: Any, values: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        out = op(*values)
    if not torch.is_grad_enabled():
        return out
    inputs = [v for v in values if isinstance(v, Tensor)]
    final: Callable[..., Any] = _Final.apply
    return final(out, *inputs) if isinstance(out, Tensor) else tuple(final(v, *inputs) for v in out)


F = typing.TypeVar("F", bound=Callable[..., Any])


def operator(fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register a function of records as ``marginkernels::<its name>``; gives a function of the same signature that goes through it. Where
    nothing wants to see the operator, nor needs a gradient, the function itself is called: that spares a tenth of a millisecond.

    Args:
        fake: as the function, on tensors without data: gives tensors of the right shapes and dtypes.

    The function's annotations are dataclasses, tensors, numbers and strings, or ``Tensor | None``; it returns a tensor or a dataclass of
    tensors. The result has the attributes ``op``, the operator, and ``flatten``, which makes the operator's arguments.
    """

    def register(function: F) -> F:
        hints = typing.get_type_hints(function)
        returns = hints.pop("return")
        names = tuple(inspect.signature(function).parameters)
        params = {name: hints[name] for name in names}
        leaves = tuple(leaf for name, kind in params.items() for leaf in _leaves(name, kind))
        results = tuple(f.name for f in dataclasses.fields(returns)) if dataclasses.is_dataclass(returns) else ()
        gives = f"({', '.join(['Tensor'] * len(results))})" if results else "Tensor"
        schema = f"({', '.join(leaf.declared() for leaf in leaves)}) -> {gives}"

        def through(body: Callable[..., Any]) -> Callable[..., Any]:
            def run(*values: Any) -> Any:
                out = body(*unflatten(params, leaves, values))
                return tuple(getattr(out, name) for name in results) if results else out

            return run

        op = torch.library.custom_op(f"marginkernels::{function.__name__}", through(function), mutates_args=(), schema=schema)
        op.register_fake(through(fake))
        op.register_autograd(_no_second_derivative)
        loops_under_vmap(op)

        def flat(*args: Any) -> tuple[Any, ...]:
            return flatten(leaves, dict(zip(names, args, strict=True)))

        def call(*args: Any) -> Any:
            if not observed(args) and not (torch.is_grad_enabled() and _requires_grad(args)):
                return function(*args)
            out = _call_under_transforms(op, flat(*args)) if transforming() else op(*flat(*args))
            return returns(*out) if results else out

        call.__name__, call.__doc__, call.__module__ = function.__name__, function.__doc__, function.__module__
        call.op, call.flatten, call.schema = op, flat, schema  # type: ignore[attr-defined]
        return typing.cast(F, call)

    return register
