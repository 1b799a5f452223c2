"""The curves of the documentation, drawn from the package's own margins: ``python docs/figures.py`` writes ``docs/figures/*.svg``.

Drawn without a plotting library, so that a file changes only where a curve does, and follows the reader's light or dark colors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import marginkernels as mk

FOLDER = Path(__file__).with_name("figures")
DEGREES = torch.arange(0, 181, dtype=torch.float64)
#: The classes that the gradients are drawn for; the others' centers stand at a right angle to the embedding.
CLASSES = 1_000_000

#: Legible on white and on black.
COLORS = ("#3b82f6", "#ef6c00", "#16a34a", "#d946ef", "#0d9488", "#b45309")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.paper { fill: #ffffff } .grid { stroke: #d0d7de } .axis { stroke: #57606a } .name { font-weight: 600 }
path { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .paper { fill: #131416 } .grid { stroke: #363b42 } .axis { stroke: #9198a1 }
}
"""
WIDTH, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 470, 44, 30, 400, 210


class Panel(NamedTuple):
    """One diagram over the angle: its title, the range of its values, the distance of its ticks, and a value (181,) for each curve."""

    title: str
    low: float
    high: float
    tick: float
    curves: list[Tensor]


class Named(NamedTuple):
    """A margin, under the name that the legend gives it; the norm of the embeddings; and the margins whose targets have the same curve."""

    name: str
    margin: mk.Margin
    norm: float = 1.0
    alike: tuple[mk.Margin, ...] = ()


def target(margin: mk.Margin, norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """(181,) value and slope of the target logit before the scale, at each degree between embedding and class center."""
    margin = margin.eval()
    margin.bind(CLASSES)
    rows = torch.full((len(DEGREES), 1), norm, dtype=torch.float64)
    labels = torch.zeros(len(DEGREES), dtype=torch.int64)
    with torch.no_grad():
        value, slope = margin.target(DEGREES.deg2rad().cos(), mk.BatchInfo(rows, labels, CLASSES))
    return value, torch.as_tensor(slope, dtype=torch.float64).expand_as(value)


def gradient(margin: mk.Margin, scale: float) -> Tensor:
    """(181,) how strongly a row is turned towards its center, ``|dL / dtheta|``."""
    value, slope = target(margin)
    doubt = torch.sigmoid(math.log(CLASSES - 1) - scale * value)  # 1 - p: the other logits are all 0
    return scale * doubt * (slope * DEGREES.deg2rad().sin()).abs()


def targets(named: list[Named], low: float, high: float) -> tuple[list[str], list[Panel]]:
    """Target logits from ``low`` to 1, above their slopes from 0 to ``high``."""
    values, slopes = zip(*(target(n.margin, n.norm) for n in named), strict=True)
    above = Panel("Target logit T, before the scale", low, 1, 1 if low < -2 else 0.5, list(values))
    return [n.name for n in named], [above, Panel("Slope dT / dcos, a factor of the gradient", 0, high, high / 4, list(slopes))]


def pulls(named: list[Named], scales: list[float]) -> tuple[list[str], list[Panel]]:
    """Gradients; the highest of them sets the range."""
    curves = [gradient(n.margin, scale) for n, scale in zip(named, scales, strict=True)]
    high = 16 * math.ceil(max(float(c.max()) for c in curves) / 16)
    return [n.name for n in named], [Panel("|dL / d angle|, one million classes", 0, high, high / 4, curves)]


def adaface() -> mk.AdaFace:
    """AdaFace in the middle of a training run: norms of 20 on average, with a standard deviation of 5."""
    margin = mk.AdaFace()
    margin.norm_mean.fill_(20.0)
    margin.norm_std.fill_(5.0)
    return margin


#: What the figures show. Every margin of the package is in one of the first four.
NORMFACE = Named("NormFace; Softmax, L2Softmax, AdaCos", mk.NormFace(), alike=(mk.Softmax(), mk.L2Softmax(), mk.AdaCos(CLASSES)))
COSFACE = Named("CosFace 0.35; MVSoftmax am", mk.CosFace(), alike=(mk.MVSoftmax("am", margin=0.35),))
ARCFACE = Named("ArcFace 0.5; CurricularFace", mk.ArcFace(), alike=(mk.CurricularFace(),))
ADDITIVE = [
    NORMFACE,
    COSFACE,
    ARCFACE,
    Named("ElasticFace 0.5, its mean; MVSoftmax arc", mk.ElasticFace(std=0.0), alike=(mk.MVSoftmax("arc"),)),
    Named("CombinedMargin 0.9, 0.4, 0.15", mk.CombinedMargin(m1=0.9, m2=0.4, m3=0.15)),
    Named("InterTopK 0.2", mk.InterTopK()),
]
MULTIPLICATIVE = [
    NORMFACE,
    Named("SphereFace 2", mk.SphereFace(2)),
    Named("SphereFace 4, LSoftmax 4", mk.SphereFace(4), alike=(mk.LSoftmax(4),)),
    Named("SphereFaceR v0, 1.5", mk.SphereFaceR()),
    Named('SphereFaceR v0, 1.5, gradient="exact"', mk.SphereFaceR(gradient="exact")),
]
NORMS = [
    Named("AdaFace, a poor image (norm 1)", adaface(), 1.0),
    Named("AdaFace, an average one (norm 20)", adaface(), 20.0),
    Named("AdaFace, a good one (norm 40)", adaface(), 40.0),
    Named("MagFace, norm 10", mk.MagFace(), 10.0),
    Named("MagFace, norm 110", mk.MagFace(), 110.0),
]
WEIGHTED = [
    NORMFACE,
    Named("Circle 0.25", mk.Circle()),
    Named("SphereFace2 0.4", mk.SphereFace2(CLASSES)),
    Named("UniFace 0.4", mk.UniFace(CLASSES)),
]
BEYOND = [Named(f'beyond_pi="{rule}"', mk.ArcFace(beyond_pi=rule)) for rule in ("linear", "continuous", "clip", "easy", "none")]
PULLS = [NORMFACE, COSFACE, ARCFACE, Named('ArcFace 0.5, gradient="detached"', mk.ArcFace(gradient="detached"))]
SCALES = [16.0, 32.0, 64.0]

FIGURES: dict[str, Callable[[], tuple[list[str], list[Panel]]]] = {
    "additive": lambda: targets(ADDITIVE, -2, 2),
    "multiplicative": lambda: targets(MULTIPLICATIVE, -7, 16),
    "norms": lambda: targets(NORMS, -2, 2),
    "weighted": lambda: targets(WEIGHTED, -3, 2.4),
    "beyond-pi": lambda: targets(BEYOND, -1.5, 2),
    "gradients": lambda: pulls(PULLS, [64.0] * len(PULLS)),
    "scales": lambda: pulls([Named(f"NormFace, scale {s:g}", mk.NormFace(s)) for s in SCALES], SCALES),
}


def place(panel: Panel, degrees: float, value: float, top: float) -> tuple[float, float]:
    """Where a point lies in the picture; a value beyond the range lies on its edge."""
    share = (min(max(value, panel.low), panel.high) - panel.low) / (panel.high - panel.low)
    return LEFT + PLOT_WIDTH * degrees / 180, top + PLOT_HEIGHT * (1 - share)


def diagram(panel: Panel, top: float) -> list[str]:
    """The lines of one panel, whose plot begins at ``top``."""
    found = [f'<text class="name" x="{LEFT}" y="{top - 10:g}">{panel.title}</text>']
    for i in range(round((panel.high - panel.low) / panel.tick) + 1):
        value = panel.low + i * panel.tick
        _, y = place(panel, 0, value, top)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for degrees in range(0, 181, 30):
        x, y = place(panel, degrees, panel.low, top)
        found.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
        found.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{degrees}&#176;</text>')
    for i, curve in enumerate(panel.curves):
        points = [place(panel, float(d), float(v), top) for d, v in zip(DEGREES, curve, strict=True)]
        line = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        found.append(f'<path stroke="{COLORS[i]}"{dashes(i)} d="M{line}"/>')
    return found


def dashes(i: int) -> str:
    """Every second curve is dashed, so that one under another shows."""
    return ' stroke-dasharray="7 4"' if i % 2 else ""


def drawn(names: list[str], panels: list[Panel]) -> str:
    """A figure as SVG: the panels one below the other, and the legend under them."""
    step = PLOT_HEIGHT + 62
    height = TOP + step * len(panels) + 20 * len(names)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">']
    lines += [f"<style>{STYLE}</style>", f'<rect class="paper" width="{WIDTH}" height="{height}"/>']
    for i, panel in enumerate(panels):
        lines += diagram(panel, TOP + step * i)
    bottom = TOP + step * len(panels) - 10
    lines.append(f'<text x="{LEFT + PLOT_WIDTH / 2:g}" y="{bottom - 14}" text-anchor="middle">angle to the own class center</text>')
    for i, name in enumerate(names):
        y = bottom + 6 + 20 * i
        lines.append(f'<path stroke="{COLORS[i]}"{dashes(i)} d="M{LEFT} {y} h34"/>')
        lines.append(f'<text x="{LEFT + 44}" y="{y + 4}">{name.replace(chr(34), "&quot;")}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(drawn(*figure()))


if __name__ == "__main__":
    main()
