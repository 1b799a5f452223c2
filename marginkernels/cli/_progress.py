"""A progress bar where tqdm is installed, and none where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T = TypeVar("T")


class SilentBar(Generic[T]):
    """The part of tqdm's interface that this package uses, without output."""

    def __init__(self, iterable: Iterable[T], **options: Any):
        self.iterable = iterable

    def __iter__(self) -> Iterator[T]:
        return iter(self.iterable)

    n = 0

    def __enter__(self) -> SilentBar[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.n += n


if TYPE_CHECKING:  # tqdm has no type annotations
    tqdm = SilentBar
else:
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = SilentBar

__all__ = ["tqdm"]
