"""The two passes of a backend against those of the ``torch`` backend, for everything that they may be asked for."""

from __future__ import annotations

import torch

from marginkernels import NonTarget, testing
from marginkernels.backend import Backend
from marginkernels.backend.chunked import ChunkedBackend
from marginkernels.core.numerics import accumulation_dtype
from marginkernels.core.types import PassInputs, Reduction, Request, Upstream

#: Tensors of a row pass's output by reduction.
FIELDS = {
    Reduction.LOG_SUM_EXP: ("lse", "max_logit", "mean_cos", "mean_center", "class_factor"),
    Reduction.SOFTPLUS_SUM: ("lse", "max_logit", "mean_cos", "mean_center", "class_factor"),
    Reduction.LOGIT_SUM: ("logit_sum", "cos_sum", "center_sum", "class_factor"),
}


def pass_inputs(
    dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    non_target: NonTarget = NonTarget.IDENTITY,
    *,
    normalize_weight: bool = True,
    bias: bool = False,
    n: int = 70,
    c: int = 300,
    sub_centers: int = 1,
) -> PassInputs:
    """Rows and classes of ``dtypes``, ``c`` centers in all; scale, threshold and t differ from row to row, and some labels are of no class
    here."""
    dtype, weight_dtype = dtypes
    case = testing.Case.random(n, dim, c, dtype, weight_dtype=weight_dtype, bias=bias)
    g = torch.Generator().manual_seed(1)
    labels = case.labels.clone()
    labels[:4] = torch.tensor([-1, c, 2**40, 2**32 + 5])
    hard = non_target != NonTarget.IDENTITY
    least, most = (1.0, 4.0) if non_target in (NonTarget.POWER, NonTarget.POWER_DETACHED) else (0.0, 0.6)
    return PassInputs(
        x=(case.x.double() / case.x.double().norm(dim=1, keepdim=True) * 0.7).to(dtype),
        row_factor=torch.full((n,), 1 / 0.7, dtype=accumulation_dtype(dtype)),
        w=case.w,
        bias=None if case.bias is None else case.bias[: c // sub_centers].to(accumulation_dtype(dtype)),
        labels=labels,
        scale=(torch.rand(n, generator=g) * 20 + 1).to(accumulation_dtype(dtype)),
        threshold=(torch.rand(n, generator=g) * 0.2 - 0.1).to(accumulation_dtype(dtype)) if hard else None,
        t=(torch.rand(n, generator=g) * (most - least) + least).to(accumulation_dtype(dtype)) if hard else None,
        non_target=non_target,
        normalize_weight=normalize_weight,
        sub_centers=sub_centers,
    )


def request(reduction: Reduction, *, need_center: bool, need_cos: bool) -> Request:
    return Request(reduction, need_center, need_cos, 0)


def upstream_of(inputs: PassInputs, lse: torch.Tensor, reduction: Reduction, steep: float = 1.0) -> Upstream:
    """A random upstream gradient; ``steep`` is how large that of the target cosine is in every third row, as where the cosine is near 1."""
    rest = torch.rand(4, inputs.x.shape[0], generator=torch.Generator().manual_seed(2)).to(inputs.acc_dtype)
    return Upstream(
        lse=torch.zeros_like(lse) if reduction == Reduction.SOFTPLUS_SUM else lse,
        d_lse=rest[0],
        d_logit_sum=rest[1] if reduction == Reduction.LOGIT_SUM else None,
        d_target_cos=(rest[2] - 0.5) * torch.where(torch.arange(len(lse)) % 3 == 0, steep, 1.0),
        d_target_bias=rest[3],
        reduction=Reduction.SOFTPLUS_SUM if reduction == Reduction.SOFTPLUS_SUM else Reduction.LOG_SUM_EXP,
    )


def longhand(
    inputs: PassInputs, reduction: Reduction, steep: float = 1.0, *, rounded: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both passes as :mod:`marginkernels.core.types` defines them, from the whole N x C matrix in float64, without any of the package's
    arithmetic: what a row pass gives by field, and what a class pass gives with :func:`upstream_of`. ``rounded``: whether the products take
    the normalized centers in the embeddings' dtype."""
    p = inputs
    rows = p.x.double() * p.row_factor.double()[:, None]
    w = p.w.double()
    factor = 1 / w.square().sum(1).sqrt() if p.normalize_weight else torch.ones(len(w), dtype=torch.float64)
    unit = w * factor[:, None]
    product = unit.to(p.x.dtype).double() if rounded else unit
    c = rows @ product.T
    t = p.t.double()[:, None] if p.t is not None else torch.zeros(())
    hard = c > p.threshold.double()[:, None] if p.threshold is not None else c > torch.inf
    if p.non_target == NonTarget.HARD_LINEAR:
        value, slope = torch.where(hard, (1 + t) * c + t, c), torch.where(hard, 1 + t, 1)
    elif p.non_target == NonTarget.HARD_QUADRATIC:
        value, slope = torch.where(hard, c * (t + c), c), torch.where(hard, t + 2 * c, 1)
    elif p.non_target == NonTarget.FILTERED:
        value, slope = torch.where(hard, 0, c), (~hard).double()
    elif p.non_target == NonTarget.HINGE:
        slope = torch.where(c > -t, c + t, 0)
        value = slope * (c - t)
    elif p.non_target == NonTarget.CLIPPED:
        value, slope = torch.minimum(torch.maximum(c, p.threshold.double()[:, None]), t), ((c > p.threshold[:, None]) & (c < t)).double()
    elif p.non_target in (NonTarget.POWER, NonTarget.POWER_DETACHED):
        base = (0.5 + 0.5 * c).clamp_min(2.0**-40)
        value = 2 * torch.exp(t * base.log()) - 1 + p.threshold.double()[:, None]
        slope = t * torch.exp((t - 1) * base.log())
        if p.non_target == NonTarget.POWER_DETACHED:
            slope = torch.ones_like(c)
    elif p.non_target == NonTarget.LIFTED:
        value, slope = torch.where(hard, c + t, c), torch.ones_like(c)
    elif p.non_target == NonTarget.LIFTED_ANGLE:
        at = c.clamp(-1, 1)  # where centers are not normalized, c may lie beyond
        sine = (1 - at * at).sqrt()
        value = torch.where(hard, at * torch.cos(t) + sine * torch.sin(t), c)
        slope = torch.where(hard, torch.cos(t) - at * torch.sin(t) / sine.clamp_min(1 / 128), 1)
    elif p.non_target != NonTarget.IDENTITY:
        theta = torch.acos(c.clamp(-1, 1 - 1e-12))
        sine = torch.where(c < 0, torch.sin(theta).clamp_min(1 / 16), torch.sin(theta))
        value, slope = torch.cos(t * theta), t * torch.sin(t * theta) / sine
        if p.non_target == NonTarget.ANGLE_PART_DETACHED:
            slope = torch.ones_like(c)
    else:
        value, slope = c, torch.ones_like(c)
    scale = p.scale.double()[:, None]
    k, column = p.sub_centers, torch.arange(len(w))
    bias = p.bias.double().repeat_interleave(k) if p.bias is not None else 0
    z, raw = scale * value + bias, scale * c + bias
    own = p.labels[:, None] == column
    # Of each other class the nearest center takes part, the first of equals.
    nearest = c.unflatten(1, (-1, k)).argmax(2).repeat_interleave(k, 1) == column % k
    away = nearest & (torch.where(p.labels < 0, -1, p.labels // k)[:, None] != column // k)
    highest = raw.masked_fill(~away, -torch.inf).max(1).values
    top = z.masked_fill(~away, -torch.inf).max(1).values
    total = (torch.exp(z - top[:, None]) * away).sum(1)
    lse = total.log() + top
    share = torch.exp(z - lse[:, None]) * away
    if reduction == Reduction.SOFTPLUS_SUM:
        share = away / (1 + torch.exp(-z))
        lse = (torch.log1p(torch.exp(-z.abs())) + z.clamp_min(0)).masked_fill(~away, 0).sum(1)
    row = {
        "lse": lse,
        "max_logit": highest,
        "mean_cos": (share * value).sum(1),
        "mean_center": (share * slope) @ product,
        "logit_sum": (z * away).sum(1),
        "cos_sum": (value * away).sum(1),
        "center_sum": (slope * away) @ product,
        "class_factor": factor if p.normalize_weight else factor[:0],
    }
    up = upstream_of(p, lse.to(p.acc_dtype), reduction, steep)
    g = up.d_lse.double()[:, None] * share
    if up.d_logit_sum is not None:
        g = g + up.d_logit_sum.double()[:, None] * away
    v = torch.where(own, up.d_target_cos.double()[:, None], g * slope).T @ rows
    if p.normalize_weight:
        v = factor[:, None] * (v - (v * unit).sum(1, keepdim=True) * unit)
    held = (slope == 0) & (p.non_target == NonTarget.CLIPPED)
    moved = torch.where(own, up.d_target_bias.double()[:, None], (g / scale).masked_fill(held, 0))
    return row, {"d_weight": v, "d_bias": moved.sum(0).view(-1, k).sum(1)}


def check_passes(
    backend: Backend, inputs: PassInputs, reduction: Reduction, tolerance: float, *, workspace: int = 0, steep: float = 1.0
) -> None:
    """Both passes of ``backend`` against :func:`longhand`. What the row pass saves in ``workspace`` bytes goes to the class pass."""
    row, classes = longhand(inputs, reduction, steep, rounded=backend.name != "cpu")  # the C++ kernels apply the norms to the products

    def near(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
        assert got.shape == want.shape, name
        assert testing.relative_error(got, want) <= tolerance, name
        assert not want.numel() or (got.double() - want).abs().max() <= 20 * tolerance * want.abs().max(), name

    for wanted in (True, False):
        # The sum of cosines is asked for where the transform is not the identity.
        with_cos = wanted and (inputs.non_target != NonTarget.IDENTITY or backend.name == "torch")
        got = backend.row_pass(inputs, request(reduction, need_center=wanted, need_cos=with_cos))
        for name in FIELDS[reduction]:
            if getattr(got, name).numel() or (wanted and with_cos) or name in ("lse", "max_logit", "logit_sum"):
                near(getattr(got, name), row[name], name)
    size = backend.workspace_bytes(*inputs.x.shape[:1], inputs.w.shape[0], inputs.x.dtype, workspace, inputs.sub_centers)
    kind = Reduction.SOFTPLUS_SUM if reduction == Reduction.SOFTPLUS_SUM else Reduction.LOG_SUM_EXP
    first = backend.row_pass(inputs, Request.of_loss(kind, need_center=False, need_cos=False, workspace_bytes=size))
    upstream = upstream_of(inputs, first.lse, reduction, steep)
    for need_weight, need_bias in ((True, True), (True, False), (False, True)):
        found = backend.class_pass(inputs, upstream, first.class_factor, first.saved, need_weight, need_bias)
        for name, needed in (("d_weight", need_weight), ("d_bias", need_bias)):
            if needed:
                near(getattr(found, name), classes[name], name)
            else:
                assert not getattr(found, name).numel()


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
    upstream = upstream_of(inputs, lse, reduction)
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
