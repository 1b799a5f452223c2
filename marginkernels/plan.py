"""``python -m marginkernels plan``: what a head needs of each rank, before anything is bought or started.

The memory is counted from what the code allocates, and a test holds it against measured peaks; so are the bytes exchanged. Times are
amounts over rates. The rates are arguments, and their defaults are assumptions.
"""

from __future__ import annotations

import argparse
import json

from . import optim
from .backend.slab import SLAB_ELEMENTS
from .sampling import count
from .text import table

GB = 1e9
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: How many tensors of the weight's size each optimizer keeps.
MOMENTS = {"sgd": 1, "adamw": 2}


def memory(
    classes: int,
    dim: int,
    ranks: int,
    batch: int,
    *,
    sample_rate: float = 1.0,
    optimizer: str = "sgd",
    weight_bytes: int = 4,
    embedding_bytes: int = 4,
    workspace: int = 0,
) -> dict[str, int]:
    """Bytes on the fullest rank at the peak of a training step, by part.

    Args:
        classes, dim: C over all ranks, D.
        ranks: how many the classes are divided over.
        batch: rows of each rank.
        sample_rate: of the head.
        optimizer: ``sgd`` (with momentum) or ``adamw`` of :mod:`marginkernels.optim`.
        weight_bytes, embedding_bytes: per number, of the class centres (with gradient and moments) and of the embeddings.
        workspace: bytes that the forward pass leaves to the backward pass.
    """
    held, rows = -(-classes // ranks), batch * ranks
    met = met_classes(classes, ranks, batch, sample_rate)
    centre = dim * weight_bytes
    parts = {
        "class centres": held * centre,
        "optimizer state": held * (MOMENTS[optimizer] * centre + (4 if optimizer == "adamw" else 0)),
        "gradient": met * centre,
    }
    if sample_rate < 1:
        # The draw is over before the copy of what was drawn is made, which lives until its gradient is there.
        parts["drawn classes"] = max(met * centre, 40 * held)
    # Of all ranks: the embeddings as they came and prepared, u, and the float64 temporaries of the O(N D) arithmetic.
    parts["rows"] = rows * dim * (2 * embedding_bytes + 4 + 5 * 8)
    # A pass works on slabs of logits and converted centres (plain PyTorch on a dozen, kernels on one or none); an optimizer step on slabs
    # of rows: temporaries, and copies where rows were drawn. Never both.
    logits = 6 * 4 * min(SLAB_ELEMENTS, rows * met) + 4 * met
    copies = MOMENTS[optimizer] + (1 + MOMENTS[optimizer] if sample_rate < 1 else 0)
    parts["slabs"] = max(logits, copies * weight_bytes * min(optim.SLAB_ELEMENTS, met * dim))
    if workspace:
        parts["workspace"] = workspace
    return parts


def met_classes(classes: int, ranks: int, batch: int, sample_rate: float) -> int:
    """How many classes the fullest rank's rows meet in a step."""
    held = -(-classes // ranks)
    return held if sample_rate == 1 else count(sample_rate, batch * ranks, held)


def exchanged(dim: int, ranks: int, batch: int, *, embedding_bytes: int = 4, label_smoothing: bool = False) -> dict[str, int]:
    """Bytes that each rank receives in a step, by purpose, as ring algorithms move them; for a head made with ``batch_size``."""
    others, rows = ranks - 1, batch * ranks
    return {
        "embeddings": others * batch * dim * embedding_bytes,
        "labels": others * batch * 8,
        "targets": 2 * others * (3 * rows * 8) // ranks,
        "log-sum-exps": others * rows * (3 * 8 if label_smoothing else 2 * 4),
        "embedding gradients": others * batch * dim * max(embedding_bytes, 4),
    }


def flops(classes: int, dim: int, ranks: int, batch: int, sample_rate: float = 1.0) -> int:
    """Of the two passes on the fullest rank: 8 N D C."""
    return 8 * batch * ranks * dim * met_classes(classes, ranks, batch, sample_rate)


def traffic(classes: int, dim: int, ranks: int, batch: int, *, sample_rate: float, optimizer: str, weight_bytes: int) -> tuple[int, int]:
    """Bytes between the fullest rank's processor and its memory in a step: of the passes, and of the draw and the optimizer."""
    met, held = met_classes(classes, ranks, batch, sample_rate), -(-classes // ranks)
    centre = dim * weight_bytes
    passes = 3 * met * centre  # read W twice, write dW
    update = (1 + 2 * (1 + MOMENTS[optimizer])) * met * centre  # read dW; read and write W and each moment
    if sample_rate < 1:
        # Hashing and selecting among all keys, and the copies of drawn rows: W before, W and moments around the update.
        update += 30 * 8 * held + (2 + 4 * (1 + MOMENTS[optimizer])) * met * centre
    return passes, update


def most_classes(limit: int, dim: int, ranks: int, batch: int, **options) -> int:
    """The most classes whose peak stays within ``limit`` bytes a rank."""
    low, high = 0, 1
    fits = lambda c: sum(memory(c, dim, ranks, batch, **options).values()) <= limit  # noqa: E731
    while high < 2**50 and fits(high * ranks):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * ranks) else (low, middle)
    return low * ranks


def fewest_ranks(limit: int, classes: int, dim: int, batch: int, **options) -> int | None:
    """The fewest ranks whose peak stays within ``limit`` bytes each; None where not even 65,536 do."""
    fits = lambda r: sum(memory(classes, dim, r, batch, **options).values()) <= limit  # noqa: E731
    return next((r for r in range(1, 65537) if fits(r)), None)


def plan(args: argparse.Namespace) -> dict:
    """Everything :func:`run` prints, as numbers: bytes, seconds, FLOPs."""
    classes, size = int(args.classes), {"weight_bytes": BYTES[args.weight], "embedding_bytes": BYTES[args.embedding]}
    shape = {"classes": classes, "dim": args.dim, "ranks": args.gpus, "batch": args.batch}
    chosen = {"sample_rate": args.sample_rate, "optimizer": args.optimizer}
    parts = memory(**shape, **chosen, **size, workspace=int(args.workspace_mb * 2**20)) | {"reserve": int(args.reserve * GB)}
    moved = exchanged(args.dim, args.gpus, args.batch, embedding_bytes=size["embedding_bytes"])
    work = flops(**shape, sample_rate=args.sample_rate)
    passes, update = traffic(**shape, **chosen, weight_bytes=size["weight_bytes"])
    seconds = {
        "passes": max(work / (args.rate * 1e12), passes / (args.bandwidth * GB)),
        "draw and optimizer" if args.sample_rate < 1 else "optimizer": update / (args.bandwidth * GB),
        "exchange": sum(moved.values()) / (args.link * GB),
    }
    limit = int((args.memory - args.reserve) * GB)
    options = []
    for rate in sorted({1.0, 0.1, args.sample_rate}, reverse=True):
        for name in MOMENTS:
            asked = {"sample_rate": rate, "optimizer": name, **size}
            options.append(
                {
                    "sample_rate": rate,
                    "optimizer": name,
                    "bytes": sum(memory(**shape, **asked).values()) + int(args.reserve * GB),
                    "most_classes": most_classes(limit, args.dim, args.gpus, args.batch, **asked),
                    "fewest_gpus": fewest_ranks(limit, classes, args.dim, args.batch, **asked),
                }
            )
    return {
        **shape,
        **chosen,
        "met_classes": met_classes(**{k: v for k, v in shape.items() if k != "dim"}, sample_rate=args.sample_rate),
        "bytes": parts,
        "fits": sum(parts.values()) <= args.memory * GB,
        "exchanged": moved,
        "flops": work,
        "seconds": seconds,
        "options": options,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--classes", type=whole, required=True, help="C, such as 30e6")
    parser.add_argument("--dim", type=int, default=512, help="D (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="how many the classes are divided over (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="rows on each GPU (default: %(default)s)")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="share of the classes in a step (default: %(default)s)")
    parser.add_argument("--optimizer", choices=MOMENTS, default="sgd", help="sgd has momentum (default: %(default)s)")
    parser.add_argument("--weight", choices=("fp32", "bf16"), default="fp32", help="of centres, gradient, moments (default: %(default)s)")
    parser.add_argument("--embedding", choices=BYTES, default="bf16", help="of the embeddings (default: %(default)s)")
    parser.add_argument("--workspace-mb", type=float, default=0.0, help="as given to the head (default: %(default)s)")
    parser.add_argument("--reserve", type=float, default=10.0, help="GB for backbone, activations and the rest (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=400.0, help="TFLOP/s of the passes; assumed (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=2500.0, help="GB/s of the memory; assumed (default: %(default)s)")
    parser.add_argument("--link", type=float, default=50.0, help="GB/s that each GPU receives; assumed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 where it does not fit."""
    for name in ("classes", "dim", "gpus", "batch", "memory", "rate", "bandwidth", "link"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"--{name}: expected a number > 0, got {getattr(args, name)}")
    if not 0 < args.sample_rate <= 1:
        raise SystemExit(f"--sample-rate: expected a number in (0, 1], got {args.sample_rate}")
    found = plan(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0 if found["fits"] else 1
    rows, total, moved = args.batch * args.gpus, sum(found["bytes"].values()), found["exchanged"]
    met = f"{found['met_classes']:,} of {-(-found['classes'] // args.gpus):,} classes"
    print(f"{found['classes']:,} classes x {args.dim}, {args.gpus} GPUs of {args.memory:g} GB, {args.batch} rows each ({rows:,} in all);")
    print(f"each GPU meets {met} in a step; {args.weight} centres, {args.embedding} embeddings, {args.optimizer}.\n")
    lines = [(name, f"{v / GB:.2f}") for name, v in found["bytes"].items()] + [("in all", f"{total / GB:.2f}")]
    print(table(("memory of the fullest GPU", "GB"), lines, right=(1,)))
    print(f"{'fits' if found['fits'] else 'DOES NOT FIT'} in {args.memory:g} GB\n")
    lines = [(name, f"{v / 1e6:.2f}") for name, v in moved.items()] + [("in all", f"{sum(moved.values()) / 1e6:.2f}")]
    print(table(("each GPU receives in a step", "MB"), lines, right=(1,)))
    print()
    seconds = found["seconds"]
    lines = [(name, f"{1e3 * v:.2f}") for name, v in seconds.items()] + [("in all", f"{1e3 * sum(seconds.values()):.2f}")]
    print(table((f"time of a step ({found['flops'] / 1e12:.2f} TFLOP a GPU)", "ms"), lines, right=(1,)))
    print(f"assumed: {args.rate:g} TFLOP/s, {args.bandwidth:g} GB/s of memory, {args.link:g} GB/s of link; nothing overlaps.\n")
    lines = [
        (f"{o['sample_rate']:g}", o["optimizer"], f"{o['bytes'] / GB:.1f}", f"{o['most_classes']:,}", o["fewest_gpus"] or "none")
        for o in found["options"]
    ]
    header = ("sample rate", "optimizer", "GB a GPU", f"most classes on {args.gpus} GPUs", f"fewest GPUs for {found['classes']:,}")
    print(table(header, lines, right=(0, 2, 3, 4)))
    return 0 if found["fits"] else 1
