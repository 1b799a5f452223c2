"""``python -m benchmarks.gpu_small``: every GPU backend on a few small ragged cases, for compute-sanitizer; seconds without it."""

from __future__ import annotations

import sys

import torch

from marginkernels import verify
from marginkernels.backend import FUSED

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
                for head in HEADS:
                    case = verify.Case.random(*shape, dtype, device="cuda")
                    found = max(verify.errors(case, verify.HEADS[head](shape[2]), name).values())
                    good = found <= verify.TOLERANCE[dtype]
                    worst |= not good
                    print(f"{name} {head} {dtype} {shape}: {found:.2e} {'ok' if good else 'WRONG'}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
