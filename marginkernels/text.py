"""What the commands share: tables in plain text, and the argument for a device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch


def usable_device(name: str) -> str:
    """The type of a ``--device`` argument: a name such as ``cpu`` or ``cuda:1`` that PyTorch can put tensors on.

    Raises:
        argparse.ArgumentTypeError: it cannot, and why.
    """
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that PyTorch can use here, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return name


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns under a header; the columns whose index is in ``right`` are flush right."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * w for w in widths])
    align = [str.rjust if i in right else str.ljust for i in range(len(header))]
    return "\n".join("  ".join(f(v, w) for f, v, w in zip(align, row, widths, strict=True)).rstrip() for row in cells)
