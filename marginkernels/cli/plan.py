"""``python -m marginkernels plan``: memory, communication and time of a head on each rank, estimated before a run.

Memory and exchanged bytes are counted from what the code allocates and sends; tests compare both with measurements. Times are these
amounts divided by rates. The rates are arguments, or of a data sheet (``--gpu``), and their defaults are assumptions.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

from .. import optim
from ..core.numerics import chunk_elements
from ..sampling import count
from ._gpus import GPUS, INSIGHTFACE, INSIGHTFACE_ROWS, INSIGHTFACE_SOURCE
from ._text import integer, number, refuse, table

GB = 1e9
#: The most ranks that a plan is made for.
MOST_RANKS = 65536
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: Dtypes of class centers and moments.
WEIGHTS = ("fp32", "bf16")
#: How many tensors of the weight's size each optimizer holds as its state.
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
    gpu_memory: int = 0,
    fused_step: bool = False,
) -> dict[str, int]:
    """Bytes on the rank with the most classes at the peak of a training step, by part.

    Args:
        classes, dim: C over all ranks, D.
        ranks: how many ranks the classes are divided over.
        batch: rows of each rank.
        sample_rate: that of the head.
        optimizer: ``sgd`` (with momentum) or ``adamw`` of :mod:`marginkernels.optim`.
        weight_bytes, embedding_bytes: per element, of the class centers (and their gradient and moments) and of the embeddings.
        workspace: bytes that the forward pass saves for the backward pass.
        gpu_memory: bytes of each GPU, by which plain PyTorch sizes its chunks; 0 on a CPU.
        fused_step: whether the optimizer is :class:`marginkernels.optim.FusedSGD` or ``FusedAdamW``: then there is no gradient but that of
            a chunk of classes, or of the drawn ones.
    """
    held, rows = -(-classes // ranks), batch * ranks
    met = met_classes(classes, ranks, batch, sample_rate)
    center = dim * weight_bytes
    parts = {
        "class centers": held * center,
        "optimizer state": held * (MOMENTS[optimizer] * center + (4 if optimizer == "adamw" else 0)),
        "gradient": 0 if fused_step and sample_rate == 1 else met * center,
    }
    if sample_rate < 1:
        # Either the keys of the draw or the copy of the drawn centers, which is made after it and freed once the gradient is computed.
        parts["drawn classes"] = max(met * center, 40 * held)
    # The rows of all ranks: embeddings as given and prepared, the mean center, and float64 temporaries of the O(N D) arithmetic.
    parts["rows"] = rows * dim * (2 * embedding_bytes + 4 + 5 * 8)
    # Either a pass works on chunks of logits and converted centers (plain PyTorch needs several copies, kernels one or none), or the
    # optimizer on chunks of rows: temporaries, and copies where rows were drawn. Never both at a time.
    logits = 6 * 4 * min(chunk_elements(gpu_memory), max(rows, dim) * met) + 4 * met
    # Its kernel on a CPU needs none of the temporaries.
    copies = (MOMENTS[optimizer] if gpu_memory else 0) + (1 + MOMENTS[optimizer] if sample_rate < 1 else 0)
    of_step = copies * weight_bytes * min(optim.rows.CHUNK_ELEMENTS, met * dim)
    if fused_step and sample_rate == 1:  # centers and gradient of a chunk, in float32
        of_step = logits + 2 * 4 * min(chunk_elements(gpu_memory), met * dim)
    parts["chunks"] = max(logits, of_step)
    if workspace:
        parts["workspace"] = workspace
    return parts


def bytes_per_weight(optimizer: str, weight_bytes: int, fused_step: bool) -> int:
    """Bytes for each number of the class centers: itself, its moments, and its gradient where there is one."""
    return weight_bytes * (1 + MOMENTS[optimizer] + (not fused_step))


def met_classes(classes: int, ranks: int, batch: int, sample_rate: float) -> int:
    """How many classes take part in a step on the rank with the most."""
    held = -(-classes // ranks)
    return held if sample_rate == 1 else count(sample_rate, batch * ranks, held)


def exchanged(dim: int, ranks: int, batch: int, *, embedding_bytes: int = 4, label_smoothing: bool = False) -> dict[str, int]:
    """Bytes that each rank receives in a step with ring algorithms, by purpose, for a head made with ``batch_size``."""
    others, rows = ranks - 1, batch * ranks
    return {
        "embeddings": others * batch * dim * embedding_bytes,
        "labels": others * (batch + 1) * 8,  # and one number for the dtypes
        "targets": 2 * others * (3 * rows * 8) // ranks,
        "log-sum-exps": others * rows * 8 * (3 if label_smoothing else 2),
        "embedding gradients": others * batch * dim * max(embedding_bytes, 4),
    }


def flops(classes: int, dim: int, ranks: int, batch: int, sample_rate: float = 1.0) -> int:
    """Floating-point operations of the two passes on the rank with the most classes: 8 N D C."""
    return 8 * batch * ranks * dim * met_classes(classes, ranks, batch, sample_rate)


def traffic(
    classes: int, dim: int, ranks: int, batch: int, *, sample_rate: float, optimizer: str, weight_bytes: int, fused_step: bool = False
) -> tuple[int, int]:
    """Bytes read and written in memory in a step, on the rank with the most classes: by the passes, and by the draw and the optimizer."""
    met, held = met_classes(classes, ranks, batch, sample_rate), -(-classes // ranks)
    center = dim * weight_bytes
    passes = 3 * met * center  # read W twice, write dW
    update = (1 + 2 * (1 + MOMENTS[optimizer])) * met * center  # read dW; read and write W and each moment
    if fused_step:  # W is read by the pass, and of dW a chunk is in the cache
        passes, update = 2 * met * center, (1 + 2 * MOMENTS[optimizer]) * met * center
    if sample_rate < 1:
        # Hashing all classes and selecting among them; copies of the drawn rows: W before the passes, W and moments around the update.
        update += 30 * 8 * held + (2 + 4 * (1 + MOMENTS[optimizer])) * met * center
    return passes, update


def most_classes(limit: int, dim: int, ranks: int, batch: int, **options: Any) -> int:
    """The largest number of classes that fits in ``limit`` bytes per rank. ``options`` are those of :func:`memory`."""

    def fits(c: int) -> bool:
        return sum(memory(c, dim, ranks, batch, **options).values()) <= limit

    low, high = 0, 1
    while high < 2**50 and fits(high * ranks):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * ranks) else (low, middle)
    return low * ranks


def fewest_ranks(limit: int, classes: int, dim: int, batch: int, **options: Any) -> int | None:
    """The smallest number of ranks that fit the head in ``limit`` bytes each; None where 65,536 do not."""

    def fits(r: int) -> bool:
        return sum(memory(classes, dim, r, batch, **options).values()) <= limit

    return next((r for r in range(1, MOST_RANKS + 1) if fits(r)), None)


def limits(args: argparse.Namespace, **chosen: Any) -> dict[str, float]:
    """Seconds that a step needs of each part of a GPU if it does nothing else at any time: the largest is a bound from below.

    Args:
        args: the command's, for the sizes and rates.
        chosen: ``sample_rate``, ``optimizer``, ``fused_step`` and ``weight_bytes``, in the place of the command's.
    """
    shape: dict[str, Any] = {"classes": int(args.classes), "dim": args.dim, "ranks": args.gpus, "batch": args.batch}
    moved = exchanged(args.dim, args.gpus, args.batch, embedding_bytes=BYTES[args.embedding])
    return {
        "tensor cores": flops(**shape, sample_rate=chosen["sample_rate"]) / (args.rate * 1e12),
        "memory": sum(traffic(**shape, **chosen)) / (args.bandwidth * GB),
        "link": sum(moved.values()) / (args.link * GB),
    }


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that :func:`run` prints, as numbers: bytes, seconds, FLOPs."""
    classes = int(args.classes)
    size: dict[str, Any] = {
        "weight_bytes": BYTES[args.weight],
        "embedding_bytes": BYTES[args.embedding],
        "gpu_memory": int(args.memory * GB),
    }
    shape: dict[str, Any] = {"classes": classes, "dim": args.dim, "ranks": args.gpus, "batch": args.batch}
    chosen = {"sample_rate": args.sample_rate, "optimizer": args.optimizer, "fused_step": args.fused_step}
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
        for name, weight, fused in itertools.product(MOMENTS, WEIGHTS, (False, True)):
            mode: dict[str, Any] = {"sample_rate": rate, "optimizer": name, "fused_step": fused}
            asked = mode | size | {"weight_bytes": BYTES[weight]}
            needed = sum(memory(**shape, **asked).values()) + int(args.reserve * GB)
            options.append(
                {
                    **mode,
                    "weight": weight,
                    "bytes_per_weight": bytes_per_weight(name, BYTES[weight], fused),
                    "bytes": needed,
                    "fits": needed <= args.memory * GB,
                    "least_seconds": max(limits(args, **mode, weight_bytes=BYTES[weight]).values()),
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
        "least_seconds": limits(args, **chosen, weight_bytes=size["weight_bytes"]),
        "options": options,
    }


def published(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What insightface has published (:mod:`._gpus`), a row for each number of identities, beside what the planner has for the same number
    on the GPUs of ``args``: of model parallel all classes in a step, of Partial FC a tenth. Samples a second, MB, bytes, seconds."""
    rows = []
    first = INSIGHTFACE_ROWS / min(INSIGHTFACE.items())[1][2][0]
    for identities, (_, parallel, partial) in INSIGHTFACE.items():
        for rate, theirs in ((1.0, parallel), (0.1, partial)):
            chosen: dict[str, Any] = {"sample_rate": rate, "optimizer": args.optimizer, "fused_step": args.fused_step}
            chosen["weight_bytes"] = BYTES[args.weight]
            same = argparse.Namespace(**(vars(args) | {"classes": identities}))
            sizes: dict[str, Any] = {"embedding_bytes": BYTES[args.embedding], "gpu_memory": int(args.memory * GB)}
            needed = sum(memory(identities, args.dim, args.gpus, args.batch, **chosen, **sizes).values())
            rows.append(
                {
                    "identities": identities,
                    "sample_rate": rate,
                    "samples_per_second": theirs and theirs[0],
                    "megabytes": theirs and theirs[1],
                    "seconds_beyond_the_first": theirs and INSIGHTFACE_ROWS / theirs[0] - first,
                    "bytes": needed,
                    "least_seconds": max(limits(same, **chosen).values()),
                }
            )
    return rows


class _OfGpu(argparse.Action):
    """Sets the rates that a GPU's data sheet has; what is given after it counts instead."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        gpu = GPUS[values]
        for name in ("memory", "rate", "bandwidth", "link"):
            if getattr(namespace, name) != parser.get_default(name):
                raise argparse.ArgumentError(self, f"expected before --{name}, which then counts instead of the data sheet's")
            setattr(namespace, name, getattr(gpu, name))
        namespace.gpu = values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rate = number(1e-9, 1e12)
    parser.add_argument("--classes", type=integer(high=2**50), required=True, help="C, such as 30e6")
    parser.add_argument("--dim", type=integer(), default=512, help="D (default: %(default)s)")
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        action=_OfGpu,
        help="take --memory, --rate, --bandwidth and --link from its data sheet; what is given after it counts instead",
    )
    parser.add_argument("--gpus", type=integer(high=MOST_RANKS), default=8, help="how many GPUs hold the classes (default: %(default)s)")
    parser.add_argument("--memory", type=rate, default=80.0, help="GB of each GPU (default: %(default)s)")
    parser.add_argument("--batch", type=integer(), default=128, help="rows on each GPU (default: %(default)s)")
    share = number(0, 1, open_low=True)
    parser.add_argument("--sample-rate", type=share, default=1.0, help="share of the classes in a step (default: %(default)s)")
    parser.add_argument("--optimizer", choices=MOMENTS, default="sgd", help="sgd is with momentum (default: %(default)s)")
    parser.add_argument("--fused-step", action="store_true", help="of FusedSGD or FusedAdamW: no gradient of the class centers is stored")
    parser.add_argument("--weight", choices=WEIGHTS, default="fp32", help="dtype of class centers and moments (default: %(default)s)")
    parser.add_argument("--embedding", choices=BYTES, default="bf16", help="dtype of the embeddings (default: %(default)s)")
    parser.add_argument("--workspace-mb", type=number(0, 2**40), default=0.0, help="workspace_mb of the head (default: %(default)s)")
    parser.add_argument(
        "--reserve", type=number(0, 1e12), default=10.0, help="GB for the backbone and everything else (default: %(default)s)"
    )
    parser.add_argument("--rate", type=rate, default=400.0, help="assumed TFLOP/s of the passes (default: %(default)s)")
    parser.add_argument("--bandwidth", type=rate, default=2500.0, help="assumed memory bandwidth in GB/s (default: %(default)s)")
    parser.add_argument("--link", type=rate, default=50.0, help="assumed GB/s that each GPU receives (default: %(default)s)")
    parser.add_argument("--published", action="store_true", help="compare with what insightface has published for eight V100")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 1 where it does not fit, 2 where the arguments contradict each other."""
    if args.reserve >= args.memory:
        return refuse(f"--reserve: expected fewer GB than --memory has ({args.memory:g}), got {args.reserve:g}")
    found = plan(args) | ({"published": published(args)} if args.published else {})
    if args.json:
        print(json.dumps(found, indent=1))
        return 0 if found["fits"] else 1
    rows, total, moved = args.batch * args.gpus, sum(found["bytes"].values()), found["exchanged"]
    met = f"{found['met_classes']:,} of its {-(-found['classes'] // args.gpus):,} classes"
    print(f"{found['classes']:,} classes x {args.dim}, {args.gpus} GPUs of {args.memory:g} GB, {args.batch} rows each ({rows:,} in total);")
    called = _called(args.optimizer, args.fused_step)
    print(f"each GPU uses {met} in a step; {args.weight} class centers, {args.embedding} embeddings, {called}.\n")
    lines = [(name, f"{v / GB:.2f}") for name, v in found["bytes"].items()] + [("total", f"{total / GB:.2f}")]
    print(table(("memory of the GPU with the most classes", "GB"), lines, right=(1,)))
    print(f"{'fits' if found['fits'] else 'DOES NOT FIT'} in {args.memory:g} GB\n")
    lines = [(name, f"{v / 1e6:.2f}") for name, v in moved.items()] + [("total", f"{sum(moved.values()) / 1e6:.2f}")]
    print(table(("received by each GPU in a step", "MB"), lines, right=(1,)))
    print()
    seconds = found["seconds"]
    lines = [(name, f"{1e3 * v:.2f}") for name, v in seconds.items()] + [("total", f"{1e3 * sum(seconds.values()):.2f}")]
    print(table((f"time of a step ({found['flops'] / 1e12:.2f} TFLOP per GPU)", "ms"), lines, right=(1,)))
    rates = f"{args.rate:g} TFLOP/s, {args.bandwidth:g} GB/s memory bandwidth, {args.link:g} GB/s link bandwidth"
    print(f"assumed: {rates}, no overlap.")
    least = found["least_seconds"]
    parts = ", ".join(f"{name} {1e3 * v:.2f}" for name, v in least.items())
    print(f"at least {1e3 * max(least.values()):.2f} ms if all overlaps: what each part of a GPU needs is {parts} ms.")
    if args.gpu:
        print(f"{GPUS[args.gpu].title}, {GPUS[args.gpu].by}: by {GPUS[args.gpu].source}.")
    print("No time here was measured.\n")
    choices = [
        (
            *(f"{o['sample_rate']:g}", _called(o["optimizer"], o["fused_step"]), o["weight"], o["bytes_per_weight"]),
            *(f"{o['bytes'] / GB:.1f}", "yes" if o["fits"] else "no", f"{1e3 * o['least_seconds']:.1f}"),
            *(f"{o['most_classes']:,}", o["fewest_gpus"] or "none"),
        )
        for o in found["options"]
    ]
    header = (
        *("sample rate", "optimizer", "centers", "bytes a weight", "GB per GPU", "fits", "at least, ms"),
        *(f"most classes on {args.gpus} GPUs", f"fewest GPUs for {found['classes']:,}"),
    )
    print(table(header, choices, right=(0, 3, 4, 6, 7, 8)))
    if args.published:
        print(f"\n{about_published(args)}\n")
        print(table(PUBLISHED_HEADER, [published_cells(row) for row in found["published"]], right=range(len(PUBLISHED_HEADER))))
    return 0 if found["fits"] else 1


#: Of the comparison with insightface; a number of the planner's is marked so.
PUBLISHED_HEADER = (
    *("identities", "sample rate", "samples/s", "MB of a GPU", "step beyond the first's, ms"),
    *("planned: GB of a GPU", "planned: at least, ms"),
)


def published_cells(row: dict[str, Any]) -> Sequence[str]:
    """A row of :func:`published` as text."""
    return (
        *(f"{row['identities']:,}", f"{row['sample_rate']:g}"),
        *(
            "out of memory" if v is None else f"{v * by:,.0f}"
            for v, by in ((row["samples_per_second"], 1), (row["megabytes"], 1), (row["seconds_beyond_the_first"], 1e3))
        ),
        *(f"{row['bytes'] / GB:.1f}", f"{1e3 * row['least_seconds']:.1f}"),
    )


def about_published(args: argparse.Namespace) -> str:
    """What the columns of the comparison are."""
    where = f"{args.gpus} GPUs{f' ({GPUS[args.gpu].title})' if args.gpu else ''}"
    return (
        f"Published by insightface for arcface_torch on eight V100 of 32 GB, backbone and head together\n({INSIGHTFACE_SOURCE}),\n"
        f"and planned for the head alone on {where}, {_called(args.optimizer, args.fused_step)}, {args.weight} centers, {args.batch} rows "
        f"on each.\nThe first's is the step of {min(INSIGHTFACE):,} identities at a sample rate of 0.1, all steps taken as of "
        f"{INSIGHTFACE_ROWS:,} rows."
    )


def _called(optimizer: str, fused_step: bool) -> str:
    return f"{optimizer}, fused step" if fused_step else optimizer
