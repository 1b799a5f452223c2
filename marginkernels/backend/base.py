"""The two functions that every fused backend implements, and their shapes.

Notation: N rows, D embedding dimensions, C classes (of this shard). With ``x`` (N, D) the prepared rows, ``f`` = ``row_factor``
(N,) and ``a`` = ``class_factor`` (C,), the similarity is

    c_ij = f_i a_j (x_i . w_j),        a_j = 1/|w_j| where ``normalize_weight``, else 1,

and the logit of a non-target class is ``z_ij = s_i N(c_ij) + b_j`` with N one of :mod:`marginkernels.forms`. The target column
``j == labels[i]`` takes part in neither sum of the row pass; a label outside [0, C) means that the row's target is not here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rows as with_operators
from .rows import TINY as TINY
from .rows import accumulator


@dataclass(frozen=True)
class Problem:
    """One head on one device. ``acc`` below is float32, or float64 where ``x`` is float64.

    Attributes:
        x: (N, D) prepared rows, contiguous: the embeddings times a power of two, so that 1/2 <= |x_i| < 1 (or x_i = 0). Its dtype is
            the product's: ``w`` is converted to it inside the pass, and products accumulate in acc.
        row_factor: (N,) acc, what is left of each row's normalisation (or, where the embedding's norm is kept, the power of two).
        w: (C, D) class centres, any float dtype, any strides with a unit one last.
        bias: (C,) acc, or None.
        labels: (N,) int64 in [0, C), or anything outside for a row whose target is not here.
        scale: (N,) acc, s_i > 0.
        threshold: (N,) acc, or None where the form is the identity.
        t: () acc, on the same device; None where the form is the identity.
        form: a number of :mod:`marginkernels.forms`.
        normalize_weight: whether a_j is 1/|w_j|; a centre with |w_j| < ``TINY`` has a_j = 0.
    """

    x: Tensor
    row_factor: Tensor
    w: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: Tensor
    threshold: Tensor | None
    t: Tensor | None
    form: int
    normalize_weight: bool

    @property
    def acc(self) -> torch.dtype:
        return accumulator(self.x.dtype)


@dataclass(frozen=True)
class RowPass:
    """What the row pass gives, all acc.

    With weights ``p_ij = softmax_{j != y}(z_ij)``, or ``p_ij = 1`` when asked for ``uniform``:

    Attributes:
        total: (N,) ``log sum_{j != y} exp(z_ij)``, -inf for an empty sum; when uniform, ``sum_{j != y} z_ij``.
        top: (N,) ``max_{j != y} (s_i c_ij + b_j)``, -inf where there is none; unspecified when uniform.
        moment: (N,) ``sum_{j != y} p_ij N(c_ij)``: total's derivative in s_i. (0,) unless asked for.
        u: (N, D) ``sum_{j != y} p_ij N'(c_ij) a_j w_j``: total's derivative in the (normalised) row, over s_i. (0, D) unless asked for.
        class_factor: (C,) a_j, for the class pass; (0,) where the weights are not normalised.
        kept: (K,) uint8, what the class pass need not compute again, in the backend's own layout; at most the workspace asked for.
    """

    total: Tensor
    top: Tensor
    moment: Tensor
    u: Tensor
    class_factor: Tensor
    kept: Tensor


@dataclass
class RowSums:
    """The state of a row pass that moves over the classes a slab at a time; :meth:`start` to begin, :meth:`done` at the end. All acc.

    Attributes:
        peak: (N,) the highest logit so far, -inf before the first.
        total: (N,) ``sum_{j != y} exp(z_ij - peak_i)``; when uniform, ``sum_{j != y} z_ij``.
        moment, u: as in :class:`RowPass`, but with the weights that ``total`` sums.
        top, class_factor: as in :class:`RowPass`.
    """

    peak: Tensor
    total: Tensor
    moment: Tensor
    top: Tensor
    u: Tensor
    class_factor: Tensor

    @classmethod
    def start(cls, p: Problem, *, need_u: bool, need_moment: bool) -> RowSums:
        n, d = p.x.shape

        def new(*shape: int, fill: float = 0.0) -> Tensor:
            return torch.full(shape, fill, dtype=p.acc, device=p.x.device)

        moment, u = new(n if need_moment else 0), new(n if need_u else 0, d)
        return cls(new(n, fill=-torch.inf), new(n), moment, new(n, fill=-torch.inf), u, new(p.w.shape[0] if p.normalize_weight else 0))

    def done(self, *, uniform: bool, kept: Tensor | None = None) -> RowPass:
        total = self.total
        if not uniform:
            share = 1 / total.masked_fill(total == 0, 1)
            for sums, by in ((self.moment, share), (self.u, share[:, None])):
                if sums.shape[0]:
                    sums.mul_(by)
            total = torch.where(total == 0, -torch.inf, total.log() + self.peak)
        if kept is None:
            kept = torch.empty(0, dtype=torch.uint8, device=total.device)
        return RowPass(total, self.top, self.moment, self.u, self.class_factor, kept)


@dataclass(frozen=True)
class RowWeights:
    """The upstream of the class pass: each (N,) acc. With lambda the row pass's total,

        G_ij = N'(c_ij) (softmax_i exp(z_ij - lse_i) + uniform_i)   for j != y_i,    G_iy = target_i,
        v_j  = sum_i G_ij f_i x_i,    dw_j = a_j (v_j - (v_j . a_j w_j) a_j w_j), or v_j where weights are not normalised.
        db_j = sum_i (softmax_i exp(z_ij - lse_i) + uniform_i) / s_i  over j != y_i, plus bias_i over j == y_i.

    Attributes:
        lse: lambda_i, +inf (never -inf) for an empty sum.
        softmax: dL/dlambda_i times s_i.
        uniform: dL/d(sum of logits)_i times s_i, or None.
        target: dL/dc_iy.
        bias: dL/db_y of the row's own target, or None.
    """

    lse: Tensor
    softmax: Tensor
    uniform: Tensor | None
    target: Tensor
    bias: Tensor | None


class Backend(ABC):
    """A way to run the two passes. Stateless; one instance of each lives in the registry."""

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    #: Whether ``auto`` may choose it; False while it has not run on the hardware it is for.
    proven = True
    #: What ``workspace_mb=None`` stands for: more than 0 only where that has been measured to pay.
    workspace_mb = 0.0
    #: One line for the README: what it is, on any machine.
    summary = ""
    #: One line for ``doctor``: what it is here, and what is unproven where ``proven`` is False.
    note = ""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def refuses(self, device_type: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        """Why it cannot serve this problem, or None. Asked only where :meth:`unavailable` is None."""
        if device_type not in self.device_types:
            return f"runs on {' and '.join(self.device_types)}, not on {device_type}"
        for what, got in (("embeddings", dtype), ("weight", weight_dtype)):
            if got not in self.dtypes:
                return f"has no {str(got).removeprefix('torch.')} {what}"
        return None

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int) -> int:
        """How many of ``limit`` bytes the row pass would keep for the class pass."""
        return 0

    def rows(
        self, x: Tensor, w: Tensor, labels: Tensor, normalize_embedding: bool, normalize_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prepare the embeddings (N, D) for the passes and take their target similarities, in float64.

        Returns:
            :attr:`Problem.x`; :attr:`Problem.row_factor`; the target similarity c_iy and the true target cosine, both (N,) float64, 0 where
            the label is none of ``w``'s.
        """
        return with_operators.rows(x, w, labels, normalize_embedding, normalize_weight)

    def row_gradient(
        self,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        u: Tensor,
        softmax: Tensor,
        uniform_u: Tensor | None,
        uniform: Tensor | None,
        target: Tensor,
        normalize_embedding: bool,
        normalize_weight: bool,
    ) -> Tensor:
        """dx (N, D) in x's dtype: ``softmax u + uniform uniform_u + target w_y``, with :class:`RowPass`'s u of the softmax and of the
        uniform weights and :class:`RowWeights`' fields, through the normalisation's Jacobian; in float64."""
        return with_operators.row_gradient(x, w, labels, u, softmax, uniform_u, uniform, target, normalize_embedding, normalize_weight)

    @abstractmethod
    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        """Stream over the classes; see :class:`RowPass`. ``workspace``: bytes, as :meth:`workspace_bytes` gave."""

    @abstractmethod
    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Stream over the rows for each block of classes; gives dw (C, D) in w's dtype and db (C,) acc, or None where not needed."""
