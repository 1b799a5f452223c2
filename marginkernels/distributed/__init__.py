"""For class-parallel heads (``MarginHead(..., process_group=...)``): checkpoints, export and import of class centers, gradient clipping
and scaling."""

from typing import Any

from .. import _deprecated
from .centers import export_centers, full_state_dict, import_centers
from .checkpoint import latest, load, save
from .clipping import clip_grad_norm_
from .grad_scaler import GradScaler

__all__ = ["GradScaler", "clip_grad_norm_", "export_centers", "full_state_dict", "import_centers", "latest", "load", "save"]


def __getattr__(name: str) -> Any:
    new = _deprecated.DISTRIBUTED.get(name)
    if new is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _deprecated.warn(f"{__name__}.{name}", f"{__name__}.{new}")
    return globals()[new]
