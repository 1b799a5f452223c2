"""``python -m benchmarks.gpu_small``: every GPU backend on a few small ragged cases, for compute-sanitizer; seconds without it.

``--sanitize`` runs it under each of compute-sanitizer's tools in turn, whatever became of the one before.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from marginkernels import verify
from marginkernels.backend import FUSED

#: Where CUDA's own tools lie where they are not on the path.
CUDA_BIN = Path("/usr/local/cuda/bin")
#: compute-sanitizer's tools: accesses out of bounds, races in shared memory.
TOOLS = ("memcheck", "racecheck")
#: Seconds that each may take.
LIMIT = 36
#: (N, D, C): one tile and less, ragged in every direction, several tiles.
SHAPES = [(7, 40, 65), (33, 128, 517), (130, 512, 1100)]
HEADS = ("arcface", "curricularface", "softmax")


def main() -> int:
    worst = 0
    for name, backend in FUSED.items():
        if "cuda" not in backend.device_types or backend.unavailable() is not None:
            continue
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                if backend.refuses("cuda", dtype, dtype, shape[1]) is not None:
                    continue
                kept = 0.6 * backend.workspace_bytes(shape[0], shape[2], dtype, 1 << 30) / 2**20
                for head, mb in [(head, 0.0) for head in HEADS] + [(HEADS[0], kept)] * (kept > 0):
                    case = verify.Case.random(*shape, dtype, device="cuda")
                    found = max(verify.errors(case, verify.HEADS[head](shape[2]), name, workspace_mb=mb).values())
                    good = found <= verify.TOLERANCE[dtype]
                    worst |= not good
                    what = f"{name} {head} {dtype} {shape}{' with a workspace' if mb else ''}"
                    print(f"{what}: {found:.2e} {'ok' if good else 'WRONG'}", flush=True)
    return worst


def tool(name: str) -> str | None:
    """The path of one of CUDA's tools, or None."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_BIN))


def sanitizer(which: str) -> list[str]:
    """The words that run this module under compute-sanitizer."""
    return [
        tool("compute-sanitizer") or "compute-sanitizer", "--tool", which, "--error-exitcode", "9", "--target-processes", "all",
        sys.executable, "-m", "benchmarks.gpu_small",
    ]  # fmt: skip


def sanitize(command=sanitizer, limit: float = LIMIT) -> int:
    """Every tool in turn; 1 where one found something, failed, or was not done by ``limit`` seconds."""
    worst = 0
    for which in TOOLS:
        print(f"## {which}", flush=True)
        try:
            status = subprocess.run(command(which), timeout=limit, stderr=subprocess.STDOUT).returncode
            outcome = "ok" if status == 0 else f"exit status {status}"
        except (OSError, subprocess.TimeoutExpired) as error:
            status, outcome = 1, f"ended at its limit of {limit:g} s" if isinstance(error, subprocess.TimeoutExpired) else error.strerror
        print(f"## {which}: {outcome}", flush=True)
        worst |= status != 0
    return int(worst)


if __name__ == "__main__":
    sys.exit(sanitize() if sys.argv[1:] == ["--sanitize"] else main())
