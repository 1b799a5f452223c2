"""SGD and AdamW whose step computes the gradient of the class centers, a chunk at a time, and applies it at once: no C x D gradient.

``backward()`` leaves O(N D) to the step, which runs one class pass over the rows of all backward passes since ``zero_grad()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..core.draws import check_seed
from ..core.update import MOMENTS, Update, key_of
from ..head import MarginHead
from ..ops import GradientChunks, Record, StepQueue
from .rows import SGD, AdamW, _RowOptimizer, apply_update, update_rows

#: The state that counts the steps of stochastic rounding.
DRAWS = "draws"
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)


class _FusedOptimizer(_RowOptimizer):
    """Base of the two: the queue of a head, its state, and the step of its weight."""

    def __init__(self, head: MarginHead, options: dict[str, Any], state_dtype: torch.dtype | None, exact_norm: bool):
        if not isinstance(head, MarginHead):
            raise TypeError(f"head: expected a MarginHead, got {type(head).__name__}; other parameters go into groups of add_param_group()")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype: expected None, torch.float32, torch.bfloat16 or torch.float64, got {state_dtype!r}")
        if not isinstance(exact_norm, bool):
            raise TypeError(f"exact_norm: expected True or False, got {exact_norm!r}")
        self.state_dtype, self._head = state_dtype, weakref.ref(head)
        self._check(options)
        weight = head.weight
        self._weight = weight
        norm = _norm_of(weakref.ref(weight))
        queue = self._queue = head._attach(lambda probe, marks: StepQueue(weight, probe, norm, exact_norm, marks))
        try:
            params = [p for p in head.parameters() if p is not queue.probe]
            _RowOptimizer.__init__(self, [*params, queue.probe], options)
            self._start(weight, self.state[weight], self.param_groups[0])
            self.state[queue.probe] = {}  # torch.distributed.checkpoint wants one of every parameter
        except BaseException:
            head._detach()
            raise

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        if options["rounding"] not in (None, "nearest", "stochastic"):
            raise ValueError(f'rounding: expected None, "nearest" or "stochastic", got {options["rounding"]!r}')
        check_seed("seed", options["seed"])

    def _start(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if p is not self._weight:
            super()._start(p, state, group)
            return
        named: dict[str, Tensor] = {}
        super()._start(p.detach()[:0], named, group)
        dtype = self.state_dtype or (torch.float32 if p.dtype == torch.float16 else p.dtype)
        for name in named:
            shape = p.shape if name != "step" else (p.shape[0], 1)
            state[name] = torch.zeros(shape, dtype=dtype if name != "step" else torch.float32, device=p.device)
        if _is_stochastic(p, state, group):
            state[DRAWS] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the class centers by what the backward passes since ``zero_grad()`` have left, and every other parameter by its gradient.

        Args:
            closure: computes the loss again; its result is returned.

        Raises:
            RuntimeError: the class centers are not what the loss was computed from, or the step repeats without a new backward pass.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        p = self._weight
        head = self._head()
        if head is not None and (head.weight is not p or head._queue_here() is not self._queue):
            raise RuntimeError(
                "head: expected the weight that this optimizer was made with, got a head with another one: make the optimizer anew after "
                "prune(), load_state_dict(assign=True) and the like"
            )
        due, extra = self._queue.due(), p.grad
        try:
            p.grad = None  # what another loss on the same weight left
            if due or extra is not None:
                self._step_weight(self._queue.take() if due else [], extra)
            with self._without_probe():
                super().step()
        finally:
            p.grad = extra
        return loss

    @contextmanager
    def _without_probe(self) -> Iterator[None]:
        params, probe = self.param_groups[0]["params"], self._queue.probe
        self.param_groups[0]["params"] = [p for p in params if p is not probe]
        try:
            yield
        finally:
            self.param_groups[0]["params"] = params

    def _step_weight(self, records: list[Record], extra: Tensor | None) -> None:
        p, group, head = self._weight, self.param_groups[0], self._head()
        state = self.state[p]
        first = 0 if head is None else head.class_start * head.sub_centers
        if not records and extra is None and head is not None and head.sampler is not None:
            return  # cleared gradients of drawn rows: no row took part
        update = self._rule_of(group)
        if update.momentum and not set(MOMENTS[update.rule]) <= state.keys():
            self._start(p, state, group)  # the group's momentum was set after the optimizer was made
        if DRAWS in state:
            update = replace(update, stochastic=True, key=key_of(group["seed"], int(state[DRAWS])))
            state[DRAWS] += 1
        chunks = GradientChunks(records, p)
        backend = chunks.records[0].backend if chunks.records else None
        if chunks.drawn and extra is None:
            rows, g = chunks.of_drawn()
            update_rows(update, p, rows, g, state, first, backend)
            return
        if chunks.drawn or (extra is not None and extra.is_sparse):
            raise RuntimeError(
                "weight: expected a dense gradient beside the head's that takes all classes, or none at all, got one of drawn rows and "
                "another: use mk.optim.SGD or AdamW"
            )
        moments = {name: v for name, v in state.items() if name != DRAWS}
        if extra is None and self._in_one_pass(chunks.records, update, moments, first):
            return
        for part, g in chunks:
            if extra is not None:
                g = g + extra[part]
            apply_update(update, p[part], g, {name: v[part] for name, v in moments.items()}, first + part.start, backend)

    def _in_one_pass(self, records: list[Record], update: Update, state: dict[str, Tensor], first: int) -> bool:
        """Whether a kernel that updates each center as soon as its gradient is known has done the step."""
        if len(records) != 1 or records[0].class_weight is not None or records[0].d_norm is not None:
            return False
        (r,), p = records, self._weight.detach()
        if p.shape[0] == 0 or r.inputs.x.shape[0] == 0:
            return False
        backend = backends.get(r.backend)
        if not backend.class_step(replace(r.inputs, w=p), r.upstream, r.class_factor, r.saved, update, state, first):
            return False
        torch.autograd.graph.increment_version(self._weight)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim.Optimizer``; what backward passes have left to the step is forgotten."""
        super().zero_grad(set_to_none)
        if self._queue.probe.grad is None:
            self._queue.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, but the state of the class centers keeps the dtype that this optimizer has it in. What
        :class:`SGD` or :class:`AdamW` saved of the same parameters fits too.

        Raises:
            ValueError: it is of other parameters.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        values = dict(state_dict["state"])
        mine = self.param_groups[0]["params"]
        if groups and len(groups[0]["params"]) == len(mine) - 1:
            groups[0]["params"] = [*groups[0]["params"], -1]  # the probe, which has no state
        groups[0] = {**{name: v for name, v in self.param_groups[0].items() if name != "params"}, **groups[0]}
        at = mine.index(self._weight)
        number = groups[0]["params"][at] if len(groups[0]["params"]) == len(mine) else None
        held = values.pop(number, None)
        own = dict(self.state[self._weight])
        super().load_state_dict({"state": values, "param_groups": groups})
        state = self.state[self._weight] = own
        self.state[self._queue.probe] = {}
        for name, v in (held or {}).items():
            if name in state and (v.shape == state[name].shape or v.numel() == 1):
                dtype, device = state[name].dtype, state[name].device
                state[name] = v.detach().to(device, dtype, copy=True).expand(state[name].shape).contiguous()
            elif name in state:
                raise ValueError(f"state_dict: expected {name} of shape {tuple(state[name].shape)}, got {tuple(v.shape)}")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__}: expected state_dict(), got a copy or pickle of the optimizer: what it has attached to its head cannot "
            "be copied. Copy the head, make an optimizer for the copy, and load the state_dict()"
        )


def _norm_of(weight: weakref.ref[nn.Parameter]) -> Callable[[list[Record]], Tensor]:
    def norm(records: list[Record]) -> Tensor:
        held = weight()
        assert held is not None
        return GradientChunks(records, held).norm()

    return norm


def _is_stochastic(p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    halves = (torch.float16, torch.bfloat16)
    return group["rounding"] != "nearest" and any(v.dtype in halves for v in (p, *state.values()))


class FusedSGD(_FusedOptimizer, SGD):
    """:class:`SGD` of a head's parameters, without a gradient of the class centers: ``head.weight.grad`` stays None.

    The loop stays as it is: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, with any number of backward passes to a step,
    ``torch.amp.GradScaler`` and ``torch.nn.utils.clip_grad_norm_`` (:mod:`marginkernels.distributed`'s where classes are sharded). See
    docs/fused_step.md for what else holds and what does not.

    Args:
        head: whose ``weight`` is updated inside the class pass; its other parameters are updated as by :class:`SGD`. Parameters of other
            modules go into groups of ``add_param_group()``.
        lr, momentum, weight_decay, nesterov: as in :class:`SGD`.
        rounding: how half-precision class centers and state are rounded: ``"stochastic"``, with an exact mean, ``"nearest"``, which loses
            updates smaller than half a last place, weight decay first; None is stochastic. Float32 is always to nearest.
        state_dtype: of the state of the class centers: float32 or bfloat16 (float64 for float64 centers); None: theirs, but float32 for
            float16.
        exact_norm: take the norm of the gradient after each backward pass, at the cost of a class pass, also where nobody asks for it: for
            tools that read gradients past PyTorch's functions.
        seed: of stochastic rounding.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        head: MarginHead,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        rounding: str | None = None,
        state_dtype: torch.dtype | None = None,
        exact_norm: bool = False,
        seed: int = 0,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        _FusedOptimizer.__init__(self, head, options | {"rounding": rounding, "seed": seed}, state_dtype, exact_norm)


class FusedAdamW(_FusedOptimizer, AdamW):
    """:class:`AdamW` of a head's parameters, without a gradient of the class centers; see :class:`FusedSGD`.

    Args:
        head, rounding, state_dtype, exact_norm, seed: as in :class:`FusedSGD`.
        lr, betas, eps, weight_decay: as in :class:`AdamW`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        head: MarginHead,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rounding: str | None = None,
        state_dtype: torch.dtype | None = None,
        exact_norm: bool = False,
        seed: int = 0,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _FusedOptimizer.__init__(self, head, options | {"rounding": rounding, "seed": seed}, state_dtype, exact_norm)
