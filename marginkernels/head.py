"""The heads as modules: class centres, margin and state in one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import FLOATS, check_reduction, positive
from .functional import head_losses, reduce
from .margins import Margin
from .topk import nearest

#: Standard deviation of the class centres at the start, as in insightface.
INIT_STD = 0.01


class MarginHead(nn.Module):
    """A classification head: class centres ``weight`` (C, D), a margin, and the loss of both, never holding the N x C logits.

    Args:
        embedding_dim: D.
        num_classes: C.
        margin: a :class:`Margin`.
        bias: learn one bias per class (C,), starting at 0.
        reduction, ignore_index, label_smoothing, backend, workspace_mb: see :func:`margin_cross_entropy`.
        device, dtype: of the weight and bias; float32 by default.

    Shapes:
        ``head(embeddings (N, D), labels (N,) int64)`` gives the loss: a scalar, or (N,) for ``reduction="none"``.

    Attributes:
        weight: (C, D) Parameter, drawn from N(0, 0.01^2).
        bias: (C,) Parameter or None.
        stats: what the last call saw, scalar tensors on the device (only reading them waits): ``target_cosine`` (mean cosine to the own
            class centre), ``scale`` (mean), ``top1`` (share of rows whose target is the top class, margin apart), and the
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
        workspace_mb: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.num_classes = positive("num_classes", num_classes)
        if not isinstance(margin, Margin):
            raise TypeError(f"margin: expected an instance of mk.Margin such as mk.ArcFace(), got {margin!r}")
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
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.num_classes, device=device, dtype=dtype)) if bias else None
        self.stats: dict[str, Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class centres anew and set the bias to 0."""
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        losses, valid, self.stats = head_losses(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
            workspace_mb=self.workspace_mb,
        )
        return reduce(losses, valid, self.reduction)

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
        """The k classes nearest to each embedding, streamed over the class centres.

        Args:
            embeddings: (N, D).
            k: at most C.

        Returns:
            scores (N, k) falling, in float32 (float64 for float64), and classes (N, k) int64. A score is what training compares
            before scale and margin: the cosine for cosine heads, ``x . w_j`` on the sides that the margin does not normalise;
            with a bias, the logit without margin. Among equal scores the lower class comes first.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        return nearest(embeddings, self.weight, self.bias, self.margin, k)

    def extra_repr(self) -> str:
        return f"embedding_dim={self.embedding_dim}, num_classes={self.num_classes}, bias={self.bias is not None}, backend={self.backend!r}"
