"""The two passes on NVIDIA GPUs in CUDA C++: library matrix products over chunks of classes, custom kernels between them.

A chunk's cosines are one product; one kernel turns them into exponentials and running row sums; another product accumulates the centers.
The class pass is the same with G in place of the exponentials, and a last kernel adds the rows' own target terms in float32, applies the
normalization's Jacobian and writes each row of dw once.

**Never run on a GPU so far**; see :mod:`.common`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.types import ClassPassOutput, PassInputs, Request, RowPassOutput, Upstream
from .._extension import address
from ..online_softmax import OnlineSoftmax
from .common import Chunks, ExtensionBackend, GradientWriter, chunk_width, matrix_product, stream_row_chunks


class CudaBackend(ExtensionBackend):
    name = "cuda"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    summary = "CUDA C++ (compute capability 8.0 and later): custom kernels between library matrix products, a chunk of classes at a time"

    def _row_pass(self, inputs: PassInputs, request: Request) -> RowPassOutput:
        sums = OnlineSoftmax.init(inputs, request)
        saved = torch.empty(request.workspace_bytes, dtype=torch.uint8, device=inputs.x.device)
        chunks = Chunks(inputs, self.kernels, chunk_width(inputs.x.shape[0], inputs.w.shape[0]))
        stream_row_chunks(chunks, inputs.w.shape[0], sums, saved, request)
        if request.need_center:
            sums.center.mul_(1 / chunks.pow2)
        return sums.finalize(request, saved)

    def _class_pass(
        self, inputs: PassInputs, upstream: Upstream, class_factor: Tensor, saved: Tensor, need_weight: bool, need_bias: bool
    ) -> ClassPassOutput:
        n, c = inputs.x.shape[0], inputs.w.shape[0]
        chunks = Chunks(inputs, self.kernels, chunk_width(n, c))
        row_blocks = -(-n // chunks.kernels.ROW_BLOCK)
        writer = GradientWriter(chunks, upstream, class_factor, saved, row_blocks, need_weight, need_bias)
        products, scratch = chunks.scratch()
        weights = scratch if need_weight else None
        for _, start, stop in chunks.between(writer.write_saved(), c):
            w = chunks.centers(start, stop, class_factor, given=True)
            matrix_product(inputs.x, w.T, products[:, : stop - start])
            chunks.kernels.class_chunk(
                *chunks.launch,
                products=products.data_ptr(),
                weights=address(weights),
                bias_parts=address(writer.bias_parts),
                lse=upstream.lse.data_ptr(),
                d_lse=upstream.d_lse.data_ptr(),
                d_logit_sum=address(upstream.d_logit_sum),
                reduction=int(upstream.reduction),
                pow2=address(writer.pow2),
                bias=chunks.bias(start),
                ld=chunks.width,
                start=start,
                count=stop - start,
                **chunks.rows(),
            )
            if weights is not None:
                matrix_product(weights[:, : stop - start].T, inputs.x, writer.v[: stop - start])
            writer.write(start, stop)
        return writer.out
