"""The machine and the versions that a record was taken with, without host names or folders."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import psutil
import torch

import marginkernels

from .measure import Device, copy_bandwidth
from .peers import providers
from .worker import without_folders

#: The instruction sets that determine the speed of matrix products on x86, in the order in which they are listed.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


def machine(kind: str) -> dict:
    """The machine, the versions and the time, for device ``kind``, ``cpu`` or ``cuda``."""
    name, flags = _cpu()
    return {
        "device": kind,
        "cpu": name,
        "cpu_features": flags,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "marginkernels": marginkernels.__version__,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),  # what else the machine was busy with
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe(kind: str) -> dict:
    """The ``environment`` block of a record file for device ``kind``, ``cpu`` or ``cuda``."""
    found = machine(kind) | {
        "copy_gb_s": round(copy_bandwidth(Device(kind)) / 1e9, 1),
        "memory_method": "torch.cuda.max_memory_allocated" if kind == "cuda" else "resident high-water mark of the process",
    }
    if kind == "cuda":
        torch.cuda.empty_cache()  # the cases run in other processes
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    found["providers"] = {
        p.name: {"note": p.note, "version": p.version(), "unavailable": without_folders(p.unavailable_reason(kind) or "") or None}
        for p in providers().values()
        if not getattr(p, "variant", "")
    }
    return found


def _cpu() -> tuple[str, list[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    return name, [f for f in _FLAGS if f in flags]


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def commit() -> str | None:
    """Short commit hash of the checkout, with ``+`` appended where tracked sources differ from it; None outside a checkout."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Only changes of the measured code count, not of the records or the report.
        sources = ("../marginkernels", "../csrc", ".", ":!results", ":!RESULTS.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
