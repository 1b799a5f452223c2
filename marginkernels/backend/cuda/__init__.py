"""CUDA C++: ``cuda`` for compute capability 8.0 and later, ``hopper`` for 9.0."""

from .generic import CudaBackend
from .hopper import HopperBackend

__all__ = ["CudaBackend", "HopperBackend"]
