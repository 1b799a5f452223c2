"""What a piece of PyTorch code asks a device to do, counted on a CPU: which operators write, and how many numbers each."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators that hand out memory and write nothing.
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Launches(TorchDispatchMode):
    """Within it, every operator that writes numbers is counted; views and empty tensors are not. Operators made of Python code, which would
    hide what they call, are entered, and those that are made of other operators are taken apart.

    Attributes:
        written: (name, numbers written) of each call, in order.
        most: the most tensors of at least ``size`` numbers each, made within, that were alive at once.

    Args:
        size: of what a tensor must have to count in ``most``.
    """

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []
        self.size, self.most = size, 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        custom = OPDEFS.get(func._schema.name)
        with self:
            if custom is not None:
                return custom._init_fn(*args, **(kwargs or {}))
            inner = func.decompose(*args, **(kwargs or {}))
        if inner is not NotImplemented:
            return inner
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        name = func._schema.name.partition("::")[2]
        view = any(a is not None and not a.is_write for a in aliases)
        if not view and name not in EMPTY and any(isinstance(v, Tensor) for v in tree_leaves(out)):
            self.written.append((name, max((v.numel() for v in tree_leaves(out) if isinstance(v, Tensor)), default=0)))
        for v in tree_leaves(out):
            if isinstance(v, Tensor):
                self._follow(v)
        return out

    def _follow(self, v: Tensor) -> None:
        """Count the memory of ``v`` as alive until it is freed."""
        storage = v.untyped_storage()
        key = storage._cdata
        if v.numel() >= self.size and key not in self._alive:
            self._alive[key] = v.numel()
            weakref.finalize(storage, self._alive.pop, key, None)
            self.most = max(self.most, len(self._alive))

    def large(self, numbers: int) -> list[str]:
        """The operators that wrote at least ``numbers``."""
        return [name for name, size in self.written if size >= numbers]
