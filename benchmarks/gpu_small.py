"""``python -m benchmarks.gpu_small [BACKEND ...]``: GPU backends on a few small ragged cases, for compute-sanitizer; seconds without it."""

from __future__ import annotations

import subprocess
import sys

import torch

from marginkernels import verify
from marginkernels.backend import FUSED

#: (N, D, C): one tile and less, ragged in every direction, several tiles.
SHAPES = [(7, 40, 65), (33, 128, 517), (130, 512, 1100)]
HEADS = ("arcface", "curricularface", "softmax")
#: A backend whose kernels hang is ended after so many seconds.
SECONDS = 25


def main(names: list[str]) -> int:
    """Every backend in a process of its own: an error on a GPU spoils the process that it happens in."""
    if len(names) == 1:
        return check(names[0])
    return max((alone(name) for name in names or _here()), default=0)


def alone(name: str) -> int:
    try:
        return int(subprocess.run([sys.executable, "-m", "benchmarks.gpu_small", name], timeout=SECONDS).returncode != 0)
    except subprocess.TimeoutExpired:
        print(f"{name}: ended after {SECONDS} s", flush=True)
        return 1


def _here() -> list[str]:
    return [name for name, b in FUSED.items() if "cuda" in b.device_types and b.unavailable() is None]


def check(name: str) -> int:
    """1 if a case is wrong, 0 if none is."""
    worst = 0
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if FUSED[name].refuses("cuda", dtype, dtype, shape[1]) is not None:
                continue
            kept = 0.6 * FUSED[name].workspace_bytes(shape[0], shape[2], dtype, 1 << 30) / 2**20
            for head, mb in [(head, 0.0) for head in HEADS] + [(HEADS[0], kept)] * (kept > 0):
                case = verify.Case.random(*shape, dtype, device="cuda")
                found = max(verify.errors(case, verify.HEADS[head](shape[2]), name, workspace_mb=mb).values())
                good = found <= verify.TOLERANCE[dtype]
                worst |= not good
                what = f"{name} {head} {dtype} {shape}{' with a workspace' if mb else ''}"
                print(f"{what}: {found:.2e} {'ok' if good else 'WRONG'}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
