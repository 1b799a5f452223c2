"""Comparison with the float64 reference: the cases, the tolerances and the error measure that tests, ``verify`` and benchmarks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import margins as m
from . import reference
from .core.types import Reduction
from .loss import margin_cross_entropy
from .margins.contract import evaluate

#: Largest relative error ||got - want|| / ||want|| in loss and in each gradient, by the embeddings' dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}

#: Every head by name, and how to make one for C classes. Scales are such that small random problems have gradients worth comparing.
HEADS: dict[str, Callable[[int], m.Margin]] = {
    "softmax": lambda c: m.Softmax(),
    "w-norm-softmax": lambda c: m.Softmax(normalize_weight=True),
    "normface": lambda c: m.NormFace(scale=32.0),
    "l2-softmax": lambda c: m.L2Softmax(num_classes=c),
    "l2-softmax-trainable": lambda c: m.L2Softmax(num_classes=c, trainable=True),
    "lsoftmax": lambda c: m.LSoftmax(),
    "sphereface": lambda c: m.SphereFace(),
    "sphereface-annealed": lambda c: m.SphereFace(annealing=True),
    "sphereface-fnorm": lambda c: m.SphereFace(margin=3, scale=32.0),
    "cosface": lambda c: m.CosFace(),
    "arcface": lambda c: m.ArcFace(),
    "arcface-none": lambda c: m.ArcFace(beyond_pi="none"),
    "arcface-easy": lambda c: m.ArcFace(beyond_pi="easy"),
    "arcface-continuous": lambda c: m.ArcFace(beyond_pi="continuous"),
    "arcface-clip": lambda c: m.ArcFace(beyond_pi="clip"),
    "arcface-detached": lambda c: m.ArcFace(gradient="detached"),
    "cosface-filtered": lambda c: m.CosFace(filter_above=0.4485),  # no cosine of the tests' problems is nearer to it than rounding
    "arcface-filtered": lambda c: m.ArcFace(filter_above=0.4485),
    "sphereface-r": lambda c: m.SphereFaceR(),
    "sphereface-r-v1": lambda c: m.SphereFaceR("v1", loss_weight=50.0, gradient="exact"),
    "sphereface-r-v2": lambda c: m.SphereFaceR("v2"),
    "sphereface-r-v2-exact": lambda c: m.SphereFaceR("v2", gradient="exact"),
    "sphereface-r-soft": lambda c: m.SphereFaceR("v2", 10.0, 1.4, "soft", loss_weight=20.0),
    "circle": lambda c: m.Circle(scale=64.0),
    "sphereface2": lambda c: m.SphereFace2(c),
    "sphereface2-arc": lambda c: m.SphereFace2(c, 20.0, 0.2, kind="A", gradient="exact"),
    "uniface": lambda c: m.UniFace(c, 32.0),
    "combined": lambda c: m.CombinedMargin(m1=1.35, m2=0.3, m3=0.2),
    "adacos-fixed": lambda c: m.AdaCos(c, dynamic=False),
    "adacos": lambda c: m.AdaCos(c),
    "mv-arc": lambda c: m.MVSoftmax(),
    "mv-am": lambda c: m.MVSoftmax(kind="am", margin=0.35),
    "curricularface": lambda c: m.CurricularFace(),
    "arcface-focal": lambda c: m.ArcFace(focal_gamma=2.0),
    "cosface-per-class": lambda c: m.CosFace(margin=torch.linspace(0.1, 0.5, c)),
    "arcface-per-class": lambda c: m.ArcFace(margin=m.margins_from_counts(torch.arange(1, c + 1))),
    "adaface": lambda c: m.AdaFace(momentum=0.5),
    "magface": lambda c: m.MagFace(norm_range=(1.0, 30.0)),
    "inter-topk": lambda c: m.InterTopK(penalty=0.2),
    "inter-topk-cos": lambda c: m.InterTopK("cos", 16.0, 0.35, k=3, penalty=0.1),
    "elasticface": lambda c: m.ElasticFace(std=0.05),
    "elasticface-plus": lambda c: m.ElasticFace("cos", margin=0.35, std=0.05, plus="paper"),
}


def accepted(head: str | m.Margin, **options: Any) -> dict[str, Any]:
    """``options`` of :func:`marginkernels.margin_cross_entropy` without those that a head refuses, one of :data:`HEADS` or a margin."""
    margin = HEADS[head](3) if isinstance(head, str) else head
    if margin.reduction == Reduction.LOG_SUM_EXP:
        return options
    return {name: value for name, value in options.items() if name not in ("label_smoothing", "class_weight", "mix")}


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison, already rounded to the dtypes they are given in."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D), or (C K, D) with K centers a class
    labels: Tensor  # (N,)
    bias: Tensor | None  # (C,)

    @classmethod
    def random(
        cls,
        n: int,
        d: int,
        c: int,
        dtype: torch.dtype = torch.float32,
        *,
        weight_dtype: torch.dtype | None = None,
        bias: bool = False,
        ignored: bool = True,
        seed: int = 0,
        device: str = "cpu",
        sub_centers: int = 1,
    ) -> Case:
        """Every other row lies near its class center, as in training, the rest anywhere; one is ignored, one label repeated. Several
        centers of a class lie as :func:`set_apart` puts them."""
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(c * sub_centers, d, generator=g) * 0.1
        labels = torch.randint(c, (n,), generator=g)
        if n > 2:
            labels[1] = labels[0]
        x = torch.randn(n, d, generator=g)
        near = torch.arange(n) % 2 == 0
        own = labels if sub_centers == 1 else set_apart(x, w, labels, sub_centers, g)
        x[near] = 0.6 * x[near] + 12 * w[own[near]]
        if ignored and n > 4:
            labels[n // 2] = -100
        b = torch.randn(c, generator=g) if bias else None
        weight_dtype = dtype if weight_dtype is None else weight_dtype
        return cls(
            x=x.to(device=device, dtype=dtype),
            w=w.to(device=device, dtype=weight_dtype),
            labels=labels.to(device),
            bias=None if b is None else b.to(device=device, dtype=weight_dtype),
        )


def set_apart(x: Tensor, w: Tensor, labels: Tensor, sub_centers: int, g: torch.Generator) -> Tensor:
    """Move the centers of a class, rows of ``w`` (C K, D) of numbers near 0.1, in K directions, in another order in each class, and each
    row of ``x`` (N, D), of numbers near 1, in one of them: so which center of a class is a row's nearest does not hang on rounding, and
    takes turns.

    Returns:
        (N,) the row's nearest center of its class.
    """
    directions = torch.randint(2, (sub_centers, x.shape[1]), generator=g, device=x.device) * 2.0 - 1
    place = torch.arange(w.shape[0], device=w.device)
    w += 0.1 * directions[(place % sub_centers + place // sub_centers) % sub_centers]
    of_row = torch.arange(x.shape[0], device=x.device) % sub_centers
    x += directions[of_row]
    return labels * sub_centers + (of_row - labels) % sub_centers


def settled(case: Case, margin: m.Margin, sub_centers: int = 1) -> Case:
    """``case`` without the rows, which are ignored then, in which it hangs on rounding which classes are the nearest that
    :class:`marginkernels.InterTopK` lifts: there a gradient jumps, and is right on either side."""
    if not isinstance(margin, m.InterTopK):
        return case
    x, w = (torch.nn.functional.normalize(v.double()) for v in (case.x, case.w))
    near = (x @ w.T).unflatten(1, (-1, sub_centers)).amax(2)
    near.scatter_(1, case.labels.clamp_min(0)[:, None], -torch.inf)
    if near.shape[1] <= margin.k:
        return case
    highest = near.topk(margin.k + 1, 1).values
    # Rounding a vector of length 1 moves its products with others by about a fifth of eps / sqrt(D).
    least = 2 * max(torch.finfo(v.dtype).eps for v in (case.x, case.w)) / case.x.shape[1] ** 0.5
    return replace(case, labels=case.labels.masked_fill(highest[:, -2] - highest[:, -1] < least, -100))


def run(
    case: Case, margin: m.Margin, backend: str, *, dtype: torch.dtype | None = None, upstream: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Loss and gradients of a copy of ``margin`` on ``case``, computed by ``backend``.

    Args:
        dtype: the inputs are converted to it first, if given.
        upstream: the gradient of the loss; ones by default.
        options: of :func:`marginkernels.margin_cross_entropy`.

    Returns:
        ``{"loss", "dx", "dw"}`` and, where there are such, ``"dbias"`` and ``"d<parameter of the margin>"``.
    """
    margin = copy.deepcopy(margin).to(case.x.device)

    def leaf(v: Tensor) -> Tensor:
        return v.detach().to(dtype or v.dtype).requires_grad_()

    x, w = leaf(case.x), leaf(case.w)
    b = None if case.bias is None else leaf(case.bias)
    loss = margin_cross_entropy(x, w, case.labels, margin=margin, bias=b, backend=backend, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    leaves = {"dx": x, "dw": w} | ({} if b is None else {"dbias": b}) | {f"d{name}": p for name, p in margin.named_parameters()}
    return {"loss": loss.detach()} | _gradients(leaves)


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items()}


def eager(case: Case, margin: m.Margin) -> dict[str, Tensor]:
    """What plain PyTorch gets when all of it is computed in the embeddings' dtype: the measure of what error is fair. As :func:`run`."""
    margin = copy.deepcopy(margin).to(case.x.device)
    margin.bind(case.w.shape[0])
    leaves = {"dx": case.x, "dw": case.w} | ({} if case.bias is None else {"dbias": case.bias})
    leaves = {name: v.detach().clone().requires_grad_() for name, v in leaves.items()}
    labels = torch.where(case.labels < 0, -1, case.labels)
    losses, *_ = reference.losses(leaves["dx"], leaves["dw"], labels, margin, leaves.get("dbias"), 0.0, case.x.dtype)
    loss = losses.sum() / (labels >= 0).sum().clamp_min(1)
    loss.backward()
    return {"loss": loss.detach()} | _gradients(leaves)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, NaN or infinite where ``got`` is not finite."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def errors(case: Case, margin: m.Margin, backend: str, **options: Any) -> dict[str, float]:
    """Relative error of ``backend`` against the float64 reference on the same rounded inputs, by output; of the rows that are
    :func:`settled`."""
    case = settled(case, margin, options.get("sub_centers", 1))
    want = run(case, margin, "reference", dtype=torch.float64, **options)
    got = run(case, margin, backend, **options)
    return {name: relative_error(got[name], want[name]) for name in want}


def captured(
    step: Callable[[], tuple[Tensor, ...]], device: torch.device | str = "cuda", warm_ups: int = 3
) -> tuple[Any, tuple[Tensor, ...]]:
    """``step`` captured in a CUDA graph, after it ran ``warm_ups`` times on a stream of its own, which loads all kernels that it needs.

    Returns:
        The graph, whose ``replay()`` runs the step on what its inputs hold then, and the results, which a replay writes.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


#: Angles at which :func:`check_margin` looks, beside both ends, and the norms of the embeddings that it tries at each.
CHECK_ANGLES, CHECK_NORMS = 2001, (1e-2, 1.0, 7.0, 30.0, 150.0)


def check_margin(margin: m.Margin, num_classes: int | None = None) -> None:
    """Check that a margin's slope is the derivative of its value, and what else a head takes for granted.

    In float64, over theta in (0, pi), for several embedding norms and labels: the slope is what central differences of the value give,
    and what autograd gives, with which the reference works. Value and slope are finite, at cos = +-1 as well. ``target`` changes no
    buffer. Points where the value jumps or bends, such as the end of ``beyond_pi="linear"``, have no derivative and are skipped. A
    margin that declares ``straight_through = True`` (or has ``gradient="detached"``) is checked against autograd alone. Where a side is
    not normalized, similarities from -20 to 20 are tried too.

    Args:
        margin: a copy of it is checked; it does not change.
        num_classes: C, for margins whose constants depend on it; by default the margin's own ``num_classes`` or 1000.

    Raises:
        AssertionError: naming the margin, the angle and both numbers.
        ValueError, TypeError: a hook returned a wrong shape or dtype.
    """
    m.check_margin(margin)
    name, margin = type(margin).__name__, copy.deepcopy(margin).cpu()
    classes = num_classes or getattr(margin, "num_classes", None) or getattr(margin, "_bound_classes", None) or 1000
    margin.bind(classes)
    cos = torch.linspace(0, math.pi, CHECK_ANGLES + 2, dtype=torch.float64).cos()
    if not (margin.normalize_embedding and margin.normalize_weight):
        cos = torch.cat([cos, torch.linspace(-20, 20, CHECK_ANGLES, dtype=torch.float64)])
    cos = cos.repeat(len(CHECK_NORMS))
    norms = torch.tensor(CHECK_NORMS, dtype=torch.float64).repeat_interleave(len(cos) // len(CHECK_NORMS))
    # Label and norm of a row have nothing to do with its angle: the 7 is prime to the number of angles.
    labels = torch.arange(len(cos)) * 7 % min(classes, 10)
    directions = torch.randn(len(cos), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embeddings = directions * (norms / torch.linalg.vector_norm(directions, dim=1))[:, None]
    batch = m.BatchInfo(
        embeddings,
        labels,
        classes,
        center_norm=3.0 + labels.to(torch.float64),
        nearest=lambda count: torch.linspace(0.5, -0.5, count, dtype=torch.float64).expand(len(cos), count),
    )
    buffers = {key: v.clone() for key, v in margin.named_buffers()}

    def at(cos: Tensor) -> tuple[Tensor, Tensor]:
        found = evaluate(margin, cos, batch, torch.float64)
        return found.value, found.slope.detach()

    def agree(slope: Tensor, want: Tensor, tolerance: Tensor | float, where: Tensor, how: str) -> None:
        off = torch.where(where, (slope - want).abs() - tolerance, -math.inf)
        worst = int(off.argmax())
        if not bool((off <= 0).all()):
            raise AssertionError(
                f"{name}.target: expected the slope {float(want[worst]):.9g} at cos(theta) = {float(cos[worst]):.9g} (|x| = "
                f"{float(norms[worst]):g}, label {int(labels[worst])}), the derivative of the value by {how}, got {float(slope[worst]):.9g}"
            )

    leaf = cos.clone().requires_grad_()
    value, slope = at(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True) if value.requires_grad else (None,)
    gradient = torch.zeros_like(cos) if gradient is None else gradient
    value = value.detach()
    for what, v in (("value", value), ("slope", slope)):
        if not bool(torch.isfinite(v).all()):
            worst = int((~torch.isfinite(v)).to(torch.int8).argmax())
            raise AssertionError(
                f"{name}.target: expected a finite {what} at cos(theta) = {float(cos[worst]):.9g} (|x| = {float(norms[worst]):g}), "
                f"got {float(v[worst])}"
            )
    for key, v in margin.named_buffers():
        if key not in buffers or not torch.equal(v, buffers[key]):
            raise AssertionError(f"{name}.target: expected the buffer {key} unchanged, since only update() moves state, got another value")

    # At the ends a slope may be held back where arccos has none; what it must be there is finite.
    inside = cos.abs() != 1
    agree(slope, gradient, 1e-7 * (1 + gradient.abs()), inside, "autograd")
    if margin.straight_through or getattr(margin, "gradient", None) == "detached":
        return
    # Steps in proportion to sin(theta)^2, since derivatives grow as its powers towards the ends; the first 0.003 radians are autograd's.
    reach = torch.where(cos.abs() <= 1, (1 - cos * cos).clamp_min(0), 1.0)
    step = 2e-7 * reach
    inside = reach > 1e-5
    safe = torch.where(inside, step, 1.0)
    with torch.no_grad():
        up, down = (torch.where(inside, cos + sign * step, cos) for sign in (1, -1))
        above, below = at(up)[0], at(down)[0]
    forward, backward = (above - value) / safe, (value - below) / safe
    smooth = (forward - backward).abs() <= 1e-3 * (1 + torch.minimum(forward.abs(), backward.abs()))
    if int((inside & ~smooth).sum()) > 0.05 * len(cos):
        raise AssertionError(f"{name}.target: expected a value that jumps at a few angles at most, got one that jumps at many")
    # Where the value bends in its second derivative, as SphereFace's does, a difference is off by its step: hence 1e-4.
    central = (above - below) / (2 * safe)
    rounding = 8 * torch.finfo(torch.float64).eps * (1 + value.abs()) / safe
    agree(slope, central, 1e-4 * (1 + central.abs()) + rounding, inside & smooth, "finite differences")
