"""The interface of a provider: something that computes the mean loss of a case and its gradients in embeddings and class centers."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import DTYPES, Case
from ..heads import HEADS


@dataclass(frozen=True)
class Work:
    """One provider set up for one case.

    Attributes:
        loss: x (N, D), labels (N,) -> mean loss, a scalar with gradients.
        weight: the leaf whose ``grad`` the step fills.
        transposed: whether ``weight`` has the layout (D, C) instead of (C, D).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    transposed: bool = False

    def weight_gradient(self) -> Tensor:
        """The gradient of the class centers, (C, D)."""
        assert self.weight.grad is not None
        return self.weight.grad.T if self.transposed else self.weight.grad


class Provider(ABC):
    """One competitor in a benchmark: a backend of this package, or a peer."""

    name: str
    #: One line that says what it is.
    note = ""
    #: The distribution it comes from, for the version in the record; None for what is part of this repository or of PyTorch.
    package: str | None = None
    heads: tuple[str, ...] = tuple(HEADS)
    device_types: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    #: Heads whose target gradient it computes as for an unchanged cosine (dT/dcos = 1); the reference does the same for them.
    detached_heads: tuple[str, ...] = ()
    #: The memory of one step beyond inputs and gradients, as a number of float32 matrices, measured at 100,000 classes: of N x C while the
    #: logits exist (together with one of C x D), and of C x D while the gradient of the centers goes through their normalization. On a CPU,
    #: a case that would not fit by this estimate is recorded as out of memory, because running it could take the machine down.
    logit_copies = 0.0
    weight_copies = 0.0
    #: Whether it is a backend of this package.
    ours = False

    def unavailable_reason(self, device: str) -> str | None:
        """Why it cannot run on this machine, or None."""
        if device not in self.device_types:
            return f"runs on {' and '.join(self.device_types)} only"
        if self.package is not None and self.version() is None:
            return f"{self.package} is not installed (pip install {self.package})"
        return None

    def unsupported_reason(self, case: Case, device: str) -> str | None:
        """Why it cannot do this case, or None. Asked only where :meth:`unavailable_reason` is None."""
        if case.head not in self.heads:
            return f"has no margin: {' and '.join(self.heads)} only"
        if case.dtype not in self.dtypes:
            return f"has no {case.dtype}"
        return None

    def version(self) -> str | None:
        """The version of its package; None where that is not installed, or where it has none."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None

    def expected_bytes(self, case: Case) -> int:
        """The estimated peak memory of one step beyond inputs and gradients; 0 where nothing grows with C."""
        if not self.logit_copies and not self.weight_copies:
            return 0
        return int(4 * case.C * max(self.logit_copies * case.N + case.D, self.weight_copies * case.D))

    @abstractmethod
    def build(self, case: Case, w: Tensor) -> Work:
        """Set up for ``case`` with the class centers ``w`` (C, D), a leaf that requires gradients."""


def unit_sides(x: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalized embeddings (N, D) and class centers (C, D) in the dtype of the product, for libraries that take plain x and w."""
    normalize = torch.nn.functional.normalize
    return normalize(x.float()).to(dtype), normalize(w).to(dtype)
