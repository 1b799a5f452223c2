"""Optimizers for the heads: with row-sparse updates (:mod:`.rows`), and with the class pass inside the step (:mod:`.fused`)."""

from .fused import FusedAdamW, FusedSGD
from .rows import SGD, AdamW

__all__ = ["SGD", "AdamW", "FusedAdamW", "FusedSGD"]
