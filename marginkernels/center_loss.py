"""Center loss, which stands beside a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .core.labels import checked_labels
from .core.numerics import reduce_losses
from .core.validation import check_embeddings, check_labels_shape, check_reduction, positive


class CenterLoss(nn.Module):
    """Center loss ``1/2 |x_i - c_y|^2`` (Wen et al., ECCV 2016, eq. 2): pulls each embedding to a learned center of its identity.

    The centers are a Parameter trained by the optimizer. Its gradient is sparse in effect (only the rows of the batch's identities
    are not zero) but dense in form; with ``sparse=True`` it is a sparse tensor, for SGD and SparseAdam.

    Args:
        num_classes: C, the number of identities.
        embedding_dim: D, the size of an embedding.
        reduction: ``"none"``, ``"mean"`` over the rows not ignored (0 where there is none) or ``"sum"``.
        ignore_index: rows with this label have no loss and no gradient, whatever they hold.
        sparse: give the centers' gradient as a sparse tensor.
        device, dtype: of the centers.

    Shapes:
        ``loss(embeddings (N, D), labels (N,) int64)`` gives a scalar, or (N,) for ``"none"``; float32, or float64 for float64.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_classes = positive("num_classes", num_classes)
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        check_reduction(reduction)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.sparse = sparse
        self.centers = nn.Parameter(torch.randn(self.num_classes, self.embedding_dim, device=device, dtype=dtype))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_embeddings(embeddings, self.centers, name="centers")
        check_labels_shape(labels, embeddings)
        labels = checked_labels(labels, self.num_classes, self.ignore_index)
        valid = labels >= 0
        own = nn.functional.embedding(torch.where(valid, labels, 0), self.centers, sparse=self.sparse)
        dtype = torch.promote_types(torch.float32, torch.promote_types(embeddings.dtype, own.dtype))
        # Masked before the square, so that NaN in an ignored row reaches no gradient.
        difference = torch.where(valid[:, None], embeddings.to(dtype) - own.to(dtype), 0)
        losses = 0.5 * difference.square().sum(1)
        return reduce_losses(losses, valid, self.reduction)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}"
