"""A progress bar where tqdm is installed, and nothing where it is not."""

from __future__ import annotations

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:  # type: ignore[no-redef]
        """The part of tqdm's interface that this package uses, silent."""

        def __init__(self, iterable=None, **_):
            self.iterable = iterable

        def __iter__(self):
            return iter(self.iterable)

        def set_postfix(self, **_):
            pass


__all__ = ["tqdm"]
