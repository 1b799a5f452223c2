"""What the two CUDA C++ backends share: the extension, chunks of classes, the loop of library products, and the writing of gradients.

Nothing is atomic and every sum has a fixed order, so the bits repeat; no step waits for the GPU, and all runs on PyTorch's current
stream, so that CUDA graphs capture it.

**Never run on a GPU so far.** The sources compile for sm_80 and sm_90a without stack use, and `tests/backends/test_cuda.py` runs the same
sources and the loops below on a CPU, against the float64 reference, under an emulation that can show neither races nor speed. What to
run first on a GPU, beside ``python -m marginkernels verify --device cuda``: ``make gpu-report``, whose steps are the small cases,
compute-sanitizer (memcheck and racecheck) on them, bits that repeat, a training step in a ``torch.cuda.CUDAGraph``, all tests, and the
times of every backend in one run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.device import on_device_of
from ...core.nontarget import NonTarget
from ...core.numerics import FLOAT16_POW2
from ...core.types import ClassPassOutput, PassInputs, Request, RowPassOutput, Upstream
from .. import _extension
from .._extension import DTYPES, address
from ..gpu_rows import GpuRows
from ..online_softmax import OnlineSoftmax

_cuda, _missing = _extension.load("_cuda")

#: Logits of a chunk: 6 bytes each (float32 products, half-precision weights), so that a chunk of 1,024 rows about fits the L2 of an H100.
CHUNK_ELEMENTS = 1 << 23
MAX_WIDTH = 8192
#: Threads that take one row of a chunk in the row pass: with few rows chunks are long, and there are multiprocessors to spare.
ROW_THREADS = {False: 256, True: 1024}
#: Kernels take classes in groups of so many: buffers are padded to it.
GROUP = 128


def chunk_width(n: int, c: int) -> int:
    """Classes of a chunk for ``n`` rows, a multiple of ``GROUP``."""
    return max(GROUP, min(MAX_WIDTH, CHUNK_ELEMENTS // max(n, 1) // GROUP * GROUP, -(-c // GROUP) * GROUP))


class ExtensionBackend(GpuRows):
    """A backend whose kernels are in ``marginkernels._cuda``."""

    device_types = ("cuda",)
    kernels: Any = _cuda  #: the compiled launchers; tests put their emulation here

    @property
    def note(self) -> str:
        return f"{self.summary}; compiled and emulated on a CPU, never run on a GPU so far"

    def unavailable_reason(self) -> str | None:
        if self.kernels is None:
            return _extension.missing("_cuda", _missing, "nvcc")
        if "cuda" in self.device_types and not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        return (self._driver_reason() or self._no_gpu_does()) if "cuda" in self.device_types else None

    def capability_reason(self, found: tuple[int, int] | None) -> str | None:
        return f"needs compute capability 8.0 or later, not {found[0]}.{found[1]}" if found is not None and found < (8, 0) else None

    def _driver_reason(self) -> str | None:
        """The CUDA runtime is linked into the extension, and its first call fails where the driver is of an older major version, though
        PyTorch, with a runtime of its own, works."""
        driver, runtime = self.kernels.driver_version(), self.kernels.runtime_version()
        if driver // 1000 >= runtime // 1000:
            return None
        has, needs = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return f"was built with CUDA {needs}, and the driver is for CUDA {has}: update the driver, or build with that toolkit"

    def workspace_bytes(self, n: int, c: int, dtype: torch.dtype, limit: int, sub_centers: int = 1) -> int:
        width = chunk_width(n, c)
        size = saved_bytes(n, width, dtype)
        return min(limit // max(size, 1), -(-c // width)) * size

    def row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        with on_device_of(inputs.x):
            return self._row_pass(inputs, request)

    def class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        contiguous: dict[str, Any] = {
            name: v.contiguous() if isinstance(v, Tensor) else v for name, v in vars(upstream.rounded(torch.float32)).items()
        }
        with on_device_of(inputs.x):
            return self._class_pass(inputs, Upstream(**contiguous), class_factor, saved, need_weight, need_bias)

    @abstractmethod
    def _row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput: ...

    @abstractmethod
    def _class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput: ...


class Chunks:
    """The classes in chunks of ``width``, a multiple of ``GROUP`` (the last may be shorter), and what every chunk needs.

    Attributes:
        launch: what every launcher takes first: the product's dtype and the stream.
        pow2: a power of two that the row pass's weights are stored times.
    """

    def __init__(self, inputs: PassInputs, kernels: Any, width: int):
        p = inputs
        self.inputs, self.kernels, self.width = p, kernels, width
        # Centers that need neither norm nor conversion, and lie where tensor copies can take them, are taken as they are.
        convert = p.normalize_weight or p.w.dtype != p.x.dtype or p.w.stride(0) != p.w.shape[1] or p.w.data_ptr() % 16 != 0
        self.converted = torch.empty((width, p.w.shape[1]), dtype=p.x.dtype, device=p.x.device) if convert else None
        stream = torch.cuda.current_stream(p.x.device).cuda_stream if p.x.device.type == "cuda" else 0
        self.launch = (DTYPES[p.x.dtype], stream)
        self.pow2 = FLOAT16_POW2 if p.x.dtype == torch.float16 else 1.0

    def between(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of the chunks of classes [first, last)."""
        return ((i, start, min(start + self.width, last)) for i, start in enumerate(range(first, last, self.width)))

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Products (N, width) float32, and weights (N, width) in the product's dtype: in float32 the same, overwritten."""
        products = torch.empty((self.inputs.x.shape[0], self.width), dtype=torch.float32, device=self.inputs.x.device)
        return products, products if self.inputs.x.dtype == torch.float32 else torch.empty_like(products, dtype=self.inputs.x.dtype)

    def centers(self, start: int, stop: int, factor: Tensor, *, given: bool) -> Tensor:
        """(chunk, D) a_j w_j in the product's dtype; a_j goes to ``factor`` (C,), or comes from there where ``given``."""
        w = self.inputs.w[start:stop]
        if self.converted is None:
            return w
        out = self.converted[: stop - start]
        self.kernels.centers(
            DTYPES[w.dtype],
            *self.launch,
            w=w.data_ptr(),
            stride=w.stride(0),
            factor=address(factor[start:]),
            out=out.data_ptr(),
            count=stop - start,
            d=w.shape[1],
            given=given,
        )
        return out

    def rows(self) -> dict[str, Any]:
        """What turns a row's product into a logit, as the launchers take it."""
        p = self.inputs
        hard = p.non_target != NonTarget.IDENTITY
        return {
            "row_factor": p.row_factor.data_ptr(),
            "scale": p.scale.data_ptr(),
            "threshold": address(p.threshold) if hard else None,
            "t": address(p.t) if hard else None,
            "labels": p.labels.data_ptr(),
            "n": p.x.shape[0],
            "non_target": int(p.non_target),
        }

    def bias(self, start: int) -> int | None:
        """The address of the biases from class ``start`` on."""
        return None if self.inputs.bias is None else self.inputs.bias[start:].data_ptr()


def stream_row_chunks(chunks: Chunks, last: int, sums: OnlineSoftmax, saved: Tensor, request: Request) -> None:
    """The row pass over classes [0, ``last``) by library products: moves ``sums`` on, its centers times ``chunks.pow2``, and fills
    ``saved`` (bytes,) uint8 with as many chunks' weights as it holds."""
    p, kernels = chunks.inputs, chunks.kernels
    n = p.x.shape[0]
    decay, part = torch.empty_like(sums.running_max), torch.empty_like(sums.center)
    products, scratch = chunks.scratch()
    for index, start, stop in chunks.between(0, last):
        w = chunks.centers(start, stop, sums.class_factor, given=False)
        weights, base = saved_chunk(saved, index, n, chunks.width, p.x.dtype)
        if weights is None:
            weights = scratch if request.need_center else None
        matrix_product(p.x, w.T, products[:, : stop - start])
        kernels.row_chunk(
            *chunks.launch,
            products=products.data_ptr(),
            weights=address(weights),
            decay=decay.data_ptr(),
            base=address(base),
            running_max=sums.running_max.data_ptr(),
            total=sums.total.data_ptr(),
            cos=address(sums.cos),
            max_logit=sums.max_logit.data_ptr(),
            pow2=chunks.pow2,
            threads=ROW_THREADS[n < 256],
            reduction=int(request.reduction),
            bias=chunks.bias(start),
            ld=chunks.width,
            start=start,
            count=stop - start,
            **chunks.rows(),
        )
        if request.need_center and weights is not None:
            matrix_product(weights[:, : stop - start], w, part)
            torch.addcmul(part, sums.center, decay[:, None], out=sums.center)


class GradientWriter:
    """The class pass's results and scratch, and its last step for each chunk: the rows' own targets, the norm's Jacobian, one write.

    Args:
        row_blocks: how many partial sums of db there are.

    Attributes:
        out: the gradients.
        pow2: () what weights are to be multiplied by, or None.
        v: (chunk, D) gradients in the converted centers, without targets, times ``pow2``; or (0, D).
        bias_parts: (``row_blocks``, chunk) what adds up to db without targets; or (0, chunk).
    """

    def __init__(
        self, chunks: Chunks, upstream: Upstream, class_factor: Tensor, saved: Tensor, row_blocks: int, need_weight: bool, need_bias: bool
    ):
        p = chunks.inputs
        (n, d), c = p.x.shape, p.w.shape[0]
        self.inputs, self.chunks, self.upstream, self.class_factor, self.saved = p, chunks, upstream, class_factor, saved
        self.out = ClassPassOutput.allocate(p, need_weight, need_bias)
        width = max(chunks.width, chunk_width(n, c) if saved.numel() else 0)
        self.v = p.x.new_empty((width if need_weight else 0, d), dtype=torch.float32)
        self.bias_parts = p.x.new_empty((row_blocks if need_bias else 0, chunks.width), dtype=torch.float32)
        # Stable, so that the rows of one class are always added in the same order.
        self.sorted, self.order = torch.sort(p.labels, stable=True)
        self.pow2 = class_pow2(p, upstream)

    def write(self, start: int, stop: int, v_pow2: float = 1.0) -> None:
        """Finish classes [``start``, ``stop``), whose sums stand in ``v``, times ``v_pow2`` besides, and in ``bias_parts``."""
        p, up, out, w = self.inputs, self.upstream, self.out, self.inputs.w[start:]
        self.chunks.kernels.finish(
            DTYPES[w.dtype],
            *self.chunks.launch,
            v=address(self.v),
            pow2=address(self.pow2),
            v_pow2=v_pow2,
            x=p.x.data_ptr(),
            sorted=self.sorted.data_ptr(),
            order=self.order.data_ptr(),
            row_factor=p.row_factor.data_ptr(),
            d_target_cos=up.d_target_cos.data_ptr(),
            d_target_bias=address(up.d_target_bias),
            w=w.data_ptr(),
            stride=w.stride(0),
            factor=address(self.class_factor[start:]),
            dw=address(out.d_weight[start:]),
            db=address(out.d_bias[start:]),
            bias_parts=address(self.bias_parts),
            ld=self.bias_parts.shape[1],
            row_blocks=self.bias_parts.shape[0],
            start=start,
            n=p.x.shape[0],
            count=stop - start,
            d=w.shape[1],
        )

    def write_saved(self) -> int:
        """Do the chunks whose weights the row pass saved, one product each; gives the first class left.

        Weights were saved as exp(z) N'(c): enough for dw of the log-sum-exp alone, so nothing is done where more is asked for.
        """
        p, up = self.inputs, self.upstream
        n, c = p.x.shape[0], p.w.shape[0]
        if not self.out.d_weight.numel() or self.out.d_bias.numel() or up.d_logit_sum is not None:
            return 0
        width = chunk_width(n, c)
        for index, start in enumerate(range(0, c, width)):
            stop = min(start + width, c)
            weights, base = saved_chunk(self.saved, index, n, width, p.x.dtype)
            if weights is None or base is None:
                return start
            share = up.d_lse * p.row_factor * torch.exp(base - up.lse)
            if self.pow2 is not None:
                share = share * self.pow2
            matrix_product(weights[:, : stop - start].T, (p.x * share[:, None]).to(p.x.dtype), self.v[: stop - start])
            self.write(start, stop, self.chunks.pow2)
        return c


def matrix_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, accumulated in, and written as, float32."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def class_pow2(inputs: PassInputs, upstream: Upstream) -> Tensor | None:
    """() the power of two that brings the largest |G_ij f_i| near ``FLOAT16_POW2``; None unless the products are of float16."""
    if inputs.x.dtype != torch.float16:
        return None
    weight = upstream.d_lse.abs() if upstream.d_logit_sum is None else upstream.d_lse.abs() + upstream.d_logit_sum.abs()
    largest = (weight * inputs.row_factor).amax()
    exponent = torch.frexp(torch.where(largest.isfinite() & (largest > 0), largest, 1.0)).exponent
    return torch.ldexp(torch.full_like(largest, FLOAT16_POW2), -exponent)


def saved_bytes(n: int, width: int, dtype: torch.dtype) -> int:
    """A saved chunk: (N, width) weights, then what their exponentials were taken against (N,) float32; each on 16 bytes."""
    return n * width * dtype.itemsize + -(-n * 4 // 16) * 16


def saved_chunk(saved: Tensor, index: int, n: int, width: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weights (N, width) and base (N,) of chunk ``index``, or None where it was not saved."""
    size = saved_bytes(n, width, dtype)
    if (index + 1) * size > saved.numel():
        return None, None
    one = saved[index * size : (index + 1) * size]
    weights = n * width * dtype.itemsize
    return one[:weights].view(dtype).view(n, width), one[weights : weights + 4 * n].view(torch.float32)
