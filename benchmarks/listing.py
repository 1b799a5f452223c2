"""``python -m benchmarks peers``: every provider, whether it can run here, and what it supports."""

from __future__ import annotations

import argparse

import torch

from .peers import providers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    for p in providers().values():
        reason = p.unavailable_reason(args.device)
        version = f" {p.version()}" if p.version() else ""
        print(f"{p.name}{version}: {'available' if reason is None else f'not available on {args.device}: {reason}'}")
        print(f"    {p.note}")
        print(f"    heads: {', '.join(p.heads)}; dtypes: {', '.join(p.dtypes)}; devices: {', '.join(p.device_types)}")
    return 0
