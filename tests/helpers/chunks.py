"""Chunks of the ``torch`` backend: one class wide, a few, and all in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from marginkernels import testing
from marginkernels.core import numerics
from marginkernels.margins import Margin


@contextlib.contextmanager
def chunks_of(width: int | None) -> Iterator[None]:
    """Chunks of ``width`` classes; None leaves them as they are: one, for what tests can afford."""
    if width is None:
        yield
        return
    with patch.multiple(numerics, CHUNK_ELEMENTS=1, LEAST_CHUNK=width):
        yield


def widths(backend: str, classes: int) -> tuple[int | None, ...]:
    """The widths to try: of a backend without such chunks none, else one class (more where there are many), a third of them, and all."""
    return (1 if classes <= 150 else classes // 9, classes // 3 + 1, None) if backend == "torch" else (None,)


def errors(case: testing.Case, margin: Margin, backend: str, **options: object) -> dict[str, float]:
    """:func:`marginkernels.testing.errors`, the largest over the widths of chunks."""
    want = testing.run(case, margin, "reference", dtype=torch.float64, **options)
    worst = dict.fromkeys(want, 0.0)
    for width in widths(backend, case.w.shape[0]):
        with chunks_of(width):
            got = testing.run(case, margin, backend, **options)
        for name in want:
            off = testing.relative_error(got[name], want[name])
            worst[name] = worst[name] if off <= worst[name] else off  # also where it is NaN
    return worst
