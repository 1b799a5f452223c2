"""SGD with momentum and AdamW with row-sparse updates, for heads that sample their classes.

If the gradient of a parameter is a sparse tensor of rows, only these rows are updated. The values and the optimizer state of all other
rows do not change by a bit. So weight decay is lazy: a row decays only in steps that update it, and AdamW's bias correction counts the
steps of each row separately. With a dense gradient every row is updated, as by ``torch.optim.SGD`` and ``torch.optim.AdamW``; so the
backbone and the head may share one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import backend as backends
from ..core.update import MOMENTS, Rule, Update
from ..core.validation import check_number

#: Elements updated at once: 64 MB of float32, so that the temporaries of a step are small compared with the weight.
CHUNK_ELEMENTS = 1 << 24
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]


def _chunks(v: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of ``v``, of about ``CHUNK_ELEMENTS`` elements each."""
    width = max(1, CHUNK_ELEMENTS * v.shape[0] // max(v.numel(), 1))
    return (slice(start, start + width) for start in range(0, v.shape[0], width))


class _RowOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: dense gradients in chunks, sparse ones row by row."""

    def __init__(self, params: Params, defaults: dict[str, Any]):
        self._check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; options of the group are checked like those of the constructor.

        Raises:
            ValueError, TypeError: naming the option, what was expected and what came; the group is then not added.
        """
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, options: dict[str, Any]) -> None:
        """Raise where an option of the constructor or of a group is out of its range."""
        check_number("lr", options["lr"], 0.0, None)
        check_number("weight_decay", options["weight_decay"], 0.0, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. ``closure`` computes the loss again; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, state, group)
                update = self._rule_of(group)
                if p.grad.is_sparse:
                    g = p.grad.coalesce()  # does nothing to the gradient of a single backward pass
                    update_rows(update, p, g.indices()[0], g.values(), state)
                elif p.ndim == 0:
                    apply_update(update, p, p.grad, state)
                else:
                    for part in _chunks(p):
                        apply_update(update, p[part], p.grad[part], {name: v[part] for name, v in state.items()})
        return loss

    def _rule_of(self, group: dict[str, Any]) -> Update:
        """What a step does to the parameters of a group."""
        raise NotImplementedError

    def _start(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Create the state of a parameter: tensors with as many rows as ``p``, so that they can be updated by row."""
        raise NotImplementedError


def apply_update(
    update: Update, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int = 0, backend: str | None = None
) -> None:
    """:meth:`Update.apply` by ``backend``, or where that is None or ``torch`` by the ``cpu`` kernels if they serve: the bits of the ``cpu``
    backend's fused step."""
    if backend in (None, "torch"):
        backend = "cpu" if p.device.type == "cpu" and backends.get("cpu").unavailable_reason() is None else "torch"
    backends.get(backend).update(update, p, g, state, rows)


def update_rows(
    update: Update, p: Tensor, index: Tensor, g: Tensor, state: dict[str, Tensor], first_row: int = 0, backend: str | None = None
) -> None:
    """Update the rows ``index`` (K,) of ``p`` and of its state, with gradient ``g`` (K, ...): copy them out, update the copies, copy them
    back. ``first_row`` is the number of the first row of ``p`` among those of all ranks."""
    for part in _chunks(g):
        here = index[part]
        rows, values = p.index_select(0, here), {name: v.index_select(0, here) for name, v in state.items() if v.ndim}
        apply_update(update, rows, g[part], values, here + first_row, backend)
        p.index_copy_(0, here, rows)
        for name, v in values.items():
            state[name].index_copy_(0, here, v)


class SGD(_RowOptimizer):
    """SGD with momentum: ``m <- momentum m + g + weight_decay p; p <- p - lr m`` (``- lr (g + momentum m)`` with ``nesterov``).

    Args:
        params: parameters or parameter groups.
        lr, momentum, weight_decay, nesterov: as in ``torch.optim.SGD``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_number("momentum", options["momentum"], 0.0, None)
        if options["nesterov"] and not options["momentum"]:
            raise ValueError("momentum: expected a number > 0 for nesterov=True, got 0")

    def _start(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if group["momentum"]:
            (name,) = MOMENTS[Rule.SGD]
            state[name] = torch.zeros_like(p)

    def _rule_of(self, group: dict[str, Any]) -> Update:
        return Update(Rule.SGD, group["lr"], group["weight_decay"], group["momentum"], group["nesterov"])


class AdamW(_RowOptimizer):
    """AdamW: ``p <- p - lr weight_decay p - lr m^ / (sqrt(v^) + eps)``, with moments and a step count for each row.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_number("eps", options["eps"], 0.0, None)
        betas = options["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        for beta in betas:
            check_number("betas", beta, 0.0, None)
            if beta >= 1:
                raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")

    def _start(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] = torch.zeros(p.shape[:1] + (1,) * (p.ndim - 1), dtype=torch.float32, device=p.device)
        for name in MOMENTS[Rule.ADAMW]:
            state[name] = torch.zeros_like(p)

    def _rule_of(self, group: dict[str, Any]) -> Update:
        return Update(Rule.ADAMW, group["lr"], group["weight_decay"], betas=tuple(group["betas"]), eps=group["eps"])
