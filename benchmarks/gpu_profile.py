"""``python -m benchmarks.gpu_profile``: the GPU time of a step by kernel, for each backend of this package."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .cases import Case, inputs
from .peers import Work, providers

CASE = Case("arcface", 1024, 512, 1_000_000, "bf16")
STEPS = 3


def main() -> int:
    x, w, labels = inputs(CASE, "cuda")
    x.requires_grad_()
    w.requires_grad_()
    status = 0
    for name, provider in providers().items():
        reason = provider.unavailable_reason("cuda") or provider.unsupported_reason(CASE, "cuda")
        if not provider.ours or reason is not None:
            continue
        try:
            _profile(name, provider.build(CASE, w), x, labels)
        except Exception as error:  # go on with the next backend
            print(f"## {name}: {type(error).__name__}: {error}", flush=True)
            status = 1
        x.grad = w.grad = None
        torch.cuda.empty_cache()
    return status


def _profile(name: str, work: Work, x: Tensor, labels: Tensor) -> None:
    def step() -> None:
        x.grad = work.weight.grad = None
        work.loss(x, labels).backward()
        torch.cuda.synchronize()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(STEPS):
            step()
    print(f"## {name}: {CASE}, {STEPS} steps\n")
    print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60), flush=True)


if __name__ == "__main__":
    sys.exit(main())
