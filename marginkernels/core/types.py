"""The records that a call hands down to a backend, and what comes back.

Notation, here and in every backend: N rows (embeddings), D embedding dimensions, C classes (of this shard). With ``x`` (N, D) the
prepared rows, ``f`` = ``row_factor`` (N,) and ``a`` = ``class_factor`` (C,), the similarity is

    c_ij = f_i a_j (x_i . w_j),        a_j = 1/|w_j| where ``normalize_weight``, else 1,

and the logit of a non-target class is ``z_ij = s_i N(c_ij) + b_j`` with N one of :class:`~marginkernels.core.nontarget.NonTarget`. The
target column ``j == labels[i]`` takes part in neither sum of the row pass; a label outside [0, C) means that the row's target is not
here. With K = ``sub_centers`` of each class, ``w`` is (C K, D), class j has its rows j K to j K + K - 1, ``class_factor`` is (C K,), labels
are rows of ``w``, c_ij is the highest of the class's K similarities, and its derivative that of the first row that has it. The
accumulation dtype ``acc_dtype`` is float32, or float64 where ``x`` is float64.

The records cross the boundary to ``torch.library`` field by field (:mod:`marginkernels.ops.schema`): a field that is added here appears
in the operators without another change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from .nontarget import NonTarget, value
from .numerics import accumulation_dtype


class Reduction(IntEnum):
    """What the row pass sums over the non-target classes of a row."""

    LOG_SUM_EXP = 0  #: ``log sum_{j != y} exp(z_ij)``
    LOGIT_SUM = 1  #: ``sum_{j != y} z_ij``, for label smoothing; each term times its class weight, where the inputs have one
    SOFTPLUS_SUM = 2  #: ``sum_{j != y} log(1 + exp(z_ij))``, of a binary classifier for each class

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class HeadInputs:
    """Embeddings, class centers and labels as they came.

    Attributes:
        x: (N, D) embeddings.
        w: (C, D) class centers, any float dtype, any strides; or K rows of each class.
        labels: (N,) int64, the row of ``w`` of each target, or anything outside for a row whose target is not here.
        normalize_embedding: whether the similarity uses x/|x|.
        normalize_weight: whether the similarity uses w/|w|.
    """

    x: Tensor
    w: Tensor
    labels: Tensor
    normalize_embedding: bool
    normalize_weight: bool


@dataclass(frozen=True)
class PreparedRows:
    """The embeddings as the passes take them, and each row's similarity to the center of its own class.

    Attributes:
        x: (N, D), contiguous: the embeddings times a power of two each, so that 1/2 <= |x_i| < 1 (or x_i = 0, or
            |x_i| was 2^127 or more).
        row_factor: (N,) acc_dtype, what is left of each row's normalization; the power of two where the embedding's norm is kept.
        target_similarity: (N,) float64 c_iy, 0 where the target is not here.
        target_cos: (N,) float64 cosine between x_i and w_y whatever is normalized, 0 where the target is not here.
    """

    x: Tensor
    row_factor: Tensor
    target_similarity: Tensor
    target_cos: Tensor

    def part(self, rows: slice) -> PreparedRows:
        """Some of the rows; all of them as they are."""
        if rows == slice(None):
            return self
        return PreparedRows(self.x[rows], self.row_factor[rows], self.target_similarity[rows], self.target_cos[rows])


@dataclass(frozen=True)
class PassInputs:
    """One head on one device, as both passes take it. State of the call is per row, so that rows of several calls can share a pass.

    Attributes:
        x: (N, D) prepared rows, contiguous. Their dtype is the products': ``w`` is converted to it inside the pass, and products
            accumulate in acc_dtype.
        row_factor: (N,) acc_dtype, f_i.
        w: (C K, D) class centers, any float dtype, any strides.
        bias: (C,) acc_dtype, or None.
        labels: (N,) int64 in [0, C K), the row of ``w`` that is the target's, or anything outside for a row whose target is not here.
        scale: (N,) acc_dtype, s_i > 0.
        threshold: (N,) acc_dtype, or None where the transform is the identity.
        t: (N,) acc_dtype, the transform's parameter; None where the transform is the identity.
        non_target: the transform N of non-target similarities.
        normalize_weight: whether a_j is 1/|w_j|; a center with |w_j| < ``TINY`` has a_j = 0.
        class_weight: (C,) acc_dtype, how much each class counts in the sum of logits; None: 1. Only ``torch`` knows it.
        sub_centers: K, the rows of ``w`` that a class has.
    """

    x: Tensor
    row_factor: Tensor
    w: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: Tensor
    threshold: Tensor | None
    t: Tensor | None
    non_target: NonTarget
    normalize_weight: bool
    class_weight: Tensor | None = None
    sub_centers: int = 1

    @property
    def acc_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x.dtype)

    @property
    def num_classes(self) -> int:
        return self.w.shape[0] // self.sub_centers


@dataclass(frozen=True)
class Request:
    """What a row pass is asked for; made by :meth:`of_loss`, :meth:`log_sum_exp` or :meth:`logit_sum`.

    Attributes:
        reduction: which sum over the non-target classes.
        need_center: also its derivative in the row, over s_i.
        need_cos: also its derivative in s_i.
        workspace_bytes: how much the pass may save for the class pass, as :meth:`~marginkernels.backend.base.Backend.workspace_bytes` gave.
    """

    reduction: Reduction
    need_center: bool
    need_cos: bool
    workspace_bytes: int

    @classmethod
    def of_loss(cls, reduction: Reduction, *, need_center: bool, need_cos: bool, workspace_bytes: int) -> Request:
        """A sum that the class pass can differentiate: ``LOG_SUM_EXP`` or ``SOFTPLUS_SUM``."""
        return cls(reduction, need_center, need_cos, workspace_bytes)

    @classmethod
    def log_sum_exp(cls, *, need_center: bool = False, need_cos: bool = False, workspace_bytes: int = 0) -> Request:
        return cls(Reduction.LOG_SUM_EXP, need_center, need_cos, workspace_bytes)

    @classmethod
    def logit_sum(cls, *, need_center: bool = False, need_cos: bool = False) -> Request:
        return cls(Reduction.LOGIT_SUM, need_center, need_cos, 0)


@dataclass(frozen=True)
class RowPassOutput:
    """What the row pass gives, the two sums in float64 and the rest in acc_dtype. A field that the request did not ask for has no rows:
    (0,) or (0, D).

    With ``p_ij = softmax_{j != y}(z_ij)``, or for SOFTPLUS_SUM ``p_ij = sigmoid(z_ij)``:

    Attributes:
        lse: (N,) ``log sum_{j != y} exp(z_ij)``, -inf for an empty sum; for SOFTPLUS_SUM ``sum_{j != y} log(1 + exp(z_ij))``.
        max_logit: (N,) ``max_{j != y} (s_i c_ij + b_j)``, -inf where there is none.
        mean_cos: (N,) ``sum_{j != y} p_ij N(c_ij)``: lse's derivative in s_i.
        mean_center: (N, D) ``sum_{j != y} p_ij N'(c_ij) a_j w_j``: lse's derivative in the (normalized) row, over s_i.
        logit_sum: (N,) ``sum_{j != y} z_ij``.
        cos_sum: (N,) ``sum_{j != y} N(c_ij)``: logit_sum's derivative in s_i.
        center_sum: (N, D) ``sum_{j != y} N'(c_ij) a_j w_j``: logit_sum's derivative in the row, over s_i.
        class_factor: (C K,) a_j, for the class pass; (0,) where the weights are not normalized.
        saved: (bytes,) uint8, what the class pass need not compute again, in the backend's own layout.
    """

    lse: Tensor
    max_logit: Tensor
    mean_cos: Tensor
    mean_center: Tensor
    logit_sum: Tensor
    cos_sum: Tensor
    center_sum: Tensor
    class_factor: Tensor
    saved: Tensor

    @classmethod
    def of(
        cls,
        request: Request,
        *,
        value: Tensor,
        max_logit: Tensor,
        cos: Tensor,
        center: Tensor,
        class_factor: Tensor,
        saved: Tensor | None = None,
    ) -> RowPassOutput:
        """From the sums of a pass: ``value`` (N,), in whatever dtype it was summed, ``cos`` (N,) or (0,) and
        ``center`` (N, D) or (0, D) go where the request's reduction has them. ``max_logit`` is dropped where the reduction has none."""
        if saved is None:
            saved = max_logit.new_empty(0, dtype=torch.uint8)
        value = value.to(torch.float64)
        empty = max_logit.new_empty  # each field a tensor of its own: an operator's results may not alias
        no_center = empty(0, center.shape[1])
        if request.reduction == Reduction.LOGIT_SUM:
            return cls(value.new_empty(0), empty(0), empty(0), no_center, value, cos, center, class_factor, saved)
        return cls(value, max_logit, cos, center, value.new_empty(0), empty(0), no_center, class_factor, saved)

    @classmethod
    def allocate(cls, inputs: PassInputs, request: Request) -> RowPassOutput:
        """Uninitialized tensors of the right shapes and dtypes."""
        (n, d), c, acc_dtype = inputs.x.shape, inputs.w.shape[0], inputs.acc_dtype

        def new(*shape: int) -> Tensor:
            return inputs.x.new_empty(shape, dtype=acc_dtype)

        return cls.of(
            request,
            value=new(n),
            max_logit=new(n),
            cos=new(n if request.need_cos else 0),
            center=new(n if request.need_center else 0, d),
            class_factor=new(c if inputs.normalize_weight else 0),
            saved=inputs.x.new_empty(request.workspace_bytes, dtype=torch.uint8),
        )


@dataclass(frozen=True)
class Upstream:
    """The upstream gradient of the class pass and of the row gradient: each (N,) acc_dtype, but ``lse`` float64. With L the loss
    and lambda = lse,

        G_ij = N'(c_ij) (d_lse_i exp(z_ij - lse_i) + d_logit_sum_i)   for j != y_i,    G_iy = d_target_cos_i,
        v_j  = sum_i G_ij f_i x_i,    dw_j = a_j (v_j - (v_j . a_j w_j) a_j w_j), or v_j where weights are not normalized.
        db_j = sum_i (d_lse_i exp(z_ij - lse_i) + d_logit_sum_i) / s_i  over j != y_i, plus d_target_bias_i over j == y_i.

    For SOFTPLUS_SUM ``sigmoid(z_ij)`` takes the place of ``exp(z_ij - lse_i)``. A class whose logit ``CLIPPED`` holds adds nothing to db.

    Attributes:
        lse: lambda_i as the row pass gave it, +inf (never -inf) for an empty sum, and 0 for SOFTPLUS_SUM. An
            exponential is as wrong, relatively, as its exponent absolutely: float32 has 4e-6 at 64.
        d_lse: dL/dlambda_i times s_i.
        d_logit_sum: dL/d(sum of logits)_i times s_i, or None.
        d_target_cos: dL/dc_iy.
        d_target_bias: dL/db_y of the row's own target, or None.
        reduction: what d_lse is the gradient of, LOG_SUM_EXP or SOFTPLUS_SUM.
        rounded_lse, rounded_d_lse: (N,) float32, what :meth:`rounded` gives, where that is known already.
    """

    lse: Tensor
    d_lse: Tensor
    d_logit_sum: Tensor | None
    d_target_cos: Tensor
    d_target_bias: Tensor | None
    reduction: Reduction = Reduction.LOG_SUM_EXP
    rounded_lse: Tensor | None = None
    rounded_d_lse: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> Upstream:
        """The same for a pass that takes ``lse`` in ``dtype``: what rounding adds to it is a factor of ``d_lse``.

        A pass whose logits are of that dtype can follow as far as float64 goes: where rounding moves ``lse`` by more than all classes
        together can add to the largest logit, it moves it to that logit.
        """
        if self.rounded_lse is not None and self.rounded_d_lse is not None and self.rounded_lse.dtype == dtype:
            return replace(self, lse=self.rounded_lse, d_lse=self.rounded_d_lse)
        lse = self.lse.to(dtype)
        added = torch.where(self.lse.abs() < 2.0**36, lse.to(torch.float64) - self.lse, 0.0)
        return replace(self, lse=lse, d_lse=(self.d_lse * added.clamp(-44.0, 44.0).exp()).to(self.d_lse.dtype))


@dataclass(frozen=True)
class RowLogits:
    """What a step knows of each row's logits, (N,) each and detached, biases included.

    Attributes:
        plain: s_i c_iy + b_y, that of the own class without the margin.
        own: the same as the loss takes it, with the margin.
        nearest: ``max_{j != y} (s_i c_ij + b_j)``, that of the nearest other class; -inf where there is none.
        other: the same as the loss takes it, by :meth:`transformed`.
    """

    plain: Tensor
    own: Tensor
    nearest: Tensor
    other: Tensor

    @staticmethod
    def transformed(
        non_target: NonTarget, nearest: Tensor, scale: Tensor, shared: Tensor | None, threshold: Tensor | None, t: Tensor | None
    ) -> Tensor:
        """(N,) ``nearest`` with the transform of the other classes. A bias that the class has of its own counts as part of its similarity
        there; one that all classes share does not.

        Args:
            scale: (N,).
            shared: () that bias, or None.
            threshold, t: (N,) of the transform, or None for the identity.
        """
        if non_target == NonTarget.IDENTITY:
            return nearest
        bias = 0.0 if shared is None else shared
        similarity = (nearest - bias) / scale
        moved = scale * value(non_target, similarity[:, None], threshold, t)[:, 0] + bias
        return torch.where(nearest == -torch.inf, nearest, moved.to(nearest.dtype))


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a step is made of, where one kernel makes it: (N,) float64 each but for ``labels``, ``max_logit`` and ``other``.

    Attributes:
        lse: lambda.
        value, slope: T(c_y) and its derivative.
        scale: s_i.
        bias: b_y, or None.
        logit_sum: the sum of the non-target logits, or None where ``label_smoothing`` is 0.
        labels: (N,) int64 over all classes, negative for a row that has no loss.
        similarity: c_y.
        cos: the cosine between the row and its own class center.
        max_logit: (N,) acc_dtype, the highest non-target logit, before the transform.
        other: (N,) acc_dtype, the same as the loss takes it, with the transform.
        num_classes: C.
        label_smoothing, focal_gamma: epsilon and gamma.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the rows that have a loss.
    """

    lse: Tensor
    value: Tensor
    slope: Tensor
    scale: Tensor
    bias: Tensor | None
    logit_sum: Tensor | None
    labels: Tensor
    similarity: Tensor
    cos: Tensor
    max_logit: Tensor
    other: Tensor
    num_classes: int
    label_smoothing: float
    focal_gamma: float
    reduction: str


@dataclass(frozen=True)
class LossOutput:
    """The loss of a step and its statistics.

    Attributes:
        loss: (N,) or, reduced, (1,) float32; 0 for a row that has none.
        stats: (5,) float32, over the rows that have a loss: the mean of ``cos``, of its angle in radians and of ``scale``, and the share
            of rows whose target is the top class, without the margin and with it.
        count: (1,) float64, how many rows have a loss, at least 1.
    """

    loss: Tensor
    stats: Tensor
    count: Tensor

    @classmethod
    def allocate(cls, p: LossInputs) -> LossOutput:
        """Uninitialized tensors of the right shapes and dtypes."""
        new = p.lse.new_empty
        return cls(new(p.lse.shape[0] if p.reduction == "none" else 1, dtype=torch.float32), new(5, dtype=torch.float32), new(1))


@dataclass(frozen=True)
class LossUpstream:
    """The gradients of a loss in the fields of :class:`LossInputs`: (N,) float64 each, or (0,) where one was not asked for;
    ``d_similarity`` is that in c_y, by way of ``slope``."""

    d_lse: Tensor
    d_similarity: Tensor
    d_value: Tensor
    d_scale: Tensor
    d_bias: Tensor
    d_logit_sum: Tensor

    @classmethod
    def allocate(cls, p: LossInputs, need_value: bool, need_scale: bool) -> LossUpstream:
        """Uninitialized tensors of the right shapes."""
        wanted = (True, True, need_value, need_scale, p.bias is not None, p.label_smoothing > 0)
        return cls(*(p.lse.new_empty(p.lse.shape[0] if one else 0) for one in wanted))


@dataclass(frozen=True)
class SumsUpstream:
    """What comes back to the sums over the classes, (N,) float64 or, for zeros, None; ``lse`` and ``scale`` are those of the forward pass,
    float64 and acc_dtype."""

    lse: Tensor
    scale: Tensor
    g_lse: Tensor | None
    g_similarity: Tensor | None
    g_bias: Tensor | None
    g_logit_sum: Tensor | None


@dataclass(frozen=True)
class RoundedUpstream:
    """The fields of :class:`Upstream`, (0,) where one was not asked for."""

    lse: Tensor
    d_lse: Tensor
    d_logit_sum: Tensor
    d_target_cos: Tensor
    d_target_bias: Tensor
    rounded_lse: Tensor
    rounded_d_lse: Tensor

    @classmethod
    def allocate(cls, p: SumsUpstream, need_bias: bool, need_logit_sum: bool) -> RoundedUpstream:
        """Uninitialized tensors of the right shapes and dtypes."""
        wanted = (True, need_logit_sum, True, need_bias, True, True)
        return cls(torch.empty_like(p.lse), *(p.scale.new_empty(p.lse.shape[0] if one else 0) for one in wanted))

    def upstream(self, need_bias: bool, need_logit_sum: bool) -> Upstream:
        return Upstream(
            lse=self.lse,
            d_lse=self.d_lse,
            d_logit_sum=self.d_logit_sum if need_logit_sum else None,
            d_target_cos=self.d_target_cos,
            d_target_bias=self.d_target_bias if need_bias else None,
            rounded_lse=self.rounded_lse,
            rounded_d_lse=self.rounded_d_lse,
        )


@dataclass(frozen=True)
class ClassPassOutput:
    """The gradients of the class pass.

    Attributes:
        d_weight: (C K, D) in w's dtype, or (0, D) where it was not asked for.
        d_bias: (C,) acc_dtype, or (0,).
    """

    d_weight: Tensor
    d_bias: Tensor

    @classmethod
    def allocate(cls, inputs: PassInputs, need_weight: bool, need_bias: bool) -> ClassPassOutput:
        """Uninitialized, contiguous tensors of the right shapes and dtypes."""
        rows, d = inputs.w.shape
        d_bias = inputs.x.new_empty(inputs.num_classes if need_bias else 0, dtype=inputs.acc_dtype)
        return cls(inputs.w.new_empty(rows if need_weight else 0, d), d_bias)


@dataclass(frozen=True)
class TopkInputs:
    """A search for the class centers nearest to each embedding.

    Attributes:
        x: (N, D) embeddings as they came, any strides.
        w: (C K, D) class centers, any float dtype, any strides.
        bias: (C,) acc_dtype, contiguous, or None.
        scale: (N,) acc_dtype, contiguous, what a similarity is multiplied by before the bias is added; None where ``bias`` is.
        normalize_embedding, normalize_weight: whether the similarity uses x/|x| and w/|w|.
        sub_centers: K, as in :class:`PassInputs`.
        as_in_passes: whether centers are rounded as the two passes round them, so that a number between two scores parts the same classes
            there; else scores are as exact as the backend can have them.
    """

    x: Tensor
    w: Tensor
    bias: Tensor | None
    scale: Tensor | None
    normalize_embedding: bool
    normalize_weight: bool
    sub_centers: int = 1
    as_in_passes: bool = False

    @property
    def acc_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x.dtype)


@dataclass(frozen=True)
class TopkOutput:
    """The k best classes of each row.

    Attributes:
        scores: (N, k) acc_dtype, falling, NaN before every number.
        classes: (N, k) int64; of equal scores the lower class comes first.
    """

    scores: Tensor
    classes: Tensor

    @classmethod
    def allocate(cls, inputs: TopkInputs, k: int) -> TopkOutput:
        """Uninitialized."""
        n = inputs.x.shape[0]
        return cls(inputs.x.new_empty((n, k), dtype=inputs.acc_dtype), inputs.x.new_empty((n, k), dtype=torch.int64))
