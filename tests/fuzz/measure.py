"""Whether a backend is right on a problem.

An output is right where its error against the float64 reference, ``||got - want||``, is at most one of these, tried in this order:

- **tolerance**: ``testing.TOLERANCE`` of the embeddings' dtype, times ``||want||``;
- **eager**: three times the error of plain PyTorch in the embeddings' dtype;
- **rounding**: what no algorithm of that precision can avoid. Eight times what the float64 reference moves when its inputs are moved by a
  unit of roundoff of the products' dtype, and its similarities by one of the accumulation dtype: where a margin is steep or has a kink,
  and at a tie that a hard transform decides. And eight units of roundoff of the *terms* of a gradient, ``sum_j |G_ij| |w_j|``, where their
  sum cancels (equal class centers; D = 1), the smoothing's 1/C against the softmax among them.

To each comes what the output's own dtype cannot hold: half of its smallest number, per element; and infinity where what is fair exceeds its
largest number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from marginkernels import margin_cross_entropy, reference, testing
from marginkernels.core.numerics import accumulation_dtype, per_row, reduce_losses
from marginkernels.margins import BatchInfo

from .problem import DTYPES, Problem, change_margin

STAGES = ("tolerance", "eager", "rounding", "undefined")
#: How often the inputs are moved, and how often once more before a problem counts as a failure.
DRAWS, LAST_DRAWS = 4, 16
#: Eager's error, and the reference's own movement, by which a backend may be off.
EAGER, ROUNDING = 3.0, 8.0
#: What float64's log-softmax and softmax may be off by, absolutely.
EPS = torch.finfo(torch.float64).eps

Outputs = dict[str, Tensor]


class Watched(TorchFunctionMode):
    """Keeps, of each step, the reference's similarities (N, C), logits (N, C), and rows and centers as they were multiplied; moves the
    similarities by ``noise`` if there is one."""

    def __init__(self, noise: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        self.noise, self.generator = noise, generator
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.log_softmax:
            cos, _, x, w = self.steps.pop()
            self.steps.append((cos, args[0].detach(), x, w))
        if getattr(func, "__name__", "") in ("matmul", "__matmul__") and args[0].requires_grad:
            x, w = args[0].detach(), args[1].detach().T
            if self.noise:
                size = x.norm(dim=1)[:, None] * w.norm(dim=1)
                out = out + self.noise * size * (2 * torch.rand(out.shape, generator=self.generator, dtype=torch.float64) - 1)
            out.retain_grad()
            self.steps.append((out, out, x, w))
        return out


@dataclass(frozen=True)
class Verdict:
    """``stage`` of ``STAGES`` that let the problem pass ("undefined": the reference itself is not finite), or ``fault`` in words."""

    stage: str
    fault: str = ""


def solve(problem: Problem, given: Outputs, kind: str) -> Outputs:
    """Loss, gradients, and the margin's state: of the problem's backend, of the ``"reference"`` in float64 or of ``"eager"`` PyTorch."""
    margin = problem.margin()
    dtype = torch.float64 if kind == "reference" else None

    def leaf(v: Tensor) -> Tensor:
        return v.detach().to(dtype or v.dtype).requires_grad_()

    leaves = {"d" + name: leaf(given[name]) for name in ("x", "w", "b") if name in given}
    x, w, b, labels = leaves["dx"], leaves["dw"], leaves.get("db"), given["labels"]
    for step in range(problem.steps):
        if step:
            change_margin(margin)
        if kind == "eager":
            margin.bind(problem.c)
            inside = torch.where(labels == problem.ignore_index, -1, labels)
            rows = torch.where((inside >= 0)[:, None], x, 1)  # plain PyTorch would have NaN everywhere
            losses, *_ = reference.losses(rows, w, inside, margin, b, problem.smoothing, DTYPES[problem.dtype])
            loss = reduce_losses(losses, inside >= 0, problem.reduction)
        else:
            loss = margin_cross_entropy(
                x,
                w,
                labels,
                margin=margin,
                bias=b,
                reduction=problem.reduction,
                ignore_index=problem.ignore_index,
                label_smoothing=problem.smoothing,
                backend="reference" if kind == "reference" else problem.backend,
                workspace_mb=problem.workspace_mb,
            )
        upstream = given["upstream"].to(loss.dtype)
        if problem.strided_upstream and upstream.ndim:
            upstream = torch.stack([upstream, torch.full_like(upstream, torch.nan)], 1)[:, 0]
        loss.backward(upstream)
    leaves |= {f"d{name}": p for name, p in margin.named_parameters()}
    found = {"loss": loss.detach()} | {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items()}
    return found | {name: v for name, v in margin.named_buffers() if v.dtype.is_floating_point}


def check(problem: Problem) -> Verdict:
    """Run the problem. An exception of the backend is a fault, too."""
    torch.set_num_threads(problem.threads)
    given = problem.tensors()
    want = solve(problem, given, "reference")
    if not all(v.isfinite().all() for v in want.values()):
        return Verdict("undefined")
    try:
        got = solve(problem, given, "backend")
    except Exception as error:
        return Verdict("", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for name, v in got.items():
        if v.shape != want[name].shape:
            return Verdict("", f"{name}: shape {tuple(v.shape)} instead of {tuple(want[name].shape)}")
    held = {name: v for name, v in want.items() if bool(v.to(got[name].dtype).isfinite().all())}  # the others overflow in any case
    off = {name: float((got[name].double() - v).norm()) for name, v in held.items()}
    size = {name: float(v.norm()) for name, v in held.items()}
    least = {name: _least(got[name]) for name in held}
    tolerance = testing.TOLERANCE[DTYPES[problem.dtype]]
    bound = {name: tolerance * size[name] + least[name] for name in held}

    def wrong() -> list[str]:
        # Also where it is NaN. Where what is fair exceeds the largest number of the output's dtype, so may infinity be.
        fair = {name: math.inf if bound[name] > torch.finfo(got[name].dtype).max else bound[name] for name in held}
        return [name for name in held if not off[name] <= fair[name]]

    if not wrong():
        return Verdict("tolerance")
    fair = solve(problem, given, "eager")
    for name in wrong():
        theirs = float((fair[name].double() - held[name]).norm())
        if math.isfinite(theirs):
            bound[name] = max(bound[name], EAGER * theirs + least[name])
    if not wrong():
        return Verdict("eager")
    for draw in range(DRAWS + LAST_DRAWS):
        g = torch.Generator().manual_seed(draw)
        # In turn: the target similarity is computed in float64, the others in the accumulation dtype. Two rows that are normalized by a
        # product with a rounded inverse, and their product, may be off by five roundings: at a cosine of 1 the angle is their square root.
        noise = torch.finfo(accumulation_dtype(DTYPES[problem.dtype])).eps / 2 if draw % 2 else 5 * EPS / 2
        with Watched(noise, g) as seen:
            moved = solve(problem, _moved(problem, given, g), "reference")
        apart = _terms(problem, given, seen)
        for name in wrong():
            change = float((moved[name] - held[name]).norm())
            if math.isfinite(change):
                bound[name] = max(bound[name], ROUNDING * change + apart.get(name, 0.0) + least[name])
        if draw + 1 >= DRAWS and not wrong():
            return Verdict("rounding")
    name = max(wrong(), key=lambda v: off[v] / bound[v] if math.isfinite(off[v]) else math.inf)
    return Verdict("", f"{name} is off by {off[name]:.2e} of {size[name]:.2e}, at most {bound[name]:.2e} is fair")


def _least(v: Tensor) -> float:
    """The norm of what ``v``'s dtype cannot hold: below the smallest normal number, or half a subnormal one in float16."""
    info = torch.finfo(v.dtype)
    smallest = info.smallest_normal * info.eps / 2 if v.dtype == torch.float16 else info.smallest_normal
    return float(smallest) * v.numel() ** 0.5


def _terms(problem: Problem, given: Outputs, seen: Watched) -> dict[str, float]:
    """What the sums of loss and gradients may be off by where their terms cancel, by output: of all steps."""
    total: dict[str, float] = {}
    for step, (cos, logits, x, w) in enumerate(seen.steps):
        grad = torch.zeros_like(logits) if cos.grad is None else cos.grad
        for name, v in _terms_of_step(problem, given, step, cos.detach(), grad, logits, x, w).items():
            total[name] = v if name == "loss" else total.get(name, 0.0) + v
    return {name: v for name, v in total.items() if math.isfinite(v)}


def _terms_of_step(
    problem: Problem, given: Outputs, step: int, cos: Tensor, grad: Tensor, logits: Tensor, unit_x: Tensor, unit_w: Tensor
) -> dict[str, float]:
    """``cos``, its gradient ``grad`` and ``logits`` (N, C), and what was multiplied, ``unit_x`` (N, D) and ``unit_w`` (C, D)."""
    margin = problem.margin(step)
    margin.bind(problem.c)
    labels, valid = given["labels"], given["labels"] != problem.ignore_index
    up = given["upstream"].abs() * valid / (valid.sum().clamp_min(1) if problem.reduction == "mean" else 1)
    sizes = logits.abs().masked_fill(logits == -torch.inf, 0)
    largest = 1 + sizes.amax(1) if logits.numel() else logits.new_zeros(problem.n)
    slope = grad.abs() * ROUNDING * torch.finfo(DTYPES[problem.dtype]).eps / 2
    own = (labels[:, None] == torch.arange(problem.c)) & valid[:, None]
    rounded = torch.finfo(accumulation_dtype(DTYPES[problem.dtype])).eps / 2
    lost = EPS + problem.smoothing * rounded  # smoothing subtracts a mean of logits from a logit
    rows = torch.where(valid[:, None], given["x"].double(), 1)
    norms = given["w"].double().norm(dim=1)[torch.where(valid, labels, 0)]
    batch = BatchInfo(rows, torch.where(valid, labels, -1), problem.c, center_norm=norms)
    target = cos.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    value, target_slope = margin.target(target, batch)
    steep = (per_row(margin.row_scale(batch), target, torch.float64) * target_slope).detach().abs()
    slope += own * (ROUNDING * lost * up * largest * (1 + steep))[:, None]
    softmax = torch.softmax(logits, 1).nan_to_num()
    if problem.smoothing:  # a softmax that is nearly uniform cancels against the smoothing's 1/C
        scale = per_row(margin.row_scale(batch), target, torch.float64).detach().abs()
        slope += (ROUNDING * torch.finfo(DTYPES[problem.dtype]).eps / 2 * up * scale)[:, None] * (
            torch.softmax(logits, 1).nan_to_num() + problem.smoothing / problem.c
        )
    f = _inverse(rows) if margin.normalize_embedding else 1.0
    a = _inverse(given["w"].double()) if margin.normalize_weight else 1.0
    loss = ROUNDING * lost * up * largest
    found = {
        "loss": loss.norm() if problem.reduction == "none" else loss.sum(),
        "dx": (f * (slope @ unit_w.norm(dim=1)) + ROUNDING * lost * up * value.detach().abs()).norm(),  # where the scale is |x|
        "dw": (a * (slope.T @ unit_x.norm(dim=1))).norm(),
        "db": (slope + ROUNDING * rounded * up[:, None] * (softmax + own)).sum(0).norm(),  # not of the scale, which may be 0
        "dalpha": (slope * cos.abs()).sum(),
    }
    return {name: float(v) for name, v in found.items()}


def _inverse(v: Tensor) -> Tensor:
    """One over the norm of each row, 0 where it is 0."""
    norm = v.norm(dim=1)
    return torch.where(norm > 0, 1 / norm, 0)


def _moved(problem: Problem, given: Outputs, g: torch.Generator) -> Outputs:
    """The inputs, each number of x, w and b moved by up to one unit of roundoff of the embeddings' dtype, relative to it."""
    unit = torch.finfo(DTYPES[problem.dtype]).eps / 2

    def move(v: Tensor) -> Tensor:
        return v.double() * (1 + unit * (2 * torch.rand(v.shape, generator=g, dtype=torch.float64) - 1))

    return {name: move(v) if name in ("x", "w", "b") else v for name, v in given.items()}


def shrink(problem: Problem, *, most: int = 200) -> Problem:
    """The simplest problem that a greedy walk over :meth:`Problem.smaller` finds and that still fails."""
    tried = 0
    moved = True
    while moved and tried < most:
        moved = False
        for less in problem.smaller():
            tried += 1
            try:
                fails = bool(check(less).fault)
            except Exception:  # the reference may refuse what is left
                fails = False
            if fails:
                problem, moved = less, True
                break
            if tried >= most:
                break
    return problem
