"""Record files: reading them, and the lookups that plots, tables and comparisons share."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "marginkernels-"
#: Providers by the names that older record files have -> their names today. Record files are never rewritten, so readers translate.
RENAMED = {"marginkernels-slab": "marginkernels-torch"}  # the plain PyTorch backend, until version 0.1

Key = tuple[str, str, str, int, int, int]  # head, dtype, phase, N, D, C


@dataclass
class Records:
    """One record file.

    Attributes:
        records: each with its ``line`` in the file.
        cases: (head, dtype, phase, N, D, C) -> provider -> record.
    """

    name: str
    environment: dict
    records: list[dict]
    cases: dict[Key, dict[str, dict]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        for r in self.records:
            self.cases[r["head"], r["dtype"], r["phase"], r["N"], r["D"], r["C"]][r["provider"]] = r

    @classmethod
    def read(cls, path: Path | str) -> Records:
        """Read a file, with provider names as they are today (see ``RENAMED``)."""
        path = Path(path)
        text = path.read_text()
        loaded: dict[str, Any] = json.loads(text)
        lines = [i for i, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith('{"provider"')]
        if len(lines) == len(loaded["records"]):  # else the file was reformatted, and has no line numbers
            loaded["records"] = [r | {"line": line} for r, line in zip(loaded["records"], lines, strict=True)]
        environment, records = loaded["environment"], [r | {"provider": today(r["provider"])} for r in loaded["records"]]
        environment["providers"] = {today(name): about for name, about in environment["providers"].items()}
        return cls(path.name, environment, records)

    def providers(self) -> list[str]:
        """The backends of this package first, then the peers, each in order of appearance."""
        names = list(dict.fromkeys(r["provider"] for r in self.records))
        return sorted(names, key=lambda name: not is_ours(name))

    @property
    def machine(self) -> str:
        e = self.environment
        if e["device"] == "cuda":
            return e["gpu"]
        features = ", ".join(f for f in e["cpu_features"] if f.startswith(("avx512", "amx"))) or ", ".join(e["cpu_features"])
        return f"{e['cpu']}, {e['threads']} threads ({features})"


def today(provider: str) -> str:
    """A provider's current name."""
    return RENAMED.get(provider, provider)


def is_ours(provider: str) -> bool:
    """Whether it is a backend of this package."""
    return provider.startswith(OURS)


def timed(case: dict[str, dict]) -> dict[str, dict]:
    """The records of a case that have a time."""
    return {name: r for name, r in case.items() if r["status"] == "ok"}


def fastest(case: dict[str, dict], ours: bool | None = None) -> dict | None:
    """The record with the smallest median, or None where nothing was timed.

    Args:
        ours: among the backends of this package (True), the peers (False) or all (None).
    """
    candidates = [r for name, r in timed(case).items() if ours is None or is_ours(name) == ours]
    return min(candidates, key=lambda r: r["ms_p50"], default=None)


def record_file(text: str) -> Path:
    """The ``argparse`` type of a record file of ``python -m benchmarks run``: it is read once, so that a bad one is refused at once."""
    try:
        Records.read(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a record file, got {text!r} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise argparse.ArgumentTypeError(f"expected a record file of `python -m benchmarks run`, got {text!r}") from None
    return Path(text)


def committed() -> list[Path]:
    """The record files of ``run`` in ``results``: those with an environment and records."""
    return [path for path in sorted(RESULTS.glob("*.json")) if {"environment", "records"} <= json.loads(path.read_text()).keys()]
