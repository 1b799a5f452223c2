"""Checks of what comes in: each error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(embeddings, weight, labels, margin, bias, label_smoothing, workspace_mb, *, shard: bool = False) -> None:
    """Everything that can be seen without reading a tensor's values. A ``shard`` of the classes may be empty.

    Raises:
        TypeError: something is not a tensor, or has a dtype that no head takes.
        ValueError: shapes or devices do not fit, or an option is out of range.
    """
    from .margins import Margin

    if not isinstance(margin, Margin):
        raise TypeError(f"margin: expected an instance of mk.Margin such as mk.ArcFace(), got {margin!r}")
    given = {"embeddings": embeddings, "weight": weight, "labels": labels}
    if bias is not None:
        given["bias"] = bias
    for name, v in given.items():
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(v).__name__}")
        if v.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {v.layout}")
        if name != "labels":
            check_float(name, v)
    check_embeddings(embeddings, weight, shard=shard)
    check_labels_shape(labels, embeddings)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), one number per class, got {tuple(bias.shape)}")
    for name, v in given.items():
        if v.device != embeddings.device:
            raise ValueError(f"{name}: expected device {embeddings.device}, where the embeddings are, got {v.device}")
    if weight.dtype == torch.float64 and embeddings.dtype != torch.float64:
        raise TypeError(f"weight: expected at most the precision of the embeddings ({embeddings.dtype}), got torch.float64")
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    if workspace_mb is not None:
        check_number("workspace_mb", workspace_mb, 0.0, None)


def check_float(name: str, v) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(v).__name__}")
    if v.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {v.dtype}")


def check_embeddings(embeddings, weight, *, shard: bool = False) -> None:
    """Embeddings (N, D) against class centres (C, D): dtypes and shapes."""
    check_float("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"embeddings: expected shape (N, D) with D >= 1, got {tuple(embeddings.shape)}")
    if weight.ndim != 2 or (weight.shape[0] == 0 and not shard):
        raise ValueError(f"weight: expected shape (C, D) with C >= 1, got {tuple(weight.shape)}")
    if weight.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"weight: expected shape (C, {embeddings.shape[1]}) to match embeddings {tuple(embeddings.shape)}, got {tuple(weight.shape)}"
        )


def check_labels_shape(labels, embeddings) -> None:
    """Labels (N,) int64 against embeddings (N, D), on the same device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.ndim != 1 or labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"labels: expected shape ({embeddings.shape[0]},) to match embeddings, got {tuple(labels.shape)}")
    if labels.device != embeddings.device:
        raise ValueError(f"labels: expected device {embeddings.device}, where the embeddings are, got {labels.device}")


def positive(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    return value


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def check_number(name: str, value, low: float, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    if not (value >= low and (high is None or value <= high)):
        raise ValueError(f"{name}: expected a number {f'in [{low:g}, {high:g}]' if high is not None else f'>= {low:g}'}, got {value!r}")


def checked_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """``labels`` with -1 for ignored rows; raises where one is out of range.

    On a CPU the labels are read at once. On a GPU that would stop the host, in every step, until the device has caught up. There
    rows out of range are treated as ignored, so that nothing goes wrong meanwhile; the smallest and the largest such label are
    copied to pinned host memory behind the step, and the first later call that finds the copy done raises.
    :func:`raise_pending` waits for it. Under CUDA-graph capture nothing is watched: such rows are just ignored.

    Raises:
        ValueError: a label is neither in [0, C) nor ``ignore_index``; on a GPU, one of an earlier call's.
        TypeError: ``ignore_index`` is not an integer.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    return _checked_labels(labels, num_classes, ignore_index)


@torch.library.custom_op("marginkernels::checked_labels", mutates_args=())
def _checked_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low >= 0 and high < num_classes and not 0 <= ignore_index < num_classes:
            return labels.clone(memory_format=torch.contiguous_format)
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if labels.device.type == "cuda":
        if not torch.cuda.is_current_stream_capturing():
            raise_pending(wait=False)
            _watch(labels, outside, num_classes, ignore_index)
    elif labels.numel() and bool(outside.any()):
        bad = labels[outside]
        raise ValueError(_label_error(int(bad.min()), int(bad.max()), num_classes, ignore_index))
    return torch.where(outside | (labels == ignore_index), -1, labels)


@_checked_labels.register_fake
def _(labels, num_classes, ignore_index):
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


def _label_error(low: int, high: int, num_classes: int, ignore_index: int) -> str:
    got = f"{low}" if low == high else f"values from {low} to {high}"
    return f"labels: expected values in [0, {num_classes}) or ignore_index {ignore_index}, got {got}"


_pending: list[tuple[torch.cuda.Event, Tensor, int, int]] = []


def _watch(labels: Tensor, outside: Tensor, num_classes: int, ignore_index: int) -> None:
    if len(_pending) >= 64 or not labels.numel():  # a host far ahead of its device still finds the error in one of these
        return
    inside = num_classes // 2  # any value that is not an error
    bad = torch.where(outside, labels, inside)
    host = torch.empty(2, dtype=torch.int64, pin_memory=True)
    host.copy_(torch.stack(torch.aminmax(bad)), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((event, host, num_classes, ignore_index))


def raise_pending(wait: bool = True) -> None:
    """Raise for out-of-range labels that earlier calls met on a GPU; with ``wait`` every one of them, else those already known.

    Raises:
        ValueError: naming the smallest and largest label that was out of range.
    """
    while _pending and (wait or _pending[0][0].query()):
        event, host, num_classes, ignore_index = _pending.pop(0)
        event.synchronize()
        low, high = host.tolist()
        bad = [v for v in (low, high) if not 0 <= v < num_classes]
        if bad:
            _pending.clear()
            raise ValueError(_label_error(min(bad), max(bad), num_classes, ignore_index) + " (in an earlier step on the GPU)")
