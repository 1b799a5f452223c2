"""Margin-softmax heads for huge identity counts, fused: normalize, product, margin, softmax and cross-entropy without the logits."""

from __future__ import annotations

import importlib
from typing import Any

from . import _deprecated, optim
from ._version import __version__
from .backend import backends
from .center_loss import CenterLoss
from .core.labels import raise_pending_label_errors
from .head import MarginHead
from .loss import head_losses, margin_cross_entropy
from .margins import (
    AdaCos,
    AdaFace,
    Annealing,
    ArcFace,
    BatchInfo,
    Circle,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    InterTopK,
    L2Softmax,
    LSoftmax,
    MagFace,
    Margin,
    MVSoftmax,
    NonTarget,
    NormFace,
    Softmax,
    SphereFace,
    SphereFace2,
    SphereFaceR,
    UniFace,
    margins_from_counts,
)
from .monitor import log_stats
from .retrieval import topk

__all__ = [
    "AdaCos",
    "AdaFace",
    "Annealing",
    "ArcFace",
    "BatchInfo",
    "CenterLoss",
    "Circle",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InterTopK",
    "L2Softmax",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "MarginHead",
    "NonTarget",
    "NormFace",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "SphereFaceR",
    "UniFace",
    "__version__",
    "backends",
    "head_losses",
    "log_stats",
    "margin_cross_entropy",
    "margins_from_counts",
    "optim",
    "raise_pending_label_errors",
    "topk",
]

#: Parts that are loaded on first use.
_LAZY = ("distributed", "testing")

_deprecated.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    return _deprecated.attribute(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
