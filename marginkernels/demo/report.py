"""What a run of the demo found, as text for the terminal and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli._text import table

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --paper: #ffffff; --line: #d0d7de; --faint: #59636e }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --paper: #0d1117; --line: #3d444d; --faint: #9198a1 } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper) }
h1, h2 { line-height: 1.25 }
h2 { font-size: 1.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th.text, td.text { text-align: left }
p.note, figcaption { color: var(--faint); font-size: 0.9rem }
figure { margin: 1.5rem 0 }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Table(NamedTuple):
    """A table of the report.

    Attributes:
        title: a sentence or its beginning.
        header, rows: cells as they are shown.
        text: the columns that hold words, flush left.
        note: what explains it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int]
    note: str


def tables(results: Mapping[str, Any], fars: Sequence[float]) -> list[Table]:
    """How well each head verifies, and what its step costs; ``results`` is what ``results.json`` holds."""
    quality = [
        [
            r["head"],
            *(f"{r['tar'][f'{far:g}']:.1%}" for far in fars),
            f"{r['rank1']:.1%}",
            f"{r['top1']:.1%}",
            f"{r['loss']:.3f}",
            f"{r['largest_difference']:.1e}",
            f"{r['seconds']:.0f} s",
        ]
        for r in results["heads"]
    ]
    costs = [
        [
            str(c["n"]),
            f"{c['c']:,}",
            c["kind"],
            f"{1e3 * c['seconds']:.1f} ms",
            "-" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**20:.1f} MiB",
        ]
        for c in results["costs"]
    ]
    unseen, (first, checked) = results["data"]["unseen"]["identities"], (results["heads"][0][k] for k in ("head", "checked_steps"))
    return [
        Table(
            f"Verification on {unseen:,} identities not seen in training: true accept rate at a false accept rate of ...",
            ["head", *(f"{far:g}" for far in fars), "rank-1", "train top-1", "loss", "fused vs. eager", "time"],
            quality,
            [0],
            "rank-1: the nearest other image shows the same character; "
            f"fused vs. eager: largest relative difference of a step's loss, of {checked:,} steps",
        ),
        Table(
            f"Loss and gradients of the {first} head in float32, fused and in eager PyTorch, timed in turn",
            ["batch", "classes", "", "median time", "peak memory"],
            costs,
            [2],
            "peak memory: beyond inputs and class centers, including the gradients of both",
        ),
    ]


def unusual(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each head whose settings are not the usual ones."""
    return [r["unusual"] for r in results["heads"] if r["unusual"]]


def as_text(results: Mapping[str, Any], fars: Sequence[float]) -> str:
    """For the terminal."""
    parts = []
    for t in tables(results, fars):
        right = [i for i in range(len(t.header)) if i not in t.text]
        parts += [f"{t.title}\n{table(t.header, t.rows, right=right)}\n({t.note})"]
    return "\n\n".join([parts[0], *(["\n".join(unusual(results))] if unusual(results) else []), *parts[1:]])


def as_page(results: Mapping[str, Any], fars: Sequence[float], pictures: Sequence[Path]) -> str:
    """One page of HTML, also well-formed XML: the tables, the pictures within it, and the settings."""
    trained, unseen, versions = results["data"]["train"], results["data"]["unseen"], results["versions"]
    names = ", ".join(r["head"] for r in results["heads"])
    parts = [
        f"<h1>Demo: {_escaped(names)}</h1>",
        f"<p>A small network, trained on {trained['images']:,} images of {trained['identities']:,} characters in "
        f"{results['data']['typefaces']} typefaces, and verified on {unseen['images']:,} images of {unseen['identities']:,} others.</p>",
    ]
    found = tables(results, fars)
    parts += [_table(found[0]), *(f"<p>{_escaped(text)}</p>" for text in unusual(results)), *(_table(t) for t in found[1:])]
    parts.append("<h2>Pictures</h2>")
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        name = _escaped(path.stem)
        parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"/><figcaption>{name}</figcaption></figure>')
    settings = {"backend": results["backend"], "device": results["device"], **results["settings"], **versions}
    rows = [[name, str(value)] for name, value in settings.items() if value is not None]
    parts.append(_table(Table("Settings", ["", ""], rows, [0, 1], "All numbers, each step's loss included: results.json")))
    title, body = f"marginkernels demo: {_escaped(names)}", "\n".join(parts)
    return PAGE.format(title=title, style=STYLE, body=body)


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _table(t: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        kinds = [' class="text"' if i in t.text else "" for i in range(len(cells))]
        return f"<tr>{''.join(f'<{kind}{k}>{_escaped(v)}</{kind}>' for k, v in zip(kinds, cells, strict=True))}</tr>"

    head = f"<thead>{row(t.header, 'th')}</thead>" if any(t.header) else ""
    body = f"<tbody>{''.join(row(cells, 'td') for cells in t.rows)}</tbody>"
    title, note = _escaped(t.title), _escaped(t.note)
    return f'<h2>{title}</h2>\n<div class="wide"><table>{head}{body}</table></div>\n<p class="note">{note}</p>'
