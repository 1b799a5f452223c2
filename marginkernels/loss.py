"""Cross-entropy of a margin head: validation, the margin, the passes over the classes, and the assembly of the loss."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import ops, reference
from .core.labels import checked_ignore_index
from .core.nontarget import NonTarget
from .core.numerics import accumulation_dtype, reduce_losses, target_biases, target_centers, target_rows
from .core.transforms import transforming
from .core.types import HeadInputs, LossInputs, PassInputs, PreparedRows, Reduction, Request, RowLogits, TopkInputs
from .core.validation import check_class_weight, check_inputs, check_mix, check_number, check_reduction
from .margins import BatchInfo, Margin, check_holds_values, check_margin
from .margins.base import Nearest
from .margins.contract import Evaluated, advance, check_binary, evaluate, restored_on_error

if TYPE_CHECKING:
    from .distributed._shard import Shard
    from .sampling import Sampler


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    mix: tuple[Tensor, float | Tensor] | None = None,
    sub_centers: int = 1,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """Cross-entropy of a margin head over C classes, without the N x C logits.

    Args:
        embeddings: (N, D), float16, bfloat16, float32 or float64; N may be 0. Under autocast they are cast to its dtype.
        weight: (C, D) class centers, any float dtype, on the same device. Products run in the embeddings' dtype (the weight is converted
            a tile at a time) and accumulate in float32, or float64 for float64 embeddings.
        labels: (N,) int64 in [0, C), or ``ignore_index``.
        margin: a :class:`Margin`; in training mode its state advances by one step.
        bias: (C,), added to every logit after the scale, or None. ``-inf`` masks a class: it is as if it were not there, and its
            gradients are 0. As in ``torch.nn.functional.cross_entropy``, the loss is infinite for a row whose own class is masked, and for
            every row with label smoothing; it is NaN for a row all of whose classes are masked.
        reduction: ``"none"`` (N,), ``"mean"`` over the rows that are not ignored (0 where there is none) or ``"sum"``.
        ignore_index: rows with this label have no loss and no gradient, whatever they hold, NaN included.
        label_smoothing: epsilon in [0, 1]: the target distribution is 1 - eps + eps/C on the label, eps/C elsewhere.
        class_weight: (C,) numbers >= 0, not differentiated: as ``weight`` of ``torch.nn.functional.cross_entropy``. A row's loss is
            multiplied by the weight of its class, each term of the label smoothing by that of the term's class, and a mean divides by the
            sum of the rows' weights (0 where that is 0). The focal factor comes after. With label smoothing it costs one more pass over the
            classes, of plain PyTorch whatever the backend.
        mix: ``(labels_b, lam)`` for mixed samples (mixup, CutMix): the loss is ``lam L(labels) + (1 - lam) L(labels_b)``, each with its
            own margin at its own label and its own mean, from one pass over the classes. ``labels_b`` is (N,) int64 as ``labels``;
            ``lam`` in [0, 1] is a number or a tensor of shape () or (N,), then multiplied row by row before the reduction. A margin's state
            advances once, on ``labels``, of which the statistics are too. A row with an ignored label lacks that label's term alone.
        sub_centers: K: ``weight`` is (C K, D), and class c has its rows c K to c K + K - 1. Its similarity is the highest of the K
            (Deng et al., ECCV 2020, equation 3), for the target as for the other classes, and the first row that has it gets the whole
            gradient. ``bias`` and ``class_weight`` stay (C,).
        backend: ``"auto"``, or one of :func:`backends`; an explicit backend never falls back: it raises and lists the reasons.
        workspace_mb: how much memory (2^20 bytes) the forward pass may leave to the backward pass: the exponentials of as many classes
            as fit, for which the backward pass then needs one matrix product instead of two. 0 saves nothing, infinity all; None is the
            backend's own choice: 128 for ``cpu``, where that was measured to pay, else 0. A backend that has no use for it ignores it.

    Returns:
        The loss, float32 (float64 for float64 embeddings).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Out-of-range labels on a GPU are counted there,
            left out of the loss, and reported by a later call (see :func:`raise_pending_label_errors`), so that no step waits.
    """
    check_reduction(reduction)
    workspace = workspace_bytes(workspace_mb)
    options = LossOptions(ignore_index, label_smoothing, backend, workspace, reduction, sub_centers, statistics=False)
    return local_head_losses(embeddings, weight, labels, margin, bias, options, class_weight=class_weight, mix=mix).reduce(reduction)


def head_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sub_centers: int = 1,
    backend: str = "auto",
    workspace_mb: float | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The per-row losses behind :func:`margin_cross_entropy`, whose arguments these are, and the step's statistics.

    Returns:
        losses (N,), float32 or float64, 0 for ignored rows; valid (N,) bool; and detached scalar tensors by name, over the rows that are
        not ignored: ``target_cosine`` and ``target_angle`` (means of the cosine to the own class center and of its angle in radians, pi/2
        where either is zero), ``scale`` (mean), ``top1`` (share of rows whose target is the top class, margin apart), ``beyond_margin``
        (share of rows whose target logit, margin included, is above that of the nearest other class as the loss takes it) and the
        margin's own state.
    """
    options = LossOptions(ignore_index, label_smoothing, backend, workspace_bytes(workspace_mb), sub_centers=sub_centers)
    found = local_head_losses(embeddings, weight, labels, margin, bias, options)
    return found.terms[0].losses, found.terms[0].valid, found.stats


@dataclass(frozen=True)
class LossOptions:
    """Options of :func:`margin_cross_entropy` by the same names; ``workspace_bytes`` is ``workspace_mb`` as :func:`workspace_bytes` gives
    it, an integer before anything is traced; ``of_rows`` asks for :attr:`HeadLosses.of_rows`, and then no kernel reduces the loss; without
    ``statistics`` there need be none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    backend: str = "auto"
    workspace_bytes: int | None = None
    reduction: str = "none"
    sub_centers: int = 1
    of_rows: bool = False
    statistics: bool = True


@dataclass(frozen=True)
class Term:
    """The losses at one label for each row.

    Attributes:
        losses: (N,), 0 for ignored rows.
        valid: (N,) bool.
        weight: (N,) float64 class weight of each row, or None.
        share: what the term counts, a number or (N,); None: 1.
    """

    losses: Tensor
    valid: Tensor
    weight: Tensor | None
    share: float | Tensor | None

    def reduce(self, reduction: str) -> Tensor:
        losses = self.losses if self.share is None else (self.losses * self.share).to(self.losses.dtype)
        return reduce_losses(losses, self.valid, reduction, self.weight)


@dataclass(frozen=True)
class HeadLosses:
    """What :func:`local_head_losses` gives.

    Attributes:
        terms: one, or two where labels are mixed; none where a kernel has reduced the losses.
        stats: the statistics of the rows at their first labels.
        reduced: () the loss, by the reduction of the options, where a kernel has reduced it.
        of_rows: the logits of the rows at their first labels, where they were asked for.
    """

    terms: tuple[Term, ...]
    stats: dict[str, Tensor]
    reduced: Tensor | None
    of_rows: RowLogits | None

    def reduce(self, reduction: str) -> Tensor:
        """The loss: () or, for ``"none"``, (N,)."""
        if self.reduced is not None:
            return self.reduced
        first, *more = (term.reduce(reduction) for term in self.terms)
        return first + more[0] if more else first


def local_head_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    bias: Tensor | None,
    options: LossOptions,
    *,
    class_weight: Tensor | None = None,
    mix: tuple[Tensor, float | Tensor] | None = None,
    shard: Shard | None = None,
    sampler: Sampler | None = None,
    sink: ops.Sink | None = None,
) -> HeadLosses:
    """The losses of :func:`margin_cross_entropy` before the reduction, where this process may hold only part of the classes.

    Args:
        class_weight: (C,) of all classes, also with a shard.
        shard: where ``weight`` and ``bias`` are one rank's part of the classes; labels count over all of them. See :class:`MarginHead`.
        sampler: draws the classes that take part. The others are as if they were not there, also to the label smoothing.
        sink: where the gradient of ``weight`` goes instead of to it; see :mod:`marginkernels.ops.queue`.

    Returns:
        With a shard, the losses of the rows of all ranks, each rank's padded to one number of rows.
    """
    check_margin(margin)
    k = options.sub_centers
    check_inputs(embeddings, weight, labels, bias, options.label_smoothing, shard=shard is not None, sub_centers=k)
    check_holds_values(margin)
    check_binary(margin, options.label_smoothing, class_weight, mix, sampler is not None and sampler.log_q, bias is not None)
    device = embeddings.device.type
    if torch.is_autocast_enabled(device) and embeddings.dtype != torch.float64:
        embeddings = embeddings.to(torch.get_autocast_dtype(device))
    if shard is None or options.backend != "auto":
        name = _backend(options.backend, embeddings, weight, margin, None, sampler, k)
    else:
        name = "auto"  # until it is known how many rows the ranks have together
    if name == "reference" and (shard is not None or sampler is not None):
        raise ValueError("backend: expected a fused backend for a head that is sharded or samples its classes, got 'reference'")
    if shard is not None and transforming():
        raise RuntimeError("process_group: expected None under the transforms of torch.func (grad, vmap, ...), got a sharded head")
    num_classes = weight.shape[0] // k if shard is None else shard.num_classes
    if class_weight is not None:
        check_class_weight(class_weight, num_classes, embeddings.device)
    mixed = None if mix is None else check_mix(mix, embeddings)
    ignore_index = checked_ignore_index(options.ignore_index)
    own = slice(None)
    if shard is not None:
        count = embeddings.shape[0]
        embeddings, labels = shard.gather(embeddings, labels, ignore_index, dtypes=(embeddings.dtype, weight.dtype))
        own = shard.own_part(labels.shape[0], count)
        if mixed is not None:
            mixed = shard.gather_mix(*mixed, labels.shape[0], ignore_index)
        if name == "auto":
            name = _backend(name, embeddings, weight, margin, shard, sampler, k)
    margin.bind(num_classes)
    labels = ops.checked_labels(labels, num_classes, ignore_index, embeddings, name)
    if mixed is not None:  # every row once more, at its second label
        second = ops.checked_labels(mixed[0], num_classes, ignore_index, embeddings, name)
        labels, embeddings = torch.cat([labels, second]), torch.cat([embeddings, embeddings])
    fused = ops.fuses_rows(embeddings, name)
    if fused:
        embeddings = ops.without_bad_ignored_rows(embeddings, labels, name)
    elif not ops.none_ignored(labels):
        embeddings = _without_bad_ignored_rows(embeddings, labels)
    batches = [BatchInfo(embeddings, labels, num_classes, own=own)]
    if mixed is not None:
        halves = zip(embeddings.tensor_split(2), labels.tensor_split(2), strict=True)
        batches = [BatchInfo(x, y, num_classes, own=own) for x, y in halves]
    of_rows = row_weights(class_weight, labels)
    # A compiled step writes its buffers at its end, where nothing raises any more.
    moves = margin.training and margin._moves and not torch.compiler.is_compiling()
    with torch.autocast(device, enabled=False), restored_on_error(margin) if moves else contextlib.nullcontext():
        if name == "reference":
            found = [
                reference.losses(
                    batch.embeddings,
                    weight,
                    batch.labels,
                    margin,
                    bias,
                    options.label_smoothing,
                    class_weight=class_weight,
                    advances=batch is batches[0],
                    sub_centers=k,
                )
                for batch in batches
            ]
            losses, stats = torch.cat([each for each, *_ in found]), found[0][1]
            logits: RowLogits | None = found[0][2]
        else:
            smoothed = class_weight if options.label_smoothing > 0 else None
            weight = weight if sink is None else weight.detach()
            classes = LocalClasses.of(weight, bias, labels, smoothed, shard, sampler, k).with_bias(margin.class_bias())
            workspace = options.workspace_bytes
            if workspace is None:
                workspace = backends.get(name).workspace_mb << 20
            given = replace(options, backend=name, workspace_bytes=workspace)
            if sink is not None and sampler is not None:
                sink = replace(sink, rows=sampler.rows, about=(*sink.about, id(sampler.rows)))
            losses, stats, logits = _fused_losses(embeddings, batches, classes, of_rows, margin, given, fused and not options.of_rows, sink)
    state = {name: buffer.reshape(()) for name, buffer in margin.named_buffers() if buffer.numel() == 1} if options.statistics else {}
    stats = {k: v.detach().to(torch.float32, copy=k in state) for k, v in (stats | state).items()}
    if not losses.ndim:  # a kernel has reduced them
        return HeadLosses((), stats, losses, None)
    losses = losses.to(torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    shares: list[float | Tensor | None] = [None] if mixed is None else [mixed[1], 1 - mixed[1]]
    of_batch = (losses,) if mixed is None else losses.tensor_split(2)
    weights = [of_rows] * len(shares) if mixed is None or of_rows is None else of_rows.tensor_split(2)
    terms = (
        Term(some, batch.valid, weight_of_rows, share)
        for some, batch, weight_of_rows, share in zip(of_batch, batches, weights, shares, strict=True)
    )
    return HeadLosses(tuple(terms), stats, None, logits if options.of_rows else None)


def row_weights(class_weight: Tensor | None, labels: Tensor) -> Tensor | None:
    """(N,) float64 the weight of each row's class, that of any class where the row is ignored; None where ``class_weight`` is."""
    return None if class_weight is None else class_weight.index_select(0, labels.clamp_min(0)).to(torch.float64)


def _backend(
    name: str, embeddings: Tensor, weight: Tensor, margin: Margin, shard: Shard | None, sampler: Sampler | None, sub_centers: int
) -> str:
    """The backend that serves: of all that decides, every rank of a shard sees the same."""
    rows, classes = embeddings.shape[0], weight.shape[0] // sub_centers
    if shard is not None:
        classes = max(shard.widths())
    if sampler is not None:
        classes = sampler.count(rows, classes)
    agreed = None if shard is None else agreed_by(shard, str(embeddings.device))
    given = (str(embeddings.device), embeddings.dtype, weight.dtype, weight.shape[1], rows, classes * sub_centers)
    return backends.resolve(name, *given, agreed, sub_centers, backends.features(margin.non_target, margin.reduction, sub_centers))


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def agreed_by(shard: Shard, device: str) -> backends.Agreement:
    """What all ranks of a shard may choose a backend from on devices of this kind; they compare it once, at their first call there."""
    kind = device.partition(":")[0]
    if kind not in shard.agreed:
        shard.agreed[kind] = backends.agreement(shard.of_all_ranks(backends.offer(device)))
    return shard.agreed[kind]


def _without_bad_ignored_rows(embeddings: Tensor, labels: Tensor) -> Tensor:
    """``embeddings`` (N, D) with ones in the ignored rows that hold NaN or infinity, which else would reach the gradients as 0 * NaN.
    Every other row keeps its bits, and the gradient of such a row is 0. O(N D), without waiting for the device."""
    if embeddings.dtype == torch.float64:
        total = embeddings.detach().sum(1)
    else:
        total = embeddings.detach().sum(1, dtype=torch.float32)
    # A sum that overflows only replaces one more ignored row.
    bad = (labels < 0) & ~torch.isfinite(total)
    return torch.where(bad[:, None], 1, embeddings)


def workspace_bytes(workspace_mb: float | None) -> int | None:
    """``workspace_mb`` in bytes, at most 2^60 of them; None for the backend's own choice.

    Raises:
        ValueError, TypeError: it is no number >= 0.
    """
    if workspace_mb is None:
        return None
    check_number("workspace_mb", workspace_mb, 0.0, None)
    return int(min(workspace_mb, 2**40) * 2**20)


@dataclass(frozen=True)
class LocalClasses:
    """The classes that the passes of this process run over: all C of them, a shard's, or those drawn from either.

    Attributes:
        w: (K, D), or ``sub_centers`` rows of each of the K classes.
        bias: (K,) or None, with what sampling adds to it.
        labels: (N,) within K, -1 where the row's class is not here.
        class_weight: (K,) the weights of the classes in the label smoothing, or None for 1.
        weight_sum: () float64 the sum of these weights over all classes that take part, on all ranks; None where ``class_weight`` is.
        log_q_sum: () what sampling has added to the biases in all, times the class weights, or None.
        count: how many classes take part on all ranks.
        shard: None where all of them are here.
        sub_centers: rows of ``w`` that a class has.
    """

    w: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None
    weight_sum: Tensor | None
    log_q_sum: Tensor | None
    count: int
    shard: Shard | None
    sub_centers: int

    @classmethod
    def of(
        cls,
        w: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weight: Tensor | None,
        shard: Shard | None,
        sampler: Sampler | None,
        sub_centers: int = 1,
    ) -> LocalClasses:
        """``class_weight``: (C,) of the classes of all ranks, where the label smoothing wants it."""
        widths = [w.shape[0] // sub_centers] if shard is None else shard.widths()
        labels = labels if shard is None else shard.local(labels)
        log_q_sum = weight_sum = None
        if class_weight is not None:
            weight_sum = class_weight.sum(dtype=torch.float64)
            class_weight = class_weight if shard is None else class_weight[shard.start : shard.stop]
        if sampler is not None:
            widths = [sampler.count(labels.shape[0], c) for c in widths]
            w, bias, labels, correction = sampler(w, bias, labels, 0 if shard is None else shard.start, sub_centers)
            if class_weight is not None:
                assert sampler.index is not None
                class_weight = class_weight.index_select(0, sampler.index)
                weight_sum = class_weight.sum(dtype=torch.float64)
                weight_sum = weight_sum if shard is None else shard.from_owner(weight_sum.view(1))[0].view(())
            if correction is not None:
                added = correction if class_weight is None else correction * class_weight
                bias, log_q_sum = correction if bias is None else bias + correction, added.sum(dtype=torch.float64)
        return cls(w, bias, labels, class_weight, weight_sum, log_q_sum, sum(widths), shard, sub_centers)

    def with_bias(self, shared: Tensor | None) -> LocalClasses:
        """The same with a bias that all classes share, of shape (), or None."""
        if shared is None:
            return self
        shared = shared.to(self.w.device).expand(self.w.shape[0] // self.sub_centers)
        return replace(self, bias=shared if self.bias is None else self.bias + shared)


def _fused_losses(
    embeddings: Tensor,
    batches: list[BatchInfo],
    classes: LocalClasses,
    row_weight: Tensor | None,
    margin: Margin,
    given: LossOptions,
    fused: bool,
    sink: ops.Sink | None,
) -> tuple[Tensor, dict[str, Tensor], RowLogits | None]:
    """The losses of all rows, and the statistics and logits of the first batch's, by the two passes of a backend; where ``fused``, one
    kernel may have made the statistics and reduced the losses, and there are no logits.

    Args:
        embeddings: (N, D), the rows of all ``batches``, one batch after the other.
        batches: what the margin sees at a time; its state advances by the first.
        row_weight: (N,) the weight of each row's class, or None.
    """
    label_smoothing, backend = given.label_smoothing, given.backend
    own = target_rows(embeddings, classes.w, classes.labels, classes.sub_centers, margin.normalize_weight)
    inputs = HeadInputs(embeddings, classes.w, own, margin.normalize_embedding, margin.normalize_weight)
    rows, owner_bias, center_norm = _prepare(inputs, classes, backend, margin.needs_center_norm)
    parts = _parts(batches)
    batches = [
        batch.with_classes(None if center_norm is None else center_norm[part], _nearest(inputs, classes, part, backend))
        for batch, part in zip(batches, parts, strict=True)
    ]
    first = parts[0]
    if margin.training:
        _update_state(margin, batches[0], rows.part(first), classes, own[first], backend)
    # The first last: what a margin notes of a call is of the rows' first labels.
    last_first = reversed([*zip(batches, parts, strict=True)])
    found = [evaluate(margin, rows.target_similarity[part], batch, torch.float64) for batch, part in last_first]
    target = Evaluated.joined(found[::-1])
    fused = fused and classes.shard is None and center_norm is None and target.regularizer is None and target.value.dtype == torch.float64
    fused = fused and len(batches) == 1 and row_weight is None and margin.loss_factor == 1
    fused = fused and margin.reduction == Reduction.LOG_SUM_EXP
    options = ops.SumOptions(
        non_target=margin.non_target,
        normalize_embedding=margin.normalize_embedding,
        normalize_weight=margin.normalize_weight,
        reduction=margin.reduction,
        logit_sum=label_smoothing > 0,
        center_norm=center_norm is not None,
        grad=torch.is_grad_enabled(),
        workspace_bytes=given.workspace_bytes or 0,
        backend=backend,
        fused=fused,
        sub_centers=classes.sub_centers,
    )
    of_rows = (target.scale, target.threshold, target.t)
    sums = ops.sum_over_classes(inputs, rows, center_norm, classes.bias, *of_rows, classes.class_weight, options, sink)
    sums, target = _exchange(sums, target, owner_bias, classes, label_smoothing > 0, margin.reduction)
    if fused:
        return *_by_kernel(sums, target, batches[0], rows, classes, given, margin), None
    target_logit = _target_logit(sums, target, rows.target_similarity, center_norm)
    if margin.reduction == Reduction.SOFTPLUS_SUM:
        own = torch.logaddexp(-target_logit, torch.zeros_like(target_logit))
        losses = margin.target_weight * own + margin.other_weight * sums.lse
    else:
        weights = (row_weight, classes.weight_sum)
        losses = _assemble(sums, target_logit, classes.count, label_smoothing, margin.focal_gamma, *weights)
    if margin.loss_factor != 1:
        losses = losses * margin.loss_factor
    if target.regularizer is not None:
        losses = losses + target.regularizer
    valid = torch.cat([batch.valid for batch in batches]) if len(batches) > 1 else batches[0].valid
    losses = torch.where(valid, losses, 0)
    if not (given.statistics or given.of_rows):
        return losses, {}, None
    logits = _row_logits(rows.part(first), sums, target, margin)
    return losses, _statistics(batches[0], rows.part(first), target, logits), logits


def _nearest(inputs: HeadInputs, classes: LocalClasses, part: slice, backend: str) -> Nearest:
    """What :meth:`BatchInfo.nearest` gives of some of the rows."""

    @torch.no_grad()
    def nearest(count: int) -> Tensor:
        sides = (inputs.normalize_embedding, inputs.normalize_weight)
        search = TopkInputs(inputs.x.detach()[part], inputs.w.detach(), None, None, *sides, classes.sub_centers, as_in_passes=True)
        found = ops.topk(search, min(count + 1, inputs.w.shape[0] // classes.sub_centers), backend)
        scores = found.scores.masked_fill(found.classes == classes.labels[part, None], -torch.inf)
        scores = F.pad(scores, (0, count + 1 - scores.shape[1]), value=-torch.inf)
        if classes.shard is not None:
            scores = classes.shard.gathered(scores)
        return scores.topk(count, 1).values

    return nearest


def _parts(batches: list[BatchInfo]) -> list[slice]:
    """Where the rows of each batch lie among those of all."""
    if len(batches) == 1:
        return [slice(None)]
    ends = list(itertools.accumulate(batch.labels.shape[0] for batch in batches))
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


@torch.no_grad()
def _prepare(
    inputs: HeadInputs, classes: LocalClasses, backend: str, need_center_norm: bool
) -> tuple[PreparedRows, Tensor | None, Tensor | None]:
    """The rows as the passes take them, with the target similarity and, beside them, from the rank that holds it the target bias (None
    without ranks) and the norm of the class center (None where nobody needs it)."""
    detached = HeadInputs(inputs.x.detach(), inputs.w.detach(), inputs.labels, inputs.normalize_embedding, inputs.normalize_weight)
    rows = ops.prepare_inputs(detached, backend)
    bias, norm = None, None
    if need_center_norm:
        norm = torch.linalg.vector_norm(target_centers(detached.w, inputs.labels), dim=1)
    if classes.shard is not None:
        own_bias = target_biases(classes.bias, classes.labels)
        mine = [rows.target_similarity, rows.target_cos, own_bias, *([] if norm is None else [norm])]
        similarity, cos, bias, *norms = classes.shard.from_owner(*mine)
        rows, norm = PreparedRows(rows.x, rows.row_factor, similarity, cos), norms[0] if norms else None
    return rows, bias, norm


@torch.no_grad()
def _update_state(margin: Margin, batch: BatchInfo, rows: PreparedRows, classes: LocalClasses, own: Tensor, backend: str) -> None:
    """Advance the margin's state by one step; it may ask for a pass over the classes, of which ``own`` (N,) are the targets' rows."""

    def non_target_lse(scale: Tensor) -> Tensor:
        inputs = PassInputs(
            x=rows.x,
            row_factor=rows.row_factor,
            w=classes.w,
            bias=None,
            labels=own,
            scale=scale.to(accumulation_dtype(rows.x.dtype)).expand(rows.x.shape[0]).contiguous(),
            threshold=None,
            t=None,
            non_target=NonTarget.IDENTITY,
            normalize_weight=margin.normalize_weight,
            sub_centers=classes.sub_centers,
        )
        out = ops.row_pass(inputs, Request.log_sum_exp(), backend)
        return out.lse if classes.shard is None else classes.shard.combine(out.lse, None, out.max_logit)[0]

    advance(margin, rows.target_similarity, batch, non_target_lse)


def _exchange(
    sums: ops.ClassSums,
    target: Evaluated,
    owner_bias: Tensor | None,
    classes: LocalClasses,
    with_logit_sum: bool,
    reduction: Reduction,
) -> tuple[ops.ClassSums, Evaluated]:
    """Sums over the classes here to sums over all, with gradients of O(N) terms on the rank that holds the row's class alone."""
    lse, logit_sum, max_logit, target_bias = sums.lse, sums.logit_sum, sums.max_logit, sums.target_bias
    if classes.log_q_sum is not None:
        logit_sum = logit_sum - classes.log_q_sum
    if classes.shard is not None:
        if reduction == Reduction.LOG_SUM_EXP:
            lse, combined, max_logit = classes.shard.combine(lse, logit_sum if with_logit_sum else None, max_logit)
            logit_sum = logit_sum if combined is None else combined
        else:
            _, total, max_logit = classes.shard.combine(lse.detach(), lse, max_logit)
            assert total is not None
            lse = total
        assert owner_bias is not None
        target_bias = torch.where(classes.labels >= 0, target_bias, owner_bias)
        term = target.regularizer
        value, scale = (classes.shard.grad_on_owner(v, classes.labels) for v in (target.value, target.scale))
        term = None if term is None else classes.shard.grad_on_owner(term, classes.labels)
        target = replace(target, value=value, scale=scale, regularizer=term)
    return replace(sums, lse=lse, target_bias=target_bias, logit_sum=logit_sum, max_logit=max_logit), target


def _by_kernel(
    sums: ops.ClassSums,
    target: Evaluated,
    batch: BatchInfo,
    rows: PreparedRows,
    classes: LocalClasses,
    options: LossOptions,
    margin: Margin,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What :func:`_assemble`, :func:`reduce_losses` and :func:`_statistics` give, by one kernel; the loss is (N,), or () where reduced."""
    inputs = LossInputs(
        lse=sums.lse,
        value=target.value,
        slope=target.slope.detach().to(torch.float64),
        scale=target.scale,
        bias=None if classes.bias is None else sums.target_bias,
        logit_sum=sums.logit_sum if options.label_smoothing else None,
        labels=batch.labels,
        similarity=rows.target_similarity,
        cos=rows.target_cos,
        max_logit=sums.max_logit,
        other=_other(sums.max_logit, target, margin),
        num_classes=classes.count,
        label_smoothing=float(options.label_smoothing),
        focal_gamma=float(margin.focal_gamma),
        reduction=options.reduction,
    )
    loss, stats = ops.fused_loss(inputs, sums.target_similarity, options.backend)
    return loss, dict(zip(_STATISTICS, stats.unbind(), strict=True))


def _target_logit(sums: ops.ClassSums, target: Evaluated, similarity: Tensor, center_norm: Tensor | None) -> Tensor:
    """(N,) with the slopes that the margin gave."""
    # T(cos) to first order about where it stands: its value now, its slope for the backward pass.
    value = target.value + target.slope.detach() * (sums.target_similarity - similarity)
    if center_norm is not None:
        # T is homogeneous in the center w (see Margin.needs_center_norm): |w| dT/d|w| = T - c dT/dc.
        rate = (target.value - target.slope * similarity) / torch.where(center_norm > 0, center_norm, 1.0)
        value = value + rate.detach() * (sums.center_norm - center_norm)
    return target.scale * value + sums.target_bias


def _assemble(
    sums: ops.ClassSums,
    target_logit: Tensor,
    num_classes: int,
    label_smoothing: float,
    focal_gamma: float,
    row_weight: Tensor | None,
    weight_sum: Tensor | None,
) -> Tensor:
    """(N,) cross-entropy from the non-target log-sum-exp and the target logit."""
    gap = sums.lse - target_logit
    zero = torch.zeros_like(gap)
    losses = torch.logaddexp(gap, zero)  # softplus, without F.softplus's threshold
    nll = losses
    if row_weight is not None:
        losses = row_weight * losses
    if label_smoothing and weight_sum is not None:
        assert row_weight is not None
        weighted_sum = row_weight * target_logit + sums.logit_sum
        losses = (1 - label_smoothing) * losses + label_smoothing / num_classes * (weight_sum * (nll + target_logit) - weighted_sum)
    elif label_smoothing:
        losses = losses + label_smoothing * (target_logit - (target_logit + sums.logit_sum) / num_classes)
    if label_smoothing:
        losses = torch.where(sums.target_bias == -torch.inf, torch.inf, losses)
    if focal_gamma:
        losses = losses * torch.exp(-focal_gamma * torch.logaddexp(-gap, zero))
    return losses


_STATISTICS = ("target_cosine", "target_angle", "scale", "top1", "beyond_margin")


@torch.no_grad()
def _other(nearest: Tensor, target: Evaluated, margin: Margin) -> Tensor:
    """(N,) the logit of the nearest other class as the loss takes it."""
    return RowLogits.transformed(margin.non_target, nearest, target.scale, margin.class_bias(), target.threshold, target.t)


@torch.no_grad()
def _row_logits(rows: PreparedRows, sums: ops.ClassSums, target: Evaluated, margin: Margin) -> RowLogits:
    """Of the rows of the first labels; the others of ``sums`` and ``target`` follow them."""
    n, scale, bias, value = rows.target_cos.shape[0], target.scale, sums.target_bias, target.value
    nearest, other = sums.max_logit, _other(sums.max_logit, target, margin)
    if scale.shape[0] != n:  # the rows have second labels too
        scale, bias, value, nearest, other = (v[:n] for v in (scale, bias, value, nearest, other))
    return RowLogits(torch.addcmul(bias, scale, rows.target_similarity), torch.addcmul(bias, scale, value), nearest, other)


@torch.no_grad()
def _statistics(batch: BatchInfo, rows: PreparedRows, target: Evaluated, logits: RowLogits) -> dict[str, Tensor]:
    """See :func:`head_losses`."""
    cos, scale = rows.target_cos, target.scale
    if scale.shape != cos.shape:
        scale = scale[: cos.shape[0]]
    top1, beyond = logits.plain > logits.nearest, logits.own > logits.other
    means = batch.mean(torch.stack([cos, torch.acos(cos.clamp(-1, 1)), scale, top1, beyond]))
    return dict(zip(_STATISTICS, means.to(torch.float32).unbind(), strict=True))
