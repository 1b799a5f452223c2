"""Plain-text tables for the command line."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns under a header; the columns whose index is in ``right`` are flush right."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * w for w in widths])
    align = [str.rjust if i in right else str.ljust for i in range(len(header))]
    return "\n".join("  ".join(f(v, w) for f, v, w in zip(align, row, widths, strict=True)).rstrip() for row in cells)
