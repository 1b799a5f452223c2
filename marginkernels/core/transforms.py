"""The transforms of ``torch.func``: whether one is running, and the rule by which operators run under ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether this call runs within ``torch.func.grad``, ``vmap``, ``jvp`` or another transform of ``torch.func``, or in forward mode."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def writable(v: Tensor) -> bool:
    """Whether a transform that is running lets ``v`` be written: not where it was captured from outside."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(v)


def looped(function: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """``vmap`` of ``function`` by a loop over its ``size`` problems: one stays as large as it is, and shares no memory with the next.

    Returns:
        The results, and the dimension of each that counts the problems: 0, or None where the result is None.
    """
    found = []
    for i in range(size):
        one = (v if dim is None else v.select(dim, i) for v, dim in zip(args, in_dims, strict=True))
        found.append(function(*one))
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    columns = [None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)]
    return tuple(columns), tuple(None if column is None else 0 for column in columns)


def loops_under_vmap(op: Any) -> None:
    """Give an operator of ``torch.library`` the rule :func:`looped`."""
    op.register_vmap(lambda info, in_dims, *args: looped(op, info.batch_size, in_dims, args))
