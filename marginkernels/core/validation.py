"""Validation of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch
from torch import Tensor

from .transforms import transforming

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    *,
    shard: bool = False,
    sub_centers: int = 1,
) -> None:
    """Everything that can be seen without reading a tensor's values. A ``shard`` of the classes may be empty.

    Raises:
        TypeError: something is not a tensor, or has a dtype that no head takes.
        ValueError: shapes or devices do not fit, or an option is out of range.
    """
    given = {"embeddings": embeddings, "weight": weight, "labels": labels}
    if bias is not None:
        given["bias"] = bias
    for name, v in given.items():
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(v).__name__}")
        if v.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a nested one")
        if v.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {v.layout}")
        if name != "labels":
            check_float(name, v)
    check_centers(embeddings, weight, bias, shard=shard, sub_centers=sub_centers)
    check_labels_shape(labels, embeddings)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)


def check_centers(embeddings: Tensor, weight: Tensor, bias: Tensor | None, *, shard: bool = False, sub_centers: int = 1) -> None:
    """Embeddings (N, D) against class centers (C, D), or ``sub_centers`` rows of each class, and biases (C,) or None: dtypes, shapes and
    devices."""
    check_embeddings(embeddings, weight, shard=shard)
    positive("sub_centers", sub_centers)
    classes = weight.shape[0] if sub_centers == 1 else weight.shape[0] // sub_centers
    if sub_centers > 1 and weight.shape[0] % sub_centers:
        raise ValueError(f"weight: expected shape (C * {sub_centers}, D), sub_centers rows of each class, got {tuple(weight.shape)}")
    if bias is not None:
        check_float("bias", bias)
        if tuple(bias.shape) != (classes,):
            raise ValueError(f"bias: expected shape ({classes},), one number per class, got {tuple(bias.shape)}")
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None and v.device != embeddings.device:
            raise ValueError(f"{name}: expected device {embeddings.device}, where the embeddings are, got {v.device}")
    if weight.dtype == torch.float64 and embeddings.dtype != torch.float64:
        raise TypeError(f"weight: expected at most the precision of the embeddings ({embeddings.dtype}), got torch.float64")


def check_float(name: str, v: object) -> None:
    """A tensor of a floating dtype that heads take."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(v).__name__}")
    if v.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {v.dtype}")


def check_embeddings(embeddings: Tensor, weight: Tensor, *, name: str = "weight", shard: bool = False) -> None:
    """Embeddings (N, D) against class centers (C, D), an argument called ``name``: dtypes and shapes, and that there are values at all."""
    check_float("embeddings", embeddings)
    check_float(name, weight)
    if embeddings.device.type == "meta":
        raise ValueError("embeddings: expected a device that holds values, such as cpu or cuda, got meta; see to_empty()")
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"embeddings: expected shape (N, D) with D >= 1, got {tuple(embeddings.shape)}")
    if weight.ndim != 2 or (weight.shape[0] == 0 and not shard):
        raise ValueError(f"{name}: expected shape (C, D) with C >= 1, got {tuple(weight.shape)}")
    if weight.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{name}: expected shape (C, {embeddings.shape[1]}) to match embeddings {tuple(embeddings.shape)}, got {tuple(weight.shape)}"
        )


def check_labels_shape(labels: object, embeddings: Tensor) -> None:
    """Labels (N,) int64 against embeddings (N, D), on the same device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.ndim != 1 or labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"labels: expected shape ({embeddings.shape[0]},) to match embeddings, got {tuple(labels.shape)}")
    if labels.device != embeddings.device:
        raise ValueError(f"labels: expected device {embeddings.device}, where the embeddings are, got {labels.device}")


def check_class_weight(class_weight: object, num_classes: int, device: torch.device) -> None:
    """A weight for each class (C,) on ``device``. Its values are read on a CPU only: finite and >= 0."""
    check_float("class_weight", class_weight)
    assert isinstance(class_weight, Tensor)
    if tuple(class_weight.shape) != (num_classes,):
        raise ValueError(f"class_weight: expected shape ({num_classes},), one number per class, got {tuple(class_weight.shape)}")
    if class_weight.device != device:
        raise ValueError(f"class_weight: expected device {device}, where the embeddings are, got {class_weight.device}")
    if class_weight.requires_grad:
        raise ValueError("class_weight: expected a tensor without gradient, as it is not differentiated, got one that requires grad")
    if device.type == "cpu":
        _check_values("class_weight", class_weight, None)


def check_mix(mix: object, embeddings: Tensor) -> tuple[Tensor, float | Tensor]:
    """``(labels_b, lam)``: labels (N,) and a number, or a tensor of shape () or (N,), in [0, 1], whose values are read on a CPU only."""
    if not isinstance(mix, tuple | list) or len(mix) != 2:
        came = f"{len(mix)} values" if isinstance(mix, tuple | list) else type(mix).__name__
        raise TypeError(f"mix: expected (labels_b, lam), got {came}")
    labels, lam = mix
    try:
        check_labels_shape(labels, embeddings)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("labels:", "mix: in labels_b", 1)) from None
    if not isinstance(lam, Tensor):
        check_number("mix: lam", lam, 0.0, 1.0)
        return labels, float(lam)
    if lam.dtype not in FLOATS:
        raise TypeError(f"mix: lam: expected a number or a floating tensor, got {lam.dtype}")
    if lam.ndim > 1 or (lam.ndim == 1 and lam.shape[0] != embeddings.shape[0]):
        raise ValueError(f"mix: lam: expected a number or shape () or ({embeddings.shape[0]},), one for each row, got {tuple(lam.shape)}")
    if lam.ndim and lam.device != embeddings.device:
        raise ValueError(f"mix: lam: expected device {embeddings.device}, where the embeddings are, got {lam.device}")
    if lam.device.type == "cpu":
        _check_values("mix: lam", lam, 1.0)
    return labels, lam


def _check_values(name: str, v: Tensor, high: float | None) -> None:
    """All values in [0, high], ``high`` None for any finite number; read where nothing traces the call."""
    if torch.compiler.is_compiling() or transforming() or v.numel() == 0:
        return
    least, most = (float(end) for end in v.detach().aminmax())
    if not (least >= 0 and most <= (sys.float_info.max if high is None else high)):  # NaN is neither
        bound = "finite numbers >= 0" if high is None else f"numbers in [0, {high:g}]"
        raise ValueError(f"{name}: expected {bound}, got values from {least:g} to {most:g}")


def positive(name: str, value: object) -> int:
    """``value``, an integer of at least 1, as an int."""
    return integer(name, value, 1)


def integer(name: str, value: object, low: int) -> int:
    """``value`` as an int where it is an integer of Python or NumPy of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | Integral) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return int(value)


def check_reduction(reduction: object) -> None:
    """One of the three reductions."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def check_number(name: str, value: object, low: float, high: float | None, *, open_low: bool = False) -> None:
    """A number in [low, high], or in (low, high] where ``open_low``; ``high`` None is no bound."""
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not ((number > low if open_low else number >= low) and (high is None or number <= high)):
        bound = f"in {'(' if open_low else '['}{low:g}, {high:g}]" if high is not None else f"{'>' if open_low else '>='} {low:g}"
        raise ValueError(f"{name}: expected a number {bound}, got {value!r}")
