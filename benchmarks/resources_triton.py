"""Resources of the Triton kernels, compiled ahead of time by Triton's compiler; needs Triton, but no GPU."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from marginkernels import NonTarget
from marginkernels.core.update import Rule

#: The architectures that differ in shared memory or in instructions, and dimensions: 500 is no multiple of 8, 768 no power of two.
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
DIMS = (64, 128, 256, 500, 512, 768, 1024)
#: dtypes of embeddings and weight.
DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
)
#: Centers of a class where it has several: that of the paper, and no power of two.
SUB_CENTERS = 3
#: dtypes of weight and moments in an optimizer's step.
UPDATE_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32))
#: Variants of the kernels by name, as arguments of ``aot.meta_inputs`` and ``aot.launches``: the common case; a hard transform and a bias;
#: no gradients; centers that are not normalized; the logit sum of label smoothing, which only a transform asks of the passes; softmax
#: weights saved between the passes; several centers a class.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "hard-linear, bias": {"non_target": NonTarget.HARD_LINEAR, "bias": True},
    "hard-quadratic": {"non_target": NonTarget.HARD_QUADRATIC},
    "no gradient": {"need_center": False, "need_weight": False},
    "raw centers": {"normalize_weight": False},
    "hard-linear, logit sum": {"non_target": NonTarget.HARD_LINEAR, "logit_sum": True},
    "saved weights": {"saved": 1.0},
    "saved weights, hard-quadratic": {"saved": 1.0, "non_target": NonTarget.HARD_QUADRATIC},
    "sub-centers": {"sub_centers": SUB_CENTERS},
    "sub-centers, saved weights": {"sub_centers": SUB_CENTERS, "saved": 1.0},
    "sub-centers, hard-linear, bias": {"sub_centers": SUB_CENTERS, "non_target": NonTarget.HARD_LINEAR, "bias": True},
}
#: Variants of what a step does per row, as arguments of ``aot.row_launches``.
ROW_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "label smoothing, focal, bias": {"label_smoothing": 0.1, "focal_gamma": 2.0, "bias": True},
    "nothing normalized, no reduction": {
        "normalize_embedding": False,
        "normalize_weight": False,
        "label_smoothing": 0.1,
        "reduction": "none",
    },
}
#: How many nearest class centers are searched for.
NEAREST = (1, 5, 64)
#: Those of the variants' options that ``aot.launches`` takes.
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


#: Whose tensor cores take both operands from registers.
HELD_BY_REGISTERS = tuple(itertools.product(("row", "class"), (500, 512), ("sm_80", "sm_89", "sm_120")))
BY_REGISTERS = (
    "some registers, since a thread holds fragments of both blocks and addresses of the key block that is fetched ahead; without the "
    "prefetch, or with half of the queries, there are none, but then the key block is waited for, or serves half as many products"
)
THROUGH_REGISTERS = (
    "the accumulator leaves tensor memory through registers whenever the running maximum moves, and blocks of rows are as narrow as a "
    "product takes them"
)
#: D -> bytes.
LEAVES_TENSOR_MEMORY = {256: 96, 500: 240, 512: 240, 768: 192, 1024: 192}
NEAREST_IN_ORDER = "at most six registers, of the nearest class centers that a row of the block holds in order"
EXPLAINED = (
    *(
        Explained(("row_pass_kernel", f"D={dim}", "running maximum"), "sm_100", most, THROUGH_REGISTERS)
        for dim, most in LEAVES_TENSOR_MEMORY.items()
    ),
    *(
        Explained(("row_pass_kernel", words), "sm_100", 16, "at most four registers; blocks of twice as many rows took hundreds")
        for words in ("D=64,", "D=64>", "D=128,", "D=128>", "D=500, no gradient")
    ),
    Explained(("class_pass_kernel", "hard-linear, bias"), "sm_100", 8, "two registers"),
    *(Explained(("topk_kernel",), arch, 24, NEAREST_IN_ORDER) for arch in ("sm_80", "sm_89", "sm_100", "sm_120")),
    *(
        Explained(
            ("saved_pass_kernel", "float32, float32", f"D={dim}"),
            "sm_90",
            104,
            "the accumulator in float32 spans all of D, for the Jacobian's sake, and the block is as narrow as a product takes it",
        )
        for dim in (768, 1024)
    ),
    Explained(("row_pass_kernel", "D=512", "saved weights"), "sm_90", 8, "two registers, with Triton 3.6 only"),
    Explained(("prepare_kernel", "D=512"), "sm_80", 8, "two registers, in a kernel without a loop, with Triton 3.6 only"),
    *(Explained((f"{kernel}_pass_kernel", f"D={dim}"), arch, 64, BY_REGISTERS) for kernel, dim, arch in HELD_BY_REGISTERS),
    *(Explained(("class_pass_kernel", f"D={dim}", "sub-centers"), "sm_120", 160, BY_REGISTERS) for dim in (500, 512)),
    *(
        Explained(("class_pass_kernel", f"D={dim}", "logit sum"), arch, 104, BY_REGISTERS)
        for dim, arch in itertools.product((500, 512), ("sm_80", "sm_120"))
    ),
)


def unavailable_reason() -> str | None:
    """Why nothing can be collected here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def cases(dims: Iterable[int] = DIMS, dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = DTYPES) -> list[tuple]:
    """Every (D, dtypes, variant)."""
    return list(itertools.product(dims, dtypes, VARIANTS))


def kernels(arch: str, dims: Iterable[int] = DIMS) -> dict[str, Any]:
    """One launch of every distinct kernel of :func:`cases` by a name that says which case takes it first: of the launches of steps of
    1,024 rows and a million classes, some 6,000 for one architecture, one in twelve is new to the compiler."""
    from marginkernels.backend.triton import aot

    found: dict[str, Any] = {}
    seen: set[str] = set()
    for one, about in _launches(arch, dims):
        key = aot.variant(one, arch)
        if key not in seen:
            seen.add(key)
            name = f"{one.kernel.__name__}<{about}>"
            assert name not in found, name
            found[name] = one
    return found


def _launches(arch: str, dims: Iterable[int]) -> Iterator[tuple[Any, str]]:
    """Every launch, and the words for its case."""
    from marginkernels.backend.triton import aot

    n, c = 1024, 1_000_000
    for dim, dtypes, variant in cases(dims):
        options = dict(VARIANTS[variant])
        launch_options = {name: options.pop(name) for name in LAUNCH_OPTIONS if name in options}
        for one in aot.launches(aot.meta_inputs(n, dim, c, *dtypes, **options), arch, **launch_options):
            online = "running maximum" if one.constants.get("ONLINE") else ""
            yield one, _words(dim, dtypes, online, variant)
    for dim, dtypes in itertools.product(dims, DTYPES):
        for variant, options in ROW_VARIANTS.items():
            for one in aot.row_launches(n, dim, c, *dtypes, arch, **options):
                # Rows with NaN are marked on the way in, and their gradients replaced on the way out.
                marks = "marks" if one.constants.get("MARK") else ""
                yield one, _words(dim, dtypes, marks, variant)
        for k in NEAREST:
            for sub_centers, words in ((1, ""), (SUB_CENTERS, "sub-centers")):
                one = aot.topk_launch(n, dim, c, *dtypes, k, arch, sub_centers=sub_centers)
                yield one, _words(dim, dtypes, f"k={k}", words)
    for dim, dtypes, rule in itertools.product(dims, UPDATE_DTYPES, Rule):
        yield aot.update_launch(c, dim, *dtypes, rule, arch), _words(dim, dtypes, rule.name, "step")


def _words(dim: int, dtypes: tuple[torch.dtype, torch.dtype], *more: str) -> str:
    return ", ".join([*(str(d).removeprefix("torch.") for d in dtypes), f"D={dim}", *filter(None, more)])


#: (arch, name, launch) of every kernel to compile: launches hold functions that cannot be sent to another process, only inherited by it.
_WORK: list[tuple[str, str, Any]] = []


def collect(archs: Iterable[str] = ARCHS, dims: Iterable[int] = DIMS, processes: int = 2) -> list[dict]:
    """A record of every distinct kernel for each of ``archs``: ``kernel``, ``backend``, ``arch``, ``registers`` and ``stack_bytes`` per
    thread, ``shared_bytes`` per program, ``shared_limit``, and ``explained`` where the use of the stack is; of one that the compiler
    refuses, the first three and ``failed``."""
    _WORK[:] = [(arch, name, one) for arch in archs for name, one in kernels(arch, dims).items()]
    found: dict[int, dict] = {}
    start = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:  # unlike Pool, raises if the compiler dies
        asked = {pool.submit(compile_kernel, i): i for i in range(len(_WORK))}
        for done in as_completed(asked):
            found[asked[done]] = done.result()
            if len(found) % 100 == 0:
                print(f"{len(found)} of {len(asked)} kernels in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return [found[i] for i in range(len(_WORK))]


def compile_kernel(i: int) -> dict:
    """The record of ``_WORK[i]``."""
    from marginkernels.backend.triton import aot
    from marginkernels.backend.triton.heuristics import shared_limit

    arch, name, one = _WORK[i]
    try:
        used = aot.resources(aot.compile(one, arch))
    except Exception as refused:  # whatever the compiler raises; the others are worth a report
        return {"kernel": name, "backend": "triton", "arch": arch, "failed": f"{type(refused).__name__}: {refused}"}
    explained = explanation(name, arch, used.stack_bytes)
    record = {
        "kernel": name,
        "backend": "triton",
        "arch": arch,
        "registers": used.registers,
        "stack_bytes": used.stack_bytes,
        "shared_bytes": used.shared_bytes,
        "shared_limit": shared_limit(arch),
    }
    return record | ({"explained": explained} if explained else {})


def explanation(name: str, arch: str, stack_bytes: int) -> str | None:
    """Why a kernel uses that much stack, or None where that is not known."""
    if not stack_bytes:
        return None
    return next((e.why for e in EXPLAINED if e.arch == arch and stack_bytes <= e.most and all(w in name for w in e.words)), None)
