"""What a head saw, to a logger of training runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_stats(head: Any, logger: Any, step: int, *, every: int = 1, prefix: str = "head/", **more: Tensor | float) -> dict[str, float]:
    """Give ``head.stats``, and ``more``, to a logger: a callback for the end of a training step.

    The numbers come from the device in one copy, for which it waits; ``every`` spares the wait in the steps between. With a process group
    the stats are the same on all ranks: call it on the one that logs.

    Args:
        head: a :class:`marginkernels.MarginHead`, or anything with ``stats``.
        logger: with ``add_scalar(tag, value, step)``, as TensorBoard's ``SummaryWriter``, or with ``log(values, step=step)``, as a run of
            Weights & Biases; the first where it has both.
        step: the number of the step.
        every: of how many steps one is logged: those that it divides.
        prefix: of each tag.
        more: further numbers or tensors of one element by name, such as ``loss=loss``.

    Returns:
        What was logged, by tag; empty in the steps between.

    Raises:
        TypeError: the logger has neither method. ValueError: ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"every: expected an integer >= 1, got {every!r}")
    add, log = getattr(logger, "add_scalar", None), getattr(logger, "log", None)
    if not callable(add) and not callable(log):
        raise TypeError(
            f"logger: expected add_scalar(tag, value, step) or log(values, step=step), got {type(logger).__name__} without either"
        )
    if step % every:
        return {}
    given: dict[str, Tensor | float] = {**head.stats, **more}
    tensors = {name: v.detach().reshape(()).double() for name, v in given.items() if isinstance(v, Tensor)}
    device = next((v.device for v in tensors.values() if v.device.type != "cpu"), torch.device("cpu"))
    read = torch.stack([v.to(device) for v in tensors.values()]).tolist() if tensors else []
    numbers = dict(zip(tensors, read, strict=True))
    values = {f"{prefix}{name}": numbers[name] if name in numbers else float(v) for name, v in given.items()}
    if callable(add):
        for tag, value in values.items():
            add(tag, value, step)
    else:
        assert callable(log)
        log(values, step=step)
    return values
