"""The float64 reference: loss and gradients from the formulas, streamed over the classes, so that it fits in memory at any size.

It shares no code with the package; ``tests/unit/test_benchmarks.py`` compares it with the package's own reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import HEADS, SCALE

CHUNK = 8192
#: Gradients of class centers are compared for the classes of all labels, and for at most twice this many others, evenly spaced, among them
#: the last class.
CLASSES = 65536


@dataclass(frozen=True)
class Expected:
    """The expected loss and gradients, all float64.

    Attributes:
        own: the classes that are some row's label.
        rest: a sample of the other classes.
    """

    loss: Tensor  # ()
    dx: Tensor  # (N, D)
    own: Tensor  # (K,)
    dw_own: Tensor  # (K, D)
    rest: Tensor  # (M,)
    dw_rest: Tensor  # (M, D)

    def errors(self, loss: Tensor, dx: Tensor, dw: Tensor) -> dict[str, float]:
        """||got - want|| / ||want|| of each output. The classes that are no row's label are compared separately: their gradients are
        small, and an error in them would be lost among those of the label classes."""
        want = {"loss": self.loss, "dx": self.dx, "dw_own": self.dw_own, "dw_rest": self.dw_rest}
        got = {"loss": loss, "dx": dx, "dw_own": dw[self.own], "dw_rest": dw[self.rest]}
        return {k: float((got[k].double() - v).norm() / v.norm().clamp_min(1e-300)) for k, v in want.items()}


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Normalized rows, and the norms (rows, 1), in float64."""
    v = v.double()
    norm = v.norm(dim=1, keepdim=True)
    return v / norm, norm


def expected(x: Tensor, w: Tensor, labels: Tensor, head: str, detached: bool = False) -> Expected:
    """The mean loss over the rows and its gradients; with ``detached`` the target gradient is that of dT/dcos = 1."""
    n, c = len(x), len(w)
    x, x_norm = _unit(x.detach())
    w = w.detach()
    own_center, _ = _unit(w[labels])
    cos = (x * own_center).sum(1).requires_grad_()
    target = HEADS[head].target(cos)
    slope = torch.ones_like(cos) if detached else torch.autograd.grad(target.sum(), cos)[0]
    target = target.detach()

    # |z| <= SCALE, so exp(z - SCALE) needs no running maximum in float64.
    total, center_sum = x.new_zeros(n), torch.zeros_like(x)
    for start in range(0, c, CHUNK):
        center, _ = _unit(w[start : start + CHUNK])
        weight = torch.exp(SCALE * (x @ center.T) - SCALE)
        inside = (labels >= start) & (labels < start + CHUNK)
        weight[inside, labels[inside] - start] = 0
        total += weight.sum(1)
        center_sum += weight @ center
    lse = total.log() + SCALE
    gap = lse - SCALE * target
    q = torch.sigmoid(gap)
    dx_unit = SCALE / n * q[:, None] * (center_sum / total[:, None] - slope[:, None] * own_center)
    dx = (dx_unit - (dx_unit * x).sum(1, keepdim=True) * x) / x_norm

    own = labels.unique()
    rest = torch.arange(c - 1, -1, -max(1, c // CLASSES), device=labels.device)
    rest = rest[~torch.isin(rest, own)]

    def dw(classes: Tensor) -> Tensor:
        center, norm = _unit(w[classes])
        weight = SCALE / n * q[:, None] * torch.exp(SCALE * (x @ center.T) - lse[:, None])
        weight = torch.where(labels[:, None] == classes, -(SCALE / n * q * slope)[:, None], weight)
        v = weight.T @ x
        return (v - (v * center).sum(1, keepdim=True) * center) / norm

    chunks = [dw(part) for part in rest.split(CHUNK)] or [x.new_zeros(0, x.shape[1])]
    return Expected(F.softplus(gap).mean(), dx, own, dw(own), rest, torch.cat(chunks))
