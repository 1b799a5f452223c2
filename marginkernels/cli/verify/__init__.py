"""``python -m marginkernels verify``: check every backend in a process of its own, time it, and write the record that ``auto`` follows."""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ... import __version__, testing
from ..._deprecated import backend_name
from ...backend import FUSED, records, registry
from ...backend.records import Record, Time, Verdict
from ...backend.triton import heuristics
from .._progress import tqdm
from .._text import MAX_SEED, integer, number, table, usable_device
from .plan import COMPILED, DTYPES, HEADS, Candidate, Check, candidates, checks, compiled_checks, unavailable, unsupported
from .processes import Outcome, Settings, supervise, times, verdict

#: The outputs of every head; a margin with parameters also has their gradients, and a search its scores and classes.
OUTPUTS = ("loss", "dx", "dw", "dbias")
#: Minutes by default, and what the compiled peer gets of them at most: it has no verdict.
MINUTES, PEER_SHARE = {"cpu": 3.0, "cuda": 20.0}, 0.25
#: Seconds of one check that are a hang. On a GPU the first checks compile kernels.
LIMIT = {"cpu": 60.0, "cuda": 300.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, once = parser.add_argument, "only this one (may be repeated); writes no record"
    add("--device", type=usable_device, default="cpu", help="where to run, such as cpu or cuda (default: %(default)s)")
    add("--minutes", type=number(0, open_low=True), metavar="M", help="begin no check after that (default: 3; 20 on a GPU)")
    add("--limit", type=number(0, open_low=True), metavar="S", help="seconds of one check that are a hang (default: 60; 300 on a GPU)")
    add("--tiles", type=tiles_file, metavar="PATH", help="verify the Triton kernels with the tiles of this file of tune, and record them")
    add("--backend", action="append", type=backend_name, choices=["reference", *FUSED], help=once)
    add("--head", action="append", choices=list(HEADS), metavar="NAME", help=once)
    add("--dtype", action="append", choices=list(DTYPES), help=f"of embeddings and weight; {once}")
    add("--seed", type=integer(0, MAX_SEED), default=0, help="of the random problems (default: %(default)s)")


def tiles_file(text: str) -> Path:
    """The ``argparse`` type of a file of tiles that ``tune`` wrote."""
    try:
        heuristics.check_tiles(heuristics.read_tiles(text))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a file of tiles that tune wrote, got {text!r} ({error})") from None
    return Path(text)


@dataclass(frozen=True)
class Found:
    """What came of one candidate: its checks, what they gave, and the verdict."""

    candidate: Candidate
    checks: Sequence[Check]
    outcome: Outcome
    verdict: Verdict


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the record; returns 0 if nothing is wrong, 1 if a backend is or nothing could be verified."""
    kind = torch.device(args.device).type
    narrowed = bool(args.head or args.dtype or args.backend)
    seconds = 60 * (args.minutes if args.minutes is not None else MINUTES.get(kind, MINUTES["cuda"]))
    before = registry.reading(args.device).record
    tiles = heuristics.read_tiles(args.tiles) if args.tiles else list(before.tiles) if before is not None else []
    limit = args.limit if args.limit is not None else LIMIT.get(kind, LIMIT["cuda"])
    settings = Settings(args.device, limit, args.seed, tiles)
    asked = candidates(args.device, args.backend)
    plans = [(one, checks(one, args.device, heads=args.head, dtypes=args.dtype)) for one in asked]
    peer = [] if narrowed else compiled_checks(args.device)
    found, peer_times = verify(plans, settings, seconds, peer)
    show(found, args, peer_times)
    wrong = [f for f in found if f.verdict.verdict in records.BAD]
    nothing = all(f.verdict.verdict not in records.BAD and not any(isinstance(n, int) for n in f.verdict.checks.values()) for f in found)
    code = 1 if wrong or nothing else 0
    if not narrowed and not nothing:
        code = max(code, save(record_of(found, peer_times, settings, seconds)))
    elif narrowed:
        print("\nNo record is written of a part of the checks.")
    if nothing:
        print("\nNothing could be verified")
    elif wrong:
        print(f"\nFAILED: {', '.join(f'{f.candidate.name} ({f.verdict.verdict})' for f in wrong)}")
    else:
        print("\nAll errors are within tolerance")
    return code


def verify(
    plans: Sequence[tuple[Candidate, Sequence[Check]]], settings: Settings, seconds: float, peer: Sequence[Check] = ()
) -> tuple[list[Found], dict[str, dict[str, Time]]]:
    """Check each candidate in turn, within ``seconds`` in all.

    Args:
        peer: what the compiled peer is timed at.

    Returns:
        What was found of each candidate, and the times of the peer.
    """
    kind, end, found = torch.device(settings.device).type, time.monotonic() + seconds, list[Found]()
    total, lost = sum(len(each) for _, each in plans) + len(peer), ""
    bar: tqdm[Any] = tqdm((), total=total, desc="verify", unit="check")
    with bar:
        done = 0
        for index, (candidate, each) in enumerate(plans):
            bar.set_postfix(backend=candidate.name)
            reason = unavailable(candidate) or (None if each else _why_nothing(candidate, settings.device))
            left = sum(len(more) for _, more in plans[index:]) + len(peer) * 4
            share = (end - time.monotonic()) * min(1.0, 1.5 * len(each) / max(left, 1))
            if reason or lost:
                found.append(
                    Found(candidate, each, Outcome(), Verdict(records.UNAVAILABLE if reason else records.UNFINISHED, reason or lost))
                )
            elif share <= 0:
                found.append(Found(candidate, each, Outcome(), Verdict(records.UNFINISHED, f"0 of {len(each)} checks in the time")))
            else:
                outcome = supervise(candidate, each, settings, share, lambda n, at=done: bar.update(at + n - bar.n))  # type: ignore[misc]
                found.append(Found(candidate, each, outcome, verdict(each, outcome, kind)))
                if outcome.fault is not None and not answers(settings):
                    lost = f"the device did not answer after the {outcome.fault[0]} of {candidate.name}"
            done += len(each)
            bar.update(done - bar.n)
        bar.set_postfix(backend=COMPILED)
        remaining = end - time.monotonic()
        peer_times: dict[str, dict[str, Time]] = {}
        if peer and remaining > 0 and not lost:
            one = Candidate(COMPILED, records.FALLBACK)
            limit = min(settings.limit, max(remaining, 1.0))  # compiling is one long check, and nobody waits for it
            peer_times = times(peer, supervise(one, peer, replace(settings, limit=limit), min(remaining, PEER_SHARE * seconds)))
        bar.update(total - bar.n)
    return found, peer_times


def answers(settings: Settings) -> bool:
    """Whether plain PyTorch still works on the device, after something has crashed or hung there."""
    small = [Check("bits", ("float32", "float32"), (5, 24, 19))]
    outcome = supervise(Candidate(records.FALLBACK, records.FALLBACK), small, settings, settings.limit)
    return outcome.fault is None


def _why_nothing(candidate: Candidate, device: str) -> str:
    return unsupported(candidate, device, ("float32", "float32"), 128) or "has none of the dtypes that are asked for"


def record_of(found: Sequence[Found], peer_times: dict[str, dict[str, Time]], settings: Settings, seconds: float) -> Record:
    """The record of what was found."""
    measured: dict[str, dict[str, dict[str, Time]]] = {}
    for name, each in [(f.candidate.name, times(f.checks, f.outcome)) for f in found] + [(COMPILED, peer_times)]:
        for size, by_dtype in each.items():
            for dtype, one in by_dtype.items():
                measured.setdefault(size, {}).setdefault(dtype, {})[name] = one
    about: dict[str, Any] = {"marginkernels": __version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    about |= {"cuda": torch.version.cuda, "minutes": seconds / 60, "limit": settings.limit, "seed": settings.seed}
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    verdicts = {f.candidate.name: f.verdict for f in found}
    return Record(registry.machine(settings.device), made, verdicts, measured, tuple(settings.tiles), about)


def save(record: Record) -> int:
    """Write the record; 1 where that cannot be done."""
    try:
        path = records.write(record)
    except OSError as error:
        print(f"\nThe record cannot be written: {error}")
        return 1
    registry.forget()
    print(f"\nThe record is in {path}; delete the file to be rid of it.")
    return 0


# -- what is printed ---------------------------------------------------------------------------------------------------------------


def show(found: Sequence[Found], args: argparse.Namespace, peer_times: dict[str, dict[str, Time]]) -> None:
    """The tables: errors, what was not verified, what failed, and times."""
    print(f"\n{len(args.head or HEADS)} heads on {args.device}, each backend in a process of its own.")
    print("Largest relative error |got - want| / |want|, where want is from the float64 reference:\n")
    rows = []
    for f in found:
        failed = {"/".join(f.checks[i].pair) for i, said in f.outcome.results.items() if i >= 0 and said["verdict"] in records.BAD}
        for name, seen in f.verdict.errors.items():
            others = [v for k, v in seen.items() if k not in OUTPUTS]
            shown = [seen.get(output) for output in OUTPUTS] + [max(others, default=None)]
            tolerance = max(testing.TOLERANCE[DTYPES[dtype]] for dtype in name.split("/"))
            word = "FAIL" if name in failed else "pass" if name in f.verdict.pairs or f.verdict.verdict in records.BAD else "unfinished"
            rows.append([f.candidate.name, name, *("-" if v is None else _error(v) for v in shown), f"{tolerance:.0e}", word])
    print(table(["backend", "embeddings/weight", *OUTPUTS, "others", "tolerance", ""], rows, right=range(2, 8)))
    verdicts = [
        (
            f.candidate.name,
            f.verdict.verdict,
            sum(n for n in f.verdict.checks.values() if isinstance(n, int)),
            f"{f.verdict.seconds:.0f}",
            f.verdict.why,
        )
        for f in found
    ]
    print("\nVerdicts\n\n" + table(["backend", "verdict", "checks passed", "seconds", "why"], verdicts, right=(2, 3)))
    failures = [
        (f.candidate.name, said["verdict"], f"{f.checks[i]}: {said['why']}")
        for f in found
        for i, said in f.outcome.results.items()
        if i >= 0 and said["verdict"] in records.BAD
    ]
    if failures:
        print("\nFailures\n\n" + table(["backend", "verdict", "what"], failures))
    timed = [(f.candidate.name, times(f.checks, f.outcome)) for f in found] + [(COMPILED, peer_times)]
    lines = [
        (size, dtype, name, f"{one.ms:.2f}", f"{one.torch_ms:.2f}", f"{1 / one.ratio:.2f}x")
        for name, each in timed
        for size, by_dtype in each.items()
        for dtype, one in by_dtype.items()
    ]
    if lines:
        order = [s.name for s in records.SIZE_CLASSES]
        lines.sort(key=lambda line: (order.index(line[0]), line[1]))
        print("\nA step, forward and backward, and torch's in turn with it, in ms\n")
        print(table(["size", "embeddings", "backend", "ms", "torch", "faster"], lines, right=(3, 4, 5)))
    skipped = {name: why for f in found for name, why in f.verdict.checks.items() if isinstance(why, str)}
    for name, why in skipped.items():
        print(f"\nCheck {name}: {why}", end="")
    print()


def _error(off: float) -> str:
    return f"{off:.1e}" if math.isfinite(off) and off < 1e300 else "nan"
