"""The GPU resources of each CUDA C++ kernel, as nvcc reports them; needs nvcc, but neither a GPU nor the built extension."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
#: The sources of each architecture: the fused kernels use instructions that exist on 9.0 only.
FILES = {"sm_80": ("generic.cu",), "sm_90": ("generic.cu", "hopper.cu")}
ARCHS = tuple(FILES)


def unavailable_reason() -> str | None:
    """Why nothing can be collected here, or None."""
    missing = [name for name in ("nvcc", "c++filt") if not shutil.which(name)]
    return f"no {' and no '.join(missing)} on the PATH" if missing else None


def compile_source(source: str, arch: str, folder: Path = SOURCES) -> str:
    """nvcc's report on ``source`` in ``folder`` for ``arch`` ("sm_80"; "sm_90" stands for sm_90a where the source needs it).

    Raises:
        RuntimeError: with the compiler's message if it fails.
    """
    number = arch.removeprefix("sm_") + ("a" if source == "hopper.cu" else "")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}", "-Xptxas=-v", "-c"]
        done = subprocess.run([*command, str(folder / source), "-o", f"{scratch}/out.o"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source} for {arch}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def parse(report: str) -> list[dict]:
    """One record for each kernel of an nvcc report: ``kernel``, ``registers``, ``stack_bytes`` and ``spill_bytes`` per thread,
    ``shared_bytes`` per block (static; without the dynamic shared memory of a launch)."""
    blocks = report.split("Compiling entry function '")[1:]
    names = subprocess.run(["c++filt"], input="\n".join(b.split("'")[0] for b in blocks), capture_output=True, text=True, check=True)
    records = []
    for name, block in zip(names.stdout.splitlines(), blocks, strict=True):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block).groups()
        )
        shared = re.search(r"(\d+) bytes smem", block)
        records.append(
            {
                "kernel": readable(name),
                "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
                "stack_bytes": stack,
                "spill_bytes": stores + loads,
                "shared_bytes": int(shared.group(1)) if shared else 0,
            }
        )
    return records


def readable(name: str) -> str:
    """``finish_kernel<float32, bfloat16>`` of a C++ signature."""
    name = name.replace("mk::(anonymous namespace)::", "").removeprefix("void ").split("(")[0].replace("> >", ">>")
    return (
        name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").replace("float,", "float32,").replace("float>", "float32>")
    )


def collect(archs: Iterable[str] = ARCHS, processes: int = 1) -> list[dict]:
    """Records of :func:`parse` for every kernel and architecture of ``archs`` that there are sources for, each with ``backend`` and
    ``arch``. If the extension is built, the dynamic shared memory of the fused kernels is added."""
    try:
        dynamic = importlib.import_module("marginkernels._cuda").fused_shared_bytes
    except (ImportError, AttributeError):
        dynamic = None
    work = [(arch, source) for arch in archs for source in FILES.get(arch.removesuffix("a"), ("generic.cu",))]
    with ThreadPoolExecutor(processes) as pool:
        reports = list(pool.map(lambda one: compile_source(one[1], one[0].removesuffix("a")), work))
    records = []
    for (arch, source), report in zip(work, reports, strict=True):
        backend = "hopper" if source == "hopper.cu" else "cuda"
        records += [{"backend": backend, "arch": arch, **r} for r in parse(report)]
    for record in records:
        if dynamic and record["kernel"].startswith("fused_kernel"):
            record["shared_bytes"] += dynamic(int(record["kernel"].split(", ")[1]))
            record["shared_limit"] = 227 * 1024
    return records
