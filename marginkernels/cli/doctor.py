"""``python -m marginkernels doctor``: hardware, software and build of this machine, and which backends can run on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backend import backends, cpu, records, registry
from ._text import table

#: Packages that this package uses where they are installed, and what for.
PACKAGES = {
    "numpy": "required",
    "triton": "the triton backend",
    "tqdm": "progress bars",
    "matplotlib": "the demo, benchmark plots",
    "pillow": "the demo",
    "fonttools": "the demo",
    "psutil": "benchmarks",
    "pytest": "tests",
    "pytest-xdist": "running tests in parallel",
    "hypothesis": "tests",
    "pytorch-metric-learning": "tests; a peer in the benchmarks",
    "ninja": "building the C++ and CUDA kernels",
    "pybind11": "building the C++ kernels",
}
#: Instruction sets that the kernels can use, by their names in Linux's /proc/cpuinfo.
CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report. Always returns 0: a machine without a compiler or a GPU is not an error."""
    found = report()
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return 0


def report() -> dict[str, Any]:
    """The whole report, ready for JSON."""
    return {
        "marginkernels": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {"C++ compiler": _compiler(), "nvcc": _tool("nvcc", r"release ([\d.]+)"), "ninja": _tool("ninja", r"([\d.]+)")},
        "cpu": {
            "name": records.processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "features": [f for f in CPU_FEATURES if f in (records.cpu_field("flags") or records.cpu_field("Features") or "").split()],
        },
        "gpus": _gpus(),
        "backends": {name: {**b, "device_types": list(b["device_types"])} for name, b in backends().items()},
        "records": [_record(device) for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]],
        "extensions": _extensions(),
    }


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    tools, cpu = found["tools"], found["cpu"]
    cuda = found["torch"]["cuda"] or (f"ROCm {found['torch']['hip']}" if found["torch"]["hip"] else "none")
    facts = [
        ("marginkernels", found["marginkernels"]),
        ("Python", found["python"]),
        ("PyTorch", f"{found['torch']['version']}, CUDA it was built for: {cuda}"),
        ("system", found["system"]),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores; PyTorch uses {cpu['torch_threads']} threads and {cpu['torch_uses']}"),
        ("CPU features", " ".join(cpu["features"]) or "none that the kernels can use"),
        *(
            (f"GPU {i}", f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']:.0f} GiB")
            for i, g in enumerate(found["gpus"])
        ),
        *([] if found["gpus"] else [("GPU", "none that PyTorch can use")]),
        *((name, where or "not found") for name, where in tools.items()),
    ]
    backends_ = [
        (name, "yes" if b["available"] else "no", "yes" if b["verified"] else "no", " ".join(b["device_types"]), b["reason"] or b["note"])
        for name, b in found["backends"].items()
    ]
    packages = [(name, version or "not installed", PACKAGES[name]) for name, version in found["packages"].items()]
    parts = [
        "\n".join(f"{name:<15}{value}" for name, value in facts),
        table(["backend", "available", "verified", "devices", "description, or why it cannot run"], backends_),
        "backend='auto' only picks verified backends; one that is not verified can be used by naming it.",
        *(_of_record(one) for one in found["records"]),
        table(["extension", "state"], [(name, state) for name, state in found["extensions"].items()]),
        table(["package", "version", "for"], packages),
    ]
    return "\n\n".join(parts)


def _record(device: str) -> dict[str, Any]:
    """What is verified on a device, from which record, and the other records with the reason why each does not serve."""
    reading = registry.reading(device)
    record = reading.record
    verdicts = {} if record is None else {name: f"{v.verdict}{': ' * bool(v.why)}{v.why}" for name, v in record.backends.items()}
    about = {} if record is None else {"made": record.made, "torch": record.machine.torch, "driver": record.machine.driver}
    ignored = [{"path": str(path), "reason": reason} for path, reason in reading.ignored]
    return {"device": device, "path": reading.path and str(reading.path), **about, "backends": verdicts, "ignored": ignored}


def _of_record(found: dict[str, Any]) -> str:
    """One device's record for people."""
    device = found["device"]
    if found["path"] is None:
        what = "" if device == "cpu" else f", so auto takes {records.FALLBACK}; python -m marginkernels verify --device cuda makes one"
        lines = [f"Verified on {device}: no record{what}"]
    else:
        with_driver = f", driver {found['driver']}" if found["driver"] else ""
        lines = [f"Verified on {device}, by {found['path']} of {found['made']} (torch {found['torch']}{with_driver}):"]
        lines += [f"  {name}: {said}" for name, said in found["backends"].items()]
    return "\n".join([*lines, *(f"  ignored: {one['path']}: {one['reason']}" for one in found["ignored"])])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str, pattern: str) -> str | None:
    """``version, path`` of a program on the PATH, or None where there is none. ``pattern`` finds the version in its output."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which cannot be run: {error}"
    match = re.search(pattern, out)
    return f"{match[1] if match else 'unknown version'}, {path}"


def _compiler() -> str | None:
    return next((found for name in ("c++", "g++", "clang++") if (found := _tool(name, r"(\d+\.\d+[\d.]*)"))), None)


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30})
    return found


def _extensions() -> dict[str, str]:
    """The compiled extension modules of the package: built, or the reason that the build wrote down."""
    folder = Path(__file__).parents[1]
    states = {f"marginkernels.{p.name.partition('.')[0]}": f"built: {p.name}" for p in sorted(folder.glob("_*.so"))}
    if "marginkernels._cpu" in states and cpu.levels():
        states["marginkernels._cpu"] += f", for {' '.join(cpu.levels(here=False))}"
    for p in sorted(folder.glob("_*.txt")):
        states.setdefault(f"marginkernels.{p.stem}", f"not built: {p.read_text().strip()}")
    return states or {"none": "not built; reinstall the package with a C++ compiler on the PATH"}
