"""The backends: each a way to run the row pass and the class pass. :mod:`.base` says what both are, :mod:`.registry` which one serves."""

from .base import Backend
from .records import SEARCH, features
from .registry import FUSED, NAMES, Agreement, agreement, backends, get, offer, resolve

__all__ = ["FUSED", "NAMES", "SEARCH", "Agreement", "Backend", "agreement", "backends", "features", "get", "offer", "resolve"]
