"""One rank's shard of the classes, and the communication of a step with the other ranks.

A step needs four exchanges, three of them in the forward pass:

1. the embeddings and labels of all ranks, so that each rank computes the logits of the whole batch for its own classes (the fourth
   exchange is the backward pass of this one: it sums the gradient of the embeddings over ranks);
2. each row's target similarity, cosine and bias, from the rank that holds its class;
3. the log-sum-exp of each rank over its own classes. Every rank combines them itself, in rank order, and so gets the same bits.

The rest is O(N) arithmetic that every rank repeats. Its gradient must count only once: :meth:`Shard.grad_on_owner` keeps it on the rank
that holds the row's class.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.numerics import per_row
from ..core.validation import FLOATS, positive
from . import _collectives as collectives

T = TypeVar("T")


def bounds(num_classes: int, size: int, rank: int) -> tuple[int, int]:
    """The shard [start, stop) of a rank: ceil(C / size) classes, fewer or none on the last ranks, as in ``DTensor``."""
    width = -(-num_classes // size)
    return min(rank * width, num_classes), min((rank + 1) * width, num_classes)


#: The attribute of a parameter that is divided over ranks: the name of the group, for :func:`group_of_parameter`.
_MARK = "_marginkernels_group"


def group_of_parameter(p: Tensor) -> str | None:
    """The name of the group over which a parameter is divided (see :meth:`Shard.mark`), or None."""
    name: str | None = getattr(p, _MARK, None)
    return name


def _check_not_in_ddp(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Hook of every registration of a submodule: refuses a ``DistributedDataParallel`` that would take a parameter that is divided over
    ranks for replicas of one, and so overwrite it with the first rank's and average its gradient. DDP registers its module before that.

    Raises:
        ValueError: naming the parameter.
    """
    if name != "module" or module is None or not isinstance(parent, nn.parallel.DistributedDataParallel):
        return
    ignored: set[str] = getattr(parent, "parameters_to_ignore", set())
    for parameter, p in module.named_parameters():
        group = group_of_parameter(p)
        if group is not None and collectives.group_of(group).size() > 1 and parameter not in ignored:
            raise ValueError(
                f"module: expected a module without a sharded MarginHead for DistributedDataParallel, got one whose {parameter!r} is "
                "divided over ranks: wrap the backbone alone, or have DDP ignore the head by setting, before it is wrapped, "
                "module._ddp_params_and_buffers_to_ignore to the names of its parameters and buffers"
            )


nn.modules.module.register_module_module_registration_hook(_check_not_in_ddp)


class Shard:
    """One rank's part in the division of C classes over the ranks of a group.

    Args:
        num_classes: C, over all ranks.
        group: a torch.distributed process group.
        batch_size: the largest number of rows that any rank has in a step. Batches are padded to it with ignored rows, so that ranks need
            not exchange their numbers of rows. ``None``: they exchange them in every step, which waits for the device and breaks the graph
            of ``torch.compile``.

    Attributes:
        rank, size: of this process in the group, and of the group.
        start, stop: the classes of this rank are [start, stop).
        num_classes: C.
        agreed: by type of device, what all ranks may choose a backend from.

    Raises:
        TypeError: ``group`` is not a process group.
        ValueError: this process is not in the group.
    """

    def __init__(self, num_classes: int, group: dist.ProcessGroup, batch_size: int | None = None):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a torch.distributed process group such as dist.group.WORLD, got {group!r}")
        self.rank, self.size = dist.get_rank(group), group.size()
        if self.rank < 0:
            raise ValueError("process_group: expected a group that this process belongs to, got another group")
        self.num_classes = num_classes
        self.batch_size = None if batch_size is None else positive("batch_size", batch_size)
        self.start, self.stop = self.bounds(self.rank)
        self.agreed: dict[str, tuple[bool, tuple[str, ...]]] = {}
        self.group = collectives.register(group)

    def mark(self, p: Tensor) -> None:
        """Mark a parameter as divided over the ranks of this group, so that clipping and DDP can tell. Pickling a parameter keeps the mark,
        copying it does not."""
        setattr(p, _MARK, self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # the copy of a head is in the same group

    def widths(self) -> list[int]:
        """The number of classes of each rank."""
        return [stop - start for start, stop in map(self.bounds, range(self.size))]

    def bounds(self, rank: int) -> tuple[int, int]:
        """The classes [start, stop) of a rank: :func:`bounds`, unless a subclass divides them in another way."""
        return bounds(self.num_classes, self.size, rank)

    def of_all_ranks(self, mine: T) -> list[T]:
        """What each rank gives, in rank order. Every rank calls it."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine, group=collectives.group_of(self.group))
        return every

    def assert_same_on_all_ranks(self, **facts: Any) -> list[dict[str, Any]]:
        """The ``facts`` of all ranks, in rank order. Every rank calls it.

        Raises:
            ValueError: on every rank, naming the first fact that differs between ranks. Facts whose names start with ``_`` may differ.
        """
        every = self.of_all_ranks(facts)
        for name in facts:
            found = [f.get(name) for f in every]
            if not name.startswith("_") and any(v != found[0] for v in found):
                raise ValueError(f"{name}: expected one value on all ranks of the process group, got {found} by rank")
        return every

    # -- 1. rows ---------------------------------------------------------------------------------------------------------------

    def gather(
        self, x: Tensor, labels: Tensor, ignore_index: int, *, dtypes: tuple[torch.dtype, ...], ask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The rows of all R ranks (R M, D) and their labels (R M,). Each rank's rows are padded with ignored ones to M = ``batch_size``;
        where that is None or ``ask`` is set, M is the largest number of rows on any rank.

        The gradient of ``x`` is the sum over ranks times R: DDP and FSDP average the backbone's gradient over ranks, and the average is
        then the gradient of the global loss.

        Raises:
            ValueError: on all ranks, where ``dtypes``, those of the step's embeddings and weight, differ between ranks.
        """
        if ask or self.batch_size is None:
            rows, needs_grad = self._most(x)
        else:
            rows, needs_grad = self.batch_size, torch.is_grad_enabled()
            if x.shape[0] > rows:
                raise ValueError(f"embeddings: expected at most batch_size = {rows} rows, got {x.shape[0]}")
        if needs_grad and not x.requires_grad:
            # Its gradient is reduced over ranks: without one here, as for an empty batch, the other ranks would wait forever.
            x = x.detach().requires_grad_()
        missing = rows - x.shape[0]
        # Padded with ones, not zeros: the gradient of ignored rows is zero, but that of a zero row would not be finite.
        x = F.pad(x, (0, 0, 0, missing), value=1.0)
        labels = F.pad(labels, (0, missing), value=ignore_index)
        # The labels first, whose size does not depend on a dtype: with them the ranks see whether the embeddings will fit.
        labels = collectives.all_gather_labels(labels, self.group, self.size, _number(dtypes))
        rows_of_all: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return rows_of_all, labels.flatten()

    def gather_mix(self, labels: Tensor, lam: float | Tensor, rows: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The second labels (N,) of all ranks' rows, and what the first ones count (N,) float64, after :meth:`gather` gave ``rows`` rows.
        Each rank may have a number of its own. ``lam`` is not differentiated."""
        each = rows // self.size
        share = per_row(lam, labels, torch.float64).detach()
        share, labels = (F.pad(v, (0, each - v.shape[0]), value=fill) for v, fill in ((share, 0.0), (labels, ignore_index)))
        every = collectives.all_gather(torch.stack([labels.view(torch.float64), share]), self.group, self.size, "mix")
        return every[:, 0].contiguous().view(torch.int64).flatten(), every[:, 1].flatten()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _most(self, x: Tensor) -> tuple[int, bool]:
        """The largest number of rows on any rank, and whether the rows of any rank need a gradient."""
        mine = torch.tensor([x.shape[0], int(x.requires_grad and torch.is_grad_enabled())], device=x.device)
        most, needs_grad = collectives.all_gather(mine, self.group, self.size, "row counts").amax(0).tolist()
        return most, bool(needs_grad)

    def own_part(self, rows: int, count: int) -> slice:
        """Where the ``count`` rows of this rank lie among the ``rows`` that :meth:`gather` gives."""
        start = self.rank * (rows // self.size)
        return slice(start, start + count)

    def own_rows(self, values: Tensor, count: int) -> Tensor:
        """The ``count`` rows of this rank in ``values`` (R M,). In the backward pass every rank gets the gradient of all rows."""
        mine: Tensor = _OwnRows.apply(values, self)  # type: ignore[no-untyped-call]
        return mine[:count]

    # -- 2. targets ------------------------------------------------------------------------------------------------------------

    def local(self, labels: Tensor) -> Tensor:
        """``labels`` relative to the first class of this shard; -1 for ignored rows and for classes of other ranks."""
        return torch.where((labels >= self.start) & (labels < self.stop), labels - self.start, -1)

    def from_owner(self, *values: Tensor) -> list[Tensor]:
        """``values`` (N,) each, that are 0 except on the rank that holds the row's class: gives that rank's values on all ranks. Not
        differentiable."""
        return list(collectives.all_reduce(torch.stack(values), self.group, "targets"))

    def grad_on_owner(self, value: Tensor, local_labels: Tensor) -> Tensor:
        """``value`` (N,), which is the same on all ranks, with a gradient only on the rank that holds the row's class."""
        return torch.where(local_labels >= 0, value, value.detach())

    # -- 3. sums ---------------------------------------------------------------------------------------------------------------

    def combine(self, lse: Tensor, total: Tensor | None, top: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-sum-exp, sum and maximum (N,) over the classes of each rank: gives those over all classes."""
        combined: tuple[Tensor, Tensor | None, Tensor] = _Combine.apply(lse, total, top, self)  # type: ignore[no-untyped-call]
        return combined

    def own_candidates(self, scores: Tensor, classes: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
        """``scores`` and ``classes`` of this rank's best classes, at most k, for the rows of all ranks: gives those of all ranks
        (count, R k) for the rows of this rank."""
        missing = k - scores.shape[1]
        scores, classes = F.pad(scores, (0, missing), value=-torch.inf), F.pad(classes, (0, missing), value=self.num_classes)
        mine = self.own_part(scores.shape[0], count)
        every = [collectives.all_gather(v, self.group, self.size, "candidates")[:, mine] for v in (scores, classes)]
        best_scores, best_classes = (v.transpose(0, 1).flatten(1) for v in every)
        return best_scores, best_classes

    def gathered(self, scores: Tensor) -> Tensor:
        """(N, R k) the ``scores`` (N, k) of all ranks, the same rows on each."""
        every: Tensor = collectives.all_gather(scores, self.group, self.size, "candidates")
        return every.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def draw_normal(self, weight: Tensor, std: float, sub_centers: int = 1) -> None:
        """Fill this shard's ``weight``, ``sub_centers`` rows a class, with N(0, std^2), seeded by rank 0. The values of a class do not
        depend on the number of ranks."""
        seed = self.assert_same_on_all_ranks(_seed=int(torch.randint(1 << 62, ())))[0]["_seed"]
        if weight.device.type == "meta":
            return
        generator, block = torch.Generator(weight.device), 4096
        for first in range(self.start - self.start % block, self.stop, block):
            generator.manual_seed(seed + first // block)
            drawn = torch.empty(block * sub_centers, weight.shape[1], device=weight.device).normal_(std=std, generator=generator)
            low, high = max(first, self.start), min(first + block, self.stop)
            (at, end), (start, stop) = (((low - v) * sub_centers, (high - v) * sub_centers) for v in (self.start, first))
            weight[at:end] = drawn[start:stop]

    def sum_gradients(self, parameter: Tensor) -> None:
        """Sum the gradient of a parameter that all ranks have (one of the margin) over ranks, in each backward pass."""
        parameter.register_hook(lambda g: collectives.all_reduce(g, self.group, "margin gradients"))


def _number(dtypes: tuple[torch.dtype, ...]) -> int:
    """A number for a few floating dtypes."""
    return sum(FLOATS.index(dtype) * 8**i for i, dtype in enumerate(dtypes))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        every: Tensor = collectives.all_gather(x, shard.group, shard.size, "embeddings")
        return every.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        s: Shard = ctx.shard
        # At least float32: sums over many ranks in half precision would lose accuracy.
        sum_dtype = torch.promote_types(g.dtype, torch.float32)
        parts: Tensor = g.to(sum_dtype).unflatten(0, (s.size, -1))
        return (collectives.reduce_scatter(parts, s.group, "embedding gradients") * s.size).to(g.dtype), None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        by_rank: Tensor = values.unflatten(0, (shard.size, -1))
        return by_rank[shard.rank].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return collectives.all_gather(g, ctx.shard.group, ctx.shard.size, "loss gradients").flatten(), None


class _Combine(torch.autograd.Function):
    """See :meth:`Shard.combine`. The backward pass needs no communication: all ranks have the same upstream gradient, and with lambda the
    log-sum-exp, ``d lambda / d lambda_r = exp(lambda_r - lambda)``."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, total: Tensor | None, top: Tensor, shard: Shard) -> tuple[Tensor, Tensor | None, Tensor]:
        mine = torch.stack([lse, top.to(lse.dtype)] + ([] if total is None else [total]))
        every = collectives.all_gather(mine, shard.group, shard.size, "log-sum-exps").unbind(1)
        combined = torch.logsumexp(every[0], 0)
        best = every[1].amax(0)
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(lse, combined)
        return combined, None if total is None else every[2].sum(0), best

    @staticmethod
    def backward(ctx: Any, g_lse: Tensor, g_total: Tensor | None, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        lse, combined = ctx.saved_tensors
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - combined))
        return g_lse * share, g_total, None, None
