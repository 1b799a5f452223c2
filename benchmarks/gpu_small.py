"""``python -m benchmarks.gpu_small [BACKEND ...]``: check the GPU backends on a few small ragged cases.

Meant to run under compute-sanitizer; takes seconds without it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch

from marginkernels import testing
from marginkernels.backend import FUSED

#: (N, D, C): less than one tile, about one tile, several tiles; then so many classes that on any GPU a program takes many tiles, so that
#: rings of buffers wrap around. Ragged in every dimension.
SHAPES = [(7, 40, 65), (33, 128, 517), (130, 512, 1100), (130, 512, 20_011)]
HEADS = ("arcface", "curricularface", "softmax")
#: Time limit of one backend in seconds, in case its kernels hang.
SECONDS = 25


def main(names: list[str]) -> int:
    """Check each backend in its own process, because a GPU error makes the process unusable."""
    if len(names) == 1:
        return check(names[0])
    return max((alone(name) for name in names or _here()), default=0)


def alone(name: str) -> int:
    try:
        return int(subprocess.run([sys.executable, "-m", "benchmarks.gpu_small", name], timeout=SECONDS).returncode != 0)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {SECONDS} s", flush=True)
        return 1


def _here() -> list[str]:
    return [name for name, b in FUSED.items() if "cuda" in b.device_types and b.unavailable_reason() is None]


def check(name: str) -> int:
    """Check one backend in this process; 1 if any case is wrong, else 0."""
    worst = 0
    for shape, dtype, head, mb in cases(name):
        case = testing.Case.random(*shape, dtype, device="cuda")
        found = max(testing.errors(case, testing.HEADS[head](shape[2]), name, workspace_mb=mb).values())
        good = found <= testing.TOLERANCE[dtype]
        worst |= not good
        what = f"{name} {head} {dtype} {shape}{' with a workspace' if mb else ''}"
        print(f"{what}: {found:.2e} {'ok' if good else 'WRONG'}", flush=True)
    return worst


def cases(name: str) -> Iterator[tuple[tuple[int, int, int], torch.dtype, str, float]]:
    """(N, D, C), dtype, head and workspace in MB of each case of a backend."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if FUSED[name].unsupported_reason("cuda", dtype, dtype, shape[1]) is not None:
                continue
            saved = 0.6 * FUSED[name].workspace_bytes(shape[0], shape[2], dtype, 1 << 30) / 2**20
            yield from ((shape, dtype, head, mb) for head, mb in [(head, 0.0) for head in HEADS] + [(HEADS[0], saved)] * (saved > 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
