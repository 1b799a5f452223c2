"""Gradient clipping beside class-parallel heads, where each rank sees only the gradients of its own classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.validation import check_number
from . import _collectives as collectives
from ._shard import group_of_parameter


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` that knows the heads of this library: scales the gradients in place so that their norm, taken as
    one vector over all classes of all ranks, is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` sees one rank's classes only. Each rank would then scale by a norm of its own, and the replicas of
    the backbone would drift apart. Here the ``weight`` and ``bias`` of a sharded head count over the ranks of its group, and every other
    parameter counts once. Every rank gets the same bits. Sparse gradients, those of sampled classes, are clipped by their values.

    With a sharded head all ranks of its group call it together, with the same parameters in the same order, after ``backward()`` (and after
    ``GradScaler.unscale_``) and before the optimizer's step. One all-gather of two numbers for each group; nothing waits for the device,
    except where a sparse gradient has been accumulated from several backward passes and its rows must be merged, or to raise.

    Args:
        parameters: those of the backbone and of the heads, in one iterable, or a single tensor. Parameters that are not a sharded head's
            have the same gradient on all ranks, as DDP leaves it, or are ``DTensor`` as FSDP2's. Without a sharded head, or without
            ``torch.distributed``, the result is that of ``torch.nn.utils.clip_grad_norm_``.
        max_norm: the largest norm, >= 0.
        norm_type: p > 0 of the p-norm; ``math.inf`` is the largest absolute value.
        error_if_nonfinite: raise where the norm is NaN or infinite; this waits for the device.

    Returns:
        () the norm before clipping: float32 (float64 where a gradient is), on the device of the first gradient; 0 where there is none.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set, on all ranks alike, before any gradient has changed.
    """
    check_number("max_norm", max_norm, 0.0, None)
    check_number("norm_type", norm_type, 0.0, None, open_low=True)
    every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, p in enumerate(every):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters: expected tensors, got {p!r} at {i}")
    every = list({id(p): p for p in every}.values())  # a shared parameter counts once
    p_norm, here = float(norm_type), _device(every)
    total = _total_norm(every, p_norm, here)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"parameters: expected gradients of finite norm, got a total norm of order {p_norm:g} of {float(total)}")
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)  # with torch's epsilon
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in (_values(p) for p in every):
        if g is not None:
            by_device.setdefault(g.device, []).append(g)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, coefficient.to(device))
    return total


def _total_norm(parameters: list[Tensor], p_norm: float, device: torch.device) -> Tensor:
    """() the norm of all gradients, over the ranks of the groups that parameters are divided over; the same bits on all ranks."""
    by_group: dict[str | None, list[Tensor]] = {None: []}  # None: parameters that all ranks have
    dtype = torch.float32
    for p in parameters:
        held = by_group.setdefault(group_of_parameter(p), [])  # also without a gradient: the other ranks wait for this one
        if p.grad is not None:
            dtype = torch.promote_types(dtype, p.grad.dtype)
            held.append(p)
    replicated, total = _norm(by_group.pop(None), p_norm, device), []
    for i, (group, held) in enumerate(by_group.items()):
        assert group is not None
        pair = torch.stack([_norm(held, p_norm, device), replicated])
        of_ranks = collectives.all_gather(pair, group, collectives.group_of(group).size(), "gradient norms")
        if i == 0:
            replicated = of_ranks[0, 1]  # the first rank's: it may differ in its last bit, and every rank must scale alike
        total += list(of_ranks[:, 0])
    return _joined([*total, replicated], p_norm, device).to(dtype)


def _norm(parameters: list[Tensor], p_norm: float, device: torch.device) -> Tensor:
    """() float64: the norm of the gradients of ``parameters``, over all ranks for ``DTensor``."""
    norms, wide, by_mesh = [], [], dict[Any, list[Tensor]]()
    for p in parameters:
        whole: Any = p.grad
        g = _values(p)
        if _is_dtensor(whole):
            by_mesh.setdefault(whole.device_mesh, []).append(whole)
        elif g is not None and g.numel():
            if g.dtype in (torch.float32, torch.float64):
                wide.append(g)
            else:  # half precision could not hold the norm
                norms.append(torch.linalg.vector_norm(g, p_norm, dtype=torch.float32))
    if wide:
        norms.append(torch.nn.utils.get_total_norm(wide, p_norm))
    for grads in by_mesh.values():
        of_mesh: Any = torch.nn.utils.get_total_norm(grads, p_norm)
        norms.append(of_mesh.full_tensor())
    return _joined(norms, p_norm, device)


def _joined(norms: list[Tensor], p_norm: float, device: torch.device) -> Tensor:
    """() float64: the norm of a vector, from the norms () of its parts."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    joined: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device=device, dtype=torch.float64) for n in norms]), p_norm)
    return joined


def _values(p: Tensor) -> Tensor | None:
    """The elements of the gradient of ``p`` that this rank holds, sharing its memory: those of a dense or ``DTensor`` gradient, or the
    values of a sparse one, which becomes coalesced."""
    g: Any = p.grad
    if g is not None and g.is_sparse:
        if not g.is_coalesced():
            p.grad = g = g.coalesce()
        g = g._values()
    elif _is_dtensor(g):
        g = g.to_local()
    values: Tensor | None = g
    return values


def _is_dtensor(v: object) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(v, DTensor)


def _device(parameters: list[Tensor]) -> torch.device:
    """Where the result goes: the device of the first gradient, else of the first parameter."""
    for v in (*(p.grad for p in parameters), *parameters):
        if v is not None:
            return v.device
    return torch.device("cpu")
