"""The plots of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from .. import testing
from ..margins import BatchInfo
from .data import SIZE, Glyphs
from .train import Trained

STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
}
#: The numbers of identities and, at most, of renderings of each in the sheet of samples.
SHEET = (12, 20)


def style() -> AbstractContextManager[None]:
    """A context with the style of these plots."""
    return plt.style.context(STYLE)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure, close it, and give its path."""
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def samples(glyphs: Glyphs, path: Path, seed: int) -> Path:
    """Renderings of a few identities, one identity per row."""
    counts = np.bincount(glyphs.identities)
    rich = np.flatnonzero(counts >= np.partition(counts, -SHEET[0])[-SHEET[0] :].min() // 2)
    chosen = np.sort(np.random.default_rng(seed).permutation(rich)[: SHEET[0]])
    width = min(SHEET[1], counts[chosen].max())
    sheet = np.zeros((len(chosen) * SIZE, width * SIZE), dtype=np.uint8)
    for i, identity in enumerate(chosen):
        for j, image in enumerate(glyphs.images[glyphs.identities == identity][:width]):
            sheet[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = image
    figure, axes = plt.subplots(figsize=(width * 0.42, len(chosen) * 0.42))
    axes.imshow(255 - sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_title(f"{len(chosen)} of {len(glyphs.characters):,} identities, one per row, in the typefaces that have them")
    axes.set_axis_off()
    return save(figure, path)


def roc(runs: Sequence[Trained], path: Path) -> Path:
    """True accept rate by false accept rate for each head."""
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    for run in runs:
        far, tar = run.verification.roc()
        axes.semilogx(far.clamp_min(1e-7), tar, label=f"{run.head} ({run.verification.tar(1e-3):.3f} at 1e-3)")
    line = np.logspace(-6, 0, 200)
    axes.semilogx(line, line, color="0.6", linestyle=":", label="chance")
    axes.set(xlim=(1e-5, 1), ylim=(0, 1.01), xlabel="false accept rate", ylabel="true accept rate")
    axes.set_title("Verification of pairs of identities not seen in training")
    axes.legend(loc="lower right")
    return save(figure, path)


def angles(run: Trained, path: Path) -> Path:
    """Histograms of the angles between embeddings and their class centers, at the start, in the middle and at the end of training."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    bins = np.linspace(0, 120, 121).tolist()
    for (when, values), color in zip(run.target_angles.items(), ("0.55", "C1", "C0"), strict=True):
        axes.hist(values, bins, color=color, alpha=0.6, histtype="stepfilled", label=f"{when}: median {np.median(values):.0f} degrees")
    axes.set(xlim=(0, 120), xlabel="angle between an embedding and its class center (degrees)", ylabel="images")
    axes.set_title(f"{run.head}: training images approach their class centers")
    axes.legend()
    return save(figure, path)


def losses(runs: Sequence[Trained], path: Path) -> Path:
    """Training losses, and their differences to the eager reference."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.5, 5.5), sharex=True, height_ratios=(3, 2), gridspec_kw={"hspace": 0.35})
    for run in runs:
        steps = np.arange(1, len(run.losses) + 1)
        window = max(1, len(steps) // 50)
        smooth = np.convolve(run.losses, np.ones(window) / window, mode="valid")
        if len(runs) == 1:
            above.plot(steps, run.losses, color="C0", alpha=0.25, linewidth=0.8)
        above.plot(steps[: len(smooth)] + (window - 1) / 2, smooth, label=run.head)
        below.plot(np.add(list(run.differences), 1), list(run.differences.values()), ".", markersize=3)
    above.set(ylabel="loss", ylim=(0, None))
    above.set_title("Training loss" + (f", mean of {window} steps" if window > 1 else ""))
    above.legend()
    epsilon = float(np.finfo(np.float32).eps)
    below.axhline(epsilon, color="0.5", linestyle=":", linewidth=1, label="float32 epsilon")
    below.legend()
    below.set_ylim(0, 1.25 * max(epsilon, *(max(run.differences.values()) for run in runs)))
    below.set(xlabel="step", ylabel="|fused - eager| / eager")
    below.set_title("Difference to the eager reference with the same weights")
    return save(figure, path)


def target_logits(num_classes: int, path: Path) -> Path:
    """T(cos theta) and its slope for every head with its default margin; heads with the same curves share a line."""
    theta = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
    cos = theta.cos()
    unit = torch.ones(len(theta), 1, dtype=torch.float64)
    groups: list[tuple[torch.Tensor, torch.Tensor, list[str]]] = []
    for name, make in testing.HEADS.items():
        margin = make(num_classes)
        margin.bind(num_classes)
        margin.eval()
        with torch.no_grad():
            value, slope = margin.target(cos, BatchInfo(unit, torch.zeros(len(theta), dtype=torch.int64), num_classes))
        for known_value, known_slope, members in groups:
            if torch.allclose(value, known_value, atol=1e-3) and torch.allclose(slope, known_slope, atol=1e-3):
                members.append(name)
                break
        else:
            groups.append((value, slope, [name]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    colors = plt.get_cmap("tab20")
    for i, (value, slope, members) in enumerate(groups):
        style = {"color": colors(i % 20), "linestyle": ("-", "--", "-.")[i % 3], "linewidth": 4 - 2.8 * i / len(groups)}
        left.plot(torch.rad2deg(theta), value, label="\n".join(_wrapped(members)), **style)
        right.plot(torch.rad2deg(theta), slope, **style)
    for axes in (left, right):
        axes.set(xlim=(0, 180), xticks=range(0, 181, 30), xlabel="angle to the target class center (degrees)")
    left.set(ylim=(-3, 1.05), ylabel="T, before the scale")
    left.set_title("Target logit T")
    right.set(ylim=(-0.5, 5), ylabel="dT / dcos")
    right.set_title("Slope of T, a factor of the gradient")
    figure.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=8)
    return save(figure, path)


def _wrapped(names: Sequence[str], width: int = 34) -> list[str]:
    lines = [names[0]]
    for name in names[1:]:
        if len(lines[-1]) + len(name) + 2 <= width:
            lines[-1] += f", {name}"
        else:
            lines[-1] += ","
            lines.append(name)
    return lines
