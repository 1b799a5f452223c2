"""The heads as modules: class centers, margin and state in one place."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backend as backends
from ._deprecated import BACKENDS
from .core.device import digest
from .core.labels import checked_ignore_index, checked_labels
from .core.numerics import best
from .core.transforms import transforming
from .core.validation import FLOATS, check_class_weight, check_inputs, check_number, check_reduction, positive
from .loss import LossOptions, agreed_by, local_head_losses, workspace_bytes
from .margins import Margin, check_margin
from .margins.contract import check_binary
from .ops import Sink, StepQueue
from .retrieval import nearest
from .sampling import Sampler
from .sub_centers import FAR, Outliers, angles, counted

#: Standard deviation of the class centers at the start, as in insightface.
INIT_STD = 0.01


class _Flag(property):
    """A property that is false where it is looked up on the class: TorchDynamo (since 2.15) asks with ``inspect.getattr_static`` whether a
    module is FSDP's, and would take any property for a yes."""

    def __bool__(self) -> bool:
        return False


class MarginHead(nn.Module):
    """A classification head: class centers ``weight`` (C, D), a margin, and the loss of both, never holding the N x C logits.

    Args:
        embedding_dim: D, the size of an embedding.
        num_classes: C, the number of identities.
        margin: a :class:`Margin`.
        bias: learn one bias per class (C,), starting at 0.
        reduction, ignore_index, label_smoothing, backend, workspace_mb: see :func:`margin_cross_entropy`.
        sub_centers: K rows of ``weight`` for each class, of which each row of the batch takes the nearest; see
            :func:`margin_cross_entropy`. :meth:`outliers` and :meth:`prune` are for what training has left.
        class_weight: (C,) of all classes, also with a process group; see :func:`margin_cross_entropy`. A copy is the float32 buffer
            ``class_weight`` (float64 where it was), part of ``state_dict()``, or None.
        process_group: a torch.distributed group over whose ranks the classes are divided; all of them make the head alike, and call it,
            ``backward()`` and :meth:`topk` together, each with its own rows (as many as it has, also none). See below.
        batch_size: the most rows that any rank brings. Without it the ranks ask each other in every step, which waits for the device.
        sample_rate: r in (0, 1]: while training, only the classes of the batch and others drawn uniformly take part in a step,
            ``max(r C, N)`` in all; with ranks, r of each rank's. The gradient is then a sparse tensor of the drawn rows, for
            :class:`marginkernels.optim.SGD` and :class:`marginkernels.optim.AdamW`, which leave every other row alone.
        sample_seed: of the draws; the count of draws is kept in ``state_dict``.
        log_q: correct the logits of drawn classes for the chance of being drawn; see :class:`marginkernels.sampling.Sampler`.
        sparse_grad: False gives the sampled weight and bias dense gradients, zero in the rows that were not drawn, for trainers and tools
            that do not take sparse ones (``torch.nn.utils.clip_grad_norm_``, Lightning, accelerate). It costs another tensor of the
            weight's size, and optimizers then see, and decay, every row.
        device, dtype: of the weight and bias; float32 by default.

    Shapes:
        ``head(embeddings (N, D), labels (N,) int64)`` gives the loss: a scalar, or (N,) for ``reduction="none"``.
        ``head(embeddings, labels, mix=(labels_b, lam))`` mixes two labels a row; see :func:`margin_cross_entropy`. With a process group
        every rank mixes or none, and each may have a ``lam`` of its own.

    With a process group of R ranks:
        - ``weight`` and ``bias`` are this rank's classes, ceil(C/R) of them from ``class_start`` on; the last ranks hold fewer or none.
        - The loss is that of all ranks' rows, with the same bits on every rank, and so are ``stats`` and the margin's state; with
          ``reduction="none"`` it is that of this rank's own rows (N,). Scale or divide it alike on all ranks.
        - The gradients of ``weight`` and ``bias`` are those of that loss. The gradient of the embeddings is R times theirs, because DDP
          and FSDP average the backbone's gradient over ranks: so the backbone ends with the gradient of the loss. Wrap the backbone
          in them, never the head; DDP or FSDP around a module that contains the head raises.
        - The class centers drawn at the start do not depend on the number of ranks.
        - ``torch.compile(head, fullgraph=True)`` works where ``batch_size`` is given and classes are not sampled; else the graph breaks.
        - Clip with :func:`marginkernels.distributed.clip_grad_norm_`: torch's would clip each rank by the norm of its own classes.
        - Gradients accumulate over backward passes as ever; divide each loss by how many there are, and have DDP wait for the last
          (``no_sync``). For float16 use :class:`marginkernels.distributed.GradScaler`, so that all ranks skip the same steps.

    Under ``torch.utils.checkpoint`` the recomputation in the backward pass draws the same classes again and starts from the same state of
    the margin, and neither advances. With ``use_reentrant=True`` that takes one forward pass outstanding at a time, with ``False`` one call
    of the head in each checkpointed function; else the backward pass raises, as it does for a compiled head that draws classes or has
    a margin with state.

    Attributes:
        weight: (C, D) Parameter, drawn from N(0, 0.01^2); (C K, D) with K sub-centers, class c in its rows c K to c K + K - 1.
        bias: (C,) Parameter or None.
        class_start: the class that the first row of ``weight`` stands for.
        stats: what the last call saw, scalar tensors on the device (only reading them waits), over the rows that are not ignored:

            - ``target_cosine``: the mean cosine to the own class center;
            - ``target_angle``: the mean angle to it, in radians, pi/2 for a row where either is zero;
            - ``scale``: the mean;
            - ``top1``: the share of rows whose target is the top class, margin apart: ``s c_y + b_y`` is above every ``s c_j + b_j``;
            - ``beyond_margin``: the share of rows whose target is the top class with the margin too. Let j be the nearest other class, the
              one of the highest ``s c_j + b_j``; the row counts where the target logit, with the margin, is above the logit of j as the
              loss takes it, ``s N(c_j) + b_j`` with N the margin's transform of other classes. (A bias that j has of its own counts as
              part of its cosine where N is not the identity.) It rises with ``top1``, later: near 1 the margin is met;
            - the margin's own state (AdaCos's ``s``, CurricularFace's ``t``, AdaFace's ``norm_mean``, ...).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: in the backward pass of a checkpointed head, where it cannot tell which forward pass to repeat.
    """

    class_weight: Tensor | None
    _queue: weakref.ref[StepQueue] | None = None  # of the fused optimizer that is attached

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: Margin,
        *,
        bias: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        sub_centers: int = 1,
        backend: str = "auto",
        workspace_mb: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        batch_size: int | None = None,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        log_q: bool = False,
        sparse_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.num_classes = positive("num_classes", num_classes)
        self.sub_centers = positive("sub_centers", sub_centers)
        check_margin(margin)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        check_reduction(reduction)
        self.ignore_index = ignore_index = checked_ignore_index(ignore_index)
        _check_options(label_smoothing, backend)
        self._class_weight = _checked_class_weight(class_weight, self.num_classes)
        check_binary(margin, label_smoothing, class_weight, None, log_q, bool(bias))
        if not isinstance(sparse_grad, bool):
            raise TypeError(f"sparse_grad: expected True or False, got {sparse_grad!r}")
        fingerprint = "" if process_group is None else _fingerprint(margin)  # .to("meta") would leave no values
        self.margin = margin.to(device)
        self.margin.bind(self.num_classes)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.workspace_mb = workspace_mb
        self.sampler = None
        if sample_rate != 1:
            self.sampler = Sampler(sample_rate, sample_seed, log_q, sparse_grad).to(device)
        elif log_q:
            raise ValueError("log_q: expected False where every class takes part (sample_rate = 1), got True")
        self.shard = None
        if process_group is not None:
            from .distributed._shard import Shard

            self.shard = Shard(self.num_classes, process_group, batch_size)
            facts = {
                "embedding_dim": embedding_dim,
                "num_classes": num_classes,
                "sub_centers": sub_centers,
                "margin": fingerprint,
                "bias": bool(bias),
                "dtype": str(dtype or torch.get_default_dtype()),
            }
            facts |= {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "batch_size": batch_size}
            facts |= {"class_weight": None if self._class_weight is None else digest(self._class_weight)}
            facts |= {"sample_rate": sample_rate, "sample_seed": sample_seed, "log_q": log_q, "sparse_grad": sparse_grad}
            every = self.shard.assert_same_on_all_ranks(**facts, _offer=backends.offer("cpu"))
            self.shard.agreed["cpu"] = backends.agreement([f["_offer"] for f in every])
        elif batch_size is not None:
            raise ValueError(f"batch_size: expected None without a process_group, got {batch_size!r}")
        held = self.num_classes if self.shard is None else self.shard.stop - self.shard.start
        self.weight = nn.Parameter(torch.empty(held * self.sub_centers, self.embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(held, device=device, dtype=dtype)) if bias else None
        held_weight = self._class_weight
        self.register_buffer("class_weight", None if held_weight is None else held_weight.to(device, copy=True))
        self.stats: dict[str, Tensor] = {}
        self._passes = _Passes()
        self._join(self.parameters())
        self._draw_centers()

    def _join(self, parameters: Iterable[Tensor]) -> None:
        """Hook into the gradients of ``parameters``, those of this head that have come anew, and mark those of a shard."""
        for p in parameters:
            if p is self.weight or p is self.bias:
                if self.sampler is not None:
                    _hook(p, self.sampler.watch)
                if self.shard is not None:
                    self.shard.mark(p)
            elif self.shard is not None:
                _hook(p, self.shard.sum_gradients)

    def _rejoin(self, before: list[nn.Parameter]) -> None:
        """:meth:`_join` for the parameters that have taken the place of those of ``before``."""
        old = {id(p) for p in before}
        self._join([p for p in self.parameters() if id(p) not in old])

    def _attach(self, make: Callable[[nn.Parameter, Callable[[], Any]], StepQueue]) -> StepQueue:
        """Leave the gradient of ``weight`` to the queue that ``make`` gives, of a fused optimizer, for as long as that lives. Until then
        the head has one more parameter, ``probe``, which is not in its ``state_dict()``.

        Args:
            make: gets the probe, and what gives a value that changes with the head's other parameters.

        Raises:
            ValueError, RuntimeError: naming what is in the way.
        """
        if self._queue_here() is not None:
            raise RuntimeError("head: expected a head without a fused optimizer, got one that has one: delete that first")
        if self.backend == "reference":
            raise ValueError("backend: expected a fused backend for a head with a fused optimizer, got 'reference'")
        if self.sampler is not None and not self.sampler.sparse_grad:
            raise ValueError(
                "sparse_grad: expected True for a head with a fused optimizer, which updates the drawn classes alone, got False"
            )
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            raise TypeError(
                f"weight: expected a plain parameter for a fused optimizer, got {type(getattr(self, 'weight', None)).__name__} (FSDP, or a "
                "parametrization such as weight_norm)"
            )
        probe = nn.Parameter(torch.zeros((), dtype=torch.float64, device=weight.device))
        if self.shard is not None:
            self.shard.mark(probe)
        others = [p for p in self.parameters() if p is not weight]
        queue = make(probe, lambda: tuple(p._version for p in others))
        self.register_parameter("probe", probe)
        gone = weakref.ref(self)

        def detach(_: object) -> None:
            head = gone()
            if head is not None and head._parameters.get("probe") is probe:
                head._detach()

        self._queue = weakref.ref(queue, detach)
        return queue

    def _detach(self) -> None:
        """Back to dense gradients."""
        self._parameters.pop("probe", None)
        self._queue = None

    def _queue_here(self) -> StepQueue | None:
        return None if self._queue is None else self._queue()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _sink(self) -> Sink | None:
        """Where the gradient of this call's weight goes, or None: to ``weight.grad``."""
        queue = self._queue_here()
        if queue is None or queue.weight is not self.weight or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return None
        assert self._queue is not None
        self._check_not_in_ddp()
        return Sink(self._queue, queue.probe, None, queue.written(), queue.marks())

    def _check_not_in_ddp(self) -> None:
        """Refuse a step that replicas would each take from their own rows alone.

        Raises:
            RuntimeError: ``DistributedDataParallel`` runs this forward pass and has ``weight`` among its parameters.
        """
        ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None and any(p is self.weight for p in getattr(ddp, "_module_parameters", ())):
            raise RuntimeError(
                "module: expected a module without the weight of a head with a fused optimizer for DistributedDataParallel, got one with "
                "it: DDP averages gradients, and the fused step makes none. Wrap the backbone alone and divide the head's classes over "
                "the ranks (process_group=...), or use mk.optim.SGD or AdamW"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the fused optimizer, whose records are those of this head."""
        state = {name: v for name, v in self.__dict__.items() if name != "_queue"}
        return state | {"_parameters": {name: p for name, p in self._parameters.items() if name != "probe"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._passes = _Passes()  # the outstanding ones are of the head that was copied
        self._join(self.parameters())  # a copied parameter has lost its hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MarginHead:
        before = list(self.parameters())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = self._parameters.get("probe")
        if probe is not None and probe.dtype != torch.float64:
            probe.grad, probe.data = None, probe.data.to(torch.float64)
        self._rejoin(before)  # to_empty() of a head on the meta device makes new parameters
        return self

    def _is_managed_by_fsdp(self) -> bool:
        """What both FSDPs set on each module whose parameters they take."""
        return bool(self.__dict__.get("_fsdp_managed", False))

    def _manage_by_fsdp(self, value: bool) -> None:
        # FSDP1 sets it before it touches the parameters, FSDP2 when it has made DTensor of them, and also where it ignores them.
        taken = sys._getframe(2).f_code.co_name == "_annotate_modules_for_dynamo" or type(self.weight) is not nn.Parameter
        if value and taken and self.shard is not None and self.shard.size > 1:
            raise ValueError(
                "module: expected a module without a sharded MarginHead for FSDP, got one whose classes are divided over ranks already: "
                "wrap the backbone alone, or have FSDP ignore the head, by ignored_modules=[head] or, for fully_shard, by "
                "ignored_params=set(head.parameters())"
            )
        self.__dict__["_fsdp_managed"] = value

    _is_fsdp_managed_module = _Flag(_is_managed_by_fsdp, _manage_by_fsdp)

    @property
    def workspace_mb(self) -> float | None:
        """See :func:`margin_cross_entropy`; may be set anew."""
        return self._workspace_mb

    @workspace_mb.setter
    def workspace_mb(self, value: float | None) -> None:
        self._workspace_mb, self._workspace_bytes = value, workspace_bytes(value)

    @property
    def class_start(self) -> int:
        """The class that the first row of ``weight`` stands for."""
        return 0 if self.shard is None else self.shard.start

    def reset_parameters(self) -> None:
        """Draw the class centers anew, set the bias to 0, and reset the draws of sampled classes and the margin's state: all that a head on
        the meta device needs after ``to_empty()``. With a process group every rank must call it."""
        self._draw_centers()
        if self.class_weight is not None and self._class_weight is not None:
            self.class_weight.copy_(self._class_weight)
        if self.sampler is not None:
            self.sampler.reset()
        reset = getattr(self.margin, "reset_parameters", None)
        if reset is not None:
            reset()
        self.stats = {}
        self._passes = _Passes()

    def _draw_centers(self) -> None:
        if self.shard is None:
            nn.init.normal_(self.weight, std=INIT_STD)
        else:
            self.shard.draw_normal(self.weight, INIT_STD, self.sub_centers)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor, labels: Tensor, *, mix: tuple[Tensor, float | Tensor] | None = None) -> Tensor:
        if transforming():
            loss = self._loss(embeddings, labels, mix)
            self.stats = {}  # the results of a transform mean nothing outside of it
            return loss
        if not self.training:
            return self._loss(embeddings, labels, mix)
        state = [*(self.margin.buffers() if self.margin._moves else []), *([] if self.sampler is None else [self.sampler.draws])]
        if not state:
            return self._loss(embeddings, labels, mix)
        if torch.compiler.is_compiling():
            return self._loss(embeddings, first_run(labels), mix)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            return self._passes.repeat(state, lambda: self._loss(embeddings, labels, mix))
        return self._passes.run(state, lambda: self._loss(embeddings, labels, mix))

    def _loss(self, embeddings: Tensor, labels: Tensor, mix: tuple[Tensor, float | Tensor] | None) -> Tensor:
        found = local_head_losses(
            embeddings,
            self.weight,
            labels,
            self.margin,
            self.bias,
            LossOptions(self.ignore_index, self.label_smoothing, self.backend, self._workspace_bytes, self.reduction, self.sub_centers),
            class_weight=self.class_weight,
            mix=mix,
            shard=self.shard,
            sampler=self.sampler if self.training else None,
            sink=None if self._queue is None or transforming() else self._sink(),
        )
        self.stats, loss = found.stats, found.reduce(self.reduction)
        if self.shard is not None and self.reduction == "none":
            return self.shard.own_rows(loss, embeddings.shape[0])
        return loss

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
        """The k classes nearest to each embedding, streamed over the class centers.

        Args:
            embeddings: (N, D).
            k: at most C.

        Returns:
            scores (N, k) falling, in float32 (float64 for float64), and classes (N, k) int64. A score is what training compares
            before scale and margin: the cosine for cosine heads, ``x . w_j`` on the sides that the margin does not normalize;
            with a bias, the logit without margin. Among equal scores the lower class comes first.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        if self.shard is None:
            return nearest(embeddings, self.weight, self.bias, self.margin, k, backend=self.backend, sub_centers=self.sub_centers)
        rows = self.shard.gather(embeddings, _no_labels(embeddings), -1, dtypes=(embeddings.dtype, self.weight.dtype), ask=True)[0]
        agreed = agreed_by(self.shard, str(rows.device)) if self.backend == "auto" else None
        given = (self.num_classes, self.backend, max(self.shard.widths()), agreed, self.sub_centers)
        scores, classes = nearest(rows, self.weight, self.bias, self.margin, k, *given)
        return best(*self.shard.own_candidates(scores, classes + self.class_start, k, embeddings.shape[0]), k)

    @torch.no_grad()
    def sub_center_counts(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """How many rows are nearest to each sub-center of their class; add up what batches give.

        Args:
            embeddings, labels: as the head takes them; with a process group each rank brings its own.

        Returns:
            (C, K) int64, with a process group of this rank's classes, and of the rows of all ranks.
        """
        rows, labels, _ = self._rows_here(embeddings, labels)
        return counted(rows, self.weight, labels, self.sub_centers, self.margin.normalize_weight)

    @torch.no_grad()
    def outliers(self, embeddings: Tensor, labels: Tensor, *, angle: float = FAR, counts: Tensor | None = None) -> Outliers:
        """The rows that lie far from the dominant sub-center of their class, the one that most rows of the class are nearest to: once the
        head has learned, such rows are likely mislabeled (Deng et al., ECCV 2020).

        Args:
            embeddings, labels: as the head takes them; with a process group each rank brings its own.
            angle: how far is far, in radians; 75 degrees by default.
            counts: (C, K), those of all rows that there are, as :meth:`sub_center_counts` gives them; None: of these rows.

        Returns:
            :class:`marginkernels.sub_centers.Outliers`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        check_number("angle", angle, 0.0, math.pi)
        rows, local, valid = self._rows_here(embeddings, labels)
        if counts is None:
            counts = counted(rows, self.weight, local, self.sub_centers, self.margin.normalize_weight)
        dominant = self._dominant(counts)
        found = angles(rows, self.weight, local, dominant)
        if self.shard is not None:
            own = self.shard.own_part(found.shape[0], embeddings.shape[0])
            found, valid = self.shard.from_owner(found)[0][own], valid[own]
        share = counts.amax(1) / counts.sum(1).to(torch.float64)
        return Outliers(valid & (found > angle), torch.where(valid, found, torch.nan), dominant, share)

    @torch.no_grad()
    def prune(self, counts: Tensor) -> None:
        """Keep the dominant sub-center of each class alone, in place: ``weight`` becomes a new parameter (C, D), and ``sub_centers`` 1. An
        optimizer must be made anew.

        Args:
            counts: (C, K), as :meth:`sub_center_counts` gives them. A class without rows keeps its first sub-center.

        Raises:
            ValueError: ``counts`` has another shape.
        """
        first = torch.arange(counts.shape[0], device=self.weight.device) * self.sub_centers
        kept = self.weight.detach().index_select(0, first + self._dominant(counts))
        self.weight = nn.Parameter(kept, self.weight.requires_grad)
        self.sub_centers = 1
        if self.sampler is not None:
            self.sampler.index = self.sampler.rows = None
        self._passes = _Passes()
        self._join([self.weight])

    def _dominant(self, counts: Tensor) -> Tensor:
        """(C,) the sub-center of each class here that has most of ``counts`` (C, K), the first of equals."""
        shape = (self.weight.shape[0] // self.sub_centers, self.sub_centers)
        if not isinstance(counts, Tensor) or tuple(counts.shape) != shape:
            came = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
            raise ValueError(f"counts: expected shape {shape}, the rows of each sub-center, got {came}")
        return counts.to(self.weight.device).argmax(1)

    def _rows_here(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of all ranks, their classes among those of this rank (-1 elsewhere), and which of them have a label (N,)."""
        check_inputs(embeddings, self.weight, labels, None, 0.0, shard=self.shard is not None, sub_centers=self.sub_centers)
        if self.shard is not None:
            dtypes = (embeddings.dtype, self.weight.dtype)
            embeddings, labels = self.shard.gather(embeddings, labels, self.ignore_index, dtypes=dtypes, ask=True)
        labels = checked_labels(labels, self.num_classes, self.ignore_index)
        return embeddings, labels if self.shard is None else self.shard.local(labels), labels >= 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.shard is not None:  # a plain state dict of the whole head: take this rank's rows
            for name, each in (("weight", self.sub_centers), ("bias", 1)):
                whole = state_dict.get(prefix + name)
                if whole is not None and whole.shape[0] == self.num_classes * each != getattr(self, name).shape[0]:
                    state_dict[prefix + name] = whole[self.shard.start * each : self.shard.stop * each]
        before = [p for p in (self.weight, self.bias) if p is not None]
        with self._without_probe():
            super()._load_from_state_dict(state_dict, prefix, *args)
        self._join([p for p in (self.weight, self.bias) if p is not None and all(p is not q for q in before)])  # assign=True makes new ones

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._without_probe():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    @contextlib.contextmanager
    def _without_probe(self) -> Iterator[None]:
        """The probe is no part of what a head holds."""
        probe = self._parameters.pop("probe", None)
        try:
            yield
        finally:
            if probe is not None:
                self._parameters["probe"] = probe

    def extra_repr(self) -> str:
        shown: dict[str, object] = {"embedding_dim": self.embedding_dim, "num_classes": self.num_classes, "bias": self.bias is not None}
        given: dict[str, object] = {"reduction": self.reduction, "ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        given |= {"sub_centers": self.sub_centers, "workspace_mb": self.workspace_mb}
        if self.sampler is not None:
            drawn = self.sampler
            given |= {"sample_rate": drawn.rate, "sample_seed": drawn.first_seed, "log_q": drawn.log_q, "sparse_grad": drawn.sparse_grad}
        if self.shard is not None:
            given |= {"batch_size": self.shard.batch_size}
        shown |= {"backend": self.backend} | {k: v for k, v in given.items() if v != _DEFAULTS[k]}
        text = ", ".join(f"{k}={v!r}" for k, v in shown.items())
        if self.shard is None:
            return text
        return f"{text}, classes=[{self.shard.start}, {self.shard.stop}) of rank {self.shard.rank} of {self.shard.size}"


#: What :class:`MarginHead` does not show of its options.
_DEFAULTS: dict[str, object] = {
    "reduction": "mean",
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "sub_centers": 1,
    "workspace_mb": None,
    "sample_rate": 1.0,
    "sample_seed": 0,
    "log_q": False,
    "sparse_grad": True,
    "batch_size": None,
}


def _no_labels(embeddings: Tensor) -> Tensor:
    return torch.full((embeddings.shape[0],), -1, device=embeddings.device)


def _fingerprint(margin: Margin) -> str:
    """:meth:`Margin.fingerprint`, without the tensors where they have no values yet."""
    if any(v.is_meta for v in (*margin.parameters(), *margin.buffers())):
        return f"{type(margin).__name__}; {margin.extra_repr()}"
    return margin.fingerprint()


def _checked_class_weight(class_weight: object, num_classes: int) -> Tensor | None:
    """A copy on the CPU, at least float32, of weights that a call would take."""
    if class_weight is None:
        return None
    if isinstance(class_weight, Tensor) and class_weight.is_floating_point() and not class_weight.is_meta:
        class_weight = class_weight.detach().to("cpu", torch.promote_types(class_weight.dtype, torch.float32), copy=True)
    check_class_weight(class_weight, num_classes, torch.device("cpu"))
    assert isinstance(class_weight, Tensor)
    return class_weight


def _check_options(label_smoothing: object, backend: object) -> None:
    """What a call would refuse, with its messages. Whether a backend can serve only a call can tell."""
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    names = backends.NAMES
    if not isinstance(backend, str) or backend not in (*names, *BACKENDS):
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def _hook(p: Tensor, register: Callable[[Tensor], None]) -> None:
    """``register(p)`` a hook of the gradient, which a frozen parameter refuses, but keeps for the time when it is trained."""
    frozen = not p.requires_grad
    register(p.requires_grad_())
    if frozen:
        p.requires_grad_(False)


@torch.library.custom_op("marginkernels::first_run", mutates_args=())
def first_run(labels: Tensor) -> Tensor:
    """``labels``, in a compiled step that draws classes or moves a margin's state.

    Raises:
        RuntimeError: the step runs within a backward pass, as activation checkpointing repeats it.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "checkpoint: expected a MarginHead that is not compiled, got a compiled one, whose repetition in the backward pass would draw "
            "other classes or move the margin's state once more: call it outside the checkpointed function: it never holds the N x C logits"
        )
    return labels.clone()


@first_run.register_fake
def _(labels: Tensor) -> Tensor:
    return torch.empty_like(labels)


class _Pass:
    """One forward pass that activation checkpointing may repeat.

    Attributes:
        before: the state that it started from, a copy of each buffer.
        frame: () gives the checkpointed region that it ran in, or None once nothing can repeat that; None where the region is unknown, as
            for a reentrant checkpoint, whose first pass runs without gradient.
    """

    def __init__(self, before: list[Tensor], frame: object):
        self.before = before
        self.frame = None if frame is None else weakref.ref(frame)


class _Passes:
    """The forward passes of a head in training mode that activation checkpointing may repeat, and the state that each started from.

    ``torch.utils.checkpoint`` runs the forward pass again in the backward pass. It must then see the same state, and must not advance it.
    A repeated pass is told by running within a backward pass of autograd; which pass it repeats is told by the checkpointed region, where
    that is known and ran the head once, and otherwise by there being only one.
    """

    def __init__(self) -> None:
        self.outstanding: list[_Pass] = []
        self.copies: list[tuple[Tensor, int, Tensor]] = []  # each buffer of the last pass, its version and its copy

    def run(self, state: list[Tensor], forward: Callable[[], Tensor]) -> Tensor:
        """An ordinary pass, which advances ``state``."""
        hooks = _saving_hooks()
        if torch.is_grad_enabled() and hooks is None:
            return forward()  # autograd itself keeps what the backward pass needs
        last = {id(v): (version, copy) for v, version, copy in self.copies}
        self.copies = [_copied(v, *last.get(id(v), (-1, v))) for v in state]
        this = _Pass([copy for _, _, copy in self.copies], _frame_of(hooks) if torch.is_grad_enabled() else None)
        self._prune()
        for old in [p for p in self.outstanding if p.frame is None][:-1]:
            self.outstanding.remove(old)  # of those in unknown regions, it only matters whether there are several
        self.outstanding.append(this)
        return forward()

    def repeat(self, state: list[Tensor], forward: Callable[[], Tensor]) -> Tensor:
        """A pass within a backward pass: from the state that its first run started from; ``state`` is left as it is.

        Raises:
            RuntimeError: no pass is outstanding, or several are and nothing tells them apart.
        """
        self._prune()
        frame = _frame_of(_saving_hooks())
        found = [p for p in self.outstanding if frame is not None and p.frame is not None and p.frame() is frame] or self.outstanding
        if len({tuple(map(id, p.before)) for p in found}) != 1:  # a state that has not moved has one copy
            raise RuntimeError(
                "checkpoint: expected one outstanding forward pass of the MarginHead that a backward pass repeats, got "
                f"{len(found) or 'none'}: which sampled classes and margin state to repeat is unknown. Call the head once in a "
                "checkpointed function, and backward() after each forward pass, or call it outside: it never holds the N x C logits"
            )
        first = found[-1]
        after = [v.clone() for v in state]
        _write(state, first.before)
        try:
            return forward()
        finally:  # a checkpoint that has all it needs leaves the pass by an exception
            _write(state, after)
            if first.frame is None and torch.is_grad_enabled():
                self.outstanding.remove(first)

    def _prune(self) -> None:
        self.outstanding = [p for p in self.outstanding if p.frame is None or p.frame() is not None]


def _saving_hooks() -> Any:
    """The hooks through which autograd saves tensors now, or None: ``torch.utils.checkpoint`` without ``use_reentrant`` works by these."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _frame_of(hooks: Any) -> object:
    """The record that ``torch.utils.checkpoint`` keeps of a region, the same in the first and in a repeated run; None if there is none."""
    if hooks is None:
        return None
    for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__module__ == "torch.utils.checkpoint":
            return cast(object, held)
    return None


def _copied(v: Tensor, version: int, copy: Tensor) -> tuple[Tensor, int, Tensor]:
    """``v``, its version and a copy of it: ``copy``, if ``v`` is still of the ``version`` that this was taken from."""
    now = -1 if v.is_inference() else v._version
    return v, now, copy if now == version != -1 else v.detach().clone()


@torch.no_grad()
def _write(state: list[Tensor], values: list[Tensor]) -> None:
    for v, value in zip(state, values, strict=True):
        v.copy_(value)
