"""What a provider is: a way to get the mean loss of a case and its gradients in the embeddings and the class centres."""

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
        transposed: whether ``weight`` is (D, C), the provider's own layout, instead of (C, D).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    transposed: bool = False

    def weight_gradient(self) -> Tensor:
        """(C, D)."""
        return self.weight.grad.T if self.transposed else self.weight.grad


class Provider(ABC):
    """A row of the table."""

    name: str
    #: What it is, in a line.
    note = ""
    #: The distribution it comes from, for the version in the record; None for what this repository or PyTorch holds.
    package: str | None = None
    heads: tuple[str, ...] = tuple(HEADS)
    device_types: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    #: Heads whose target gradient it takes as that of an unchanged cosine (dT/dcos = 1), so that it is compared with just that.
    detached_heads: tuple[str, ...] = ()
    #: What one step holds beyond inputs and gradients, as measured at 100,000 classes, in float32 matrices: of N x C while the logits live
    #: (beside one of C x D), of C x D when the centres' gradient goes through their normalisation. On a CPU a case that would not fit is
    #: out of memory by this estimate, because trying would take the machine down.
    logit_copies = 0.0
    weight_copies = 0.0
    ours = False

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run on this machine, or None."""
        if device not in self.device_types:
            return f"runs on {' and '.join(self.device_types)} only"
        if self.package is not None and self.version() is None:
            return f"{self.package} is not installed (pip install {self.package})"
        return None

    def refuses(self, case: Case, device: str) -> str | None:
        """Why it cannot do this case, or None. Asked only where :meth:`unavailable` is None."""
        if case.head not in self.heads:
            return f"has no margin: {' and '.join(self.heads)} only"
        if case.dtype not in self.dtypes:
            return f"has no {case.dtype}"
        return None

    def version(self) -> str | None:
        """Of its package; None where that is not installed, or where there is none."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None

    def expected_bytes(self, case: Case) -> int:
        """What one step holds at its peak beyond inputs and gradients, estimated; 0 where nothing grows with C."""
        if not self.logit_copies and not self.weight_copies:
            return 0
        return int(4 * case.C * max(self.logit_copies * case.N + case.D, self.weight_copies * case.D))

    @abstractmethod
    def build(self, case: Case, w: Tensor) -> Work:
        """Set up for ``case`` with the class centres ``w`` (C, D), a leaf that requires a gradient."""


def unit_sides(x: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised embeddings (N, D) and class centres (C, D) in the product's dtype, for libraries that only know x and w."""
    normalize = torch.nn.functional.normalize
    return normalize(x.float()).to(dtype), normalize(w).to(dtype)
