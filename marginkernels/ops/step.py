"""The class pass of an optimizer's step: the gradient of a weight from the records of a queue, a chunk of classes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..core.numerics import accumulation_dtype, chunks
from .autograd import class_gradients
from .queue import Record, joined


class GradientChunks:
    """The gradient of ``weight`` that some records stand for, in acc_dtype and never as a whole.

    Args:
        records: of one queue; all of them of all classes, or all of drawn ones.
        weight: (C K, D) as it was in their forward passes.

    Attributes:
        records: those that need a pass of their own.
        drawn: whether they are of drawn rows.
    """

    def __init__(self, records: list[Record], weight: Tensor):
        self.drawn = any(r.rows is not None for r in records)
        self.weight = weight.detach()
        self.records = joined(records)
        if self.drawn and any(r.rows is None for r in records):
            raise RuntimeError(
                "sample_rate: expected micro-batches that all draw classes, or none that does, between two steps of a fused optimizer, got "
                "both: a step would update all rows or the drawn ones. Call step() and zero_grad() before train() or eval()"
            )

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the weight, their gradient (R, D)), for all rows of the weight."""
        if not self.records:
            c, k, x = self.weight.shape[0], 1, self.weight
        else:
            first = self.records[0].inputs
            k, x = first.sub_centers, max((r.inputs.x for r in self.records), key=len)
            c = self.weight.shape[0] // k
        for start, stop in chunks(x, c, k):
            rows = slice(start * k, stop * k)
            w = self.weight[rows].to(accumulation_dtype(self.weight.dtype))
            g = torch.zeros_like(w) if not self.records else None
            for record in self.records:
                more = _gradient(record, w, rows)
                g = more if g is None else g.add_(more)
            assert g is not None
            yield rows, g

    def of_drawn(self) -> tuple[Tensor, Tensor]:
        """The rows of the weight that any record drew (U,) int64, ascending, and their gradient (U, D)."""
        found: list[tuple[Tensor, Tensor]] = []
        for record in self.records:
            assert record.rows is not None
            w = self.weight.index_select(0, record.rows).to(accumulation_dtype(self.weight.dtype))
            found.append((record.rows, _gradient(record, w, slice(0, w.shape[0]))))
        if not found:
            nothing = self.weight.new_zeros(0, dtype=torch.int64)
            return nothing, self.weight.new_zeros((0, self.weight.shape[1]))
        if len(found) == 1:
            return found[0]
        rows = torch.cat([r for r, _ in found]).unique()
        total = found[0][1].new_zeros((rows.shape[0], self.weight.shape[1]))
        for mine, g in found:  # a draw has each row once, so the order of the sum is that of the records
            total.index_add_(0, torch.searchsorted(rows, mine), g)
        return rows, total

    def norm(self) -> Tensor:
        """() float64 the 2-norm of the gradient."""
        total = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        parts = [self.of_drawn()[1]] if self.drawn else (g for _, g in self)
        for g in parts:
            total += torch.linalg.vector_norm(g, dtype=torch.float64) ** 2
        return total.sqrt()


def _gradient(record: Record, w: Tensor, rows: slice) -> Tensor:
    """(R, D) the gradient of ``w``, those ``rows`` of the record's centers, whole classes, in acc_dtype."""
    p, k = record.inputs, record.inputs.sub_centers
    classes = slice(rows.start // k, rows.stop // k)
    bias = None if p.bias is None else p.bias[classes]
    here = replace(p, w=w, bias=bias, labels=p.labels - rows.start if rows.start else p.labels)
    factor = record.class_factor[rows] if p.normalize_weight else record.class_factor
    class_weight = None if record.class_weight is None else record.class_weight[classes]
    given = (factor, record.saved.new_empty(0), class_weight, record.d_norm, True, False, record.backend)
    dw, _ = class_gradients(here, record.upstream, *given)
    assert dw is not None
    return dw
