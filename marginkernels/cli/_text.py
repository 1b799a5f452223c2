"""Shared by the commands: plain-text tables, and argument types of ``argparse``.

Every type raises ``argparse.ArgumentTypeError`` with "expected ..., got ...", which argparse prints behind the argument's name before it
exits with status 2: so a bad value is reported before any work is done.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

#: The largest seed: what both PyTorch's and numpy's generators take.
MAX_SEED = 2**63 - 1


def usable_device(name: str) -> str:
    """The ``argparse`` type of ``--device``: a name such as ``cpu`` or ``cuda:1`` of a device that PyTorch can use here.

    Raises:
        argparse.ArgumentTypeError: PyTorch cannot use it; the message says why.
    """
    try:
        torch.ones(1, device=name).item()
    except Exception as error:  # some device types of PyTorch raise ImportError or AttributeError where their package is missing
        why = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"expected a device that PyTorch can use here, got {name!r} ({why})") from None
    return name


def integer(low: int = 1, high: int = 2**31) -> Callable[[str], int]:
    """The ``argparse`` type of an integer in [low, high], which may be written as ``30e6``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            try:
                value = int(float(text)) if float(text).is_integer() else low - 1
            except (ValueError, OverflowError):
                value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return value

    return convert


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], float]:
    """The ``argparse`` type of a finite number in [low, high], or in (low, high] where ``open_low``."""
    bound = f"a finite number {'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > low if open_low else value >= low) and value <= high):
            raise argparse.ArgumentTypeError(f"expected {bound}, got {text!r}")
        return value

    return convert


def folder(text: str) -> Path:
    """The ``argparse`` type of a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder that exists, got {text!r}")
    return path


def writable_file(text: str) -> Path:
    """The ``argparse`` type of a file to write, in a folder that is there or can be made. Nothing is created yet."""
    path = Path(text)
    if not text or path.is_dir() or (path.exists() and not os.access(path, os.W_OK)) or not _can_hold(path.absolute().parent):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def writable_folder(text: str) -> Path:
    """The ``argparse`` type of a folder to write into, which is there or can be made. Nothing is created yet."""
    path = Path(text)
    if not text or not _can_hold(path.absolute()):
        raise argparse.ArgumentTypeError(f"expected a folder that can be written, got {text!r}")
    return path


def _can_hold(path: Path) -> bool:
    """Whether files can be made in the folder ``path`` or, where it is not there yet, in the nearest one above it."""
    there = next(p for p in (path, *path.parents) if p.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def refuse(message: str) -> int:
    """Print a fault of the arguments that argparse cannot see; gives argparse's exit status for them, 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns under a header; columns whose index is in ``right`` are right-aligned."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * w for w in widths])
    align = [str.rjust if i in right else str.ljust for i in range(len(header))]
    return "\n".join("  ".join(f(v, w) for f, v, w in zip(align, row, widths, strict=True)).rstrip() for row in cells)
