"""wespeaker's projections (``wespeaker/models/projections.py``), which give the loss in the place of the N x C logits.

wespeaker's executor takes ``(outputs, loss)`` from a projection where it gets a tuple: so do these. Of the outputs it computes the share of
rows that are right, for which :class:`Outputs` has what it reads. Nothing is imported from wespeaker but what cannot be fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import margins
from ..loss import HeadLosses
from ..margins import Annealing, Margin
from ._fusible import Fusible

__all__ = [
    "AddMarginProduct",
    "ArcMarginProduct",
    "ArcMarginProduct_intertopk_subcenter",
    "Outputs",
    "SphereFace2",
    "SphereProduct",
    "get_projection",
]


class Outputs:
    """In the place of a batch's logits: which rows are right. ``outputs.cpu().detach().numpy()``, which wespeaker's meter of the accuracy
    reads, is (N, C) with a 1 at the row's class or, where it is wrong, at another: one byte each, on the CPU.
    ``acc_meter.add(*outputs.right_or_not())`` tells the meter the same with two columns.

    Attributes:
        right: (N,) bool: the row's logit of its own class, margin included, is the highest.
        labels: (N,) int64.
        num_classes: C, the number of identities.
    """

    def __init__(self, right: Tensor, labels: Tensor, num_classes: int):
        self.right, self.labels, self.num_classes = right, labels, num_classes

    @property
    def accuracy(self) -> Tensor:
        """() float32 the share of rows that are right."""
        return self.right.to(torch.float32).mean()

    def detach(self) -> Outputs:
        return self

    def cpu(self) -> Outputs:
        return Outputs(self.right.cpu(), self.labels.cpu(), self.num_classes)

    def numpy(self) -> Any:
        """(N, C) uint8."""
        column = torch.where(self.right, self.labels, (self.labels + 1) % self.num_classes)
        found = torch.zeros(len(column), self.num_classes, dtype=torch.uint8)
        return found.scatter_(1, column[:, None], 1).numpy()

    def right_or_not(self) -> tuple[Any, Any]:
        """(N, 2) uint8, and for labels zeros (N,): the first of two classes is the right one."""
        right = self.right.cpu()
        return torch.stack([right, ~right], 1).to(torch.uint8).numpy(), torch.zeros(len(right), dtype=torch.int64).numpy()


class _Projection(Fusible, nn.Module):
    """A projection of ``in_features`` D to ``out_features`` C classes, with ``centers`` rows of ``weight`` each.

    Shapes:
        ``projection(input (N, D), label (N,) or (N, 1))`` gives ``(outputs, loss)``: :class:`Outputs`, and the mean loss ().
    """

    def __init__(self, in_features: int, out_features: int, margin: float, centers: int = 1):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(centers * out_features, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.centers = centers
        self.margin = margin

    @property
    def unfused_reason(self) -> str | None:
        """None: what cannot be fused is not made here."""
        return None

    def _fused(self) -> Margin:
        """The margin of the next step; no submodule: it has no state in ``state_dict``."""
        raise NotImplementedError

    def _right(self, found: HeadLosses) -> Tensor:
        assert found.of_rows is not None
        return found.of_rows.own > found.of_rows.other

    def forward(self, input: Tensor, label: Tensor) -> tuple[Outputs, Tensor]:
        labels = label.reshape(-1).long()
        options = {"reduction": "mean", "sub_centers": self.centers, "of_rows": True}
        found = self._losses(input, self.weight, labels, self._fused(), **options)
        return Outputs(self._right(found), labels, self.out_features), found.reduce("mean")


class _Updated(_Projection):
    """With a margin that a scheduler sets.

    Attributes:
        margin: as last given.
    """

    def __init__(self, in_features: int, out_features: int, scale: float, margin: float, centers: int = 1):
        super().__init__(in_features, out_features, margin, centers)
        self.scale = scale

    def _keep(self, margin: Margin) -> Margin:
        self.__dict__["_held"] = margin
        return margin

    def _fused(self) -> Margin:
        return cast(Margin, self.__dict__["_held"])

    def update(self, margin: float = 0.2) -> None:
        """Set the margin, as wespeaker's ``MarginScheduler`` does in every step.

        Raises:
            ValueError: it is out of the margin's range.
        """
        self._fused().set_margin(margin)
        self.margin = margin


class ArcMarginProduct(_Updated):
    """wespeaker's ArcFace: a margin in radians, ``cos(theta) - (1 - cos m)`` past pi or, with ``easy_margin``, no margin past pi/2."""

    def __init__(self, in_features: int, out_features: int, scale: float = 32.0, margin: float = 0.2, easy_margin: bool = False):
        super().__init__(in_features, out_features, scale, margin)
        self.easy_margin = easy_margin
        self._keep(margins.ArcFace(scale, margin, beyond_pi=_beyond(easy_margin)))

    def extra_repr(self) -> str:
        return _shown(self, "in_features", "out_features", "scale", "margin", "easy_margin")


class AddMarginProduct(_Updated):
    """wespeaker's CosFace."""

    def __init__(self, in_features: int, out_features: int, scale: float = 32.0, margin: float = 0.20):
        super().__init__(in_features, out_features, scale, margin)
        self._keep(margins.CosFace(scale, margin))

    def extra_repr(self) -> str:
        return _shown(self, "in_features", "out_features", "scale", "margin")


class ArcMarginProduct_intertopk_subcenter(_Updated):
    """wespeaker's ArcFace with K centers a class, row ``c K + k`` of ``weight``, and a penalty on each row's ``k_top`` nearest others.

    The penalty acts from the first :meth:`update` on, ``mp margin / 0.2`` radians, 0 for margins up to 0.001; with ``do_lm`` there is none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
        K: int = 3,
        mp: float = 0.06,
        k_top: int = 5,
        do_lm: bool = False,
    ):
        super().__init__(in_features, out_features, scale, margin, K)
        self.K, self.easy_margin, self.do_lm = K, easy_margin, do_lm
        self.mp, self.k_top = (0.0, 0) if do_lm else (mp, k_top)
        self._set(margin, 0.0)

    def _set(self, margin: float, penalty: float) -> None:
        beyond, held = _beyond(self.easy_margin), self.__dict__.get("_held")
        if self.k_top > 0 and penalty > 0:
            if isinstance(held, margins.InterTopK):
                held.set_margin(margin, penalty)
            else:
                self._keep(margins.InterTopK("arc", self.scale, margin, self.k_top, penalty, beyond))
        elif isinstance(held, margins.ArcFace):  # without a penalty the search for the nearest is for nothing
            held.set_margin(margin)
        else:
            self._keep(margins.ArcFace(self.scale, margin, beyond_pi=beyond))

    def update(self, margin: float = 0.2) -> None:
        """Set the margin and the penalty that follows from it."""
        self._set(margin, self.mp * (margin / 0.2) if margin > 0.001 else 0.0)
        self.margin = margin

    def extra_repr(self) -> str:
        return _shown(self, "in_features", "out_features", "scale", "margin", "easy_margin", "K", "mp", "k_top", "do_lm")


class SphereProduct(_Projection):
    """wespeaker's SphereFace with its annealing. The count of steps, ``iter``, is no part of ``state_dict``, as there."""

    def __init__(self, in_features: int, out_features: int, margin: int = 2):
        super().__init__(in_features, out_features, margin)
        self.base, self.gamma, self.power, self.LambdaMin = 1000.0, 0.12, 1, 5.0
        annealing = Annealing(self.base, self.gamma, self.power, self.LambdaMin)
        self.__dict__["_held"] = margins.SphereFace(margin, annealing=annealing)

    def _fused(self) -> margins.SphereFace:
        return cast(margins.SphereFace, self.__dict__["_held"])

    @property
    def iter(self) -> int:
        """How many steps there were; reading it waits for the device."""
        return int(self._fused().iteration)

    @iter.setter
    def iter(self, steps: int) -> None:
        self._fused().iteration.fill_(steps)

    def extra_repr(self) -> str:
        return _shown(self, "in_features", "out_features", "margin")


class _Biased(margins.SphereFace2):
    """SphereFace2 with exact slopes, the sum as it is (no factor of 50 / s), and a bias that the projection holds."""

    def __init__(self, num_classes: int, scale: float, margin: float, t: float, balance: float):
        super().__init__(num_classes, scale, margin, t, balance, loss_weight=scale, kind="C", gradient="exact")
        del self.b
        self.shared: list[Tensor] = []

    def reset_parameters(self) -> None:
        if "b" in self._parameters:
            super().reset_parameters()

    def class_bias(self) -> Tensor:
        return self.shared[0].reshape(()).double()


class SphereFace2(_Updated):
    """wespeaker's SphereFace2 of ``margin_type="C"``: exact gradients, no factor, a trained ``bias`` (1, 1) that starts at 0. Type "A"
    has margins on the other classes that are angles, for which there is no kernel: :func:`get_projection` gives wespeaker's own."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        lanbuda: float = 0.7,
        t: float = 3,
        margin_type: str = "C",
    ):
        if margin_type == "A":
            raise ValueError("margin_type: expected 'C', got 'A', which cannot be fused: get_projection() gives wespeaker's own")
        super().__init__(in_features, out_features, scale, margin)
        self.bias = nn.Parameter(torch.zeros(1, 1))
        self.lanbuda, self.t, self.margin_type = lanbuda, t, margin_type
        self._keep(_Biased(out_features, scale, margin, t, lanbuda))

    def _fused(self) -> Margin:
        margin = super()._fused()
        margin.shared = [self.bias]  # type: ignore[assignment]
        return margin

    def _right(self, found: HeadLosses) -> Tensor:
        """wespeaker's outputs are ``scale (cos - m)`` for the own class and ``scale cos`` for others."""
        assert found.of_rows is not None
        return found.of_rows.plain - self.scale * self.margin > found.of_rows.nearest

    def extra_repr(self) -> str:
        return _shown(self, "in_features", "out_features", "scale", "lanbuda", "margin", "t", "margin_type")


def _beyond(easy_margin: bool) -> str:
    return "easy" if easy_margin else "continuous"


def _shown(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)}" for name in names)


def get_projection(conf: Mapping[str, Any]) -> nn.Module:
    """wespeaker's ``get_projection``: the projection for ``conf["project_type"]``, with a margin of 0 until the scheduler sets one.

    ``add_margin``, ``arc_margin``, ``arc_margin_intertopk_subcenter``, ``sphere`` and ``sphereface2`` (``margin_type`` "C") are those of
    this module; any other is wespeaker's own and gives logits.

    Raises:
        ImportError: it is wespeaker's own, which is not there.
    """
    kind, size = conf["project_type"], (conf["embed_dim"], conf["num_class"])
    if kind == "add_margin":
        return AddMarginProduct(*size, scale=conf["scale"], margin=0.0)
    if kind == "arc_margin":
        return ArcMarginProduct(*size, scale=conf["scale"], margin=0.0, easy_margin=conf["easy_margin"])
    if kind == "arc_margin_intertopk_subcenter":
        more = {name: conf[name] for name in ("K", "mp", "k_top", "do_lm") if name in conf}
        return ArcMarginProduct_intertopk_subcenter(*size, scale=conf["scale"], margin=0.0, easy_margin=conf["easy_margin"], **more)
    if kind == "sphere":
        return SphereProduct(*size, margin=4)
    if kind == "sphereface2" and conf.get("margin_type", "C") != "A":
        more = {name: conf[name] for name in ("t", "lanbuda", "margin_type") if name in conf}
        return SphereFace2(*size, scale=conf["scale"], margin=0.0, **more)
    try:
        from wespeaker.models import projections
    except ImportError as error:
        raise ImportError(
            f"project_type: {kind!r} is not fused and needs wespeaker itself: pip install git+https://github.com/wenet-e2e/wespeaker"
        ) from error
    return cast(nn.Module, projections.get_projection(conf))
