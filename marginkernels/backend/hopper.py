"""The two passes on Hopper GPUs (compute capability 9.0), each one fused kernel: logits in registers only.

Per slab, the centres are converted (and normalised) to the product's dtype once, into a buffer that stays in the L2 cache; one kernel then
runs the whole pass over it with bulk tensor copies and warpgroup matrix products. The row pass cuts the classes of a slab into as many
splits as the GPU has room for; each split's running state is kept from slab to slab, and all are combined, in a fixed order, at the end.

**Never run on a GPU so far**, like :mod:`marginkernels.backend.cuda`, whose list of what to run first holds here too. The kernels compile
for sm_90a without stack use and without serialised products, and `tests/test_cuda.py` runs them on a CPU under an emulation of the
copies, barriers and products, at once and as late as the waits allow: it shows deadlocks, wrong layouts and most of what is read or
overwritten too early, but no missing fence and no speed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import forms
from . import cuda
from .base import Problem, RowPass, RowSums, RowWeights
from .cuda import GROUP, CudaBackend, Finish, Slabs, address, on_its_device

LOG2E = math.log2(math.e)
#: What a slab's converted centres, and in the class pass the float32 gradient in them too, may take.
ROW_SLAB_BYTES = 32 << 20
CLASS_SLAB_BYTES = 48 << 20


class HopperBackend(CudaBackend):
    name = "hopper"
    dtypes = (torch.float16, torch.bfloat16)
    dims = (128, 256, 512)
    summary = "CUDA C++ (compute capability 9.0): each pass one kernel over wgmma and TMA, for D of 128, 256 or 512"
    note = f"{summary}; compiled and emulated on a CPU, never run on a GPU so far"

    def unavailable(self) -> str | None:
        reason = super().unavailable()
        if reason is None and not hasattr(self.kernels, "fused_row"):
            return "the CUDA kernels were built without 9.0 in TORCH_CUDA_ARCH_LIST"
        return reason

    def refuses(self, device_type: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        # The weight may be float32 as well: it is converted a slab at a time.
        reason = super().refuses(device_type, dtype, dtype if weight_dtype == torch.float32 else weight_dtype, dim)
        if reason is None and dim not in self.dims:
            return f"has embedding dimensions {', '.join(map(str, self.dims))}, not {dim}"
        if reason is None and device_type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            return f"is for compute capability 9.0, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        return reason

    def multiprocessors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    @on_its_device
    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        n, d = p.x.shape
        c = p.w.shape[0]
        # Classes whose weights are kept go by library products, as one more split.
        width = cuda.slab_width(n, c)
        first = min(c, workspace // cuda.kept_bytes(n, width, p.x.dtype) * width)
        slabs = Slabs(p, self.kernels, slab_width(c - first, ROW_SLAB_BYTES // (2 * d)))
        row_tiles = -(-n // self.kernels.TILE_KEPT)
        splits = 0
        if first < c:
            splits = max(1, min(self.multiprocessors(p.x.device) // row_tiles, slabs.width // self.kernels.TILE_STREAMED))
        every = splits + (first > 0)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=p.x.device)

        factor = new(c if p.normalize_weight else 0)
        peak, total, top = new(every, n), new(every, n), new(every, n)
        moment, u = new(every if need_moment else 0, n), new(every if need_u else 0, n, d)
        kept = torch.empty(workspace, dtype=torch.uint8, device=p.x.device)
        if first:
            own = RowSums(*(v[-1] if v.shape[0] else v for v in (peak, total, moment, top, u)), factor)
            for v, start in ((own.peak, -torch.inf), (own.total, 0.0), (own.moment, 0.0), (own.top, -torch.inf), (own.u, 0.0)):
                v.fill_(start)
            cuda.rows_by_slab(Slabs(p, self.kernels, width), first, own, kept, uniform=uniform)
            for v in (peak, top):  # the fused kernels' logits are in units of log2
                v[-1].mul_(LOG2E)
        state = {name: address(v) for name, v in (("peak", peak), ("total", total), ("top", top), ("moment", moment), ("u", u))}
        state |= {"gain": slabs.gain, "d": d, "uniform": uniform}
        bias, reach = self._bias(p), None if uniform else self._reach(p)
        for index, start, stop in slabs.between(first, c):
            w = slabs.centres(start, stop, factor, given=False)
            self.kernels.fused_row(
                *slabs.launch, x=p.x.data_ptr(), w=w.data_ptr(), start=start, count=stop - start, resume=index > 0, splits=splits,
                bias=None if bias is None else bias[start:].data_ptr(), reach=address(reach), **slabs.rows(), **state,
            )  # fmt: skip
        out = RowPass(new(n), new(n), new(n if need_moment else 0), new(n if need_u else 0, d), factor, kept)
        self.kernels.combine(
            slabs.launch[1], out_total=out.total.data_ptr(), out_top=out.top.data_ptr(), out_moment=address(out.moment),
            out_u=address(out.u), n=n, splits=every, **state,
        )  # fmt: skip
        return out

    @on_its_device
    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        (n, d), c = p.x.shape, p.w.shape[0]
        slabs = Slabs(p, self.kernels, slab_width(c, CLASS_SLAB_BYTES // (6 * d)))
        finish = Finish(slabs, row, class_factor, kept, 1, need_w=need_w, need_bias=need_bias)
        rows = self._streamed(p, finish.row)
        bias = self._bias(p)
        for _, start, stop in slabs.between(finish.first, c):
            w = slabs.centres(start, stop, class_factor, given=True)
            self.kernels.fused_class(
                *slabs.launch, x=p.x.data_ptr(), w=w.data_ptr(), rows=rows.data_ptr(), t=address(p.t),
                bias=None if bias is None else bias[start:].data_ptr(), gain=address(finish.gain), v=address(finish.v),
                bias_sum=address(finish.parts), start=start, n=n, count=stop - start, d=d, form=p.form,
            )  # fmt: skip
            finish(start, stop)
        return finish.dw, finish.db

    def _bias(self, p: Problem) -> Tensor | None:
        """(C and up to a tile more) bias in units of log2, or None."""
        if p.bias is None:
            return None
        return F.pad(p.bias * LOG2E, (0, -p.bias.shape[0] % self.kernels.TILE_STREAMED))

    def _reach(self, p: Problem) -> Tensor | None:
        """(N,) what no logit exceeds either way, in units of log2 and with room for the centres' rounding; None where nothing bounds them.

        Not for float16, which has no range for exponentials of such logits."""
        if p.form != forms.IDENTITY or p.bias is not None or not p.normalize_weight or p.x.dtype != torch.bfloat16:
            return None
        return torch.linalg.vector_norm(p.x, dim=1, dtype=torch.float32) * p.row_factor * p.scale * (1.01 * LOG2E)

    def _streamed(self, p: Problem, row: RowWeights) -> Tensor:
        """(N and up to a tile more, 8) float32: csrc/cuda/fused.h's Streamed; rows past N weigh nothing."""
        zero = torch.zeros_like(p.scale)
        own = torch.where((p.labels >= 0) & (p.labels < p.w.shape[0]), p.labels, -1).to(torch.int32).view(torch.float32)
        fields = (
            p.row_factor,
            p.scale * LOG2E,
            row.lse * LOG2E,
            row.softmax,
            zero if row.uniform is None else row.uniform,
            1 / p.scale,
            own,
            zero if p.threshold is None else p.threshold,
        )
        rows = F.pad(torch.stack(fields, 1), (0, 0, 0, -p.x.shape[0] % self.kernels.TILE_STREAMED))
        rows[p.x.shape[0] :, 2] = torch.inf
        return rows


def slab_width(c: int, limit: int) -> int:
    """Classes of a slab: at most ``limit``, a multiple of ``GROUP``."""
    return max(1, min(limit // GROUP, -(-c // GROUP))) * GROUP
