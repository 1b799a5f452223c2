"""Class sampling: a step over the classes of the batch and others drawn uniformly (Partial FC, An et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .core.draws import check_seed, hashed
from .core.transforms import loops_under_vmap, transforming, writable
from .core.validation import check_number


class Sampler(nn.Module):
    """Draws the classes of a step on the device, without synchronizing with it.

    The number of drawn classes depends on shapes only: ``max(round(rate C), min(N, C))`` of the C classes here, which is enough for every
    class of the batch. These are always drawn; the others are the classes with the smallest hashes of (seed, step, class). A hash needs no
    generator object: its state is the two integers below. So draws are the same under ``torch.compile`` and in CUDA graphs, and a run can
    resume on another number of ranks.

    Args:
        rate: share of the classes that take part in a step, in (0, 1].
        seed: any integer of 64 bits.
        log_q: add ``-log q`` to the logit of a drawn class, where q is its probability of being drawn. The sum of exponentials over the
            drawn classes is then an unbiased estimate of that over all classes.
        sparse_grad: give the weight and bias sparse gradients of the drawn rows; else dense ones, zero in the other rows.

    Buffers (in ``state_dict``):
        seed, draws: () int64, the seed and the number of draws so far.
    """

    seed: Tensor
    draws: Tensor

    def __init__(self, rate: float, seed: int = 0, log_q: bool = False, sparse_grad: bool = True):
        super().__init__()
        check_number("sample_rate", rate, 0.0, 1.0, open_low=True)
        self.rate = float(rate)
        self.log_q = bool(log_q)
        self.sparse_grad = bool(sparse_grad)
        self.first_seed = check_seed("sample_seed", seed)
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("draws", torch.tensor(0))
        self.index: Tensor | None = None  # the classes of the last draw
        self.rows: Tensor | None = None  # their rows in the weight: the same where a class has one

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the seed that it was made with, and no draws; for state that was never filled, as after ``to_empty()``."""
        self.seed.fill_(self.first_seed)
        self.draws.zero_()
        self.index = self.rows = None

    def count(self, rows: int, num_classes: int) -> int:
        """How many of ``num_classes`` classes take part in a step with ``rows`` rows."""
        return count(self.rate, rows, num_classes)

    def forward(
        self, weight: Tensor, bias: Tensor | None, labels: Tensor, first_class: int = 0, sub_centers: int = 1
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Draw classes, and gather their centers and biases.

        Args:
            weight: (C, D) the centers of the classes here. Its gradient is a sparse tensor of the drawn rows, or dense (``sparse_grad``).
            bias: (C,) or None; its gradient likewise.
            labels: (N,) in [0, C), or -1 for a row whose class is not here.
            first_class: the number of the first class here, among the classes of all ranks.
            sub_centers: rows of ``weight`` that a class has; all of a drawn class's take part.

        Returns:
            The drawn centers (K, D), or ``sub_centers`` times as many rows, biases (K,) or None, labels as indices into the drawn classes
            (N,), log-q corrections (K,) or None.
        """
        with torch.no_grad():
            classes = weight.shape[0] // sub_centers
            k = self.count(labels.shape[0], classes)
            if not writable(self.draws):
                raise RuntimeError(
                    "sample_rate: expected a count of draws that torch.func may write, got one captured from outside the transformed "
                    "function: call eval() on the head, or pass its buffers as an argument, through torch.func.functional_call"
                )
            index, positive, labels = draw_op(self.seed, self.draws, labels, first_class, classes, k)
            self.draws += 1
            self.index = self.rows = index
            if sub_centers > 1:
                self.rows = (index[:, None] * sub_centers + torch.arange(sub_centers, device=index.device)).flatten()
            correction = None
            if self.log_q:
                drawn, open_to_draw = (~positive).sum(), classes - positive.sum()
                correction = torch.where(positive, 0.0, -torch.log(drawn / open_to_draw))
        if self.sparse_grad:
            return gathered(weight, self.rows), None if bias is None else gathered(bias, index), labels, correction
        return weight.index_select(0, self.rows), None if bias is None else bias.index_select(0, index), labels, correction

    def watch(self, p: Tensor) -> None:
        """Have every gradient of ``p``, a weight or bias whose rows are drawn, go through :meth:`mark`."""
        p.register_post_accumulate_grad_hook(self.mark)

    def mark(self, p: Tensor) -> None:
        """Post-accumulate hook of ``p.grad``: mark the gradient as coalesced if its rows are exactly those of the last draw.

        Autograd loses this mark, and ``coalesce()`` would have to sort the rows and wait for the device.
        """
        g = p.grad
        if g is not None and g.is_sparse:
            index = g._indices()
            if any(v is not None and (v.data_ptr(), v.numel()) == (index.data_ptr(), index.numel()) for v in (self.index, self.rows)):
                g._coalesced_(True)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, seed={self.first_seed}, log_q={self.log_q}, sparse_grad={self.sparse_grad}"


def count(rate: float, rows: int, num_classes: int) -> int:
    """How many of ``num_classes`` classes are drawn in a step with ``rows`` rows."""
    return min(num_classes, max(round(rate * num_classes), rows))


@torch.library.custom_op("marginkernels::draw", mutates_args=())
def draw_op(seed: Tensor, step: Tensor, labels: Tensor, first_class: int, num_classes: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``k`` of ``num_classes`` classes, among them all those of ``labels`` (N,).

    Returns:
        The drawn classes in ascending order (k,) int64, whether each is a label (k,) bool, and the labels as indices into the drawn classes
        (N,), -1 where the label is -1.
    """
    key = hashed(torch.arange(first_class, first_class + num_classes, device=labels.device), hashed(step.view(1), hashed(seed.view(1), 0)))
    key = torch.cat([key, key.new_zeros(1)])  # one more entry, for rows whose class is not here
    key[torch.where(labels < 0, num_classes, labels)] = -1
    index = torch.topk(key[:num_classes], k, largest=False, sorted=False).indices.sort().values
    place = torch.searchsorted(index, labels)
    return index, key[index] < 0, torch.where(labels < 0, -1, place)


@draw_op.register_fake
def _(seed: Tensor, step: Tensor, labels: Tensor, first_class: int, num_classes: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return labels.new_empty(k), labels.new_empty(k, dtype=torch.bool), torch.empty_like(labels)


loops_under_vmap(draw_op)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled graphs do not support sparse gradients
def gathered(v: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (ascending) of ``v``; the gradient of ``v`` is a coalesced sparse tensor of these rows.

    Raises:
        RuntimeError: ``v`` is no leaf, or this is under ``torch.func``: neither takes a sparse gradient.
    """
    if torch.is_grad_enabled() and (transforming() or v.grad_fn is not None):
        came = "torch.func" if transforming() else "a weight or bias that is computed (weight_norm or another parametrization)"
        raise RuntimeError(f"sparse_grad: expected False for {came}, which takes no sparse gradient, got True")
    rows: Tensor = _Gathered.apply(v, index)  # type: ignore[no-untyped-call]
    return rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = v.shape
        return v.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(index[None], g, ctx.shape, is_coalesced=True, check_invariants=False), None
