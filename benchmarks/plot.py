"""``python -m benchmarks plot``: the plots of a record file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marginkernels.cli._text import writable_folder

from .records import RESULTS, Records, committed, is_ours, record_file

WIDTH = 10.0
#: Backends of this package have warm colors, peers cool ones. A provider has the same color in every plot.
COLORS = {
    "marginkernels-hopper": "#d62728",
    "marginkernels-hopper+workspace": "#ff7f0e",
    "marginkernels-cuda": "#a4161a",
    "marginkernels-cuda+workspace": "#f4a259",
    "marginkernels-triton": "#e377c2",
    "marginkernels-triton+workspace": "#c77dff",
    "marginkernels-cpu": "#d62728",
    "marginkernels-cpu+workspace": "#ff7f0e",
    "marginkernels-cpu-recompute": "#f4a259",
    "marginkernels-torch": "#bc6c25",
    "eager": "#4c566a",
    "torch.compile": "#1f77b4",
    "pytorch-metric-learning": "#17a398",
    "partialfc-sequence": "#7b68ee",
    "F.linear_cross_entropy": "#2e8b57",
    "cut-cross-entropy": "#6b8e23",
    "liger": "#8fa3bf",
    "quack": "#0b3c5d",
}

#: The peers in the roofline plot, where all of them would be too many.
SHOWN_PEERS = ("torch.compile", "eager")


@dataclass(frozen=True)
class Picture:
    path: Path
    what: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", type=record_file, metavar="RECORDS", help="record files (default: all in benchmarks/results)")
    parser.add_argument("--out", type=writable_folder, metavar="DIR", help="folder for the plots (default: next to each record file)")


def run(args: argparse.Namespace) -> int:
    import matplotlib

    matplotlib.use("Agg")
    for path in args.paths or committed():
        found = Records.read(path)
        out = args.out or Path(path).parent
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures(found, out):
            figure = DRAW[picture.path.stem.rsplit("-", 1)[1]](found)
            figure.savefig(picture.path, dpi=110, bbox_inches="tight")
            print(picture.path)
    return 0


def pictures(found: Records, out: Path = RESULTS) -> list[Picture]:
    """The plots that the file has enough points for."""
    stem = Path(found.name).stem
    kinds = []
    if _sweep(found, "C"):
        kinds.append(("classes", "time and peak memory of a step against the number of classes"))
    if _sweep(found, "N"):
        kinds.append(("batch", "TFLOP/s of a step against the batch size"))
    if any(is_ours(r["provider"]) and r["status"] == "ok" and r["phase"] == "step" for r in found.records):
        kinds.append(("roofline", "roofline of the step"))
    return [Picture(out / f"{stem}-{kind}.png", what) for kind, what in kinds]


def _sweep(found: Records, axis: str, phase: str = "step") -> tuple[dict, dict[str, list[dict]]] | None:
    """The largest group of cases that differ only in ``axis``, with at least three values of it.

    Returns:
        What the cases have in common, and their records by dtype; None if there is no such group.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    fixed = [a for a in ("N", "D", "C") if a != axis]
    for r in found.records:
        if r["phase"] == phase and r["status"] != "unsupported":
            groups.setdefault((r["head"], *(r[a] for a in fixed)), {}).setdefault(r["dtype"], []).append(r)
    size = lambda group: max(len({r[axis] for r in records}) for records in group.values())  # noqa: E731
    best = max(groups, key=lambda k: (size(groups[k]), k[1:]), default=None)
    if best is None or size(groups[best]) < 3:
        return None
    return {"head": best[0]} | dict(zip(fixed, best[1:], strict=True)), dict(sorted(groups[best].items(), reverse=True))


def _style(provider: str) -> dict:
    ours = is_ours(provider)
    return {
        "color": COLORS.get(provider, "#999999"),
        "linewidth": 2.4 if ours else 1.4,
        "marker": "o" if ours else "s",
        "markersize": 6 if ours else 4,
        "zorder": 3 if ours else 2,
    }


def _lines(ax: Any, records: list[dict], axis: str, value: str) -> None:
    """Draw a line for each provider, and a cross at the upper edge where it was not timed."""
    missing: dict[float, list[str]] = {}
    for provider in sorted({r["provider"] for r in records}, key=lambda name: list(COLORS).index(name) if name in COLORS else 99):
        mine = sorted((r for r in records if r["provider"] == provider), key=lambda r: r[axis])
        good = [r for r in mine if r["status"] == "ok"]
        if good:
            ax.plot([r[axis] for r in good], [r[value] for r in good], label=provider, **_style(provider))
        for r in mine:
            if r["status"] != "ok":
                missing.setdefault(r[axis], []).append(provider)
    for at, names in missing.items():
        for i, name in enumerate(names):
            color = COLORS.get(name, "#999999")
            ax.plot([at], [0.98 - 0.045 * i], "x", color=color, transform=ax.get_xaxis_transform(), clip_on=False, zorder=4)
    ax.grid(True, which="major", alpha=0.35)
    ax.spines[["top", "right"]].set_visible(False)


def _log_axis(axis: Any, steps: tuple[int, ...] = (1,)) -> None:
    """Label a logarithmic axis with plain numbers, at ``steps`` times each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(v: float, _: object = None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if v >= size:
            return f"{v / size:g}{letter}"
    return f"{v:g}"


def _panels(rows: int, found: Records, groups: dict, title: str) -> tuple[Any, Any]:
    """A figure with ``rows`` rows of axes and one column per dtype."""
    import matplotlib.pyplot as plt

    size = (WIDTH, 3.7 * rows if rows > 1 else 4.6)
    figure, axes = plt.subplots(rows, len(groups), figsize=size, squeeze=False, sharex="col", sharey="row", layout="constrained")
    figure.suptitle(f"{title}\n{found.machine}; {found.name}, commit {found.environment['commit']}", fontsize=11)
    for ax, dtype in zip(axes[0], groups, strict=True):
        ax.set_title(dtype, fontsize=11)
    return figure, axes


def _legend(figure: Any, axes: Any, crosses: bool) -> None:
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if crosses:
        import matplotlib.lines

        handles["not timed (see RESULTS.md)"] = matplotlib.lines.Line2D([], [], color="#555555", marker="x", linestyle="")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _crossed(groups: dict) -> bool:
    return any(r["status"] != "ok" for records in groups.values() for r in records)


def draw_classes(found: Records) -> Any:
    shared, groups = _sweep(found, "C")
    title = f"{shared['head']}, N={shared['N']:,}, D={shared['D']:,}: one step (forward and backward) against the number of classes C"
    figure, axes = _panels(2, found, groups, title)
    for column, records in enumerate(groups.values()):
        time, memory = axes[:, column]
        _lines(time, records, "C", "ms_p50")
        # Below a megabyte the measurement is noise, and a log axis has no zero.
        _lines(memory, [r | {"peak_mb": max(1.0, r["peak_mb"])} if r["status"] == "ok" else r for r in records], "C", "peak_mb")
        time.loglog()
        memory.loglog()
        for axis in (memory.xaxis, time.yaxis, memory.yaxis):
            _log_axis(axis)
        memory.set_xlabel("classes C")
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("peak MB beyond\ninputs and gradients")
    _legend(figure, axes, _crossed(groups))
    return figure


def draw_batch(found: Records) -> Any:
    shared, groups = _sweep(found, "N")
    title = f"{shared['head']}, D={shared['D']:,}, C={shared['C']:,}: useful TFLOP/s of a step (8NDC) against the batch size N"
    figure, axes = _panels(1, found, groups, title)
    for ax, (_, records) in zip(axes[0], groups.items(), strict=True):
        _lines(ax, records, "N", "tflops")
        products = [r["mm_tflops"] for r in records if r["status"] == "ok"]
        ax.axhline(max(products), color="black", linewidth=1, linestyle="--", label="matrix product, same run")
        ax.loglog()
        ns = sorted({r["N"] for r in records})
        ax.set_xticks(ns, [f"{n:,}" for n in ns])
        ax.xaxis.minorticks_off()
        _log_axis(ax.yaxis, (1, 2, 5))
        ax.set_xlabel("batch size N")
    axes[0, 0].set_ylabel("TFLOP/s")
    _legend(figure, axes, _crossed(groups))
    return figure


def intensity(r: dict) -> float:
    """Useful operations per byte that any implementation must move: the class centers (float32), read in both passes; their gradient,
    written once; the embeddings and their gradient."""
    item = 4 if r["dtype"] == "fp32" else 2
    return 8 * r["N"] * r["D"] * r["C"] / (12 * r["C"] * r["D"] + 3 * item * r["N"] * r["D"])


def draw_roofline(found: Records) -> Any:
    """Backends of this package with filled markers, two peers with hollow ones, at the largest D."""
    import numpy as np

    steps = [r for r in found.records if r["phase"] == "step" and r["status"] == "ok" and r["head"] == "arcface"]
    largest = max(r["D"] for r in steps)
    groups = {dtype: [r for r in steps if r["dtype"] == dtype and r["D"] == largest] for dtype in ("fp32", "bf16")}
    groups = {dtype: records for dtype, records in groups.items() if records}
    figure, axes = _panels(1, found, groups, f"Roofline of a step, D={largest:,}: useful TFLOP/s (8NDC) below the limits of the machine")
    bandwidth = found.environment["copy_gb_s"] / 1e3  # TB/s
    for ax, records in zip(axes[0], groups.values(), strict=True):
        peak = max(r["mm_tflops"] for r in records)
        at = np.array([intensity(r) for r in records])
        span = np.geomspace(at.min() / 2, max(at.max(), peak / bandwidth) * 2, 200)
        ax.plot(span, np.minimum(peak, span * bandwidth), color="black", linewidth=1.2)
        ax.annotate(f"matrix product {peak:.3g} TFLOP/s", (span[-1], peak), (-2, 4), textcoords="offset points", ha="right", fontsize=8)
        memory = f"copy {1e3 * bandwidth:,.0f} GB/s"
        ax.annotate(memory, (span[0], min(peak, span[0] * bandwidth)), (2, 6), textcoords="offset points", fontsize=8)
        sizes = sorted({r["C"] for r in records})
        for r in records:
            if not is_ours(r["provider"]) and r["provider"] not in SHOWN_PEERS:
                continue
            color = COLORS.get(r["provider"], "#999999")
            ax.plot(
                intensity(r),
                r["tflops"],
                marker="o^sDv"[min(sizes.index(r["C"]), 4)],
                markersize=7,
                markerfacecolor=color if is_ours(r["provider"]) else "none",
                markeredgecolor=color,
                linestyle="",
            )
        for name in dict.fromkeys(r["provider"] for r in records):
            color = COLORS.get(name, "#999999")
            if is_ours(name) or name in SHOWN_PEERS:
                ax.plot([], [], "o", color=color, markerfacecolor=color if is_ours(name) else "none", label=name)
        for i, c in enumerate(sizes):
            ax.plot([], [], "o^sDv"[min(i, 4)], color="#777777", markerfacecolor="none", label=f"C={c:,}")
        ax.loglog()
        _log_axis(ax.xaxis)
        _log_axis(ax.yaxis, (1, 2, 5))
        ax.set_ylim(top=3 * peak)
        ax.set_xlabel("useful FLOP per byte that must be moved, about 2N/3")
        ax.grid(True, which="major", alpha=0.35)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("TFLOP/s (8NDC)")
    _legend(figure, axes, False)
    return figure


DRAW = {"classes": draw_classes, "batch": draw_batch, "roofline": draw_roofline}
