"""The two passes of a backend against those of the ``torch`` backend, for everything that they may be asked for."""

from __future__ import annotations

import torch

from marginkernels import NonTarget, testing
from marginkernels.backend import Backend
from marginkernels.backend.chunked import ChunkedBackend
from marginkernels.core.types import PassInputs, Reduction, Request, Upstream

#: Tensors of a row pass's output by reduction.
FIELDS = {
    Reduction.LOG_SUM_EXP: ("lse", "max_logit", "mean_cos", "mean_center", "class_factor"),
    Reduction.LOGIT_SUM: ("logit_sum", "cos_sum", "center_sum", "class_factor"),
}


def pass_inputs(
    dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    non_target: NonTarget = NonTarget.IDENTITY,
    *,
    normalize_weight: bool = True,
    bias: bool = False,
) -> PassInputs:
    """70 rows and 300 classes of ``dtypes``; scale, threshold and t differ from row to row, and some labels are of no class here."""
    n, c = 70, 300
    dtype, weight_dtype = dtypes
    case = testing.Case.random(n, dim, c, dtype, weight_dtype=weight_dtype, bias=bias)
    g = torch.Generator().manual_seed(1)
    labels = case.labels.clone()
    labels[:4] = torch.tensor([-1, c, 2**40, 2**32 + 5])
    hard = non_target != NonTarget.IDENTITY
    return PassInputs(
        x=(case.x.float() / case.x.float().norm(dim=1, keepdim=True) * 0.7).to(dtype),
        row_factor=torch.full((n,), 1 / 0.7),
        w=case.w,
        bias=None if case.bias is None else case.bias.float(),
        labels=labels,
        scale=torch.rand(n, generator=g) * 20 + 1,
        threshold=torch.rand(n, generator=g) * 0.2 - 0.1 if hard else None,
        t=torch.rand(n, generator=g) * 0.6 if hard else None,
        non_target=non_target,
        normalize_weight=normalize_weight,
    )


def request(reduction: Reduction, *, need_center: bool, need_cos: bool) -> Request:
    return Request(reduction, need_center, need_cos, 0)


def compare_passes(backend: Backend, inputs: PassInputs, reduction: Reduction, tolerance: float) -> None:
    """Both passes of ``backend``; an upstream of the sum of logits comes with ``LOGIT_SUM``."""
    torch_backend = ChunkedBackend()
    for wanted in (True, False):
        asked = request(reduction, need_center=wanted, need_cos=wanted)
        got, want = (b.row_pass(inputs, asked) for b in (backend, torch_backend))
        for field in vars(want):
            if field == "saved":
                continue
            a, b = getattr(got, field), getattr(want, field)
            assert (field in FIELDS[reduction]) or not b.numel(), field
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 20)
    lse = torch_backend.row_pass(inputs, Request.log_sum_exp()).lse
    rest = torch.rand(4, inputs.x.shape[0], generator=torch.Generator().manual_seed(2))
    upstream = Upstream(
        lse=lse,
        d_lse=rest[0],
        d_logit_sum=rest[1] if reduction == Reduction.LOGIT_SUM else None,
        d_target_cos=rest[2] - 0.5,
        d_target_bias=rest[3],
    )
    for need_weight, need_bias in ((True, True), (True, False), (False, True)):
        got, want = (
            b.class_pass(inputs, upstream, want.class_factor, want.saved, need_weight, need_bias) for b in (backend, torch_backend)
        )
        for name, needed in (("d_weight", need_weight), ("d_bias", need_bias)):
            a, b = getattr(got, name), getattr(want, name)
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert (a.numel() > 0) == needed
            if needed:
                assert testing.relative_error(a, b) <= tolerance, name
        want = torch_backend.row_pass(inputs, Request.log_sum_exp())
