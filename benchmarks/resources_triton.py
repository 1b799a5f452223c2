"""Resources of the Triton kernels, compiled ahead of time by Triton's compiler; needs Triton, but no GPU."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from marginkernels import NonTarget

DIMS = (64, 128, 256, 512, 1024)
#: dtypes of embeddings and weight.
DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
)
#: Variants of the kernels by name, as arguments of ``aot.meta_inputs`` and ``aot.launches``: the common case; a hard transform and a bias;
#: no gradients; centers that are not normalized, with the logit sum of label smoothing; softmax weights saved between the passes.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "hard-linear, bias": {"non_target": NonTarget.HARD_LINEAR, "bias": True},
    "hard-quadratic": {"non_target": NonTarget.HARD_QUADRATIC},
    "no gradient": {"need_center": False, "need_weight": False},
    "raw centers, logit sum": {"normalize_weight": False, "logit_sum": True},
    "saved weights": {"saved": 1.0},
    "saved weights, hard-quadratic": {"saved": 1.0, "non_target": NonTarget.HARD_QUADRATIC},
}
#: Those of them that ``aot.launches`` takes.
LAUNCH_OPTIONS = ("need_center", "need_weight", "logit_sum", "saved")


class Explained(NamedTuple):
    """Known use of the stack.

    Attributes:
        words: in the names of the kernels that it is about, all of them.
        arch: the architecture.
        most: bytes per thread, at most.
        why: the explanation.
    """

    words: tuple[str, ...]
    arch: str
    most: int
    why: str


EXPLAINED = (
    Explained(
        ("row_pass_kernel", "D=512"),
        "sm_100",
        192,
        "the accumulator leaves tensor memory through registers; blocks of half the rows need no stack, or are too narrow for a product, "
        "and do half the work per byte of class centers read from L2",
    ),
    Explained(("row_pass_kernel", "D=512", "saved weights"), "sm_90", 8, "two registers, with Triton 3.6 only"),
    Explained(("row_pass_kernel", "D=512", "saved weights"), "sm_80", 16, "four registers, with Triton 3.6 only"),
    Explained(
        ("row_pass_kernel", "D=512", "saved weights", "hard-quadratic"),
        "sm_80",
        24,
        "six registers, since N is not known to be a multiple of 16: a kernel for each batch size would take longer to compile",
    ),
    Explained(("saved_pass_kernel", "D=128"), "sm_80", 8, "two registers, since N and C are not known to be multiples of 16"),
    Explained(("prepare_kernel", "D=512"), "sm_80", 8, "two registers, in a kernel without a loop, with Triton 3.6 only"),
)


def unavailable_reason() -> str | None:
    """Why nothing can be collected here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def cases(dims: Iterable[int] = DIMS, dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = DTYPES) -> list[tuple]:
    """Every (D, dtypes, variant)."""
    return list(itertools.product(dims, dtypes, VARIANTS))


def collect(archs: Iterable[str], dims: Iterable[int] = DIMS, processes: int = 2) -> list[dict]:
    """A record of every distinct kernel of :func:`cases` for each of ``archs``: ``kernel``, ``backend``, ``arch``, ``registers`` and
    ``stack_bytes`` per thread, ``shared_bytes`` per program, ``shared_limit``, and ``explained`` where the use of the stack is."""
    work = [(arch, *case) for arch in archs for case in cases(dims)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # unlike Pool, raises if the compiler dies
        found = list(pool.map(compile_case, *zip(*work, strict=True)))
    return list({(r["kernel"], r["arch"]): r for records in found for r in records}.values())


def explanation(name: str, arch: str, stack_bytes: int) -> str | None:
    """Why a kernel uses that much stack, or None where that is not known."""
    if not stack_bytes:
        return None
    return next((e.why for e in EXPLAINED if e.arch == arch and stack_bytes <= e.most and all(w in name for w in e.words)), None)


def compile_case(arch: str, dim: int, dtypes: tuple[torch.dtype, torch.dtype], variant: str) -> list[dict]:
    """The records of one case: every launch of a step of 1,024 rows and a million classes."""
    from marginkernels.backend.triton import aot
    from marginkernels.backend.triton.heuristics import shared_limit

    options = dict(VARIANTS[variant])
    launch_options = {name: options.pop(name) for name in LAUNCH_OPTIONS if name in options}
    inputs = aot.meta_inputs(1024, dim, 1_000_000, *dtypes, **options)
    records = []
    for one in aot.distinct(aot.launches(inputs, arch, **launch_options)):
        found = aot.resources(aot.compile(one, arch))
        x, w = (str(d).removeprefix("torch.") for d in dtypes)
        online = ", running maximum" if one.constants.get("ONLINE") else ""
        name = f"{one.kernel.__name__}<{x}, {w}, D={dim}{online}{', ' if variant else ''}{variant}>"
        explained = explanation(name, arch, found.stack_bytes)
        record = {
            "kernel": name,
            "backend": "triton",
            "arch": arch,
            "registers": found.registers,
            "stack_bytes": found.stack_bytes,
            "shared_bytes": found.shared_bytes,
            "shared_limit": shared_limit(arch),
        }
        records.append(record | ({"explained": explained} if explained else {}))
    return records
