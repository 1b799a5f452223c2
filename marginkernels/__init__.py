"""Margin-softmax heads for huge identity counts, fused: normalise, product, margin, softmax and cross-entropy without the logits."""

from . import optim
from .backend import backends
from .center import CenterLoss
from .functional import head_losses, margin_cross_entropy
from .head import MarginHead
from .margins import *  # noqa: F403
from .margins import __all__ as _margins

__version__ = "0.1.0"
__all__ = ["CenterLoss", "MarginHead", "backends", "head_losses", "margin_cross_entropy", "optim", *_margins]
