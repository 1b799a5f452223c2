"""What each Triton kernel takes of a GPU, compiled ahead of time by Triton's own compiler; needs Triton, but no GPU."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from marginkernels import forms

DIMS = (64, 128, 256, 512, 1024)
#: dtypes of embeddings and weight.
DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
)
#: What is asked of the kernels: the common case; a hard form and a bias; neither gradient; centres as they are, with the sums of label
#: smoothing; and the weights kept between the passes.
ASKED = {
    "": {},
    "hard-linear, bias": {"form": forms.HARD_LINEAR, "bias": True},
    "hard-quadratic": {"form": forms.HARD_QUADRATIC},
    "no gradient": {"need_u": False, "need_w": False},
    "raw centres, uniform": {"normalize_weight": False, "uniform": True},
    "kept weights": {"kept": 1.0},
    "kept weights, hard-quadratic": {"kept": 1.0, "form": forms.HARD_QUADRATIC},
}


class Explained(NamedTuple):
    """Stack that is known: of kernels whose names have all ``words``, on ``arch``, at most ``most`` bytes a thread, and why."""

    words: tuple[str, ...]
    arch: str
    most: int
    why: str


EXPLAINED = (
    Explained(
        ("row_pass_kernel", "D=512"), "sm_100", 192,
        "the accumulator comes out of tensor memory through registers; blocks of half the rows have no stack, or are narrower than a "
        "product can be, and halve the work for each byte of keys from L2",
    ),
    Explained(("row_pass_kernel", "D=512", "kept weights"), "sm_90", 8, "two registers, under Triton 3.6 alone"),
    Explained(("row_pass_kernel", "D=512", "kept weights"), "sm_80", 16, "four registers, under Triton 3.6 alone"),
    Explained(("prepare_kernel", "D=512"), "sm_80", 8, "two registers, in a kernel without a loop, under Triton 3.6 alone"),
)  # fmt: skip


def unavailable() -> str | None:
    """Why nothing can be collected here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def cases(dims: Iterable[int] = DIMS, dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = DTYPES) -> list[tuple]:
    return list(itertools.product(dims, dtypes, ASKED))


def collect(archs: Iterable[str], dims: Iterable[int] = DIMS, processes: int = 2) -> list[dict]:
    """A record of every distinct kernel of :func:`cases` for each of ``archs``: ``kernel``, ``backend``, ``arch``, ``registers`` a thread,
    ``stack_bytes`` a thread, ``shared_bytes`` a program, ``shared_limit``, and ``explained`` where the stack is."""
    work = [(arch, *case) for arch in archs for case in cases(dims)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # raises, where a Pool would wait, if the compiler dies
        found = list(pool.map(compile_case, *zip(*work, strict=True)))
    return list({(r["kernel"], r["arch"]): r for records in found for r in records}.values())


def explanation(name: str, arch: str, stack_bytes: int) -> str | None:
    """Why a kernel has that much stack, where that is known."""
    if not stack_bytes:
        return None
    return next((e.why for e in EXPLAINED if e.arch == arch and stack_bytes <= e.most and all(w in name for w in e.words)), None)


def compile_case(arch: str, dim: int, dtypes: tuple[torch.dtype, torch.dtype], asked: str) -> list[dict]:
    """The records of one case: every launch of a step of 1,024 rows and a million classes."""
    from marginkernels.backend.triton import aot
    from marginkernels.backend.triton.table import shared_limit

    options = dict(ASKED[asked])
    needs = {name: options.pop(name) for name in ("need_u", "need_w", "uniform", "kept") if name in options}
    problem = aot.problem(1024, dim, 1_000_000, *dtypes, **options)
    records = []
    for one in aot.distinct(aot.launches(problem, arch, **needs)):
        found = aot.resources(aot.compile(one, arch))
        x, w = (str(d).removeprefix("torch.") for d in dtypes)
        online = ", running maximum" if one.constants.get("ONLINE") else ""
        name = f"{one.kernel.__name__}<{x}, {w}, D={dim}{online}{', ' if asked else ''}{asked}>"
        explained = explanation(name, arch, found.stack_bytes)
        records.append({
            "kernel": name, "backend": "triton", "arch": arch, "registers": found.registers, "stack_bytes": found.stack_bytes,
            "shared_bytes": found.shared_bytes, "shared_limit": shared_limit(arch),
        } | ({"explained": explained} if explained else {}))  # fmt: skip
    return records
