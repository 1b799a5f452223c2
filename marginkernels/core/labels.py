"""Labels: out-of-range ones are errors, reported at once on a CPU and by a later call on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from .device import on_device_of
from .transforms import loops_under_vmap


def checked_labels(labels: Tensor, num_classes: int, ignore_index: int, *, direct: bool = False) -> Tensor:
    """``labels`` with -1 for ignored rows; raises where one is out of range.

    On a CPU the labels are read at once. On a GPU that would stop the host, in every step, until the device has caught up. There
    rows out of range are treated as ignored, so that nothing goes wrong meanwhile; the smallest and the largest such label are
    copied to pinned host memory behind the step, and the first later call that finds the copy done raises.
    :func:`raise_pending_label_errors` waits for it. Under CUDA-graph capture nothing is watched: such rows are just ignored.

    Args:
        direct: nothing wants to see an operator here, such as a compiler.

    Raises:
        ValueError: a label is neither in [0, C) nor ``ignore_index``; on a GPU, one of an earlier call's.
        TypeError: ``ignore_index`` is not an integer.
    """
    check = _check if direct else _checked_labels
    return cast(Tensor, check(labels, num_classes, checked_ignore_index(ignore_index)))


def checked_ignore_index(ignore_index: object) -> int:
    """``ignore_index``, an integer of Python or NumPy, as an int; a ``TypeError`` for anything else."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | Integral):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    return int(ignore_index)


def _check(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low >= 0 and high < num_classes and not 0 <= ignore_index < num_classes:
            return labels.clone(memory_format=torch.contiguous_format)
    if labels.device.type == "cuda":
        return marked_and_watched(labels, num_classes, ignore_index, _mark)
    outside = _outside(labels, num_classes, ignore_index)
    if labels.numel() and bool(outside.any()):
        bad = labels[outside]
        raise ValueError(_label_error(int(bad.min()), int(bad.max()), num_classes, ignore_index))
    return torch.where(outside | (labels == ignore_index), -1, labels)


def _outside(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)


def _mark(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``labels`` with -1 for ignored and for wrong ones, and (1, 2) the least and the largest wrong one; what is no error where none is."""
    outside = _outside(labels, num_classes, ignore_index)
    bad = torch.where(outside, labels, num_classes // 2)
    bounds = torch.stack(torch.aminmax(bad)).unsqueeze(0) if labels.numel() else labels.new_empty(0, 2)
    return torch.where(outside | (labels == ignore_index), -1, labels), bounds


def marked_and_watched(
    labels: Tensor, num_classes: int, ignore_index: int, mark: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """:func:`checked_labels` on a GPU; ``mark`` gives (N,) labels with -1 for ignored and for wrong ones, and bounds (blocks, 2): of each
    of some blocks the least and the largest label that is wrong, or any that is not."""
    with on_device_of(labels):  # the stream that is asked, and the one that the event is recorded on, are those of the labels' device
        watched = not torch.cuda.is_current_stream_capturing()
        if watched:
            raise_pending_label_errors(wait=False)
        marked, bounds = mark(labels, num_classes, ignore_index)
        if watched:
            _watch(bounds, num_classes, ignore_index)
    return marked


_checked_labels = torch.library.custom_op("marginkernels::checked_labels", _check, mutates_args=())


@_checked_labels.register_fake
def _(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


loops_under_vmap(_checked_labels)


def _label_error(low: int, high: int, num_classes: int, ignore_index: int) -> str:
    got = f"{low}" if low == high else f"values from {low} to {high}"
    return f"labels: expected values in [0, {num_classes}) or ignore_index {ignore_index}, got {got}"


_pending: list[tuple[torch.cuda.Event, Tensor, int, int]] = []


def _watch(bounds: Tensor, num_classes: int, ignore_index: int) -> None:
    if len(_pending) >= 64 or not bounds.numel():  # a host far ahead of its device still finds the error in one of these
        return
    host = torch.empty(bounds.shape, dtype=torch.int64, pin_memory=True)
    host.copy_(bounds, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, host, num_classes, ignore_index))


def raise_pending_label_errors(wait: bool = True) -> None:
    """Raise for out-of-range labels that earlier calls met on a GPU; with ``wait`` every one of them, else those already known.

    Raises:
        ValueError: naming the smallest and largest label that was out of range.
    """
    while _pending and (wait or _pending[0][0].query()):
        event, host, num_classes, ignore_index = _pending.pop(0)
        event.synchronize()
        bad = [v for v in host.flatten().tolist() if not 0 <= v < num_classes]
        if bad:
            _pending.clear()
            raise ValueError(_label_error(min(bad), max(bad), num_classes, ignore_index) + " (in an earlier step on the GPU)")
