"""``python -m marginkernels suggest``: scales and margins that make sense for a number of identities and an embedding dimension.

Each figure is a bound with its formula and source, computed from C and D alone: where training begins to make sense, not what is best.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NamedTuple

import torch

from ..margins import AdaCos, L2Softmax
from ..sampling import count
from . import plan
from ._text import integer, number, table

#: Steps of the integral in :func:`cap_share`.
STEPS = 100_001


class Bound(NamedTuple):
    """One figure.

    Attributes:
        name: what it bounds.
        value: the figure.
        formula: how it follows from C, D and p.
        source: where it comes from.
    """

    name: str
    value: float
    formula: str
    source: str


def cosface_scale(classes: int, p: float) -> float:
    """``(C - 1)/C ln((C - 1) p / (1 - p))``: below it no row reaches probability ``p``, were it on its center (Wang et al., CosFace,
    CVPR 2018, on the scale)."""
    return (classes - 1) / classes * math.log((classes - 1) * p / (1 - p))


def least_loss(classes: int, scale: float) -> float:
    """``ln(1 + (C - 1) exp(-s C/(C - 1)))``: the loss of a head without margin cannot fall below it (Wang et al., NormFace, MM 2017,
    proposition 2)."""
    return math.log1p((classes - 1) * math.exp(-scale * classes / (classes - 1)))


def _cap(angle: float, dim: int) -> float:
    """The integral of ``sin^(dim - 2)`` from 0 to ``angle`` radians."""
    angles = torch.linspace(0.0, angle, STEPS, dtype=torch.float64)
    return float(torch.trapezoid(angles.sin().clamp_min(1e-300).log().mul(dim - 2).exp(), angles))


def cap_share(angle: float, dim: int) -> float:
    """The share of the unit sphere in ``dim`` dimensions within ``angle`` radians of a point."""
    return _cap(angle, dim) / _cap(math.pi, dim)


def widest_angle(classes: int, dim: int) -> float:
    """The largest angle in radians that ``classes`` centers in ``dim`` dimensions can all keep from each other, or a bound on it.

    Up to D + 1 centers can be the corners of a simplex, ``arccos(-1/(C - 1))``; up to 2 D those of a cross-polytope, a right angle
    (Rankin 1955). Of more centers two are closer than that, and caps of half the angle around the centers cannot overlap, so that C of
    them fit on the sphere; in two dimensions the angle is ``2 pi / C``.
    """
    if dim == 1:
        return math.pi if classes == 2 else 0.0
    if classes <= dim + 1:
        return math.acos(-1 / (classes - 1))
    if dim == 2:
        return 2 * math.pi / classes
    room = _cap(math.pi, dim) / classes
    if classes <= 2 * dim or _cap(math.pi / 4, dim) <= room:
        return math.pi / 2
    low, high = 0.0, math.pi / 4
    for _ in range(40):
        half = (low + high) / 2
        low, high = (half, high) if _cap(half, dim) <= room else (low, half)
    return 2 * high


def bounds(classes: int, dim: int, p: float) -> list[Bound]:
    """Scales first, then margins; ``classes`` at least 3, ``p`` the probability that a row on its center is to reach."""
    angle = widest_angle(classes, dim)
    found = [
        Bound("least scale, normalized centers", cosface_scale(classes, p), "(C-1)/C ln((C-1) p/(1-p))", "Wang et al. 2018"),
        Bound("scale of AdaCos(dynamic=False)", AdaCos(classes, dynamic=False).s.item(), "sqrt(2) ln(C-1)", "Zhang et al. 2019, eq. 9"),
    ]
    alpha = L2Softmax.lower_bound(classes)
    at = f"ln(p (C-2)/(1-p)) at p = {L2Softmax.PROBABILITY:g}"
    found.append(Bound("least alpha of L2Softmax", alpha, at, "Ranjan et al. 2017, eq. 8"))
    simplex = "C/(C-1)" if classes <= dim + 1 else "1 - cos of the angle below"
    found.append(Bound("largest margin of CosFace", 1 - math.cos(angle), simplex, "Wang et al. 2018"))
    found.append(Bound("largest margin of ArcFace, radians", angle, "the angle that C centers in D dimensions can keep", "Rankin 1955"))
    return found


def sampling(classes: int, dim: int, batch: int, gpus: int) -> dict[str, Any]:
    """What a tenth of the classes in each step would spare, and how many other classes a row would then meet on each rank."""
    rate = 0.1
    shape: dict[str, Any] = {"classes": classes, "dim": dim, "ranks": gpus, "batch": batch}
    full, sampled = (sum(plan.memory(**shape, sample_rate=r).values()) for r in (1.0, rate))
    met = count(rate, batch * gpus, -(-classes // gpus))
    return {"sample_rate": rate, "met_classes": met, "full_bytes": full, "sampled_bytes": sampled}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=integer(low=3, high=2**50), required=True, help="C, such as 1e6")
    parser.add_argument("--dim", type=integer(high=2**20), default=512, help="D (default: %(default)s)")
    share = number(0, 0.999999, open_low=True)
    parser.add_argument("--probability", type=share, default=0.9, help="p that a row on its center is to reach (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=integer(high=plan.MOST_RANKS), default=1, help="over which the classes are divided (default: %(default)s)"
    )
    parser.add_argument("--batch", type=integer(), default=128, help="rows on each of them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the bounds and what sampling would spare."""
    found = bounds(args.classes, args.dim, args.probability)
    spared = sampling(args.classes, args.dim, args.batch, args.gpus)
    if args.json:
        print(json.dumps({"bounds": [one._asdict() for one in found], "sampling": spared}, indent=1))
        return 0
    print(f"{args.classes:,} classes x {args.dim}, p = {args.probability:g}\n")
    print(table(("bound", "value", "formula", "source"), [(b.name, f"{b.value:.4g}", b.formula, b.source) for b in found], right=(1,)))
    print(f"\nAt scale 64 the loss without a margin cannot fall below {least_loss(args.classes, 64.0):.3g}. A scale near its bound trains")
    print("slowly at the end; one of several times the bound leaves no gradient to rows that are merely good.\n")
    full, sampled = (spared[name] / plan.GB for name in ("full_bytes", "sampled_bytes"))
    met = f"{spared['met_classes']:,} classes on each GPU"
    print(f"sample_rate=0.1 leaves a row {met} and takes {sampled:.2f} GB of it instead of {full:.2f} GB.")
    print(advice(args.classes, spared))
    return 0


def advice(classes: int, spared: dict[str, Any]) -> str:
    """Whether to sample: the results in favor of it are of about a million identities and more."""
    if classes < 1_000_000 or spared["sampled_bytes"] >= spared["full_bytes"]:
        return "Not advisable: Partial FC (An et al. 2022) reports no loss for a million identities and more. Train on all classes."
    return (
        "Advisable where time or memory asks for it: Partial FC (An et al. 2022) reports no loss at a tenth of a million identities and\n"
        "more. Where labels are clean and the hardware suffices, train on all classes."
    )
