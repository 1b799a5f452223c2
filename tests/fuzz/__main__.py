"""``PYTHONPATH=tests python -m fuzz``: random problems on the backends that serve CPU tensors here.

A failure prints the line that repeats it, what is wrong, and the simplest problem that still fails. Returns 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import marginkernels
from marginkernels.backend import FUSED
from marginkernels.cli._text import integer, number, writable_file

from .measure import STAGES, check, shrink
from .problem import Problem

#: The backends that a run compares by default; Triton's interpreter is named to have it.
BACKENDS = tuple(name for name, b in FUSED.items() if "cpu" in b.device_types and b.unavailable_reason() is None and name != "triton")
SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=integer(), default=1000, help="how many problems (default: %(default)s)")
    parser.add_argument("--seed", type=integer(0), help="of the first problem; the next count up (default: after the record's)")
    parser.add_argument("--backend", action="append", choices=list(FUSED), help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=number(0, open_low=True), help="stop after this time")
    parser.add_argument("--record", type=writable_file, metavar="PATH", help="add the counts to this file")
    parser.add_argument("--commit", help="what the record says of the code (default: the checkout's commit)")
    args = parser.parse_args(argv)
    backends = tuple(args.backend or BACKENDS)
    for name in backends:
        reason = FUSED[name].unavailable_reason()
        if reason or "cpu" not in FUSED[name].device_types:
            parser.error(f"argument --backend: expected one that serves CPU tensors here, got {name!r} ({reason or 'a GPU only'})")
    record = _read(parser, args.record)
    first = args.seed if args.seed is not None else max((run["last_seed"] + 1 for run in record["runs"]), default=0)
    print(f"seeds from {first} on, backends {', '.join(backends)}")
    words = "".join(f" --backend {name}" for name in args.backend or ())
    counts: dict[str, Counter[str]] = {name: Counter() for name in backends}
    start, failures, seed = time.monotonic(), 0, first
    bar = tqdm(range(first, first + args.cases), unit="case", mininterval=1.0)
    for seed in bar:
        problem = Problem.draw(seed, backends)
        verdict = check(problem)
        counts[problem.backend]["cases"] += 1
        counts[problem.backend][verdict.stage or "failures"] += 1
        if verdict.fault:
            failures += 1
            bar.set_postfix(failures=failures)
            if failures <= SHOWN:
                bar.write(f"FAILED  PYTHONPATH=tests python -m fuzz --seed {seed} --cases 1{words}\n    {problem}\n    {verdict.fault}")
                least = shrink(problem)
                bar.write(f"    shrunk: {least}\n    {check(least).fault}")
        if args.seconds and time.monotonic() - start > args.seconds:
            break
    for name, found in counts.items():
        print(f"{name}: {found['cases']} cases, {found['failures']} failures; within " + ", ".join(f"{s} {found[s]}" for s in STAGES))
    if args.record:
        _write(args.record, record, counts, first, seed, args.commit or _commit())
        print(f"added to {args.record}")
    return 1 if failures else 0


def _read(parser: argparse.ArgumentParser, path: Path | None) -> dict[str, Any]:
    """The record so far, or an empty one."""
    if path is None or not path.exists():
        return {"schema": "marginkernels.fuzz/1", "runs": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["schema"] == "marginkernels.fuzz/1":
            return record
    except (ValueError, KeyError, TypeError):
        pass
    return parser.error(f"argument --record: expected a record of `python -m fuzz`, got {str(path)!r}")


def _write(path: Path, record: dict[str, Any], counts: dict[str, Counter[str]], first: int, last: int, commit: str | None) -> None:
    """Add a line for each backend. The file is replaced atomically."""
    about = {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    versions = {"marginkernels": marginkernels.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, found in counts.items():
        passed = {stage: found[stage] for stage in STAGES}
        line = {"backend": name, "cases": found["cases"], "failures": found["failures"], "passed_by": passed}
        record["runs"].append(about | line | {"first_seed": first, "last_seed": last} | versions)
    record["total"] = {
        name: {key: sum(run[key] for run in record["runs"] if run["backend"] == name) for key in ("cases", "failures")}
        for name in sorted({run["backend"] for run in record["runs"]})
    }
    lines = ",\n".join("  " + json.dumps(run) for run in record["runs"])
    text = f'{{\n "schema": "{record["schema"]}",\n "total": {json.dumps(record["total"])},\n "runs": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _commit() -> str | None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.environment import commit

    return commit()


def all_right(seeds: Iterable[int], backends: tuple[str, ...]) -> list[str]:
    """The faults of the problems of ``seeds``, each with the problem."""
    found = []
    for seed in seeds:
        problem = Problem.draw(seed, backends)
        fault = check(problem).fault
        if fault:
            found.append(f"--seed {seed}: {problem}: {fault}")
    return found


if __name__ == "__main__":
    sys.exit(main())
