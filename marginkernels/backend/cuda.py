"""The two passes on NVIDIA GPUs in CUDA C++: library matrix products over slabs of classes, kernels of our own between them.

A slab's cosines are one product; one kernel turns them into exponentials and running row sums; another product accumulates U. The class
pass is the same with G in place of the exponentials, and a last kernel adds the rows' own target terms in float32, applies the
normalisation's Jacobian and writes each row of dw once. Nothing is atomic and every sum has a fixed order, so the bits repeat; no step
waits for the GPU, and all runs on PyTorch's current stream, so that CUDA graphs capture it.

**Never run on a GPU so far.** The sources compile for sm_80 and sm_90a without stack use, and `tests/test_cuda.py` runs the same sources
and the loops below on a CPU, against the float64 reference, under an emulation that can show neither races nor speed. Before
`proven` becomes True, on a GPU: ``make gpu-report``, whose steps are the small cases, compute-sanitizer (memcheck and racecheck) on them,
bits that repeat, a training step in a ``torch.cuda.CUDAGraph``, all tests, and the times of every backend in one run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import forms
from .base import Backend, Problem, RowPass, RowSums, RowWeights

try:
    _cuda = importlib.import_module("marginkernels._cuda")
except ImportError as error:
    _cuda, _missing = None, str(error)

#: The numbers of csrc/forms.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Logits of a slab: 6 bytes each (float32 products, half-precision weights), so that a slab of 1,024 rows about fits the L2 of an H100.
SLAB_ELEMENTS = 1 << 23
MAX_WIDTH = 8192
#: Threads that take one row of a slab in the row pass: with few rows slabs are long, and there are multiprocessors to spare.
ROW_THREADS = {False: 256, True: 1024}
#: Kernels take classes in groups of so many: buffers are padded to it.
GROUP = 128
#: Half precision has few bits below 1: weights of at most 1 (times a slope, at most 3 or so) are stored times this. A power of two.
HALF_GAIN = 2.0**12


def slab_width(n: int, c: int) -> int:
    """Classes of a slab for ``n`` rows, a multiple of ``GROUP``."""
    return max(GROUP, min(MAX_WIDTH, SLAB_ELEMENTS // max(n, 1) // GROUP * GROUP, -(-c // GROUP) * GROUP))


def on_its_device(run_pass):
    """Launches go to the current device, which need not be the tensors'."""

    @functools.wraps(run_pass)
    def guarded(self, p: Problem, *args, **options):
        with torch.cuda.device(p.x.device) if p.x.device.type == "cuda" else contextlib.nullcontext():
            return run_pass(self, p, *args, **options)

    return guarded


class CudaBackend(Backend):
    name = "cuda"
    device_types = ("cuda",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    proven = False
    summary = "CUDA C++ (compute capability 8.0 and later): own kernels between library matrix products, a slab of classes at a time"
    note = f"{summary}; compiled and emulated on a CPU, never run on a GPU so far"
    kernels = _cuda  #: the compiled launchers; tests put their emulation here

    def unavailable(self) -> str | None:
        if self.kernels is None:
            report = Path(__file__).parents[1] / "_cuda.txt"
            why = report.read_text().strip() if report.exists() else _missing
            return f"the CUDA extension marginkernels._cuda is not there ({why}); install again with nvcc on the PATH"
        if "cuda" in self.device_types and not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        return None

    def refuses(self, device_type: str, dtype: torch.dtype, weight_dtype: torch.dtype, dim: int) -> str | None:
        reason = super().refuses(device_type, dtype, weight_dtype, dim)
        if reason is None and device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            reason = f"needs compute capability 8.0 or later, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        return reason

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int) -> int:
        width = slab_width(n, c)
        return min(limit // kept_bytes(n, width, dtype), -(-c // width)) * kept_bytes(n, width, dtype)

    @on_its_device
    def row_pass(self, p: Problem, *, uniform: bool, need_u: bool, need_moment: bool, workspace: int) -> RowPass:
        sums = RowSums.start(p, need_u=need_u, need_moment=need_moment)
        kept = torch.empty(workspace, dtype=torch.uint8, device=p.x.device)
        slabs = Slabs(p, self.kernels, slab_width(p.x.shape[0], p.w.shape[0]))
        rows_by_slab(slabs, p.w.shape[0], sums, kept, uniform=uniform)
        if need_u:
            sums.u.mul_(1 / slabs.gain)
        return sums.done(uniform=uniform, kept=kept)

    @on_its_device
    def class_pass(
        self, p: Problem, row: RowWeights, class_factor: Tensor, kept: Tensor, *, need_w: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        n, c = p.x.shape[0], p.w.shape[0]
        slabs = Slabs(p, self.kernels, slab_width(n, c))
        finish = Finish(slabs, row, class_factor, kept, -(-n // self.kernels.CHUNK), need_w=need_w, need_bias=need_bias)
        products, scratch = slabs.scratch()
        row, weights = finish.row, scratch if need_w else None
        for _, start, stop in slabs.between(finish.first, c):
            w = slabs.centres(start, stop, class_factor, given=True)
            matrix_product(p.x, w.T, products[:, : stop - start])
            self.kernels.class_slab(
                *slabs.launch, products=products.data_ptr(), weights=address(weights), bias_parts=address(finish.parts),
                lse=row.lse.data_ptr(), softmax=row.softmax.data_ptr(), uniform=address(row.uniform), gain=address(finish.gain),
                bias=None if p.bias is None else p.bias[start:].data_ptr(), ld=slabs.width, start=start, count=stop - start,
                **slabs.rows(),
            )  # fmt: skip
            if need_w:
                matrix_product(weights[:, : stop - start].T, p.x, finish.v[: stop - start])
            finish(start, stop)
        return finish.dw, finish.db


def rows_by_slab(slabs: Slabs, last: int, sums: RowSums, kept: Tensor, *, uniform: bool) -> None:
    """The row pass over classes [0, ``last``): moves ``sums`` on, its u times ``slabs.gain``, and fills ``kept`` (K,) uint8 with as many
    slabs' weights as it holds."""
    p, kernels = slabs.p, slabs.kernels
    n = p.x.shape[0]
    need_u = sums.u.shape[0] > 0
    decay, part = torch.empty_like(sums.peak), torch.empty_like(sums.u)
    products, scratch = slabs.scratch()
    for index, start, stop in slabs.between(0, last):
        w = slabs.centres(start, stop, sums.class_factor, given=False)
        weights, base = kept_slab(kept, index, n, slabs.width, p.x.dtype)
        if weights is None and need_u:
            weights = scratch
        matrix_product(p.x, w.T, products[:, : stop - start])
        kernels.row_slab(
            *slabs.launch, products=products.data_ptr(), weights=address(weights), decay=decay.data_ptr(), base=address(base),
            peak=sums.peak.data_ptr(), total=sums.total.data_ptr(), moment=address(sums.moment), top=sums.top.data_ptr(),
            gain=slabs.gain, threads=ROW_THREADS[n < 256], uniform=uniform,
            bias=None if p.bias is None else p.bias[start:].data_ptr(), ld=slabs.width, start=start, count=stop - start, **slabs.rows(),
        )  # fmt: skip
        if need_u:
            matrix_product(weights[:, : stop - start], w, part)
            torch.addcmul(part, sums.u, decay[:, None], out=sums.u)


class Finish:
    """The class pass's results and scratch, and its last step for each slab: the rows' own targets, the norm's Jacobian, one write.

    Attributes:
        row: the upstream, contiguous.
        gain: () what weights are to be multiplied by, or None.
        dw, db: (C, D) in w's dtype and (C,) float32, or None where not needed.
        v: (slab, D) gradients in the converted centres, without targets, times ``gain``; or (0, D).
        parts: (``chunks``, slab) what adds up to db without targets; or (0, slab).
        first: the first class that the weights kept by the row pass left to do.
    """

    def __init__(self, slabs: Slabs, row: RowWeights, class_factor: Tensor, kept: Tensor, chunks: int, *, need_w: bool, need_bias: bool):
        p = slabs.p
        (n, d), c = p.x.shape, p.w.shape[0]
        self.p, self.slabs, self.class_factor = p, slabs, class_factor

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=p.x.device)

        self.row = RowWeights(*(None if v is None else v.contiguous() for v in vars(row).values()))
        self.dw = torch.empty(p.w.shape, dtype=p.w.dtype, device=p.x.device) if need_w else None
        self.db = new(c) if need_bias else None
        self.v = new(max(slabs.width, slab_width(n, c) if kept.numel() else 0) if need_w else 0, d)
        self.parts = new(chunks if need_bias else 0, slabs.width)
        # Stable, so that the rows of one class are always added in the same order.
        self.sorted, self.order = torch.sort(p.labels, stable=True)
        self.gain = class_gain(p, self.row)
        self.first = self._from_kept(kept)

    def __call__(self, start: int, stop: int, post: float = 1.0) -> None:
        """``v``, times ``post`` besides, and ``parts`` hold classes [``start``, ``stop``)."""
        p, row, w = self.p, self.row, self.p.w[start:]
        self.slabs.kernels.finish(
            DTYPES[w.dtype], *self.slabs.launch, v=address(self.v), gain=address(self.gain), post=post, x=p.x.data_ptr(),
            sorted=self.sorted.data_ptr(), order=self.order.data_ptr(), row_factor=p.row_factor.data_ptr(), target=row.target.data_ptr(),
            row_bias=address(row.bias), w=w.data_ptr(), stride=w.stride(0), factor=address(self.class_factor[start:]),
            dw=None if self.dw is None else self.dw[start:].data_ptr(), db=None if self.db is None else self.db[start:].data_ptr(),
            bias_parts=address(self.parts), ld=self.parts.shape[1], chunks=self.parts.shape[0],
            start=start, n=p.x.shape[0], count=stop - start, d=w.shape[1],
        )  # fmt: skip

    def _from_kept(self, kept: Tensor) -> int:
        """Does the slabs whose weights were kept, one product each; gives the first class left.

        Weights were kept as exp(z) N'(c): enough for dw of the softmax alone, so nothing is done where more is asked for.
        """
        p, row = self.p, self.row
        n, c = p.x.shape[0], p.w.shape[0]
        if self.dw is None or self.db is not None or row.uniform is not None:
            return 0
        width = slab_width(n, c)
        for index, start in enumerate(range(0, c, width)):
            stop = min(start + width, c)
            weights, base = kept_slab(kept, index, n, width, p.x.dtype)
            if weights is None:
                return start
            share = row.softmax * p.row_factor * torch.exp(base - row.lse)
            if self.gain is not None:
                share = share * self.gain
            matrix_product(weights[:, : stop - start].T, (p.x * share[:, None]).to(p.x.dtype), self.v[: stop - start])
            self(start, stop, self.slabs.gain)
        return c


class Slabs:
    """The classes in slabs of ``width``, a multiple of ``GROUP`` (the last may be shorter), and what every slab needs.

    Attributes:
        launch: what every launcher takes first: the product's dtype and the stream.
        gain: a power of two that the row pass's weights are stored times.
    """

    def __init__(self, p: Problem, kernels, width: int):
        self.p, self.kernels, self.width = p, kernels, width
        # Centres that need neither norm nor conversion, and lie where tensor copies can take them, are taken as they are.
        own = p.normalize_weight or p.w.dtype != p.x.dtype or p.w.stride(0) != p.w.shape[1] or p.w.data_ptr() % 16 != 0
        self.converted = torch.empty((width, p.w.shape[1]), dtype=p.x.dtype, device=p.x.device) if own else None
        stream = torch.cuda.current_stream(p.x.device).cuda_stream if p.x.device.type == "cuda" else 0
        self.launch = (DTYPES[p.x.dtype], stream)
        self.gain = HALF_GAIN if p.x.dtype == torch.float16 else 1.0

    def between(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of the slabs of classes [first, last)."""
        return ((i, start, min(start + self.width, last)) for i, start in enumerate(range(first, last, self.width)))

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Products (N, width) float32, and weights (N, width) in the product's dtype: in float32 the same, overwritten."""
        products = torch.empty((self.p.x.shape[0], self.width), dtype=torch.float32, device=self.p.x.device)
        return products, products if self.p.x.dtype == torch.float32 else torch.empty_like(products, dtype=self.p.x.dtype)

    def centres(self, start: int, stop: int, factor: Tensor, *, given: bool) -> Tensor:
        """(slab, D) a_j w_j in the product's dtype; a_j goes to ``factor`` (C,), or comes from there where ``given``."""
        w = self.p.w[start:stop]
        if self.converted is None:
            return w
        out = self.converted[: stop - start]
        self.kernels.centres(
            DTYPES[w.dtype], *self.launch, w=w.data_ptr(), stride=w.stride(0), factor=address(factor[start:]), out=out.data_ptr(),
            count=stop - start, d=w.shape[1], given=given,
        )  # fmt: skip
        return out

    def rows(self) -> dict:
        """What turns a row's product into a logit."""
        p = self.p
        hard = p.form != forms.IDENTITY
        return {
            "row_factor": p.row_factor.data_ptr(),
            "scale": p.scale.data_ptr(),
            "threshold": address(p.threshold) if hard else None,
            "t": address(p.t) if hard else None,
            "labels": p.labels.data_ptr(),
            "n": p.x.shape[0],
            "form": p.form,
        }


def matrix_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, accumulated in, and written as, float32."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def address(v: Tensor | None) -> int | None:
    return None if v is None or v.numel() == 0 else v.data_ptr()


def class_gain(p: Problem, row: RowWeights) -> Tensor | None:
    """() the power of two that lifts the largest |G_ij f_i| near ``HALF_GAIN``, for float16, whose smallest number is 6e-8; else None."""
    if p.x.dtype != torch.float16:
        return None
    weight = row.softmax.abs() if row.uniform is None else row.softmax.abs() + row.uniform.abs()
    largest = (weight * p.row_factor).amax()
    exponent = torch.frexp(torch.where(largest.isfinite() & (largest > 0), largest, 1.0)).exponent
    return torch.ldexp(torch.full_like(largest, HALF_GAIN), -exponent)


def kept_bytes(n: int, width: int, dtype: torch.dtype) -> int:
    """A kept slab: (N, width) weights, then what their exponentials were taken against (N,) float32; each on 16 bytes."""
    return n * width * dtype.itemsize + -(-n * 4 // 16) * 16


def kept_slab(kept: Tensor, index: int, n: int, width: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weights (N, width) and base (N,) of slab ``index``, or None where it was not kept."""
    size = kept_bytes(n, width, dtype)
    if (index + 1) * size > kept.numel():
        return None, None
    one = kept[index * size : (index + 1) * size]
    weights = n * width * dtype.itemsize
    return one[:weights].view(dtype).view(n, width), one[weights : weights + 4 * n].view(torch.float32)
