"""What a margin is: the value and the slope of the target logit, and which non-target form the rest of the row uses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import forms


def check_range(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, unit: str = "") -> float:
    """``value`` as a float, or a ``ValueError``/``TypeError`` naming the argument, what was expected and what came."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
    if not inside:
        bound = f"a finite number {'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name}: expected {bound}{' ' + unit if unit else ''}, got {value!r}")
    return float(value)


def settled(state: Tensor) -> Tensor:
    """``state`` (float64) to the nearest 2^-40, for state that must be the same bits whoever summed the batch, and in whatever order."""
    return torch.round(state * 2.0**40) * 2.0**-40


class Rows:
    """What else a margin may know of each row beside its target cosine.

    Attributes:
        labels: (N,) int64, the identity of each row; -1 where the row has none (ignored).
        valid: (N,) bool, False for ignored rows.
        num_classes: C, over all shards.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, num_classes: int):
        self.embeddings = embeddings
        self.labels = labels
        self.valid = labels >= 0
        self.num_classes = num_classes

    @property
    def norm(self) -> Tensor:
        """(N,) float64 norm of each embedding, differentiable; ``detach()`` it where the paper does."""
        return torch.linalg.vector_norm(self.embeddings.double(), dim=1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (..., N) over the valid rows, 0 where there is none. Never waits for the device."""
        return torch.where(self.valid, values, 0).sum(-1) / self.valid.sum().clamp_min(1)


class Margin(nn.Module):
    """Base of every margin; subclass it to make your own.

    A subclass gives :meth:`target`, and at once runs on every backend. Everything else has a default: cosine logits
    (both sides normalised), a fixed scale, the identity form for non-target logits, no state. State is kept in buffers, of shape (1,)
    where it is a float64 number: torch.compile loses what is written to a float64 buffer of shape ().

    Args:
        scale: s > 0, what both target and non-target logits are multiplied by.
        focal_gamma: gamma >= 0 of the per-sample focal factor ``(1 - p_y) ** gamma`` (Lin et al. 2017, eq. 4); 0 turns it off.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is not a number.

    Class attributes a subclass may set:
        normalize_embedding, normalize_weight: whether the similarity ``c`` uses x/|x| and w/|w|.
        form: the non-target form, one of :mod:`marginkernels.forms`; the two hard forms also need :meth:`threshold` and ``t``.
    """

    normalize_embedding = True
    normalize_weight = True
    form = forms.IDENTITY
    t: float | Tensor  #: the one parameter of the hard forms, which set it

    def __init__(self, scale: float | None = 64.0, *, focal_gamma: float = 0.0):
        super().__init__()
        if scale is not None:
            self.scale = check_range("scale", scale, 0.0, open_low=True)
        self.focal_gamma = check_range("focal_gamma", focal_gamma, 0.0)

    def target(self, cos: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Value ``T(cos)`` and slope ``dT/dcos`` of the target logit before the scale.

        Args:
            cos: (N,) float64 in [-1, 1] (unbounded where a side is not normalised): each row's target cosine.
            rows: what else is known of the rows, for margins that depend on norm or identity.

        Returns:
            value and slope, (N,) each. The reference differentiates ``value`` in ``cos`` by autograd; the fused backends
            multiply by ``slope`` and differentiate ``value`` in anything else (``rows.norm``, the margin's own parameters).
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(cos, rows)")

    def threshold(self, cos: Tensor, rows: Rows) -> Tensor:
        """(N,) what a non-target cosine must exceed to count as hard; only asked of the two hard forms."""
        raise NotImplementedError(f"{type(self).__name__} uses a hard form and must define threshold(cos, rows)")

    def row_scale(self, rows: Rows) -> float | Tensor:
        """The scale s: a number, a scalar tensor or one value per row (N,); differentiated where it is a tensor that needs it."""
        return self.scale

    def update(self, cos: Tensor, rows: Rows, non_target_lse: Callable[[Tensor], Tensor]) -> None:
        """Advance the state by one training step, before the step uses it. Runs without gradient, only in training mode.

        Args:
            cos: (N,) float64 target cosines of the whole batch (all ranks).
            rows: the rows they belong to.
            non_target_lse: ``non_target_lse(s)`` gives (N,) ``log sum_{j != y} exp(s c_ij)``, one more pass over the classes.
        """

    def bind(self, num_classes: int) -> None:
        """Told the number of classes before the first use, for margins whose constants depend on it."""

    def _apply(self, fn, recurse=True):
        # Running statistics move 1% a step: in half precision they would stop moving, so .half() leaves them as they are.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:
                setattr(self, name, old.to(device=moved.device))
        return self

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str) and not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v}" for k, v in shown.items() if not (k == "focal_gamma" and v == 0))
