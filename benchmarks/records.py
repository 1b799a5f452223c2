"""Record files: reading, and the questions that pictures, tables and comparisons ask of them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OURS = "marginkernels-"

Key = tuple[str, str, str, int, int, int]  # head, dtype, phase, N, D, C


@dataclass
class Records:
    """One file. ``cases`` maps head, dtype, phase, N, D, C to provider -> record; each record knows its ``line`` in the file."""

    name: str
    environment: dict
    records: list[dict]
    cases: dict[Key, dict[str, dict]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self):
        for r in self.records:
            self.cases[r["head"], r["dtype"], r["phase"], r["N"], r["D"], r["C"]][r["provider"]] = r

    @classmethod
    def read(cls, path: Path | str) -> Records:
        path = Path(path)
        text = path.read_text()
        loaded = json.loads(text)
        lines = [i for i, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith('{"provider"')]
        if len(lines) == len(loaded["records"]):  # a file that was reformatted has lost its line numbers
            loaded["records"] = [r | {"line": line} for r, line in zip(loaded["records"], lines, strict=True)]
        return cls(path.name, loaded["environment"], loaded["records"])

    def providers(self) -> list[str]:
        """Ours first, then the peers, each in the order in which they appear."""
        names = list(dict.fromkeys(r["provider"] for r in self.records))
        return sorted(names, key=lambda name: not is_ours(name))

    @property
    def machine(self) -> str:
        e = self.environment
        if e["device"] == "cuda":
            return e["gpu"]
        features = ", ".join(f for f in e["cpu_features"] if f.startswith(("avx512", "amx"))) or ", ".join(e["cpu_features"])
        return f"{e['cpu']}, {e['threads']} threads ({features})"


def is_ours(provider: str) -> bool:
    return provider.startswith(OURS)


def timed(case: dict[str, dict]) -> dict[str, dict]:
    """Those of a case that have a figure."""
    return {name: r for name, r in case.items() if r["status"] == "ok"}


def fastest(case: dict[str, dict], ours: bool | None = None) -> dict | None:
    """The record with the smallest median, among ours, the peers, or all (None); None where nothing was timed."""
    candidates = [r for name, r in timed(case).items() if ours is None or is_ours(name) == ours]
    return min(candidates, key=lambda r: r["ms_p50"], default=None)


def committed() -> list[Path]:
    """The record files of ``run`` in ``results``; what else lies there has no environment block."""
    return [path for path in sorted(RESULTS.glob("*.json")) if "environment" in json.loads(path.read_text())]
