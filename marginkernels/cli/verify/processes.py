"""Runs each candidate in a process of its own, under a time limit, and makes a verdict of whatever comes of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...backend import records
from ...backend.records import Time, Verdict
from .plan import GPU_ONLY, Candidate, Check

#: Seconds that a process may take until it is ready (it imports PyTorch), and that a dead one may take to be gone.
START_SECONDS, DEATH_SECONDS = 180.0, 20.0
#: The worker, in the interpreter's own words: it finds the same packages as this process, wherever that found them.
WORKER = "import sys; sys.path[:] = {path!r}; from marginkernels.cli.verify.worker import main; main({plan!r}, {results!r})"


@dataclass
class Outcome:
    """What came of one candidate.

    Attributes:
        results: by number of the check, what the worker said of it.
        ended: whether the worker came to its end.
        fault: ``records.CRASH`` or ``records.HANG`` and what happened, or None.
        seconds: how long it took.
    """

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    ended: bool = False
    fault: tuple[str, str] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What all candidates have in common.

    Attributes:
        limit: seconds of one check after which it hangs.
        seed: of the problems.
        tiles: of the Triton kernels, as ``tune`` writes them.
    """

    device: str
    limit: float
    seed: int = 0
    tiles: Sequence[Any] = ()


def supervise(
    candidate: Candidate, checks: Sequence[Check], settings: Settings, seconds: float, progress: Callable[[int], None] = lambda done: None
) -> Outcome:
    """Run the checks of a candidate in a process of its own, and stop it where one takes too long.

    Args:
        seconds: after which no other check is begun.
        progress: told of every check that is done.
    """
    outcome, began = Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="marginkernels-verify-") as name:
        folder = Path(name)
        plan, results, said = folder / "plan.json", folder / "results.jsonl", folder / "stderr.txt"
        asked = {"candidate": asdict(candidate), "checks": [c.as_dict() for c in checks], "until": time.time() + seconds}
        asked |= {"device": settings.device, "seed": settings.seed, "tiles": list(settings.tiles), "threads": torch.get_num_threads()}
        plan.write_text(json.dumps(asked))
        code = WORKER.format(path=sys.path, plan=str(plan), results=str(results))
        with said.open("w") as stderr, _process([sys.executable, "-c", code], stderr) as process:
            _watch(process, results, outcome, checks, settings.limit, progress)
        if outcome.fault is None and not outcome.ended:
            outcome.fault = records.CRASH, f"{_death(process.returncode)}{_last_line(said)}"
    outcome.seconds = time.monotonic() - began
    return outcome


@contextlib.contextmanager
def _process(words: list[str], stderr: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is dead when the context ends, however it ends."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a GPU may outlive its death
            process.wait(DEATH_SECONDS)


def _watch(
    process: subprocess.Popen[bytes],
    results: Path,
    outcome: Outcome,
    checks: Sequence[Check],
    limit: float,
    progress: Callable[[int], None],
) -> None:
    """Follow the worker's words until it ends, dies or is silent for too long."""
    heard, running, read, pause = time.monotonic(), None, 0, 0.005
    while True:
        alive = process.poll() is None  # before the last words are read
        lines = results.read_bytes()[read:] if results.exists() else b""
        whole, newline, _ = lines.rpartition(b"\n")
        read += len(whole) + len(newline)
        for line in whole.splitlines():
            event, heard = json.loads(line), time.monotonic()
            if event["event"] == "start":
                running = event["check"]
            elif event["event"] == "done":
                outcome.results[event["check"]] = event
                running = None
                progress(len(outcome.results))
            elif event["event"] == "ready":
                running, pause = -1, 0.02
            outcome.ended |= event["event"] == "end"
        if not alive:
            where = f" at {checks[running]}" if running is not None and running >= 0 else ""
            if not outcome.ended:
                outcome.results.setdefault(-1, {"where": where})
            return
        silent = time.monotonic() - heard
        if silent > (START_SECONDS if running is None and not outcome.results and not read else limit):
            where = str(checks[running]) if running is not None and running >= 0 else "its start"
            outcome.fault = records.HANG, f"nothing for {silent:.0f} s at {where}"
            return
        time.sleep(pause)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"the process ended by {signal.Signals(-code).name}"
    return f"the process ended with status {code}"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def verdict(checks: Sequence[Check], outcome: Outcome, device_type: str) -> Verdict:
    """The verdict on a candidate from what came of its checks."""
    results = {number: found for number, found in outcome.results.items() if number >= 0}
    passed, errors = Counter[str](), dict[str, dict[str, float]]()
    missed, first = set[str](), None
    for number, check in enumerate(checks):
        found, name = results.get(number), "/".join(check.pair)
        if found is not None:
            worst = errors.setdefault(name, {})
            for output, off in found.get("errors", {}).items():
                worst[output] = max(worst.get(output, 0.0), off)
        if found is not None and found["verdict"] == records.RIGHT:
            passed[check.kind] += 1
            continue
        if found is not None and found["verdict"] in records.BAD and first is None:
            first = found["verdict"], f"{check}: {found['why']}"
        if not check.size:  # what does not fit, or was not reached, is not chosen at that size
            missed.add(name)
    notes: dict[str, int | str] = dict(passed)
    if device_type != "cuda":
        notes |= dict.fromkeys(GPU_ONLY, "not run: needs a GPU")
    pairs = tuple(name for name in dict.fromkeys("/".join(c.pair) for c in checks) if name not in missed)
    if outcome.fault is not None:
        where = outcome.results.get(-1, {}).get("where", "")
        first = outcome.fault[0], outcome.fault[1] + where
    if first is not None:
        return Verdict(*first, pairs=(), checks=notes, errors=errors, seconds=outcome.seconds)
    if missed or not results:
        done = sum(passed.values())
        why = f"{done} of {len(checks)} checks in the time"
        return Verdict(records.UNFINISHED, why, pairs, notes, errors, outcome.seconds)
    tried = [{one for c in checks if "/".join(c.pair) == name for one in c.features} for name in pairs]
    features = tuple(sorted(set.intersection(*tried))) if tried else ()
    return Verdict(records.RIGHT, "", pairs, notes, errors, outcome.seconds, features)


def times(checks: Sequence[Check], outcome: Outcome) -> dict[str, dict[str, Time]]:
    """Size class -> dtype of the embeddings -> time, where the size was right as well."""
    results = {number: found for number, found in outcome.results.items() if number >= 0}
    passed = {number for number, said in results.items() if said["verdict"] == records.RIGHT}
    unproven = {(c.size, c.pair[0]) for i, c in enumerate(checks) if c.kind == "size" and i not in passed}
    found: dict[str, dict[str, Time]] = {}
    for number, check in enumerate(checks):
        key, said = (check.size, check.pair[0]), results.get(number, {})
        if check.kind == "time" and "ms" in said and key not in unproven:
            found.setdefault(check.size, {})[check.pair[0]] = Time(said["ms"], said["torch_ms"])
    return found
