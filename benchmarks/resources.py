"""``python -m benchmarks resources``: registers, stack and shared memory of every compiled kernel, without a GPU.

A collector is a module of this package with ``unavailable_reason() -> why it cannot run here, or None``, ``ARCHS``, its architectures by
default, and ``collect(archs, processes=) -> records``.
A record has ``kernel``, ``backend``, ``arch``, ``registers`` and ``stack_bytes`` per thread and ``shared_bytes`` per program. It may have
``shared_limit``, and ``explained``: why its use of the stack is acceptable. One that the compiler refuses has ``failed`` in place of
numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os

from marginkernels.cli._text import integer, writable_file
from marginkernels.cli.tune import architecture

COLLECTORS = {"triton": "resources_triton", "cuda": "resources_cuda"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", type=architecture, metavar="SM", help="architectures; of each collector its own by default")
    parser.add_argument("--jobs", type=integer(), default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted(COLLECTORS), help="collectors to run; by default all that can run here")
    parser.add_argument("--dims", nargs="+", type=integer(high=1024), help="embedding dimensions of the Triton kernels; all by default")
    parser.add_argument("--json", type=writable_file, help="write the records here")


def run(args: argparse.Namespace) -> int:
    """Print a table, write the records, and return 1 where :func:`faults` finds any."""
    records = []
    for name, module in COLLECTORS.items():
        if args.only and name not in args.only:
            continue
        collector = importlib.import_module(f"benchmarks.{module}")
        reason = collector.unavailable_reason()
        if reason:
            print(f"{name}: skipped, {reason}")
            if args.only:
                return 1
            continue
        options = {"dims": args.dims} if args.dims and name == "triton" else {}
        records += collector.collect(args.arch or collector.ARCHS, processes=args.jobs, **options)
    print(table(records))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(document(records))
    found = faults(records)
    print("\n".join(found) if found else f"{len(records)} kernels, no unexplained use of the stack")
    return 1 if found or not records else 0


def document(records: list[dict]) -> str:
    """A record a line, so that changes can be read, with the versions of the compilers."""
    lines = ",\n".join(json.dumps(r) for r in records)
    return f'{{"schema": "marginkernels.resources/1",\n"versions": {json.dumps(versions())},\n"records": [\n{lines}\n]}}\n'


def versions() -> dict[str, str]:
    """Of the packages that compile, where they are installed."""
    found = {}
    for name in ("triton", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def faults(records: list[dict]) -> list[str]:
    """Kernels that do not compile, use the stack without an explanation, or use more shared memory than there is."""
    found = []
    for r in records:
        name = f"{r['backend']} {r['arch']} {r['kernel']}"
        if "failed" in r:
            found.append(f"{name}: {r['failed']}")
            continue
        if r["stack_bytes"] > 0 and not r.get("explained"):
            found.append(f"{name}: {r['stack_bytes']} bytes of stack, unexplained")
        if r["shared_bytes"] > r.get("shared_limit", r["shared_bytes"]):
            found.append(f"{name}: {r['shared_bytes']} bytes of shared memory, at most {r['shared_limit']} available")
    return found


def table(records: list[dict]) -> str:
    lines = [f"{'backend':8} {'arch':7} {'registers':>9} {'stack':>6} {'shared':>7}  kernel"]
    for r in records:
        if "failed" in r:
            continue
        note = f"  ({r['explained']})" if r.get("explained") else ""
        lines.append(f"{r['backend']:8} {r['arch']:7} {r['registers']:9} {r['stack_bytes']:6} {r['shared_bytes']:7}  {r['kernel']}{note}")
    return "\n".join(lines)
