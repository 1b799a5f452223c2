"""One rank's share of the classes, and everything that a step exchanges with the other ranks.

The head's mathematics needs four exchanges, three of them in the forward pass:

1. the embeddings and labels of all ranks, so that each rank meets the whole batch with its own classes (the backward pass sums their
   gradient over ranks on the same path);
2. each row's target similarity, cosine and bias from the one rank that holds its class;
3. each rank's log-sum-exp over its own classes, combined in rank order by every rank for itself, hence to the same bits.

All that follows is O(N) arithmetic which every rank repeats. Its gradient must count once: :meth:`Shard.once` leaves it to the owner of
the row's class.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..checks import positive
from . import collectives


def bounds(num_classes: int, size: int, rank: int) -> tuple[int, int]:
    """First class and one past the last of ``rank``'s shard: ceil(C / size) each, the last ranks fewer or none, as DTensor cuts."""
    width = -(-num_classes // size)
    return min(rank * width, num_classes), min((rank + 1) * width, num_classes)


class Shard:
    """What one rank knows of the division of C classes over a group.

    Args:
        num_classes: C, over all ranks.
        group: a torch.distributed process group.
        batch_size: the most rows that any rank brings to a step. Batches are padded to it with ignored rows, and no rank need ask how many
            the others have. ``None``: asked in every step, which waits for the device and breaks the graph under ``torch.compile``.

    Attributes:
        rank, size: of the group. start, stop: the classes here are [start, stop). num_classes: C.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, num_classes: int, group: dist.ProcessGroup, batch_size: int | None = None):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a torch.distributed process group such as dist.group.WORLD, got {group!r}")
        self.rank, self.size = dist.get_rank(group), group.size()
        if self.rank < 0:
            raise ValueError("process_group: expected a group that this process belongs to, got one that it does not")
        self.num_classes = num_classes
        self.batch_size = None if batch_size is None else positive("batch_size", batch_size)
        self.start, self.stop = bounds(num_classes, self.size, self.rank)
        self.group = collectives.register(group)

    def __deepcopy__(self, memo):
        return self  # a copy of a head lives in the same group

    def widths(self) -> list[int]:
        """How many classes each rank holds."""
        return [stop - start for start, stop in (bounds(self.num_classes, self.size, r) for r in range(self.size))]

    def agree(self, **facts) -> list[dict]:
        """Every rank's ``facts``, in rank order; collective.

        Raises:
            ValueError: on every rank, naming the first fact that is not the same everywhere. Names that start with ``_`` may differ.
        """
        every: list[dict] = [{} for _ in range(self.size)]
        dist.all_gather_object(every, facts, group=collectives.group_of(self.group))
        for name in facts:
            found = [f.get(name) for f in every]
            if not name.startswith("_") and any(v != found[0] for v in found):
                raise ValueError(f"{name}: expected one value on all ranks of the process group, got {found} by rank")
        return every

    # -- 1. rows ---------------------------------------------------------------------------------------------------------------

    def gather(self, x: Tensor, labels: Tensor, ignore_index: int, *, ask: bool = False) -> tuple[Tensor, Tensor]:
        """The rows of all ranks (R M, D) and their labels (R M,), each rank's padded to M rows with ignored ones: ``batch_size``, or the
        most that any rank has, where that is None or ``ask`` is set.

        The gradient that comes back to ``x`` is the sum over ranks times R, so that averaging over ranks, as DDP and FSDP do with the
        backbone's gradient, gives the gradient of the global loss.
        """
        if ask or self.batch_size is None:
            rows, needs_grad = self._most(x)
        else:
            rows, needs_grad = self.batch_size, torch.is_grad_enabled()
            if x.shape[0] > rows:
                raise ValueError(f"embeddings: expected at most batch_size = {rows} rows, got {x.shape[0]}")
        if needs_grad and not x.requires_grad:
            # The others reduce its gradient with us: an empty batch without a graph must not leave them waiting.
            x = x.detach().requires_grad_()
        missing = rows - x.shape[0]
        # Ones, not zeros: an ignored row has no gradient, and a zero one would have none that is finite.
        x = F.pad(x, (0, 0, 0, missing), value=1.0)
        labels = F.pad(labels, (0, missing), value=ignore_index)
        return _Gather.apply(x, self), collectives.all_gather(labels, self.group, self.size, "labels").flatten()

    @torch.compiler.disable
    def _most(self, x: Tensor) -> tuple[int, bool]:
        """The largest number of rows on any rank, and whether any rank's need a gradient."""
        mine = torch.tensor([x.shape[0], int(x.requires_grad and torch.is_grad_enabled())], device=x.device)
        most, needs_grad = collectives.all_gather(mine, self.group, self.size, "row counts").amax(0).tolist()
        return most, bool(needs_grad)

    def own_rows(self, values: Tensor, count: int) -> Tensor:
        """This rank's ``count`` rows of ``values`` (R M,); the gradient of every rank's rows comes back to all."""
        return _OwnRows.apply(values, self)[:count]

    # -- 2. targets ------------------------------------------------------------------------------------------------------------

    def local(self, labels: Tensor) -> Tensor:
        """``labels`` counted from this shard's first class; -1 for ignored rows and for classes of other ranks."""
        return torch.where((labels >= self.start) & (labels < self.stop), labels - self.start, -1)

    def from_owner(self, *values: Tensor) -> list[Tensor]:
        """Each (N,), 0 except on the rank that holds the row's class, to that rank's value everywhere. Not differentiated."""
        return list(collectives.all_reduce(torch.stack(values), self.group, "targets"))

    def once(self, value: Tensor, local_labels: Tensor) -> Tensor:
        """``value`` (N,), the same on all ranks, with a gradient on the rank that holds the row's class only."""
        return torch.where(local_labels >= 0, value, value.detach())

    # -- 3. sums ---------------------------------------------------------------------------------------------------------------

    def combine(self, lse: Tensor, total: Tensor | None, top: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-sum-exp, sum and maximum (N,) over each rank's own classes to those over all classes."""
        return _Combine.apply(lse, total, top, self)

    def own_candidates(self, scores: Tensor, classes: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
        """Each rank's best (at most k) ``scores`` and ``classes`` for all rows, to all ranks' best (count, R k) for this rank's rows."""
        missing = k - scores.shape[1]
        scores, classes = F.pad(scores, (0, missing), value=-torch.inf), F.pad(classes, (0, missing), value=self.num_classes)
        mine = slice(self.rank * (scores.shape[0] // self.size), self.rank * (scores.shape[0] // self.size) + count)
        every = [collectives.all_gather(v, self.group, self.size, "candidates")[:, mine] for v in (scores, classes)]
        return tuple(v.transpose(0, 1).flatten(1) for v in every)

    @torch.no_grad()
    def draw_normal(self, weight: Tensor, std: float) -> None:
        """Fill this shard's ``weight`` with N(0, std^2) from rank 0's random state; a class gets the same whatever the number of ranks."""
        seed = self.agree(_seed=int(torch.randint(1 << 62, ())))[0]["_seed"]
        if weight.device.type == "meta":
            return
        generator, block = torch.Generator(weight.device), 4096
        for first in range(self.start - self.start % block, self.stop, block):
            generator.manual_seed(seed + first // block)
            drawn = torch.empty(block, weight.shape[1], device=weight.device).normal_(std=std, generator=generator)
            low, high = max(first, self.start), min(first + block, self.stop)
            weight[low - self.start : high - self.start] = drawn[low - first : high - first]

    def sum_gradients(self, parameter: Tensor) -> None:
        """Have the gradient of a parameter that all ranks hold (a margin's) summed over ranks in each backward pass."""
        parameter.register_hook(lambda g: collectives.all_reduce(g, self.group, "margin gradients"))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return collectives.all_gather(x, shard.group, shard.size, "embeddings").flatten(0, 1)

    @staticmethod
    def backward(ctx, g):
        s = ctx.shard
        # At least float32: partial sums of many ranks in half precision would lose what each rank has kept.
        wide = torch.promote_types(g.dtype, torch.float32)
        parts = g.to(wide).unflatten(0, (s.size, -1))
        return (collectives.reduce_scatter(parts, s.group, "embedding gradients") * s.size).to(g.dtype), None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, shard):
        ctx.shard = shard
        return values.unflatten(0, (shard.size, -1))[shard.rank].clone()

    @staticmethod
    def backward(ctx, g):
        return collectives.all_gather(g, ctx.shard.group, ctx.shard.size, "loss gradients").flatten(), None


class _Combine(torch.autograd.Function):
    """Backward needs no exchange: all ranks hold the same upstream, and ``d lambda / d lambda_r = exp(lambda_r - lambda)``."""

    @staticmethod
    def forward(ctx, lse, total, top, shard):
        # lse and top come from the row pass, so they lose nothing in its dtype.
        mine = torch.stack([lse.to(top.dtype), top] if total is None else [lse, top.to(lse.dtype), total])
        every = collectives.all_gather(mine, shard.group, shard.size, "log-sum-exps").unbind(1)
        combined = torch.logsumexp(every[0].to(lse.dtype), 0)
        best = every[1].amax(0)
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(lse, combined)
        return combined, None if total is None else every[2].sum(0), best

    @staticmethod
    def backward(ctx, g_lse, g_total, _):
        lse, combined = ctx.saved_tensors
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - combined))
        return g_lse * share, g_total, None, None
