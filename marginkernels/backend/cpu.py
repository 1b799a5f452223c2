"""The two passes in C++, one fused kernel each: logits stay in cache, but for a workspace; the instruction set is chosen at run time.

The extension takes addresses, not tensors: it links nothing of torch. Its threads are the process's own OpenMP ones where PyTorch brought
them, and its large buffers wait for the next step.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from torch import Tensor

from .base import Backend, Problem, RowPass, RowWeights, accumulator

try:
    from .. import _cpu
except ImportError as error:
    _cpu = None
    _missing = str(error)

#: Bytes from which on a buffer comes from the pool.
LARGE = 4 << 20
#: The numbers of csrc/forms.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def levels() -> list[str]:
    """The instruction sets that this machine can run, worst first."""
    return [] if _cpu is None else _cpu.levels()


def _panels():
    for level in ["", *levels()]:
        for dtype, number in DTYPES.items():
            with contextlib.suppress(ValueError):  # an instruction set that has none of this dtype
                yield (dtype, level), _cpu.kept_panel(number, level)


#: dtype and level -> the bytes that a panel leaves to the class pass, its rows and its classes. Asked here, since a traced call cannot.
PANELS = {} if _cpu is None else dict(_panels())


class CpuBackend(Backend):
    """Deterministic: the same bits for the same number of threads (``torch.get_num_threads()``), run after run. With another number the
    row pass cuts the classes elsewhere, so that lambda and U differ in their last bits; the class pass has no such sum.

    Args:
        level: the instruction set, one of ``levels()``; "" takes the best that serves the dtype.
    """

    name = "cpu"
    summary = "C++: each pass one fused kernel, on AMX, AVX-512, AVX2 or plain C++ as the processor allows, chosen at run time"
    device_types = ("cpu",)
    dtypes = tuple(DTYPES)

    workspace_mb = 128.0

    def __init__(self, level: str = ""):
        self.level = level

    @property
    def note(self) -> str:
        if _cpu is None:
            return "C++ kernels, not built"
        best = {str(dtype).removeprefix("torch."): _cpu.level_for(number) for dtype, number in DTYPES.items()}
        return "C++ kernels; " + ", ".join(f"{dtype} on {level}" for dtype, level in best.items())

    def unavailable(self) -> str | None:
        if _cpu is not None:
            return None
        report = Path(__file__).parents[1] / "_cpu.txt"
        why = report.read_text().strip() if report.exists() else _missing
        return f"the C++ extension marginkernels._cpu is not there ({why}); install again with g++ or clang++ on the PATH"

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int) -> int:
        panel, rows, classes = PANELS[dtype, self.level]
        slab = -(-n // rows) * panel
        return min(limit // max(slab, 1), -(-c // classes)) * slab

    def rows(
        self, x: Tensor, w: Tensor, labels: Tensor, normalize_embedding: bool, normalize_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = x.shape[0]
        prepared = torch.empty_like(x, memory_format=torch.contiguous_format)
        factor = x.new_empty(n, dtype=accumulator(x.dtype))
        similarity, cosine = x.new_empty(n, dtype=torch.float64), x.new_empty(n, dtype=torch.float64)
        problem, _alive = _rows_problem(x, w, labels, normalize_embedding, normalize_weight)
        _cpu.rows(
            problem, threads=torch.get_num_threads(), prepared=prepared.data_ptr(), row_factor=factor.data_ptr(),
            similarity=similarity.data_ptr(), cosine=cosine.data_ptr(),
        )  # fmt: skip
        return prepared, factor, similarity, cosine

    def row_gradient(
        self, x: Tensor, w: Tensor, labels: Tensor, u: Tensor, softmax: Tensor, uniform_u: Tensor | None, uniform: Tensor | None,
        target: Tensor, normalize_embedding: bool, normalize_weight: bool,
    ) -> Tensor:  # fmt: skip
        if uniform_u is not None:
            return super().row_gradient(x, w, labels, u, softmax, uniform_u, uniform, target, normalize_embedding, normalize_weight)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        problem, _alive = _rows_problem(x, w, labels, normalize_embedding, normalize_weight)
        given = [v.contiguous() for v in (u, softmax, target)]
        addresses = dict(zip(("u", "softmax", "target"), map(_address, given), strict=True))
        _cpu.row_gradient(problem, threads=torch.get_num_threads(), dx=dx.data_ptr(), **addresses)
        return dx

    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        n, d = p.x.shape
        c = p.w.shape[0]
        total, top = p.x.new_empty(n, dtype=p.acc), p.x.new_empty(n, dtype=p.acc)
        moment = p.x.new_empty(n if need_moment else 0, dtype=p.acc)
        u = p.x.new_empty((n if need_u else 0, d), dtype=p.acc)
        factor = p.x.new_empty(c if p.normalize_weight else 0, dtype=p.acc)
        kept = _empty((workspace,), torch.uint8)
        problem, _alive = _problem(p)
        _cpu.row_pass(
            problem, level=self.level, threads=torch.get_num_threads(), uniform=uniform, total=total.data_ptr(), top=top.data_ptr(),
            moment=moment.data_ptr() if need_moment else 0, u=u.data_ptr() if need_u else 0, class_factor=factor.data_ptr(),
            kept=kept.data_ptr(), kept_bytes=workspace,
        )  # fmt: skip
        return RowPass(total, top, moment, u, factor, kept)

    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        dw = _empty(p.w.shape, p.w.dtype) if need_w else None
        db = p.x.new_empty(p.w.shape[0], dtype=p.acc) if need_bias else None
        problem, _alive = _problem(p)
        weights = [None if v is None else v.contiguous() for v in (row.lse, row.softmax, row.uniform, row.target, row.bias, class_factor)]
        lse, softmax, uniform, target, bias, factor = (_address(v) for v in weights)
        _cpu.class_pass(
            problem, level=self.level, threads=torch.get_num_threads(), lse=lse, softmax=softmax, uniform=uniform, target=target, bias=bias,
            class_factor=factor, kept=kept.data_ptr(), kept_bytes=kept.numel(), dw=_address(dw), db=_address(db),
        )  # fmt: skip
        return dw, db


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised; large ones in memory that waits for the next step once it is given back (csrc/cpu/pool.h)."""
    size = math.prod(shape) * dtype.itemsize
    return torch.empty(shape, dtype=dtype) if size < LARGE else torch.frombuffer(_cpu.Block(size), dtype=dtype).view(shape)


def release_memory() -> None:
    """Give what waits for the next step back to the system: at most 512 MB, gradients and workspaces of the last steps."""
    if _cpu is not None:
        _cpu.Block.drop()


def _with_unit_stride(w: Tensor) -> Tensor:
    return w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous()


def _rows_problem(x: Tensor, w: Tensor, labels: Tensor, normalize_embedding: bool, normalize_weight: bool):
    x, w, labels = x.contiguous(), _with_unit_stride(w), labels.contiguous()
    n, d = x.shape
    problem = _cpu.RowsProblem(
        n=n, d=d, c=w.shape[0], x=x.data_ptr(), x_dtype=DTYPES[x.dtype], w=w.data_ptr(), w_dtype=DTYPES[w.dtype], w_stride=w.stride(0),
        labels=labels.data_ptr(), normalize_embedding=normalize_embedding, normalize_weight=normalize_weight,
    )  # fmt: skip
    return problem, (x, w, labels)


def _problem(p: Problem):
    """The extension's own problem, and the tensors that must outlive it."""
    w = _with_unit_stride(p.w)
    rows = [None if v is None else v.contiguous() for v in (p.x, p.row_factor, p.bias, p.labels, p.scale, p.threshold)]
    x, row_factor, bias, labels, scale, threshold = (_address(v) for v in rows)
    n, d = p.x.shape
    problem = _cpu.Problem(
        n=n, d=d, c=w.shape[0], x=x, x_dtype=DTYPES[p.x.dtype], w=w.data_ptr(), w_dtype=DTYPES[w.dtype], w_stride=w.stride(0),
        row_factor=row_factor, bias=bias, labels=labels, scale=scale, threshold=threshold, t=0.0 if p.t is None else float(p.t),
        form=p.form, normalize_weight=p.normalize_weight,
    )  # fmt: skip
    return problem, (w, rows)
