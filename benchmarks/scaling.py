"""``python -m benchmarks.scaling``: memory and communication of a class-parallel head by number of ranks and classes.

Measured on Gloo ranks on this machine's CPU: the peak resident memory of the rank with the most, above what it used before the head was
made, over two SGD steps; and the bytes that one rank receives in a step, as counted by the collectives. The planner's figures are listed
next to them. Larger sizes are planned only. Writes ``scaling.json`` and ``scaling.md``; with ``--render`` nothing is measured, and
``scaling.md`` is rewritten from the existing record.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import marginkernels as mk
from marginkernels import optim
from marginkernels.backend.cpu import release_memory
from marginkernels.cli import plan
from marginkernels.cli._text import writable_folder
from marginkernels.core.numerics import CHUNK_ELEMENTS
from marginkernels.distributed import _collectives as collectives

DIM, BATCH = 128, 32
MEASURED = [(ranks, classes, rate) for rate in (1.0, 0.1) for classes in (200_000, 800_000) for ranks in (1, 2, 4)]
#: GPUs and million classes of the planned rows, each with and without sampling; everything else is the planner's default.
PLANNED = [(1, 1), (8, 1), (8, 10), (8, 30), (16, 30), (64, 30), (64, 100)]
RATES = (1.0, 0.1)


def resident(name: str) -> int:
    """A field of Linux's ``/proc/self/status`` in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def step(head: mk.MarginHead, optimizer: torch.optim.Optimizer, classes: int) -> None:
    x, y = torch.randn(BATCH, head.embedding_dim, requires_grad=True), torch.randint(classes, (BATCH,))
    optimizer.zero_grad()
    head(x, y).backward()
    optimizer.step()


def rank_main(rank: int, ranks: int, cases: list[tuple[int, float]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    try:
        run(1000, 0.5)  # warm-up: allocations of the first steps that stay
        found = [run(*case) for case in cases]
        Path(folder, str(rank)).write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(classes: int, rate: float) -> dict:
    release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the peak
    head = mk.MarginHead(DIM, classes, mk.ArcFace(), process_group=dist.group.WORLD, batch_size=BATCH, sample_rate=rate, workspace_mb=0)
    optimizer = optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    step(head, optimizer, classes)
    collectives.forget(head.shard.group)
    step(head, optimizer, classes)
    return {"peak_bytes": resident("VmHWM") - before, "received": collectives.received(head.shard.group)}


def measure() -> list[dict]:
    records = []
    for ranks in sorted({r for r, _, _ in MEASURED}):
        cases = [(classes, rate) for r, classes, rate in MEASURED if r == ranks]
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (ranks, cases, folder), nprocs=ranks)
            every = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]
        for i, (classes, rate) in enumerate(cases):
            shape = {"classes": classes, "dim": DIM, "ranks": ranks, "batch": BATCH}
            records.append(
                {
                    **shape,
                    "sample_rate": rate,
                    "peak_bytes": max(found[i]["peak_bytes"] for found in every),
                    "planned_peak_bytes": sum(plan.memory(**shape, sample_rate=rate).values()),
                    "received_bytes": sum(every[0][i]["received"].values()),
                    "planned_received_bytes": sum(plan.exchanged(DIM, ranks, BATCH).values()),
                }
            )
            print(records[-1], flush=True)
    return records


def arguments(gpus: int, millions: int, rate: float) -> argparse.Namespace:
    """The planner's arguments for one planned row."""
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    options = {"classes": millions * 1_000_000, "gpus": gpus, "sample-rate": rate, "reserve": 0}
    return parser.parse_args([f"--{name}={value}" for name, value in options.items()])


def planned() -> list[dict]:
    return [plan.plan(arguments(*size, rate)) for size in PLANNED for rate in RATES]


def markdown(measured: list[dict], plans: list[dict]) -> str:
    """Both tables. Sums over a plan's parts do not depend on their names, so that older records can be rendered too."""
    lines = [
        f"Measured on CPU ranks (D = {DIM}, {BATCH} rows on each, float32, SGD with momentum). In brackets the planner's figure, which",
        f"includes up to {6 * 4 * CHUNK_ELEMENTS / 1e6:.0f} MB for the chunks of logits that the plain PyTorch backend needs:",
        "",
        "| classes | sample rate | ranks | peak memory of a rank, MB | received by a rank in a step, kB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for r in sorted(measured, key=lambda r: (r["classes"], -r["sample_rate"], r["ranks"])):
        lines.append(
            f"| {r['classes']:,} | {r['sample_rate']:g} | {r['ranks']} | {r['peak_bytes'] / 1e6:.0f} ({r['planned_peak_bytes'] / 1e6:.0f}) "
            f"| {r['received_bytes'] / 1e3:.1f} ({r['planned_received_bytes'] / 1e3:.1f}) |"
        )
    a = arguments(*PLANNED[0], 1.0)
    lines += [
        "",
        f"Planned (D = {a.dim}, {a.batch} rows on each GPU, {a.weight} centers, {a.embedding} embeddings, {a.optimizer}, without the "
        f"backbone); the time assumes {a.rate:g} TFLOP/s, {a.bandwidth:g} GB/s of memory bandwidth and {a.link:g} GB/s of link bandwidth, "
        "without overlap:",
        "",
        "| classes | GPUs | sample rate | memory of a GPU, GB | received by a GPU in a step, MB | TFLOP of a GPU | step, ms |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in sorted(plans, key=lambda p: (p["classes"], p["ranks"], -p["sample_rate"])):
        memory, received, seconds = (sum(p[part].values()) for part in ("bytes", "exchanged", "seconds"))
        lines.append(
            f"| {p['classes']:,} | {p['ranks']} | {p['sample_rate']:g} | {memory / 1e9:.2f} | {received / 1e6:.2f} "
            f"| {p['flops'] / 1e12:.2f} | {1e3 * seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=writable_folder, default=Path(__file__).parent / "results" / "scaling", help="folder (default: %(default)s)"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, and write scaling.md from the scaling.json in the folder")
    args = parser.parse_args()
    if args.render and not (args.out / "scaling.json").is_file():
        parser.error(f"argument --out: expected a folder with the scaling.json of an earlier run, got {str(args.out)!r}")
    if args.render:
        record = json.loads((args.out / "scaling.json").read_text())
        (args.out / "scaling.md").write_text(markdown(record["measured"], record["planned"]))
        print(args.out / "scaling.md")
        return
    measured, plans = measure(), planned()
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "marginkernels": mk.__version__, "cpu_count": os.cpu_count()}
    record = {**about, "measured": measured, "planned": plans}
    (args.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "scaling.md").write_text(markdown(measured, plans))
    print(args.out / "scaling.md")


if __name__ == "__main__":
    main()
