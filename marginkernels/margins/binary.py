"""Margins of a binary classifier for each class: a sum of softplus in the place of the log-sum-exp, and a bias that all classes share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.nontarget import NonTarget
from ..core.types import Reduction
from ..core.validation import integer
from .angles import angle, detached
from .angular import checked_gradient
from .base import BatchInfo, Margin, _arguments, check_range, setting


class Binary(Margin):
    """Base of the binary margins. With z the logits, b included, each row's loss is

        ``loss_factor (target_weight log(1 + exp(-z_y)) + other_weight sum_{j != y} log(1 + exp(z_j)))``.

    ``b`` is a parameter of shape (), trained with the embeddings; with a process group all ranks have it, and its gradient is summed over
    them. There is no distribution over the classes, hence no focal factor, label smoothing, class weights, mixed labels or ``log_q``.

    Args:
        num_classes: C, from which b starts; a head of another C raises a ``ValueError``.
    """

    reduction = Reduction.SOFTPLUS_SUM
    _state_names = ("b",)
    margin: float = setting("margin", "m, a float; assigning is :meth:`set_margin`.")

    def __init__(self, num_classes: int, scale: float):
        super().__init__(check_range("scale", scale, 0.0, open_low=True))
        self.num_classes = integer("num_classes", num_classes, 1)
        self.b = nn.Parameter(torch.empty((), dtype=torch.float32))

    def start(self) -> float:
        """What b starts at."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.b.fill_(self.start())

    def bind(self, num_classes: int) -> None:
        if num_classes != self.num_classes:
            raise ValueError(
                f"num_classes: expected {num_classes} in {type(self).__name__}, as many as the head has, got {self.num_classes}, from "
                "which the bias starts"
            )

    def _numbers(self) -> Iterable[float]:
        return (self.margin,)

    def set_margin(self, margin: float) -> None:
        """Change m; b stays as it is. See :meth:`Margin.set_margin`."""
        self._change(margin=margin)


class SphereFace2(Binary):
    """SphereFace2: ``lw/s (lambda log(1 + exp(-z_y)) + (1 - lambda) sum_{j != y} log(1 + exp(z_j)))`` with margins on
    ``g(cos) = 2 ((cos + 1) / 2)^t - 1`` (Wen et al., ICLR 2022).

    - ``kind="C"``: ``z_y = s (g(cos(theta_y)) - m) + b`` and ``z_j = s (g(cos(theta_j)) + m) + b``.
    - ``kind="A"``: ``z_y = s g(cos(min(theta_y + m, pi))) + b`` and ``z_j = s g(cos(theta_j)) + b``.
    - ``kind="M"``: ``z_y = s g(cos(min(m theta_y, pi))) + b`` and the same ``z_j``.

    Args:
        num_classes: C; the bias of a single class starts as that of two.
        scale: s > 0, r in the paper.
        margin: m, in [0, 2] for ``"C"``, radians in [0, pi) for ``"A"``, > 0 for ``"M"``, where 1 is no margin and less eases.
        t: of g, in [1, 10].
        balance: lambda in (0, 1): the weight of a row's own class.
        loss_weight: lw > 0; 1 is the paper's loss, 50 the published code's.
        kind: one of the three.
        gradient: ``"detached"``: g and the margin change values and not slopes, which are 1, as in the published code (it calls that
            characteristic gradient detachment); ``"exact"``: the derivative.

    ``b`` starts where the loss is smallest if all cosines are 0 (the paper's appendix).
    """

    def __init__(
        self,
        num_classes: int,
        scale: float = 40.0,
        margin: float = 0.4,
        t: float = 3.0,
        balance: float = 0.7,
        loss_weight: float = 50.0,
        kind: str = "C",
        gradient: str = "detached",
    ):
        super().__init__(num_classes, scale)
        if kind not in ("C", "A", "M"):
            raise ValueError(f"kind: expected 'C', 'A' or 'M', got {kind!r}")
        self.kind, self.gradient = kind, checked_gradient(gradient)
        self.margin = margin
        self.t: float = check_range("t", t, 1.0, 10.0)
        self.balance = check_range("balance", balance, 0.0, math.nextafter(1, 0), open_low=True)
        self.loss_weight = check_range("loss_weight", loss_weight, 0.0, open_low=True)
        self.target_weight, self.other_weight = self.balance, 1 - self.balance
        self.loss_factor = self.loss_weight / self.scale
        self.non_target = NonTarget.POWER if gradient == "exact" else NonTarget.POWER_DETACHED
        self._hold()
        self.reset_parameters()

    def _checked(self, name: str, value: Any) -> float:
        if self.kind == "M":
            return check_range("margin", value, 0.0, open_low=True)
        return check_range("margin", value, 0.0, 2.0 if self.kind == "C" else math.nextafter(math.pi, 0))

    def start(self) -> float:
        def g(theta: float) -> float:
            return 2 * math.pow((math.cos(min(theta, math.pi)) + 1) / 2, self.t) - 1

        right, m, s = math.pi / 2, self.margin, self.scale
        if self.kind == "C":
            own, other = s * (g(right) - m), s * (g(right) + m)
        else:
            own, other = s * g(right + m if self.kind == "A" else m * right), s * g(right)
        odds = self.balance / ((1 - self.balance) * max(self.num_classes - 1, 1))  # without another class it would have no end
        # odds sigmoid(-(own + b)) = sigmoid(other + b) is a quadratic equation in exp(b); of its root, the form that does not cancel.
        root = math.sqrt((1 - odds) ** 2 + 4 * odds * math.exp(own - other))
        return math.log(2 * odds / (1 - odds + root)) - other if odds < 1 else math.log((odds - 1 + root) / 2) - own

    def class_bias(self) -> Tensor:
        return self.b.double()

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        """(N,) the margin of the other classes."""
        (margin,) = self._read(cos)
        return (margin if self.kind == "C" else torch.zeros_like(margin)).expand(cos.shape)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        (margin,) = self._read(cos)
        at, slope = cos, torch.ones_like(cos)
        if self.kind != "C":
            theta, dtheta = angle(cos)
            phi = theta + margin if self.kind == "A" else theta * margin
            rate = dtheta if self.kind == "A" else dtheta * margin
            at, slope = phi.clamp_max(math.pi).cos(), torch.where(phi < math.pi, -phi.sin() * rate, 0.0)
        base = ((at + 1) / 2).clamp_min(0)
        value = 2 * base**self.t - 1
        if self.kind == "C":
            value = value - margin
        return detached(cos, value) if self.gradient == "detached" else (value, slope * self.t * base ** (self.t - 1))

    def extra_repr(self) -> str:
        shown = ("num_classes", "scale", "margin", "t", "balance", "loss_weight", "kind", "gradient")
        return _arguments({name: getattr(self, name) for name in shown})


class UniFace(Binary):
    """UniFace: ``log(1 + exp(b - s (cos(theta_y) - m))) + l sum_{j != y} log(1 + exp(s cos(theta_j) - b))`` with one threshold b that all
    classes and rows share (Zhou et al., ICCV 2023, the unified cross-entropy).

    Args:
        num_classes: C, the number of identities.
        scale: s > 0.
        margin: m in [0, 2], a cosine.
        negative_weight: l > 0.
        clamp: clip both exponents to [-s, s], as the published code does: beyond, the loss is constant, and neither a cosine nor b has a
            gradient. Not with biases of the classes.

    ``b`` starts at ``log(10 C)``.
    """

    def __init__(self, num_classes: int, scale: float = 64.0, margin: float = 0.4, negative_weight: float = 1.0, clamp: bool = False):
        super().__init__(num_classes, scale)
        self.margin = margin
        self.negative_weight = check_range("negative_weight", negative_weight, 0.0, open_low=True)
        self.other_weight = self.negative_weight
        self.clamp = bool(clamp)
        if self.clamp:
            self.non_target = NonTarget.CLIPPED
        self._hold()
        self.reset_parameters()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 0.0, 2.0)

    def start(self) -> float:
        return math.log(10 * self.num_classes)

    def class_bias(self) -> Tensor:
        return -self.b.double()

    def _end(self, sign: float) -> Tensor:
        """() the cosine at which the exponent is clipped."""
        return self.b.double() / self.scale + sign

    @property
    def t(self) -> Tensor:  # type: ignore[override]
        """() the cosine above which the exponents of the other classes are clipped, where ``clamp`` is on."""
        return self._end(1.0)

    def threshold(self, cos: Tensor, batch: BatchInfo) -> Tensor:
        return self._end(-1.0).expand(cos.shape).to(cos.dtype)

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        (margin,) = self._read(cos)
        value, slope = cos - margin, torch.ones_like(cos)
        if self.clamp:
            low, high = self._end(-1.0).to(cos.dtype), self._end(1.0).to(cos.dtype)
            below, above = value < low, value > high
            value = torch.where(below, low, torch.where(above, high, value))
            slope = torch.where(below | above, 0.0, slope)
        return value, slope

    def extra_repr(self) -> str:
        shown = ("num_classes", "scale", "margin", "negative_weight", "clamp")
        return _arguments({name: getattr(self, name) for name in shown})
