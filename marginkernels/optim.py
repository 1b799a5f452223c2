"""SGD with momentum and AdamW that leave rows without a gradient alone, for heads that sample their classes.

A parameter whose gradient is a sparse tensor of rows is updated in those rows only; every other row keeps its bits, in its values and in
its momentum. So decay is lazy: a row decays in the steps in which it takes part, and in AdamW's bias correction each row counts its own
steps. With a dense gradient every row takes part, and the optimizers are ``torch.optim.SGD`` and ``torch.optim.AdamW``: backbone and
head may share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .checks import check_number


class _RowOptimizer(torch.optim.Optimizer):
    def __init__(self, params: Iterable, defaults: dict):
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_number("lr", group["lr"], 0.0, None)
            check_number("weight_decay", group["weight_decay"], 0.0, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; gives what ``closure``, which computes the loss anew, gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    g = p.grad.coalesce()  # costs nothing where one backward pass made it
                    self._update_rows(p, g.indices()[0], g.values(), group)
                else:
                    self._update(p, p.grad, self.state[p], group)
        return loss

    def _update_rows(self, p: Tensor, index: Tensor, g: Tensor, group: dict) -> None:
        """Update rows ``index`` of ``p`` and of its state as a small parameter of their own."""
        state = self.state[p]
        self._start(p, state, group)
        rows = p.index_select(0, index)
        part = {name: v.index_select(0, index) for name, v in state.items()}
        self._update(rows, g, part, group)
        p.index_copy_(0, index, rows)
        for name, v in state.items():
            v.index_copy_(0, index, part[name])

    def _start(self, p: Tensor, state: dict, group: dict) -> None:
        """Make the state of a parameter that has none yet."""
        raise NotImplementedError

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        """One step of ``p`` in place, with its gradient ``g`` and state."""
        raise NotImplementedError


class SGD(_RowOptimizer):
    """SGD with momentum: ``m <- momentum m + g + weight_decay p; p <- p - lr m`` (``- lr (g + momentum m)`` with ``nesterov``).

    Args:
        params: parameters or groups of them, as for ``torch.optim.SGD``.
        lr, momentum, weight_decay, nesterov: as there.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False):
        check_number("momentum", momentum, 0.0, None)
        if nesterov and not momentum:
            raise ValueError("momentum: expected a number > 0 for nesterov=True, got 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def _start(self, p: Tensor, state: dict, group: dict) -> None:
        if group["momentum"] and not state:
            state["momentum_buffer"] = torch.zeros_like(p)

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        self._start(p, state, group)
        if group["weight_decay"]:
            g = g.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            m = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
            g = g.add(m, alpha=group["momentum"]) if group["nesterov"] else m
        p.add_(g, alpha=-group["lr"])


class AdamW(_RowOptimizer):
    """AdamW: ``p <- p - lr weight_decay p - lr m^ / (sqrt(v^) + eps)``, with each row's moments and step count its own.

    Args:
        params: parameters or groups of them, as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay: as there.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        for beta in betas:
            check_number("betas", beta, 0.0, 1.0)
        check_number("eps", eps, 0.0, None)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _start(self, p: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = torch.zeros(p.shape[:1] + (1,) * (p.ndim - 1), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        self._start(p, state, group)
        first, second = group["betas"]
        steps = state["step"].add_(1)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        m = state["exp_avg"].lerp_(g.to(p.dtype), 1 - first)
        v = state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second)
        root = v.sqrt().div_((1 - second**steps).sqrt()).add_(group["eps"])
        p.sub_(m.div(root).mul_(group["lr"] / (1 - first**steps)))
