"""``python -m benchmarks train``: time and peak memory of whole training steps: forward, backward, optimizer.

Each contestant owns its class centers and its optimizer's state, in a process of its own, and the processes take turns, several rounds of
them; a record has the median of all steps and the peak resident memory above that before the centers were made. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import marginkernels as mk
from marginkernels.backend.cpu import release_memory
from marginkernels.cli._text import integer, number, writable_file

from .cases import DTYPES, Case
from .run import write

MARGIN = {"scale": 64.0, "margin": 0.5}
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
#: Embeddings' dtype -> (N, C) of the cases; D is an argument.
SHAPES = tuple(itertools.product((64, 256), (100_000, 1_000_000)))
WARM = 1
Step = Callable[[Tensor, Tensor], None]


def _peer(name: str) -> Callable[[Case, Tensor], Step]:
    """A provider of :mod:`benchmarks.peers` with ``torch.optim.SGD`` as one kernel."""

    def build(case: Case, w: Tensor) -> Step:
        from .peers import providers

        w.requires_grad_()
        work = providers()[name].build(case, w)
        optimizer = torch.optim.SGD([work.weight], **OPTIONS, fused=True)

        def step(x: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            work.loss(x, labels).backward()
            optimizer.step()

        return step

    return build


def _ours(fused: bool, dtype: torch.dtype) -> Callable[[Case, Tensor], Step]:
    def build(case: Case, w: Tensor) -> Step:
        head = mk.MarginHead(case.D, case.C, mk.ArcFace(**MARGIN), device="meta")
        head.weight = torch.nn.Parameter(w)
        head.margin.to_empty(device="cpu")
        assert w.dtype == dtype
        optimizer = mk.optim.FusedSGD(head, **OPTIONS) if fused else mk.optim.SGD(head.parameters(), **OPTIONS)

        def step(x: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            head(x, labels).backward()
            optimizer.step()

        return step

    return build


#: Name -> the dtype of the class centers and of the momentum, and what makes a step.
CONTESTANTS: dict[str, tuple[torch.dtype, Callable[[Case, Tensor], Step]]] = {
    "compiled eager + torch.optim": (torch.float32, _peer("torch.compile")),
    "PartialFC + torch.optim": (torch.float32, _peer("partialfc-sequence")),
    "separate step": (torch.float32, _ours(False, torch.float32)),
    "fused step": (torch.float32, _ours(True, torch.float32)),
    "fused step, bf16 centers": (torch.bfloat16, _ours(True, torch.bfloat16)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable_file, required=True, metavar="PATH", help="output file; rewritten after each case")
    parser.add_argument("--dim", type=integer(), default=512, help="D (default: %(default)s)")
    parser.add_argument("--shape", action="append", type=_shape, metavar="N,C", help="instead of the four of the records; may be repeated")
    parser.add_argument("--steps", type=integer(), default=3, help="timed steps of each process (default: %(default)s)")
    parser.add_argument("--rounds", type=integer(), default=3, help="processes of each contestant (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the cases of the output file that were timed, and run the others")
    parser.add_argument("--limit", type=number(0, open_low=True), default=1200.0, help="seconds for a process (default: %(default)s)")


def _shape(text: str) -> tuple[int, int]:
    n, _, c = text.partition(",")
    if not (n.isdecimal() and c.isdecimal() and int(n) and int(c)):
        raise argparse.ArgumentTypeError(f"expected N,C, two integers >= 1, got {text!r}")
    return int(n), int(c)


def run(args: argparse.Namespace) -> int:
    from .environment import describe

    results: dict[str, Any] = {"environment": describe("cpu") | {"preset": "train"}, "records": []}
    cases = [(n, c, dtype) for n, c in args.shape or SHAPES for dtype in DTYPES]
    if args.resume and args.json.exists():
        results = json.loads(args.json.read_text())
        of_case = [[r for r in results["records"] if (r["N"], r["C"], r["dtype"], r["D"]) == (*case, args.dim)] for case in cases]
        done = [len(found) == len(CONTESTANTS) and all(r["status"] != "failed" for r in found) for found in of_case]
        results["records"] = [r for found, whole in zip(of_case, done, strict=True) if whole for r in found]
        cases = [case for case, whole in zip(cases, done, strict=True) if not whole]
    with tqdm(total=len(cases) * len(CONTESTANTS) * args.rounds, unit="process", dynamic_ncols=True) as bar:
        for n, c, dtype in cases:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
            for _ in range(args.rounds):
                for name in CONTESTANTS:
                    bar.set_description(f"{name}, N={n:,} C={c:,} {dtype}")
                    found[name].append(
                        _spawn({"name": name, "N": n, "C": c, "D": args.dim, "dtype": dtype, "steps": args.steps}, args.limit)
                    )
                    bar.update()
            results["records"] += [_record(name, n, args.dim, c, dtype, each) for name, each in found.items()]
            write(args.json, results)
    print(f"{len(results['records'])} records in {args.json}")
    return 0


def _spawn(job: dict[str, Any], limit: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train"], input=json.dumps(job), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"status": "too slow", "reason": f"more than {limit:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"status": "oom" if done.returncode == -9 else "failed", "reason": lines[-1][:160] if lines else f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _record(name: str, n: int, d: int, c: int, dtype: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"provider": name, "head": "arcface", "phase": "train", "N": n, "D": d, "C": c, "dtype": dtype}
    about["weight_dtype"] = str(CONTESTANTS[name][0]).removeprefix("torch.")
    bad = [one for one in found if one.get("status")]
    if bad:
        return about | bad[0]
    ms = [v for one in found for v in one["ms"]]
    figures = {"ms_p50": round(statistics.median(ms), 2), "ms_least": round(min(ms), 2), "samples": len(ms)}
    return about | {"status": "ok"} | figures | {"peak_mb": round(max(one["peak_mb"] for one in found), 1), "loss": found[0]["loss"]}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures."""
    from .measure import _status, _trim

    case = Case("arcface", job["N"], job["D"], job["C"], job["dtype"], train=True)
    dtype, build = CONTESTANTS[job["name"]]
    g = torch.Generator().manual_seed(0)
    small = Case("arcface", 8, 64, 100, job["dtype"])
    warm = build(small, torch.randn(small.C, small.D, generator=g).to(dtype))  # libraries that are loaded at the first step
    warm(torch.randn(small.N, small.D).to(DTYPES[case.dtype]).requires_grad_(), torch.zeros(small.N, dtype=torch.int64))
    del warm
    release_memory()
    _trim()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    w = torch.empty(case.C, case.D, dtype=dtype).normal_(std=0.1, generator=g)
    labels = torch.randint(case.C, (case.N,), generator=g)
    x = torch.randn(case.N, case.D, generator=g)
    x[::2] = 0.6 * x[::2] + 12 * w[labels[::2]].float()
    x = x.to(DTYPES[case.dtype]).requires_grad_()
    step, ms = build(case, w), []
    for i in range(WARM + job["steps"]):
        x.grad = None
        start = time.perf_counter()
        step(x, labels)
        if i >= WARM:
            ms.append(1e3 * (time.perf_counter() - start))
    peak = _status("VmHWM") - before
    with torch.no_grad():
        loss = float(mk.margin_cross_entropy(x, w, labels, margin=mk.ArcFace(**MARGIN)))
    return {"ms": ms, "peak_mb": peak / 2**20, "loss": round(loss, 4)}


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
