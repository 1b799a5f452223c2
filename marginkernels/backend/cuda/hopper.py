"""The two passes on Hopper GPUs (compute capability 9.0), each one fused kernel: logits in registers only.

Per chunk, the centers are converted (and normalized) to the product's dtype once, into a buffer that stays in the L2 cache; one kernel then
runs the whole pass over it with bulk tensor copies and warpgroup matrix products. The row pass cuts the classes of a chunk into
splits that fill the GPU; each split's running state is saved from chunk to chunk, and all are combined, in a fixed order, at the end.

**Never run on a GPU so far**; see :mod:`.common`. The kernels compile
for sm_90a without stack use and without serialized products, and `tests/backends/test_cuda.py` runs them on a CPU under an emulation of the
copies, barriers and products, at once and as late as the waits allow: it shows deadlocks, wrong layouts and most of what is read or
overwritten too early, but no missing fence and no speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.nontarget import NonTarget
from ...core.types import ClassPassOutput, PassInputs, Reduction, Request, RowPassOutput, Upstream
from .._extension import address
from ..online_softmax import OnlineSoftmax
from . import common
from .common import GROUP, Chunks, ExtensionBackend, GradientWriter

LOG2E = math.log2(math.e)
#: What a chunk's converted centers, and in the class pass the float32 gradient in them too, may take.
ROW_CHUNK_BYTES = 32 << 20
CLASS_CHUNK_BYTES = 48 << 20
#: What a block takes besides its tiles, in tiles: its embeddings, and its state in and out, at their share of the memory's bandwidth.
#: A model, not a measurement.
BLOCK_TILES = 8
#: The most waves of blocks, which also bounds the partial results: as many times 64 float32 rows for each multiprocessor.
MAX_WAVES = 8
#: Floats of csrc/cuda/hopper.h's Streamed.
STREAMED_FLOATS = 12


class HopperBackend(ExtensionBackend):
    name = "hopper"
    dtypes = (torch.float16, torch.bfloat16)
    dims = (128, 256, 512)
    summary = "CUDA C++ (compute capability 9.0): each pass one kernel over wgmma and TMA, for D of 128, 256 or 512"

    def unavailable_reason(self) -> str | None:
        reason = super().unavailable_reason()
        if reason is None and not hasattr(self.kernels, "fused_row"):
            return "the CUDA kernels were built without 9.0 in TORCH_CUDA_ARCH_LIST"
        return reason

    def unsupported_reason(self, device: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        # The weight may be float32 as well: it is converted a chunk at a time.
        reason = super().unsupported_reason(device, dtype, dtype if weight_dtype == torch.float32 else weight_dtype, dim)
        if reason is None and dim not in self.dims:
            return f"has embedding dimensions {', '.join(map(str, self.dims))}, not {dim}"
        return reason

    def capability_reason(self, found: tuple[int, int] | None) -> str | None:
        return f"is for compute capability 9.0, not {found[0]}.{found[1]}" if found is not None and found != (9, 0) else None

    def multiprocessors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def _row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        p = inputs
        (n, d), c = p.x.shape, p.w.shape[0]
        # Classes whose weights are saved go by library products, as one more split.
        width = common.chunk_width(n, c)
        first = min(c, request.workspace_bytes // common.saved_bytes(n, width, p.x.dtype) * width)
        chunks = Chunks(p, self.kernels, chunk_width(c - first, ROW_CHUNK_BYTES // (2 * d)))
        kernels = chunks.kernels
        splits = 0
        if first < c:
            row_tiles = -(-n // kernels.TILE_STATIONARY)
            splits = splits_of(row_tiles, chunks.width // kernels.TILE_STREAMED, self.multiprocessors(p.x.device))
        parts = _Splits(p, request, splits + (first > 0))
        saved = torch.empty(request.workspace_bytes, dtype=torch.uint8, device=p.x.device)
        if first:
            own = parts.last()
            common.stream_row_chunks(Chunks(p, self.kernels, width), first, own, saved, request)
            for v in (own.running_max, own.max_logit):  # the fused kernels' logits are in units of log2
                v.mul_(LOG2E)
            if request.reduction == Reduction.SOFTPLUS_SUM:
                own.total.mul_(LOG2E)
        state = parts.addresses() | {"pow2": chunks.pow2, "d": d, "reduction": int(request.reduction)}
        bias, reach = self._bias(p), self._reach(p) if request.reduction == Reduction.LOG_SUM_EXP else None
        for index, start, stop in chunks.between(first, c):
            w = chunks.centers(start, stop, parts.class_factor, given=False)
            kernels.fused_row(
                *chunks.launch,
                x=p.x.data_ptr(),
                w=w.data_ptr(),
                start=start,
                count=stop - start,
                resume=index > 0,
                splits=splits,
                bias=None if bias is None else bias[start:].data_ptr(),
                reach=address(reach),
                **chunks.rows(),
                **state,
            )
        return parts.combined(kernels, chunks.launch[1], state, saved)

    def _class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        p = inputs
        (n, d), c = p.x.shape, p.w.shape[0]
        chunks = Chunks(p, self.kernels, chunk_width(c, CLASS_CHUNK_BYTES // (6 * d)))
        writer = GradientWriter(chunks, upstream, class_factor, saved, 1, need_weight, need_bias)
        rows = self._streamed(p, upstream)
        bias = self._bias(p)
        for _, start, stop in chunks.between(writer.write_saved(), c):
            w = chunks.centers(start, stop, class_factor, given=True)
            chunks.kernels.fused_class(
                *chunks.launch,
                x=p.x.data_ptr(),
                w=w.data_ptr(),
                rows=rows.data_ptr(),
                bias=None if bias is None else bias[start:].data_ptr(),
                pow2=address(writer.pow2),
                v=address(writer.v),
                bias_sum=address(writer.bias_parts),
                start=start,
                n=n,
                count=stop - start,
                d=d,
                non_target=int(p.non_target),
                reduction=int(upstream.reduction),
            )
            writer.write(start, stop)
        return writer.out

    def _bias(self, p: PassInputs) -> Tensor | None:
        """(C and up to a tile more) bias in units of log2, or None."""
        if p.bias is None:
            return None
        return F.pad(p.bias * LOG2E, (0, -p.bias.shape[0] % self.kernels.TILE_STREAMED))

    def _reach(self, p: PassInputs) -> Tensor | None:
        """(N,) what no logit exceeds either way, in units of log2 and with room for the centers' rounding; None where nothing bounds them.

        Not for float16, which has no range for exponentials of such logits."""
        if p.non_target != NonTarget.IDENTITY or p.bias is not None or not p.normalize_weight or p.x.dtype != torch.bfloat16:
            return None
        norm: Tensor = torch.linalg.vector_norm(p.x, dim=1, dtype=torch.float32)
        return norm * p.row_factor * p.scale * (1.01 * LOG2E)

    def _streamed(self, p: PassInputs, upstream: Upstream) -> Tensor:
        """(N and up to a tile more, STREAMED_FLOATS) float32: csrc/cuda/hopper.h's Streamed; rows past N weigh nothing."""
        zero = torch.zeros_like(p.scale)
        own = torch.where((p.labels >= 0) & (p.labels < p.w.shape[0]), p.labels, -1).to(torch.int32).view(torch.float32)
        fields = (
            p.row_factor,
            p.scale * LOG2E,
            upstream.lse * LOG2E,
            upstream.d_lse,
            zero if upstream.d_logit_sum is None else upstream.d_logit_sum,
            1 / p.scale,
            own,
            zero if p.threshold is None else p.threshold,
            zero if p.t is None else p.t,
        )
        missing = -p.x.shape[0] % self.kernels.TILE_STREAMED
        rows = F.pad(torch.stack(fields, 1), (0, STREAMED_FLOATS - len(fields), 0, missing))
        rows[p.x.shape[0] :, 2] = torch.inf
        return rows


class _Splits:
    """The running sums of the row pass, one state for each split of the classes: (splits, N), and (splits, N, D) of the centers."""

    def __init__(self, inputs: PassInputs, request: Request, splits: int):
        (n, d), c = inputs.x.shape, inputs.w.shape[0]
        self.request, self.splits, self.n = request, splits, n

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=inputs.x.device)

        self.new = new
        self.class_factor = new(c if inputs.normalize_weight else 0)
        self.running_max, self.total, self.max_logit = new(splits, n), new(splits, n), new(splits, n)
        self.cos, self.center = new(splits if request.need_cos else 0, n), new(splits if request.need_center else 0, n, d)

    def last(self) -> OnlineSoftmax:
        """The state of the last split, at its start; it shares this one's memory."""
        one = OnlineSoftmax(
            running_max=self.running_max[-1].fill_(-torch.inf),
            total=self.total[-1].fill_(0.0),
            cos=self.cos[-1].fill_(0.0) if self.request.need_cos else self.cos[0:0, 0],
            max_logit=self.max_logit[-1].fill_(-torch.inf),
            center=self.center[-1].fill_(0.0) if self.request.need_center else self.center[:, 0],
            class_factor=self.class_factor,
        )
        return one

    def addresses(self) -> dict[str, int | None]:
        return {name: address(getattr(self, name)) for name in ("running_max", "total", "max_logit", "cos", "center")}

    def combined(self, kernels: Any, stream: int, state: dict[str, Any], saved: Tensor) -> RowPassOutput:
        """All splits, in a fixed order."""
        n, d, need_cos, need_center = self.n, self.center.shape[2], self.request.need_cos, self.request.need_center
        value, max_logit = self.new(n), self.new(n)
        cos, center = self.new(n if need_cos else 0), self.new(n if need_center else 0, d)
        kernels.combine(
            stream,
            out_value=value.data_ptr(),
            out_max_logit=max_logit.data_ptr(),
            out_cos=address(cos),
            out_center=address(center),
            n=n,
            splits=self.splits,
            **state,
        )
        return RowPassOutput.of(
            self.request, value=value, max_logit=max_logit, cos=cos, center=center, class_factor=self.class_factor, saved=saved
        )


def splits_of(row_tiles: int, tiles: int, processors: int) -> int:
    """Into how many splits to cut the ``tiles`` of a chunk, with ``row_tiles`` blocks for each and one block at a time on each of the GPU's
    ``processors``: the fewest with which all waves together take, within 1%, as few steps as with any.

    More splits fill the last wave better, and cost each block ``BLOCK_TILES`` again.
    """

    def steps(splits: int) -> int:
        return -(-row_tiles * splits // processors) * (-(-tiles // splits) + BLOCK_TILES)

    every = range(1, max(1, min(tiles, MAX_WAVES * processors // row_tiles)) + 1)
    fewest = min(steps(splits) for splits in every)
    return next(splits for splits in every if steps(splits) <= 1.01 * fewest)


def chunk_width(c: int, limit: int) -> int:
    """Classes of a chunk: at most ``limit``, a multiple of ``GROUP``."""
    return max(1, min(limit // GROUP, -(-c // GROUP))) * GROUP
