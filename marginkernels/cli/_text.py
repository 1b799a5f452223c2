"""Shared by the commands: plain-text tables, and argument types of ``argparse``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch


def usable_device(name: str) -> str:
    """The ``argparse`` type of ``--device``: a name such as ``cpu`` or ``cuda:1`` of a device that PyTorch can use here.

    Raises:
        argparse.ArgumentTypeError: PyTorch cannot use it; the message says why.
    """
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that PyTorch can use here, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return name


def whole_number(text: str) -> int:
    """The ``argparse`` type of a count that may be written as ``30e6``."""
    return int(float(text))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns under a header; columns whose index is in ``right`` are right-aligned."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * w for w in widths])
    align = [str.rjust if i in right else str.ljust for i in range(len(header))]
    return "\n".join("  ".join(f(v, w) for f, v, w in zip(align, row, widths, strict=True)).rstrip() for row in cells)
