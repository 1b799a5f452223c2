"""What insightface's own head gave (insightface.json, see test_compat_insightface.py), and ours for the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from marginkernels.compat import insightface

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())
NAMES = sorted(RECORD["by_ranks"]["1"])
TOLERANCE = 5e-6  # relative to the largest element on any rank


def margin_of(name: str):
    made = RECORD["by_ranks"]["1"][name]
    return getattr(insightface, made["class"])(*made["arguments"])


def results(name: str, size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What this rank's head gives, and what insightface's of the same rank gave: loss, gradients of its embeddings and its weight."""
    x, w, y = (torch.tensor(RECORD[key]) for key in ("embeddings", "weight", "labels"))
    head = insightface.PartialFC_V2(margin_of(name), x.shape[1], w.shape[0])
    rank, rows = (dist.get_rank() if size > 1 else 0), x.shape[0] // size
    part, classes = slice(rank * rows, (rank + 1) * rows), slice(head.class_start, head.class_start + head.num_local)
    head.load_state_dict({"weight": w[classes]})
    x = x[part].requires_grad_()
    loss = head(x, y[part])
    loss.backward()
    made = RECORD["by_ranks"][str(size)][name]
    expected = {
        "loss": torch.tensor(made["loss"]),
        "embeddings": torch.tensor(made["embeddings"])[part],
        "weight": torch.tensor(made["weight"])[classes],
    }
    return {"loss": loss.detach(), "embeddings": x.grad, "weight": head.weight.grad}, expected


def check(name: str, size: int) -> None:
    found, expected = results(name, size)
    for key, value in expected.items():
        largest = torch.tensor(RECORD["by_ranks"][str(size)][name][key]).abs().max()
        if key == "loss" and name == "cos-capped":
            continue  # see test_what_differs_the_loss_of_a_row_has_no_cap
        error = float((found[key] - value).abs().max() / largest)
        assert error <= TOLERANCE, (name, key, error)
