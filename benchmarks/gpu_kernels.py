"""``python -m benchmarks.gpu_kernels``: compile, in parallel, the Triton kernels that the small cases and the tests of a GPU take.

They go to Triton's cache on the disk, where later processes find them: compiled one after the other, as they are needed, they would take
longer than the steps of the report may. Needs no GPU where ``--arch`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from marginkernels import NonTarget, testing
from marginkernels.backend import FUSED
from marginkernels.backend.triton import TritonBackend

from . import gpu_small

#: Dtypes of embeddings and weight, and embedding dimensions, of tests/backends/test_gpu.py.
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]
DIMS = (32, 40, 64, 96, 128, 200, 256, 384, 512, 640, 768, 1024)
DIM_HEADS = ("arcface", "curricularface", "l2-softmax")


class Problem(NamedTuple):
    """What decides which kernels a step takes; the numbers of rows and classes do not."""

    dim: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    head: str
    bias: bool = False
    label_smoothing: float = 0.0
    share: float = 0.0  #: of the classes whose weights are saved between the passes


def problems() -> Iterator[Problem]:
    """Those of the small cases first, then those of the tests."""
    for (_, dim, _), dtype, head, mb in gpu_small.cases("triton"):
        yield Problem(dim, dtype, dtype, head, share=0.5 * (mb > 0))
    for number, dtypes in enumerate(DTYPES):
        for head, dim in itertools.product(testing.HEADS, (512, 128)):
            smoothings = (0.0, 0.1) if testing.accepted(head, label_smoothing=0.1) else (0.0,)
            yield from (Problem(dim, *dtypes, head, number % 2 == 0, smoothing) for smoothing in smoothings)
        yield from (Problem(512, *dtypes, head, share=share) for head, share in itertools.product(testing.HEADS, (0.5, 1.0)))
    yield from (Problem(dim, *dtypes, head) for dim, dtypes, head in itertools.product(DIMS, DTYPES, DIM_HEADS))


def alike(p: Problem) -> tuple:
    """The same for problems whose kernels are the same: they see of a plain head only whether it normalizes the centers. With a transform
    they may be asked for the moment of a scale that is trained; state may be moved by a pass of its own."""
    margin = testing.HEADS[p.head](300)
    plain = margin.non_target == NonTarget.IDENTITY and not list(margin.buffers())
    head = margin.normalize_weight if plain else p.head
    return p._replace(head=""), head


class Collecting(TritonBackend):
    """Notes the launches of a GPU ``arch`` instead of running them; serves tensors on a CPU, whose results mean nothing."""

    device_types = ("cpu", "cuda")  # type: ignore[assignment]

    def __init__(self, arch: str):
        self.arch, self.found = arch, []

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reason(self, device: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        return None

    def _device(self, x: Tensor):
        from marginkernels.backend.triton.launch import Device

        return Device(self.arch, 132)

    def _run(self, one) -> None:
        self.found.append(one)


@contextlib.contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    """Converted class centers in chunks of ``size`` bytes, or as many as on a GPU."""
    from marginkernels.backend.triton import launch

    before = launch.CHUNK_BYTES
    launch.CHUNK_BYTES = size or before
    try:
        yield
    finally:
        launch.CHUNK_BYTES = before


@contextlib.contextmanager
def collecting(arch: str) -> Iterator[list]:
    """The launches that the backend ``triton`` would make on a GPU ``arch``, where it is given tensors on a CPU inside the context."""
    usual, backend = FUSED["triton"], Collecting(arch)
    FUSED["triton"] = backend
    try:
        yield backend.found
    finally:
        FUSED["triton"] = usual


def launches(arch: str, wanted: Iterable[Problem]) -> list:
    """One launch of each kernel that the problems take, in their order."""
    from marginkernels.backend.triton import aot

    first: dict[tuple, Problem] = {}
    for p in wanted:
        first.setdefault(alike(p), p)
    kernels: dict = {}
    for p in first.values():
        case = testing.Case.random(3, p.dim, 300, p.dtype, weight_dtype=p.weight_dtype, bias=p.bias)
        mb = p.share * FUSED["triton"].workspace_bytes(3, 300, p.dtype, 1 << 30) / 2**20
        with collecting(arch) as found:
            for size in (None, 1):  # in one chunk of classes, and in several, of which the last are not saved
                with chunks_of(size):
                    testing.run(case, testing.HEADS[p.head](300), "triton", label_smoothing=p.label_smoothing, workspace_mb=mb)
        margin = testing.HEADS[p.head](300)
        options = {"bias": p.bias, "label_smoothing": p.label_smoothing, "focal_gamma": margin.focal_gamma}
        options |= {name: getattr(margin, name) for name in ("normalize_embedding", "normalize_weight")}
        for reduction in ("mean", "none"):
            found += aot.row_launches(3, p.dim, 300, p.dtype, p.weight_dtype, arch, reduction=reduction, **options)
        for one in found:
            kernels.setdefault(aot.variant(one, arch), one)
    return list(kernels.values())


def fill(arch: str, wanted: list, jobs: int) -> int:
    """Compile the launches' kernels; gives how many failed. Processes, since Triton's compiler holds Python's lock."""
    _WORK[:] = [(one, arch) for one in wanted]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:  # the launches need not be sent, and nothing has threads that matter
        failed = [reason for reason in pool.imap_unordered(_compile, range(len(_WORK))) if reason]
    for reason in failed:
        print(reason, flush=True)
    return len(failed)


_WORK: list = []


def _compile(number: int) -> str:
    """Why a kernel does not compile, or ""."""
    from marginkernels.backend.triton import aot

    one, arch = _WORK[number]
    try:
        aot.compile(one, arch)
    except Exception as error:  # a compiler may raise anything
        return f"{one.kernel.__name__} {one.constants}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help="such as sm_90 (default: that of the GPU)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    arch = args.arch or "sm_{}{}".format(*torch.cuda.get_device_capability())
    torch.set_num_threads(1)
    start = time.monotonic()
    found = launches(arch, problems())
    print(f"{len(found)} kernels for {arch}, listed in {time.monotonic() - start:.0f} s", flush=True)
    failed = fill(arch, found, args.jobs)
    print(f"{len(found) - failed} compiled in {time.monotonic() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
