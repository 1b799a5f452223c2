"""The two passes in C++, one fused kernel each: logits stay in cache, but for a workspace; the instruction set is chosen at run time.

The extension takes addresses, not tensors: it links nothing of torch. Its threads are the process's own OpenMP threads where PyTorch
loaded OpenMP, and its large buffers are cached for reuse by the next step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.types import (
    ClassPassOutput,
    HeadInputs,
    PassInputs,
    PreparedRows,
    Request,
    RowPassOutput,
    TopkInputs,
    TopkOutput,
    Upstream,
)
from ..core.update import MOMENTS, Rule, Update
from . import _extension
from ._extension import DTYPES
from .base import Backend

_cpu, _missing = _extension.load("_cpu")

#: What the class pass takes of :class:`Upstream`.
UPSTREAM = ("lse", "d_lse", "d_logit_sum", "d_target_cos", "d_target_bias")
#: Bytes from which on a buffer comes from the extension's pool.
POOLED_BYTES = 4 << 20


def levels(here: bool = True) -> list[str]:
    """The instruction sets that this machine can run, worst first; with ``here=False`` all that the extension was built for."""
    return [] if _cpu is None else _cpu.levels(here)


def _panels() -> Iterator[tuple[tuple[torch.dtype, str], tuple[int, int, int]]]:
    for level in ["", *levels()]:
        for dtype, number in DTYPES.items():
            with contextlib.suppress(ValueError):  # an instruction set that has none of this dtype
                yield (dtype, level), _cpu.saved_panel(number, level)


#: dtype and level -> the bytes that a panel saves for the class pass, its rows and its centers. Asked here, since a traced call cannot.
PANELS = {} if _cpu is None else dict(_panels())


class CpuBackend(Backend):
    """Deterministic: the same bits for the same number of threads (``torch.get_num_threads()``), run after run. With another number the
    row pass cuts the classes elsewhere, so that ``lse`` and ``mean_center`` differ in their last bits. The class pass has no such sum.

    Args:
        level: the instruction set, one of :func:`levels`; "" takes the best that serves the dtype.
    """

    name = "cpu"
    summary = "C++: each pass one fused kernel, on AMX, AVX-512, AVX2 or plain C++ as the processor allows, chosen at run time"
    device_types = tested_on = ("cpu",)
    dtypes = tuple(DTYPES)
    max_sub_centers = min((centers for _, _, centers in PANELS.values()), default=1)  # a class lies in one panel
    workspace_mb = 128
    step_takes_saved = True

    def __init__(self, level: str = ""):
        self.level = level

    @property
    def note(self) -> str:
        if _cpu is None:
            return "C++ kernels, not built"
        best = {str(dtype).removeprefix("torch."): _cpu.level_for(number) for dtype, number in DTYPES.items()}
        return "C++ kernels; " + ", ".join(f"{dtype} on {level}" for dtype, level in best.items())

    def unavailable_reason(self) -> str | None:
        return None if _cpu is not None else _extension.missing("_cpu", _missing, "g++ or clang++")

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int, sub_centers: int = 1) -> int:
        panel, rows, centers = PANELS[dtype, self.level]
        chunk = -(-n // rows) * panel
        return min(limit // max(chunk, 1), -(-c // (centers // sub_centers * sub_centers))) * chunk

    def prepare_inputs(self, inputs: HeadInputs) -> PreparedRows:
        n, float64 = inputs.x.shape[0], torch.float64
        out = PreparedRows(
            x=torch.empty_like(inputs.x, memory_format=torch.contiguous_format),
            row_factor=inputs.x.new_empty(n, dtype=torch.float32),
            target_similarity=inputs.x.new_empty(n, dtype=float64),
            target_cos=inputs.x.new_empty(n, dtype=float64),
        )
        native, _alive = _head_inputs(inputs)
        _cpu.prepare_inputs(native, threads=torch.get_num_threads(), **_addresses(vars(out)))
        return out

    def row_gradient(self, inputs: HeadInputs, upstream: Upstream, mean_center: Tensor, center_sum: Tensor | None) -> Tensor:
        if center_sum is not None:
            return super().row_gradient(inputs, upstream, mean_center, center_sum)
        dx = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
        native, _alive = _head_inputs(inputs)
        given = _contiguous(mean_center=mean_center, d_lse=upstream.d_lse, d_target_cos=upstream.d_target_cos)
        _cpu.row_gradient(native, threads=torch.get_num_threads(), dx=dx.data_ptr(), **_addresses(given))
        return dx

    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        n, d = inputs.x.shape

        def new(*shape: int) -> Tensor:
            return inputs.x.new_empty(shape, dtype=inputs.acc_dtype)

        results = {
            "value": inputs.x.new_empty(n, dtype=torch.float64),
            "max_logit": new(n),
            "cos": new(n if request.need_cos else 0),
            "center": new(n if request.need_center else 0, d),
            "class_factor": new(inputs.w.shape[0] if inputs.normalize_weight else 0),
            "saved": _empty((request.workspace_bytes,), torch.uint8, "the workspace (workspace_mb)"),
        }
        native, _alive = _pass_inputs(inputs)
        _cpu.row_pass(
            native,
            level=self.level,
            threads=torch.get_num_threads(),
            reduction=int(request.reduction),
            saved_bytes=request.workspace_bytes,
            **_addresses(results),
        )
        return RowPassOutput.of(request, **results)

    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        c, d = inputs.w.shape
        out = ClassPassOutput(
            d_weight=_empty((c if need_weight else 0, d), inputs.w.dtype, "the gradient of weight"),
            d_bias=inputs.x.new_empty(inputs.num_classes if need_bias else 0, dtype=inputs.acc_dtype),
        )
        self._class_pass(inputs, upstream, class_factor, saved, vars(out), None)
        return out

    def class_step(
        self,
        inputs: PassInputs,
        upstream: Upstream,
        class_factor: Tensor,
        saved: Tensor,
        update: Update,
        state: dict[str, Tensor],
        first_row: int,
    ) -> bool:
        """Each center is written once, as soon as its gradient is known, with the same bits for any number of threads."""
        native = _update(update, inputs.w, state, first_row)
        if native is None:
            return False
        self._class_pass(inputs, upstream, class_factor, saved, {"d_weight": None, "d_bias": None}, native)
        return True

    def _class_pass(
        self,
        inputs: PassInputs,
        upstream: Upstream,
        class_factor: Tensor,
        saved: Tensor,
        out: Mapping[str, Tensor | None],
        update: Any,
    ) -> None:
        native, _alive = _pass_inputs(inputs)
        given = _contiguous(**{name: getattr(upstream, name) for name in UPSTREAM}, class_factor=class_factor)
        _cpu.class_pass(
            native,
            level=self.level,
            threads=torch.get_num_threads(),
            saved_bytes=saved.numel(),
            reduction=int(upstream.reduction),
            update=update,
            **_addresses(given | {"saved": saved} | dict(out)),
        )

    def update(self, update: Update, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor | int = 0) -> None:
        """In C++ where there are rows of a dtype that it has, with the same bits as :meth:`class_step`; else in PyTorch."""
        native = _update(update, p, state, rows) if p.ndim else None
        if native is None or g.dtype not in DTYPES:
            super().update(update, p, g, state, rows)
        elif p.numel():
            g = g.contiguous()
            to = {"rows": p.shape[0], "g": g.data_ptr(), "g_dtype": DTYPES[g.dtype]}
            _cpu.update(native, level=self.level, threads=torch.get_num_threads(), **to)
            torch.autograd.graph.increment_version((p, *state.values()))

    def topk(self, inputs: TopkInputs, k: int) -> TopkOutput:
        """The same bits for any number of threads."""
        x, w, out = inputs.x.contiguous(), _with_unit_stride(inputs.w), TopkOutput.allocate(inputs, k)
        if x.dtype == torch.bfloat16 and w.dtype != torch.bfloat16 and not inputs.as_in_passes:
            x = x.float()  # products of bfloat16 pairs round the centers to it
        (n, d), sides = x.shape, {"normalize_embedding": inputs.normalize_embedding, "normalize_weight": inputs.normalize_weight}
        at = {"x": x.data_ptr(), "x_dtype": DTYPES[x.dtype], "w": w.data_ptr(), "w_dtype": DTYPES[w.dtype], "w_stride": w.stride(0)}
        native = _cpu.HeadInputs(n=n, d=d, c=w.shape[0], labels=0, **at, **sides)
        given = _addresses({"bias": inputs.bias, "scale": inputs.scale})
        to = {"scores": out.scores.data_ptr(), "classes": out.classes.data_ptr()}
        level = self.level if (x.dtype, self.level) in PANELS else ""  # of what x has become
        _cpu.topk(native, level=level, threads=torch.get_num_threads(), k=k, sub_centers=inputs.sub_centers, **given, **to)
        return out


def _contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if v is None else v.contiguous() for name, v in tensors.items()}


def _addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Of each tensor, 0 where there is nothing in it."""
    return {name: _extension.address(v) or 0 for name, v in tensors.items()}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, purpose: str) -> Tensor:
    """Uninitialized; large ones in memory that is cached for reuse by the next step once it is freed (csrc/cpu/pool.h).

    Raises:
        MemoryError: says how many bytes were wanted, and the ``purpose``.
    """
    size = math.prod(shape) * dtype.itemsize
    return torch.empty(shape, dtype=dtype) if size < POOLED_BYTES else torch.frombuffer(_cpu.Block(size, purpose), dtype=dtype).view(shape)


def release_memory() -> None:
    """Return the memory that is cached for the next step to the system: at most 512 MB, gradients and workspaces of the last steps."""
    if _cpu is not None:
        _cpu.Block.release()


def _update(update: Update, p: Tensor, state: dict[str, Tensor], rows: Tensor | int) -> Any:
    """The extension's own record of an update of ``p``, or None where it has none of such tensors."""
    moments = [state[name] for name in MOMENTS[update.rule] if name in state and (update.rule != Rule.SGD or update.momentum)]
    dtypes = {v.dtype for v in moments} or {torch.float32}
    steps = state.get("step") if update.rule == Rule.ADAMW else None
    given = [p, *moments, *([] if steps is None else [steps])]
    if p.dtype not in DTYPES or len(dtypes) > 1 or not dtypes <= set(DTYPES) or any(v.device.type != "cpu" for v in given):
        return None
    if not all(v.is_contiguous() for v in given) or (steps is not None and steps.dtype != torch.float32):
        return None
    first, second = [*moments, None, None][:2]
    first_beta, second_beta = update.betas
    numbers = {name: float(getattr(update, name)) for name in ("lr", "weight_decay", "momentum", "eps")}
    return _cpu.Update(
        rule=int(update.rule),
        nesterov=update.nesterov,
        stochastic=update.stochastic,
        first=first_beta,
        second=second_beta,
        key=update.key,
        w_dtype=DTYPES[p.dtype],
        d=p.numel() // max(p.shape[0], 1),
        moment_dtype=DTYPES[dtypes.pop()],
        first_row=0 if isinstance(rows, Tensor) else rows,
        **numbers,
        **_addresses({"w": p, "first_moment": first, "second_moment": second, "steps": steps}),
        **_addresses({"rows": rows if isinstance(rows, Tensor) else None}),
    )


def _with_unit_stride(w: Tensor) -> Tensor:
    return w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous()


def _head_inputs(inputs: HeadInputs) -> tuple[Any, Any]:
    """The extension's own record, and the tensors that must outlive it."""
    x, w, labels = inputs.x.contiguous(), _with_unit_stride(inputs.w), inputs.labels.contiguous()
    native = _cpu.HeadInputs(
        n=x.shape[0],
        d=x.shape[1],
        c=w.shape[0],
        x_dtype=DTYPES[x.dtype],
        w_dtype=DTYPES[w.dtype],
        w_stride=w.stride(0),
        normalize_embedding=inputs.normalize_embedding,
        normalize_weight=inputs.normalize_weight,
        **_addresses({"x": x, "w": w, "labels": labels}),
    )
    return native, (x, w, labels)


def _pass_inputs(inputs: PassInputs) -> tuple[Any, Any]:
    """The extension's own record, and the tensors that must outlive it."""
    w = _with_unit_stride(inputs.w)
    rows = _contiguous(**{k: getattr(inputs, k) for k in ("x", "row_factor", "bias", "labels", "scale", "threshold", "t")})
    native = _cpu.PassInputs(
        n=inputs.x.shape[0],
        d=inputs.x.shape[1],
        c=w.shape[0],
        x_dtype=DTYPES[inputs.x.dtype],
        w_dtype=DTYPES[w.dtype],
        w_stride=w.stride(0),
        non_target=int(inputs.non_target),
        normalize_weight=inputs.normalize_weight,
        sub_centers=inputs.sub_centers,
        **_addresses(rows | {"w": w}),
    )
    return native, (w, rows)
