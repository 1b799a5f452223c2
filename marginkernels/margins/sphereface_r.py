"""SphereFace with real multiples of the angle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.nontarget import NonTarget
from .angles import angle, detached
from .angular import checked_gradient
from .base import BatchInfo, Margin, _arguments, check_range, setting

VERSIONS = ("v0", "v1", "v2")
NORMALIZATIONS = ("hard", "none", "soft")


class SphereFaceR(Margin):
    """SphereFace-R: a multiplicative margin with any real m (Liu et al., "SphereFace Revived", TPAMI 2022).

    - ``"v0"``: target ``(-1)^k cos(m theta) - 2k`` with k = floor(m theta / pi), other classes ``cos(theta)``.
    - ``"v1"``: target ``cos(min(m theta, pi))``, other classes ``cos(theta)``.
    - ``"v2"``: target ``cos(theta)``, other classes ``cos(theta_j / m)``.

    Args:
        version: one of the three.
        scale: s > 0. With ``normalization="soft"`` it is the norm that embeddings are drawn to, with ``"none"`` it is not used.
        margin: m >= 1.
        normalization: ``"hard"``: logits are s times the above. ``"none"``: ``|x|`` times it. ``"soft"``: ``|x|`` times it, and each
            row's loss has the term ``t | |x| - s |``. The norm is differentiated.
        loss_weight: None, or what the cross-entropy is multiplied by, > 0; divided by s unless the normalization is ``"none"``. The
            published code has 50. The term of ``"soft"`` is not multiplied.
        t: >= 0, see ``normalization``.
        gradient: ``"detached"``: margins change values and not slopes, which are 1, as in the published code (it calls that
            characteristic gradient detachment); ``"exact"``: the derivative. That of ``"v2"`` is held back within 3.6 degrees of theta_j =
            pi, where it goes to infinity.
        focal_gamma: see :class:`Margin`.
    """

    margin: float = setting("margin", "m, a float; assigning is :meth:`set_margin`.")

    def __init__(
        self,
        version: str = "v0",
        scale: float = 30.0,
        margin: float = 1.5,
        normalization: str = "hard",
        loss_weight: float | None = None,
        t: float = 0.01,
        gradient: str = "detached",
        *,
        focal_gamma: float = 0.0,
    ):
        super().__init__(check_range("scale", scale, 0.0, open_low=True), focal_gamma=focal_gamma)
        if version not in VERSIONS:
            raise ValueError(f"version: expected one of {VERSIONS}, got {version!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization: expected one of {NORMALIZATIONS}, got {normalization!r}")
        self.version, self.normalization, self.gradient = version, normalization, checked_gradient(gradient)
        self.margin = margin
        self.loss_weight = None if loss_weight is None else check_range("loss_weight", loss_weight, 0.0, open_low=True)
        if self.loss_weight is not None:
            self.loss_factor = self.loss_weight / (1.0 if normalization == "none" else self.scale)
        self.norm_weight = check_range("t", t, 0.0)
        if version == "v2":
            self.non_target = NonTarget.ANGLE_PART if gradient == "exact" else NonTarget.ANGLE_PART_DETACHED
        self._hold()

    def _checked(self, name: str, value: Any) -> float:
        return check_range("margin", value, 1.0)

    def _numbers(self) -> Iterable[float]:
        return self.margin, 1 / self.margin

    def set_margin(self, margin: float) -> None:
        """Change m; see :meth:`Margin.set_margin`."""
        self._change(margin=margin)

    @property
    def t(self) -> Tensor:  # type: ignore[override]
        """1/m, of shape (): what the angles of non-target classes are multiplied by in ``"v2"``."""
        return self._held[1]

    def row_scale(self, batch: BatchInfo) -> float | Tensor:
        return self.scale if self.normalization == "hard" else batch.norm

    def regularizer(self, batch: BatchInfo) -> Tensor | None:
        return self.norm_weight * (batch.norm - self.scale).abs() if self.normalization == "soft" else None

    def target(self, cos: Tensor, batch: BatchInfo) -> tuple[Tensor, Tensor]:
        if self.version == "v2":
            return cos, torch.ones_like(cos)
        margin, _ = self._read(cos)
        theta, dtheta = angle(cos)
        phi = margin * theta
        if self.version == "v1":
            value, slope = phi.clamp_max(math.pi).cos(), torch.where(phi < math.pi, -margin * phi.sin() * dtheta, 0.0)
        else:
            k = (phi.detach() / math.pi).floor()
            sign = 1 - 2 * (k % 2)
            value, slope = sign * phi.cos() - 2 * k, -sign * margin * phi.sin() * dtheta
        return detached(cos, value) if self.gradient == "detached" else (value, slope)

    def extra_repr(self) -> str:
        shown = ("version", "scale", "margin", "normalization", "loss_weight")
        last = {"t": self.norm_weight, "gradient": self.gradient, "focal_gamma": self.focal_gamma}
        return _arguments({name: getattr(self, name) for name in shown} | last)
