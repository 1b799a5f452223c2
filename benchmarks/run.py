"""``python -m benchmarks run``: one process per case, all records in one file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from marginkernels.cli._text import number, refuse, writable_file

from .cases import DTYPES, Case, preset
from .heads import HEADS
from .peers import Provider, providers

#: Sampling time of each provider and phase, in seconds.
SECONDS = {"quick": 0.4, "full": 0.6}
#: A provider whose step would take more seconds than this, as estimated from its smaller cases, is not run.
LONGEST_STEP = {("cpu", "quick"): 8.0, ("cpu", "full"): 30.0, ("cuda", "quick"): 5.0, ("cuda", "full"): 30.0}
#: Time limit of one case in seconds, in case it hangs.
CASE_SECONDS = {"cpu": 1200, "cuda": 300}
#: The share of the free memory that a case on a CPU may use.
MEMORY_SHARE = 0.9
#: Below this NDC, the time of a step does not predict that of a larger case.
TELLING = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=tuple(SECONDS), default="quick", help="quick: takes minutes; full: the committed records")
    parser.add_argument("--json", type=writable_file, required=True, metavar="PATH", help="output file; rewritten after each case")
    parser.add_argument("--providers", type=_providers, metavar="NAME,...", help="run only these (see `peers`)")
    shape = "HEAD,DTYPE,N,D,C"
    parser.add_argument("--case", action="append", type=_case, metavar=shape, help="run this case instead of the preset; may be repeated")
    parser.add_argument("--train", action="store_true", help="also time the optimizer step, in every case")
    parser.add_argument("--time-limit", type=number(0, open_low=True), metavar="SECONDS", help="start no case after this time")


def _case(text: str) -> Case:
    """The ``argparse`` type of ``--case``."""
    head, dtype, *sizes = text.split(",") if text.count(",") == 4 else ("", "")
    if head not in HEADS or dtype not in DTYPES or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected HEAD,DTYPE,N,D,C with a head of {', '.join(HEADS)}, a dtype of {', '.join(DTYPES)} and sizes >= 1, got {text!r}"
        )
    n, d, c = map(int, sizes)
    return Case(head, n, d, c, dtype)


def _providers(text: str) -> list[str]:
    """The ``argparse`` type of ``--providers``."""
    chosen, known = text.split(","), providers()
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
    return chosen


def run(args: argparse.Namespace) -> int:
    from .environment import describe

    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device: expected cpu where PyTorch sees no GPU, got cuda")
    known = providers()
    chosen = args.providers or list(known)
    cases = args.case or preset(args.device, args.preset)
    if args.train:
        cases = [Case(**(case.as_dict() | {"train": True})) for case in cases]
    able = [known[name] for name in known if name in chosen and known[name].unavailable_reason(args.device) is None]
    results = {"environment": describe(args.device) | {"preset": "custom" if args.case else args.preset}, "records": []}
    path = args.json
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tqdm(cases, unit="case", dynamic_ncols=True) as bar:
        for case in bar:
            if args.time_limit and time.monotonic() - started > args.time_limit:
                bar.write(f"time limit: {case} and the cases after it were not run")
                results["environment"]["stopped_before"] = str(case)
                break
            bar.set_description(str(case))
            results["records"] += run_case(case, args.device, able, results["records"], args.preset, bar)
            write(path, results)
    results["environment"]["seconds"] = round(time.monotonic() - started)
    write(path, results)
    print(f"{len(results['records'])} records in {path}")
    return 0


def write(path: Path, results: dict) -> None:
    """Write one record per line. The file is replaced atomically."""
    lines = ",\n".join("  " + json.dumps(r) for r in results["records"])
    environment = json.dumps(results["environment"], indent=1).replace("\n", "\n ")
    text = f'{{\n "environment": {environment},\n "records": [\n{lines}\n ]\n}}\n'
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def run_case(case: Case, device: str, able: list[Provider], earlier: list[dict], preset_name: str, bar: Any) -> list[dict]:
    """The records of one case, including those of providers that do not support it or were not run."""
    from .worker import _record

    available = psutil.virtual_memory().available if device == "cpu" else None
    records, names = [], []
    for provider in able:
        reason = provider.unsupported_reason(case, device)
        if reason is not None:
            if not provider.ours:
                records += [_record(case, provider, phase, status="unsupported", reason=reason) for phase in case.phases]
            continue
        seconds = expected_seconds(earlier, provider.name, case)
        if seconds is not None and seconds > LONGEST_STEP[device, preset_name]:
            reason = f"not run: about {seconds:.0f} s a step by its smaller cases"
            records += [_record(case, provider, phase, status="too slow", reason=reason) for phase in case.phases]
            continue
        # Centers, their gradient, momentum where it is timed, and what the float64 reference needs.
        needed = provider.expected_bytes(case) + (3 if case.train else 2) * case.C * case.D * 4 + (1 << 30)
        if available is not None and needed > MEMORY_SHARE * available:
            reason = f"not run: needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB free"
            records += [_record(case, provider, phase, status="oom", reason=reason) for phase in case.phases]
            continue
        names.append(provider.name)
    memory = None if available is None else int(MEMORY_SHARE * available)
    while names:
        job = {"case": case.as_dict(), "device": device, "providers": names, "seconds": SECONDS[preset_name], "memory_bytes": memory}
        found, died, how = _spawn(job, CASE_SECONDS[device], bar)
        if died is None:
            return records + found
        # Record the failure of the provider that killed the process, and start again without it.
        culprits = [died] if died in names else list(names)
        status = "oom" if "signal 9" in how else "failed"
        by_name = {p.name: p for p in able}
        records += [_record(case, by_name[n], phase, status=status, reason=how) for n in culprits for phase in case.phases]
        names = [n for n in names if n not in culprits]
    return records


def expected_seconds(earlier: list[dict], provider: str, case: Case) -> float | None:
    """Estimated time of one step, scaled by NDC from the largest timed case of the same head and dtype; None where there is none."""
    wanted = (provider, case.head, case.dtype, "step", "ok")
    same = [r for r in earlier if (r["provider"], r["head"], r["dtype"], r["phase"], r["status"]) == wanted]
    known = [(r["N"] * r["D"] * r["C"], r["ms_p50"]) for r in same if r["N"] * r["D"] * r["C"] >= TELLING]
    if not known:
        return None
    product, ms = max(known)
    return 1e-3 * ms * max(1.0, case.product / product)


def _spawn(job: dict, limit: float, bar: Any) -> tuple[list[dict], str | None, str]:
    """Run the worker.

    Returns:
        Its records; and, where it did not end well, the provider that was running and how the process ended (else None and "").
    """
    from .worker import EVENT, without_folders

    records, running = [], None
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        timer = threading.Timer(limit, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps(job))
            child.stdin.close()
            for line in child.stdout:
                if not line.startswith(EVENT):
                    continue
                event = json.loads(line[len(EVENT) :])
                if "record" in event:
                    records.append(event["record"])
                else:
                    running = event["running"]
                    bar.set_postfix_str(running)
            code = child.wait()
        finally:
            expired = not timer.is_alive()
            timer.cancel()
            child.kill()
            child.wait()
        if code == 0:
            return records, None, ""
        errors.seek(0)
        last = without_folders(([line.strip() for line in errors.read().splitlines() if line.strip()] or [""])[-1])
    if expired:
        how = f"stopped after {limit:.0f} s"
    else:
        how = f"ended by signal {-code}" if code < 0 else f"ended with status {code}: {last}"[:160]
    return [], running or "nothing", how
