"""The Python examples of the documentation, and what they take for granted."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist

import marginkernels as mk

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
#: What the first line of an example that needs several ranks says.
RANKS = "# needs: torch.distributed\n"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M) if kind == language]


def small(code: str) -> str:
    """An example at a size, and with a compiler, that a test can afford."""
    code = re.sub(r"(torch\.compile\(.*)\)$", r'\1, backend="aot_eager")', code, flags=re.M)
    return re.sub(r"\b\d+(_000)+\b", "1_000", code)


def data(folder: Path) -> dict:
    """What the examples take for granted."""
    names = {"mk": mk, "torch": torch, "dist": dist, "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel, "folder": folder}
    names |= {"images": torch.randn(8, 128), "backbone": torch.nn.Linear(128, 512)}
    return names | {"embeddings": torch.randn(8, 512, requires_grad=True), "labels": torch.randint(1000, (8,))}
