"""What the shims have in common: whether a call can be fused, and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import HeadLosses, LossOptions, local_head_losses, workspace_bytes
from ..margins import Margin


class Fusible:
    """A loss or head of another library that is computed without the N x C logits where that can be; comes first among the bases.

    Attributes:
        fuse: False computes as the library does, for instance for a second derivative, which the fused losses do not have.
        backend: see :func:`marginkernels.margin_cross_entropy`.
        workspace_mb: see :func:`marginkernels.margin_cross_entropy`.
    """

    fuse: bool = True
    backend: str = "auto"
    workspace_mb: float | None = None
    #: The library's class, and those of its methods for which the fused loss stands: a subclass that overrides one is not fused.
    _library: type
    _replaced: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether the next call is computed without the N x C logits; where not, :attr:`unfused_reason` says why."""
        return self.unfused_reason is None

    @property
    def unfused_reason(self) -> str | None:
        """Why the next call is computed by the library's own code, or None where it is fused."""
        if not self.fuse:
            return "fuse is False"
        for name in self._replaced:
            if name in self.__dict__ or getattr(type(self), name) is not getattr(self._library, name):
                return f"{name} is not {self._library.__name__}'s own"
        reason = self._unfused()
        if reason is None:
            try:
                self._margin()
            except (TypeError, ValueError) as error:
                return str(error)
        return reason

    def _unfused(self) -> str | None:
        """What else stands against it, in the attributes as they are now."""
        return None

    def _margin(self) -> Margin:
        """The margin for the attributes as they are now; made anew where one has changed."""
        raise NotImplementedError

    def _kept(self, settings: object, make: Callable[[], Margin]) -> Margin:
        """The margin that ``make`` gave for these ``settings``, made anew where they differ from the last ones. In no module's list: it has
        no state."""
        held: tuple[object, Margin] | None = self.__dict__.get("_held")
        if held is None or held[0] != settings:
            held = self.__dict__["_held"] = settings, make()
        return held[1]

    def _losses(self, embeddings: Tensor, weight: Tensor, labels: Tensor, margin: Margin, **options: Any) -> HeadLosses:
        """``embeddings`` (N, D), ``weight`` (C K, D), ``labels`` (N,); further :class:`LossOptions` by name."""
        given = LossOptions(backend=self.backend, workspace_bytes=workspace_bytes(self.workspace_mb), **options)
        return local_head_losses(embeddings, weight, labels, margin.to(embeddings.device), None, given)


def plain_entropy(module: object, reduction: str | None = None) -> bool:
    """Whether ``module`` is torch's cross-entropy as it comes, with this ``reduction`` or, where that is None, any."""
    if type(module) is not nn.CrossEntropyLoss:
        return False
    settings = (module.ignore_index, module.label_smoothing, module.weight)
    return settings == (-100, 0.0, None) and reduction in (None, module.reduction)


def uncast(device: torch.device) -> torch.autocast:
    """Without autocast, for libraries whose heads switch it off."""
    return torch.autocast(device.type, enabled=False)
