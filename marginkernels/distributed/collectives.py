"""The few collectives the class-parallel head needs, as operators, so that ``torch.compile`` carries them whole.

Every failure becomes one clear error; every byte received is counted, which is what the planner's figures are tested against.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames both.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_groups: dict[str, dist.ProcessGroup] = {}
#: Bytes this rank has received, by group name and by what they were for, as ring algorithms move them: an all-gather receives the
#: others' parts, a reduce-scatter one part from each of the others, an all-reduce both.
_received: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))


def register(group: dist.ProcessGroup) -> str:
    """The name by which the operators below know ``group``."""
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The group that :func:`register` was given."""
    return _groups[name]


def received(group: str) -> dict[str, int]:
    """What this rank has received so far, in bytes, by purpose."""
    return dict(_received[group])


def forget(group: str) -> None:
    """Start the count of :func:`received` at zero."""
    _received[group].clear()


def _run(name: str, what: str, count: int, collective, *args) -> None:
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
    """``x`` (...) of every rank, in rank order: (size, ...). All ranks give one shape and dtype."""
    x = x.contiguous()
    out = x.new_empty((size, *x.shape))
    # As bytes: no backend refuses a dtype that it only has to carry.
    flat = lambda v: v.reshape(-1).view(torch.uint8)  # noqa: E731
    if x.numel():
        _run(group, what, (size - 1) * x.nbytes, _gather, flat(out), flat(x))
    return out


@all_gather.register_fake
def _(x, group, size, what):
    return x.new_empty((size, *x.shape))


@torch.library.custom_op("marginkernels::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, group: str, what: str) -> Tensor:
    """The sum over ranks of this rank's slice of ``x`` (size, ...)."""
    x = x.contiguous()
    out = torch.empty_like(x[0])
    if x.numel():
        _run(group, what, (x.shape[0] - 1) * out.nbytes, _scatter, out.view(-1), x.view(-1))
    return out


@reduce_scatter.register_fake
def _(x, group, what):
    return torch.empty_like(x[0])


@torch.library.custom_op("marginkernels::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, what: str) -> Tensor:
    """The sum of ``x`` over ranks, on every rank."""
    out = x.clone(memory_format=torch.contiguous_format)
    size = _groups[group].size()
    if x.numel():
        _run(group, what, 2 * (size - 1) * x.nbytes // size, dist.all_reduce, out)
    return out


@all_reduce.register_fake
def _(x, group, what):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
