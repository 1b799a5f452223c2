"""The two passes as Triton kernels; Triton itself is imported by the first call."""

from .backend import TritonBackend, interpreting
from .heuristics import use_tiles

__all__ = ["TritonBackend", "interpreting", "use_tiles"]
