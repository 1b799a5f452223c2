"""The registry of providers: the fused backends of this package, and the peers. Each does the same work, or says why it cannot."""

from __future__ import annotations

from .base import Provider, Work
from .cut import CutCrossEntropy
from .eager import CompiledEager, Eager
from .liger import Liger
from .metric_learning import MetricLearning
from .ours import ours
from .partial_fc import PartialFC
from .quack import Quack
from .torch_linear import TorchLinearCrossEntropy

PEERS: tuple[Provider, ...] = (
    Eager(),
    CompiledEager(),
    MetricLearning(),
    PartialFC(),
    TorchLinearCrossEntropy(),
    CutCrossEntropy(),
    Liger(),
    Quack(),
)


def providers() -> dict[str, Provider]:
    """Every provider by name. Eager comes first, because its error can widen the tolerance of the others."""
    return {p.name: p for p in (*PEERS, *ours())}


__all__ = ["PEERS", "Provider", "Work", "providers"]
