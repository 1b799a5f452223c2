"""What wespeaker's own projections gave (recorded_wespeaker.json, at commit dfa7419), and how they were asked.

``PYTHONPATH=<a checkout of wespeaker> python tests/helpers/recorded_wespeaker.py`` records it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).with_suffix(".json")
N, D, C = 5, 4, 6
#: Class, arguments, and the margins that are set before the step.
CASES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("ArcMarginProduct", {}, [0.3]),
    ("ArcMarginProduct", {"scale": 8.0, "margin": 2.0}, []),
    ("ArcMarginProduct", {"easy_margin": True}, []),
    ("AddMarginProduct", {}, [0.1]),
    ("SphereProduct", {"margin": 4}, []),
    ("ArcMarginProduct_intertopk_subcenter", {"k_top": 2}, [0.3]),
    ("ArcMarginProduct_intertopk_subcenter", {"do_lm": True, "K": 2}, [0.5]),
    ("SphereFace2", {"t": 2, "lanbuda": 0.6}, [0.3]),
]


def inputs(seed: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D), weight (rows, D) and labels (N,), the same on every machine: multiples of 1/64 from a linear congruence."""
    numbers, at = [], 2 * seed + 1
    for _ in range((N + rows) * D):
        at = (1103515245 * at + 12345) % 2**31
        numbers.append((at >> 16) % 256 / 64 - 2)
    values = torch.tensor(numbers, dtype=torch.float64).view(N + rows, D)
    return values[:N].clone(), values[N:].clone(), torch.arange(N) * 5 % C


def step(head: torch.nn.Module, seed: int, margins: list[float]) -> dict[str, list[Any]]:
    """Loss, gradients, and which rows are right, as wespeaker's executor has them."""
    head = head.double()
    weight = dict(head.named_parameters())["weight"]
    x, w, y = inputs(seed, weight.shape[0])
    weight.data.copy_(w)
    for margin in margins:
        head.update(margin)  # type: ignore[operator]
    x.requires_grad_()
    outputs = head(x, y)
    outputs, loss = outputs if isinstance(outputs, tuple) else (outputs, torch.nn.functional.cross_entropy(outputs, y))
    loss.backward()
    scores = torch.from_numpy(outputs.cpu().detach().numpy())
    found = {"loss": loss, "embeddings": x.grad, "right": scores.argmax(1) == y}
    found |= {name: p.grad for name, p in head.named_parameters()}
    return {name: v.detach().tolist() for name, v in found.items()}


def record() -> None:
    from wespeaker.models import projections

    found = [step(getattr(projections, name)(D, C, **options), seed, margins) for seed, (name, options, margins) in enumerate(CASES)]
    RECORD.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    record()
