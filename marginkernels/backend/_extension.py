"""Loading of the compiled extensions, each of which may be missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The numbers by which a dtype is handed to C++; csrc/scalar.h has the same.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def load(name: str) -> tuple[Any, str]:
    """The extension module ``marginkernels.<name>`` and "", or None and why it is missing."""
    try:
        return importlib.import_module(f"marginkernels.{name}"), ""
    except ImportError as error:
        report = Path(__file__).parents[1] / f"{name}.txt"
        return None, report.read_text().strip() if report.exists() else str(error)


def missing(name: str, why: str, compiler: str) -> str:
    """What to tell the user of an extension that is not there."""
    return f"the extension marginkernels.{name} is missing ({why}); install again with {compiler} on the PATH"


def address(v: Tensor | None) -> int | None:
    """The address of a tensor's data, None where there is nothing in it."""
    return None if v is None or v.numel() == 0 else v.data_ptr()
