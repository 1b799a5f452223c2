"""The heads as modules: class centers, margin and state in one place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .core.numerics import reduce_losses
from .core.validation import FLOATS, check_reduction, positive
from .loss import LossOptions, local_head_losses
from .margins import Margin, check_margin
from .retrieval import best, nearest
from .sampling import Sampler

#: Standard deviation of the class centers at the start, as in insightface.
INIT_STD = 0.01


class MarginHead(nn.Module):
    """A classification head: class centers ``weight`` (C, D), a margin, and the loss of both, never holding the N x C logits.

    Args:
        embedding_dim: D.
        num_classes: C.
        margin: a :class:`Margin`.
        bias: learn one bias per class (C,), starting at 0.
        reduction, ignore_index, label_smoothing, backend, workspace_mb: see :func:`margin_cross_entropy`.
        process_group: a torch.distributed group over whose ranks the classes are divided; all of them make the head alike, and call it,
            ``backward()`` and :meth:`topk` together, each with its own rows (as many as it has, also none). See below.
        batch_size: the most rows that any rank brings. Without it the ranks ask each other in every step, which waits for the device.
        sample_rate: r in (0, 1]: while training, only the classes of the batch and others drawn uniformly take part in a step,
            ``max(r C, N)`` in all; with ranks, r of each rank's. The gradient is then a sparse tensor of the drawn rows, for
            :class:`marginkernels.optim.SGD` and :class:`marginkernels.optim.AdamW`, which leave every other row alone.
        sample_seed: of the draws; the count of draws is kept in ``state_dict``.
        log_q: correct the logits of drawn classes for the chance of being drawn; see :class:`marginkernels.sampling.Sampler`.
        device, dtype: of the weight and bias; float32 by default.

    Shapes:
        ``head(embeddings (N, D), labels (N,) int64)`` gives the loss: a scalar, or (N,) for ``reduction="none"``.

    With a process group of R ranks:
        - ``weight`` and ``bias`` are this rank's rows, ceil(C/R) of them from class ``class_start`` on; the last ranks hold fewer or none.
        - The loss is that of all ranks' rows, with the same bits on every rank, and so are ``stats`` and the margin's state; with
          ``reduction="none"`` it is that of this rank's own rows (N,). Scale or divide it alike on all ranks.
        - The gradients of ``weight`` and ``bias`` are those of that loss. The gradient of the embeddings is R times theirs, because DDP
          and FSDP average the backbone's gradient over ranks: so the backbone ends with the gradient of the loss. Wrap the backbone
          in them, never the head.
        - The class centers drawn at the start do not depend on the number of ranks.
        - ``torch.compile(head, fullgraph=True)`` works where ``batch_size`` is given and classes are not sampled; else the graph breaks.
        - Gradients accumulate over backward passes as ever; divide each loss by how many there are, and have DDP wait for the last
          (``no_sync``). For float16 use :class:`marginkernels.distributed.GradScaler`, so that all ranks skip the same steps.

    Attributes:
        weight: (C, D) Parameter, drawn from N(0, 0.01^2).
        bias: (C,) Parameter or None.
        class_start: the class that the first row of ``weight`` stands for.
        stats: what the last call saw, scalar tensors on the device (only reading them waits): ``target_cosine`` (mean cosine to the own
            class center), ``scale`` (mean), ``top1`` (share of rows whose target is the top class, margin apart), and the
            margin's own state (AdaCos's ``s``, CurricularFace's ``t``, SphereFace's ``iteration``).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

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
        backend: str = "auto",
        workspace_mb: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        batch_size: int | None = None,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        log_q: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.num_classes = positive("num_classes", num_classes)
        check_margin(margin)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        check_reduction(reduction)
        self.margin = margin.to(device)
        self.margin.bind(self.num_classes)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.workspace_mb = workspace_mb
        self.sampler = None
        if sample_rate != 1:
            self.sampler = Sampler(sample_rate, sample_seed, log_q).to(device)
        elif log_q:
            raise ValueError("log_q: expected False where every class takes part (sample_rate = 1), got True")
        self.shard = None
        if process_group is not None:
            from .distributed._shard import Shard

            self.shard = Shard(self.num_classes, process_group, batch_size)
            facts = {
                "embedding_dim": embedding_dim,
                "num_classes": num_classes,
                "margin": margin.fingerprint(),
                "bias": bool(bias),
                "dtype": str(dtype),
            }
            facts |= {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "batch_size": batch_size}
            facts |= {"sample_rate": sample_rate, "sample_seed": sample_seed, "log_q": log_q}
            self.shard.assert_same_on_all_ranks(**facts)
        elif batch_size is not None:
            raise ValueError(f"batch_size: expected None without a process_group, got {batch_size!r}")
        held = self.num_classes if self.shard is None else self.shard.stop - self.shard.start
        self.weight = nn.Parameter(torch.empty(held, self.embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(held, device=device, dtype=dtype)) if bias else None
        self.stats: dict[str, Tensor] = {}
        self._join()
        self.reset_parameters()

    def _join(self) -> None:
        """Hook into the gradients of the parameters."""
        if self.sampler is not None:
            for p in (self.weight, self.bias):
                if p is not None:
                    p.register_post_accumulate_grad_hook(self.sampler.mark)
        if self.shard is not None:
            for p in self.margin.parameters():
                self.shard.sum_gradients(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._join()  # a copied parameter has lost its hooks

    @property
    def class_start(self) -> int:
        """The class that the first row of ``weight`` stands for."""
        return 0 if self.shard is None else self.shard.start

    def reset_parameters(self) -> None:
        """Draw the class centers anew and set the bias to 0. With a process group every rank must call it."""
        if self.shard is None:
            nn.init.normal_(self.weight, std=INIT_STD)
        else:
            self.shard.draw_normal(self.weight, INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        losses, valid, self.stats = local_head_losses(
            embeddings,
            self.weight,
            labels,
            self.margin,
            self.bias,
            LossOptions(self.ignore_index, self.label_smoothing, self.backend, self.workspace_mb),
            shard=self.shard,
            sampler=self.sampler if self.training else None,
        )
        if self.shard is not None and self.reduction == "none":
            return self.shard.own_rows(losses, embeddings.shape[0])
        return reduce_losses(losses, valid, self.reduction)

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
            return nearest(embeddings, self.weight, self.bias, self.margin, k)
        rows = self.shard.gather(embeddings, torch.full((embeddings.shape[0],), -1, device=embeddings.device), -1, ask=True)[0]
        scores, classes = nearest(rows, self.weight, self.bias, self.margin, k, self.num_classes)
        return best(*self.shard.own_candidates(scores, classes + self.class_start, k, embeddings.shape[0]), k)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.shard is not None:  # a plain state dict of the whole head: take this rank's rows
            for name in ("weight", "bias"):
                whole = state_dict.get(prefix + name)
                if whole is not None and whole.shape[0] == self.num_classes != getattr(self, name).shape[0]:
                    state_dict[prefix + name] = whole[self.shard.start : self.shard.stop]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shown = (
            f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}, bias={self.bias is not None}, backend={self.backend!r}"
        )
        return shown if self.shard is None else f"{shown}, classes=[{self.shard.start}, {self.shard.stop}) of rank {self.shard.rank}"
