"""The collectives of the class-parallel head, as operators, so that ``torch.compile`` need not break the graph.

A failure of any kind raises one error that says what to do. Received bytes are counted; the planner's figures are tested against them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.validation import FLOATS

# Renamed in torch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_groups: dict[str, dist.ProcessGroup] = {}
#: Bytes that this rank has received with ring algorithms, by group name and by purpose: an all-gather receives the parts of the other
#: ranks, a reduce-scatter one part from each other rank, an all-reduce both.
_received: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))


def register(group: dist.ProcessGroup) -> str:
    """Give the operators below access to ``group``; returns the name to pass to them."""
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The group of a name from :func:`register`."""
    return _groups[name]


def received(group: str) -> dict[str, int]:
    """Bytes that this rank has received since the last :func:`forget`, by purpose."""
    return dict(_received[group])


def forget(group: str) -> None:
    """Reset the counts of :func:`received` to zero."""
    _received[group].clear()


def _run(name: str, what: str, count: int, collective: Callable[..., Any], *args: Tensor) -> None:
    """Call a collective that receives ``count`` bytes for the purpose ``what``."""
    group = _groups[name]
    try:
        collective(*args, group=group)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RuntimeError(
            f"process_group: rank {dist.get_rank(group)} of {group.size()} could not exchange {what}: another rank has died, "
            f"has raised an error or is stuck ({reason}). Stop every rank and resume from the last checkpoint."
        ) from error
    _received[name][what] += count


@torch.library.custom_op("marginkernels::all_gather", mutates_args=())
def all_gather(x: Tensor, group: str, size: int, what: str) -> Tensor:
    """``x`` (...) of all ranks, in rank order: (size, ...). Shape and dtype are the same on all ranks."""
    x = x.contiguous()
    out = x.new_empty((size, *x.shape))
    if x.numel():
        # As bytes, because not every communication backend supports every dtype.
        _run(group, what, (size - 1) * x.nbytes, _gather, out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8))
    return out


@all_gather.register_fake
def _(x: Tensor, group: str, size: int, what: str) -> Tensor:
    return x.new_empty((size, *x.shape))


#: Dtypes of which this rank has seen that all ranks of a group have them: (group, number).
_agreed: set[tuple[str, int]] = set()


@torch.library.custom_op("marginkernels::all_gather_labels", mutates_args=())
def all_gather_labels(labels: Tensor, group: str, size: int, dtypes: int) -> Tensor:
    """``labels`` (M,) of all ranks (size, M), with a number for each rank's dtypes. On a GPU the numbers are only read where this rank's
    own is new, so that a step does not wait.

    Raises:
        ValueError: on the ranks that read them, where the numbers differ.
    """
    every: Tensor = all_gather(torch.cat([labels, labels.new_full((1,), dtypes)]), group, size, "labels")
    if labels.device.type == "cpu" or (group, dtypes) not in _agreed:
        found = every[:, -1].tolist()
        if any(v != dtypes for v in found):
            by_rank = [f"{FLOATS[v % 8]}/{FLOATS[v // 8]}".replace("torch.", "") for v in found]
            raise ValueError(f"embeddings: expected one dtype of embeddings and weight on all ranks, got {by_rank} by rank")
        _agreed.add((group, dtypes))
    return every[:, :-1].contiguous()


@all_gather_labels.register_fake
def _(labels: Tensor, group: str, size: int, dtypes: int) -> Tensor:
    return labels.new_empty((size, *labels.shape))


@torch.library.custom_op("marginkernels::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, group: str, what: str) -> Tensor:
    """The sum over ranks of slice ``x[rank]`` of ``x`` (size, ...)."""
    x = x.contiguous()
    out = torch.empty_like(x[0])
    if x.numel():
        _run(group, what, (x.shape[0] - 1) * out.nbytes, _scatter, out.view(-1), x.view(-1))
    return out


@reduce_scatter.register_fake
def _(x: Tensor, group: str, what: str) -> Tensor:
    return torch.empty_like(x[0])


@torch.library.custom_op("marginkernels::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, what: str) -> Tensor:
    """The sum of ``x`` over ranks, on all ranks."""
    out = x.clone(memory_format=torch.contiguous_format)
    size = _groups[group].size()
    if x.numel():
        _run(group, what, 2 * (size - 1) * x.nbytes // size, dist.all_reduce, out)
    return out


@all_reduce.register_fake
def _(x: Tensor, group: str, what: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
