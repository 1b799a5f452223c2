"""Margins of which each class may have its own, and a rule for what to give to which class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BatchInfo, Margin, _arguments, check_range


class PerClass(Margin):
    """Base of the margins whose m is one number, or a tensor (C,) of one for each class.

    The tensor is then the buffer ``margins`` (C,), float64 where it was, else float32, and part of ``state_dict()``. It must have as many
    numbers as the head has classes; with a process group every rank holds all of them.
    """

    margins: Tensor | None
    _setting = "margin"  # the setting that has the one number
    _shown: tuple[str, ...]

    def _taken(self, margin: Any) -> Any:
        """For the constructor, once: what to store as the one number. A tensor becomes the buffer."""
        self.register_buffer("margins", None)
        if not isinstance(margin, Tensor):
            return margin
        self._start = self._checked_margins(margin)
        self._bound_classes = len(self._start)
        self.register_buffer("margins", self._start.to(margin.device, copy=True))
        return 0.0

    def _checked_margins(self, margin: Tensor) -> Tensor:
        """A copy on the CPU."""
        if margin.ndim != 1 or margin.shape[0] == 0:
            raise ValueError(
                f"margin: expected a number, or a tensor of shape (C,) with one for each class, got shape {tuple(margin.shape)}"
            )
        if not margin.dtype.is_floating_point:
            raise TypeError(f"margin: expected a floating tensor of one number for each class, got {margin.dtype}")
        if margin.is_meta:
            raise ValueError("margin: expected a tensor that holds values, got one on the device meta")
        values = margin.detach().to("cpu", torch.promote_types(margin.dtype, torch.float32), copy=True)
        for end in values.double().aminmax():
            self._checked(self._setting, end.item())
        return values

    @property
    def margin(self) -> float | Tensor:
        """m, a float, or (C,) with one for each class; assigning is :meth:`set_margin`."""
        number: float = self.__dict__[self._setting]
        return number if self.margins is None else self.margins

    @margin.setter
    def margin(self, margin: float | Tensor) -> None:
        self.set_margin(margin)

    @torch.no_grad()
    def set_margin(self, margin: float | Tensor) -> None:
        """Change m; see :meth:`Margin.set_margin`. Where each class has its own: to a tensor (C,), or to one number for all of them, and
        the values are part of ``state_dict()``."""
        if self.margins is None:
            self._change(**{self._setting: margin})
            return
        if not isinstance(margin, Tensor):
            margin = torch.full_like(self._start, self._checked(self._setting, margin))
        values = self._checked_margins(margin)
        if len(values) != self._bound_classes:
            raise ValueError(f"margin: expected {self._bound_classes} numbers, one for each class as before, got {len(values)}")
        self._start = values.to(self._start.dtype)
        self.margins.copy_(self._start)

    def bind(self, num_classes: int) -> None:
        super().bind(num_classes)
        if self.margins is not None and self._bound_classes != num_classes:
            name = type(self).__name__
            raise ValueError(f"margin: expected {num_classes} numbers in {name}, one for each class of the head, got {self._bound_classes}")

    def reset_parameters(self) -> None:
        if self.margins is not None:
            self.margins.copy_(self._start)

    def _of_rows(self, batch: BatchInfo, like: Tensor) -> Tensor:
        """(N,) the margin of each row's class, in the dtype of ``like``; that of any class where the row is ignored."""
        assert self.margins is not None
        return self.margins.index_select(0, batch.labels.clamp_min(0)).to(like.dtype)

    def extra_repr(self) -> str:
        return _arguments({name: getattr(self, name) for name in self._shown})


def margins_from_counts(counts: Tensor | Sequence[int], power: float = -0.25, low: float = 0.05, high: float = 0.5) -> Tensor:
    """Margins for classes of unlike size, larger for the rarer ones: for ``ArcFace(margin=...)`` and ``CosFace(margin=...)``.

    ``n ** power`` of each class, moved and stretched so that the smallest is ``low`` and the largest ``high`` (Ha et al. 2020, arXiv
    2010.05350, whose ``a n ** -lambda + b`` this is with a and b from the ends). A class without samples counts as one of one sample. Where
    all classes are alike each gets the mean of ``low`` and ``high``.

    Args:
        counts: (C,) how many samples each class has.
        power: of the count; above 0 the larger classes get the larger margins.
        low, high: 0 <= low <= high.

    Returns:
        (C,) float64, where ``counts`` is.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    try:
        n = torch.as_tensor(counts).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"counts: expected a tensor or a sequence of numbers, one for each class, got {counts!r}") from None
    if n.ndim != 1 or n.shape[0] == 0:
        raise ValueError(f"counts: expected shape (C,), one number for each class, got {tuple(n.shape)}")
    if n.dtype == torch.bool or n.dtype.is_complex:
        raise TypeError(f"counts: expected numbers of samples, got {n.dtype}")
    n = n.to(torch.float64)
    for end in n.aminmax():
        check_range("counts", end.item(), 0.0)
    power = check_range("power", power, float("-inf"))
    low = check_range("low", low, 0.0)
    high = check_range("high", high, low)
    share = n.clamp_min(1) ** power
    least, most = share.aminmax()
    place = torch.where(most > least, (share - least) / (most - least), 0.5)
    return (low + place * (high - low)).clamp(low, high)
