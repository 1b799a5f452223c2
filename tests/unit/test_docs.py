"""README and docs: tables come from the code and the records, examples run, links and names lead somewhere.

``python tests/unit/test_docs.py`` writes the tables anew.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers, where this runs as a program
sys.path.insert(0, str(Path(__file__).parents[2]))  # and for benchmarks

from helpers import stand_ins
from helpers.pages import DOCS, README, ROOT, blocks, data, small

import benchmarks.__main__
import marginkernels as mk
import marginkernels.__main__
from benchmarks.peers import PEERS
from benchmarks.records import Records, fastest
from marginkernels import _deprecated, margins, testing
from marginkernels.backend import FUSED, registry
from marginkernels.cli import plan
from marginkernels.cli._gpus import GPUS, INSIGHTFACE
from marginkernels.cli._libraries import LIBRARIES
from marginkernels.core.numerics import CHUNK_ELEMENTS

#: Pages that a reader sees; the first two kinds have tables and examples.
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEMPLATES = sorted((ROOT / ".github").glob("**/*template*")) + sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
RESULTS = ROOT / "benchmarks" / "results"
MOST_LINES = 120


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def table(header: str, rows: list[tuple]) -> str:
    """Markdown; a column whose header ends in ``>`` is flush right."""
    columns = [c.strip() for c in header.split("|")]
    rule = ["---:" if c.endswith(">") else "---" for c in columns]
    lines = [[c.rstrip("> ") for c in columns], rule, *([str(v) for v in row] for row in rows)]
    return "\n".join("|" + "|".join(line) + "|" if line is rule else f"| {' | '.join(line)} |" for line in lines)


# -- the tables ------------------------------------------------------------------------------------------------------------------


#: Margins that need an argument, or have state only with one.
MADE = {
    mk.AdaCos: lambda: mk.AdaCos(10),
    mk.SphereFace: lambda: mk.SphereFace(annealing=True),
    mk.SphereFace2: lambda: mk.SphereFace2(10),
    mk.UniFace: lambda: mk.UniFace(10),
}


def heads_table(page: Path) -> str:
    rows = []
    for cls in margins.ALL:
        signature = inspect.signature(cls)
        shown = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "focal_gamma"]
        plain = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in shown]
        first = re.split(r"\s\(\w+ et al|\n\n", inspect.getdoc(cls) or "")[0].replace("\n", " ").rstrip(".")
        first = first.replace("``", "`").replace("|", r"\|")
        made = MADE.get(cls, cls)()
        state = ", ".join(f"`{name}`" for name, _ in made.named_buffers())
        if cls is mk.L2Softmax:
            state = "`alpha`, if trainable"
        elif not state:
            state = ", ".join(f"`{name}`, trained" for name, _ in made.named_parameters())
        rows.append((f"`{cls.__name__}{inspect.Signature(plain)}`", first, made.non_target.label, state or "-"))
    return table("Margin | What it is | Non-target logits | State", rows)


def backends_table(page: Path) -> str:
    rows = [("`reference`", registry.REFERENCE_NOTE, "any float", "no, it has to be named")]
    for b in FUSED.values():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        rows.append((f"`{b.name}`", b.summary, dtypes, "yes" if b.tested_on else "where a record verifies it"))
    return table("Backend | What it is | Dtypes | `auto` may take it", rows)


def tolerances_table(page: Path) -> str:
    rows = [(str(dtype).removeprefix("torch."), f"{v:.0e}") for dtype, v in testing.TOLERANCE.items()]
    return table("Embeddings | Relative error, at most >", rows)


def link(page: Path, target: Path) -> str:
    return f"[{target.name}]({os.path.relpath(target, page.parent)})"


def measured_table(page: Path) -> str:
    """The headline case of the committed record, every provider that was timed on it."""
    record = Records.read(RESULTS / "cpu-full.json")
    by_dtype = [record.cases["arcface", dtype, "step", 256, 512, 100_000] for dtype in ("fp32", "bf16")]
    where, base = record.environment, "torch.compile"
    rows = []
    for name in sorted(by_dtype[0], key=lambda name: by_dtype[0][name]["ms_p50"] or 1e9):
        found = [case.get(name) for case in by_dtype]
        if not any(r and r["ms_p50"] for r in found):
            continue
        cells = []
        for r, case in zip(found, by_dtype, strict=True):
            cells += [f"{r['ms_p50']:.0f}", f"{case[base]['ms_p50'] / r['ms_p50']:.2f}x"] if r and r["ms_p50"] else ["-", "-"]
        memory = " / ".join(f"{r['peak_mb']:.0f}" if r and r["peak_mb"] else "-" for r in found)
        rows.append((f"**{name}**" if name == "marginkernels-cpu" else name, *cells, memory))
    about = (
        f"A step (forward and backward) of an ArcFace head, N = 256, D = 512, C = 100,000, on {where['threads']} cores of {where['cpu']}, "
        f"torch {where['torch']};\nfrom {link(page, RESULTS / record.name)}, made by "
        "`python -m benchmarks run --device cpu --preset full`.\nMemory is what a step takes beyond inputs and gradients; `-recompute` is "
        "`workspace_mb=0`.\n\n"
    )
    header = "Provider | float32, ms > | against torch.compile > | bfloat16, ms > | against torch.compile > | memory fp32 / bf16, MB >"
    return about + table(header, rows)


def milliseconds(v: float) -> str:
    return f"{v:,.0f}" if v >= 100 else f"{v:.3g}"


def steps_table(page: Path) -> str:
    """Of each committed record of a CPU: what a user gets, beside the fastest peer."""
    ours, lines, rows = "marginkernels-cpu", [], []
    for path in (RESULTS / f"{name}.json" for name in ("cpu-full", "cpu-classes", "cpu-amx")):
        record = Records.read(path)
        about = record.environment
        lines.append(f"- {link(page, path)}: {record.machine}; torch {about['torch']}, commit {about['commit']}, {about['time'][:10]}")
        for key in sorted(record.cases, key=lambda key: (key[1] != "fp32", key[5], key[3])):
            head, dtype, phase, n, d, c = key
            case = record.cases[key]
            if (head, phase, d) != ("arcface", "step", 512) or n not in (32, 256) or ours not in case:
                continue
            peer = fastest(case, ours=False)
            mine = case[ours]["ms_p50"]
            if mine and peer:
                times = milliseconds(mine), f"{milliseconds(peer['ms_p50'])} ({peer['provider']})"
                rows.append((path.stem, dtype, n, f"{c:,}", *times, f"{peer['ms_p50'] / mine:.2f}x"))
    header = f"Record | dtype | N > | C > | {ours}, ms > | fastest peer, ms > | its time over ours >"
    return "\n".join(lines) + "\n\n" + table(header, rows)


def peers_table(page: Path) -> str:
    rows = [(f"`{p.name}`", p.note, ", ".join(p.heads), ", ".join(p.device_types)) for p in PEERS]
    return table("Provider | What it is | Heads | Devices", rows)


def scaling_table(page: Path) -> str:
    record = json.loads((RESULTS / "scaling" / "scaling.json").read_text())["measured"]
    rows = [
        (
            f"{r['classes']:,}",
            f"{r['sample_rate']:g}",
            r["ranks"],
            f"{r['peak_bytes'] / 1e6:.0f} ({r['planned_peak_bytes'] / 1e6:.0f})",
            f"{r['received_bytes'] / 1e3:.1f} ({r['planned_received_bytes'] / 1e3:.1f})",
        )
        for r in sorted(record, key=lambda r: (r["classes"], -r["sample_rate"], r["ranks"]))
    ]
    (dim,), (batch,) = ({r[name] for r in record} for name in ("dim", "batch"))
    about = (
        f"On CPU ranks, D = {dim}, {batch} rows on each, float32, SGD with momentum. In brackets the planner's figure, which allows up to\n"
        f"{6 * 4 * CHUNK_ELEMENTS / 1e6:.0f} MB for the chunks of logits that the `torch` backend needs and kernels do not.\n\n"
    )
    header = "Classes > | sample rate > | ranks > | peak memory of a rank, MB > | received by a rank in a step, kB >"
    return about + table(header, rows)


def sampling_table(page: Path) -> str:
    runs = json.loads((RESULTS / "scaling" / "sampling_glyphs.json").read_text())["runs"]
    rates = [name for name in runs[0] if name.startswith("TAR")]
    rows = []
    for rate, log_q in dict.fromkeys((r["sample_rate"], r["log_q"]) for r in runs):
        same = [r for r in runs if (r["sample_rate"], r["log_q"]) == (rate, log_q)]
        cells = []
        for name in rates:
            found = [r[name] for r in same]
            spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{sum(found) / len(found):.3f}{spread}")
        rows.append((f"{rate:g}", "yes" if log_q else "no", len(same), *cells))
    one = runs[0]
    about = (
        f"Trained on {one['identities']:,} characters as identities, verified on {one['verified_on']} others ({one['steps']} steps of "
        f"{one['batch']} rows on {one['ranks']} CPU ranks).\nThe mean over seeds, and the range.\n\n"
    )
    return about + table(f"Sample rate > | log-q | seeds > | {' | '.join(name + ' >' for name in rates)}", rows)


def whole_steps_table(page: Path) -> str:
    path = RESULTS / "fused_step" / "train.json"
    found = json.loads(path.read_text())
    cases: dict[tuple, dict[str, dict]] = {}
    for r in found["records"]:
        cases.setdefault((r["C"], r["N"], r["dtype"]), {})[r["provider"]] = r
    names = list(next(iter(cases.values())))
    separate, fused = "separate step", "fused step"

    def cell(r: dict) -> str:
        return f"{r['ms_p50'] / 1e3:.2f} s, {r['peak_mb'] / 1e3:.2f} GB" if r["status"] == "ok" else r["status"]

    rows = []
    for (c, n, dtype), case in sorted(cases.items()):
        gain = f"{case[separate]['ms_p50'] / case[fused]['ms_p50']:.2f}x"
        rows.append((f"{c:,}", n, dtype, *(cell(case[name]) for name in names), gain))
    where, (dim,) = found["environment"], {r["D"] for r in found["records"]}
    about = (
        f"SGD with momentum and weight decay, ArcFace, D = {dim}, on {where['threads']} cores of {where['cpu']}, torch {where['torch']}; "
        f"from {link(page, path)},\nmade by `python -m benchmarks train --rounds 2`. The median time of a whole step (forward, "
        "backward, optimizer), and the peak memory\nbeyond the process before it had class centers: centers, gradient, moments, rows.\n\n"
    )
    return about + table(f"C > | N > | embeddings | {' | '.join(name + ' >' for name in names)} | separate over fused >", rows)


def precision_table(page: Path) -> str:
    path = RESULTS / "fused_step" / "precision.json"
    runs = json.loads(path.read_text())["records"]
    titles = {"fp32": "float32", "bf16": "bfloat16, rounded at random", "bf16-nearest": "bfloat16, to nearest"}
    rates = list(runs[0]["tar"])

    def cell(values: list[float], form: str = ".2%") -> str:
        return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    rows = []
    for kind in dict.fromkeys(r["kind"] for r in runs):
        same = [r for r in runs if r["kind"] == kind]
        shares = (*([r["tar"][rate] for r in same] for rate in rates), [r["rank1"] for r in same])
        rows.append((titles[kind], len(same), cell([r["loss"] for r in same], ".3f"), *map(cell, shares)))
    one = runs[0]
    about = (
        f"The demo's network and its {one['head']} head, {one['steps']:,} steps of {one['batch']} rows of rendered characters, "
        f"{one['identities']:,} identities; verified on {one['verified_on']:,} others;\nfrom {link(page, path)}, made by "
        "`python -m benchmarks precision`. The mean over seeds, and the range.\n\n"
    )
    header = " | ".join(f"true accept rate at {float(rate):.2%} false accepts >" for rate in rates)
    return about + table(f"Class centers and moments | seeds > | training loss > | {header} | rank-1 >", rows)


#: GPUs and million classes, each with and without sampling; everything else is the planner's default.
PLANNED = ((1, 1), (8, 1), (8, 10), (8, 30), (16, 30), (64, 30), (64, 100))


def planned_for(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(words)


def planned_table(page: Path) -> str:
    def arguments(gpus: int, millions: int, rate: float) -> argparse.Namespace:
        return planned_for(f"--gpus={gpus}", f"--classes={millions}e6", f"--sample-rate={rate}", "--reserve=0")

    rows = []
    for gpus, millions in PLANNED:
        for rate in (1.0, 0.1):
            p = plan.plan(arguments(gpus, millions, rate))
            memory, received, seconds = (sum(p[part].values()) for part in ("bytes", "exchanged", "seconds"))
            cells = (f"{memory / 1e9:.2f}", f"{received / 1e6:.2f}", f"{p['flops'] / 1e12:.2f}", f"{1e3 * seconds:.1f}")
            rows.append((f"{p['classes']:,}", gpus, f"{rate:g}", *cells))
    a = arguments(1, 1, 1.0)
    about = (
        f"D = {a.dim}, {a.batch} rows on each GPU, {a.weight} centers, {a.embedding} embeddings, {a.optimizer}, without the backbone. The "
        f"time assumes {a.rate:g} TFLOP/s,\n{a.bandwidth:g} GB/s of memory and {a.link:g} GB/s of link, nothing overlapping.\n\n"
    )
    header = "Classes > | GPUs > | sample rate > | memory of a GPU, GB > | received in a step, MB > | TFLOP of a GPU > | step, ms >"
    return about + table(header, rows)


def gpus_table(page: Path) -> str:
    rows = [
        (f"`{name}`", g.title, *(f"{v:g}" for v in (g.memory, g.rate, g.bandwidth, g.link)), g.by, g.source) for name, g in GPUS.items()
    ]
    return table("`--gpu` | GPU | GB > | TFLOP/s > | memory, GB/s > | link, GB/s > | by | Source", rows)


#: Of the planner's options, those that a table shows: sample rate, dtype of the centers, whether the step is fused.
MODES = ((1.0, "fp32", False), (1.0, "fp32", True), (1.0, "bf16", True), (0.1, "fp32", False), (0.1, "bf16", True))


def modes_table(page: Path) -> str:
    """The most identities of the published table on eight of each kind of GPU."""
    rows = []
    for name, gpu in GPUS.items():
        asked = planned_for(f"--gpu={name}", f"--classes={max(INSIGHTFACE)}")
        found = {(o["sample_rate"], o["weight"], o["fused_step"]): o for o in plan.plan(asked)["options"] if o["optimizer"] == "sgd"}
        cells = (found[mode] for mode in MODES)
        rows.append((gpu.title, *(f"{1e3 * o['least_seconds']:.1f}" if o["fits"] else f"no: {o['bytes'] / 1e9:.1f} GB" for o in cells)))
    heads = (f"{weight}{', fused step' * fused}{', sample rate 0.1' * (rate < 1)} >" for rate, weight, fused in MODES)
    about = (
        f"{max(INSIGHTFACE):,} identities on eight GPUs: at least so many milliseconds, or the memory of each where it does not "
        f"fit. SGD with momentum,\nD = {asked.dim}, {asked.batch} rows on each, {asked.reserve:g} GB of each for the backbone.\n\n"
    )
    return about + table(f"GPU | {' | '.join(heads)}", rows)


def published_table(page: Path) -> str:
    asked = planned_for("--gpu=v100", "--classes=1", "--embedding=fp16", "--published")
    rows = [plan.published_cells(row) for row in plan.published(asked)]
    return f"{plan.about_published(asked)}\n\n" + table(" | ".join(f"{name} >" for name in plan.PUBLISHED_HEADER), rows)


def listed(items: tuple[str, ...]) -> str:
    return "\n".join(
        textwrap.fill(f"- {text}", 140, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for text in items
    )


def page_of(library: str) -> str:
    return f"switching-{library.replace('_', '-')}.md"


def switching_table(page: Path) -> str:
    rows = []
    for key, library in LIBRARIES.items():
        names = dict.fromkeys(name for some in library.sources.values() for name in some)
        has = ", ".join(f"`{name}`" for name in names)
        rows.append((f"[{library.title}]({page_of(key)})", f"`marginkernels.compat.{library.shim}`", has))
    return table("Library | Module | What it has", rows)


def command_table(command: str) -> str:
    """The options of a command; none of their texts may depend on the machine."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"marginkernels.{marginkernels.__main__.COMMANDS[command][0]}").add_arguments(parser)
    rows = []
    for action in parser._actions[1:]:
        about = (action.help or "") % {**vars(action), "prog": command}
        if action.choices and action.metavar is None:
            about += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
        value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
        rows.append((f"`{(action.option_strings or [action.dest])[-1]}{value}`", about.replace("|", r"\|")))
    return table("Option | What it does", rows)


TABLES = {
    **{f"command_{name}": (lambda page, name=name: command_table(name)) for name in marginkernels.__main__.COMMANDS},
    "switching": switching_table,
    **{f"same_{key}": (lambda page, library=library: listed(library.same)) for key, library in LIBRARIES.items()},
    **{f"differs_{key}": (lambda page, library=library: listed(library.numbers + library.otherwise)) for key, library in LIBRARIES.items()},
    "heads": heads_table,
    "backends": backends_table,
    "tolerances": tolerances_table,
    "measured": measured_table,
    "steps": steps_table,
    "peers": peers_table,
    "scaling": scaling_table,
    "sampling": sampling_table,
    "planned": planned_table,
    "whole_steps": whole_steps_table,
    "precision": precision_table,
    "gpus": gpus_table,
    "modes": modes_table,
    "published": published_table,
}
MARKED = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


def written(page: Path) -> str:
    """The page with its tables as they should be."""
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]](page)}\n{m[4]}", page.read_text())


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_tables_are_fresh(page):
    assert page.read_text() == written(page), f"{name_of(page)} has a stale table: run python tests/unit/test_docs.py"


def test_every_table_is_shown_once():
    shown = [m[2] for page in PAGES for m in MARKED.finditer(page.read_text())]
    assert sorted(shown) == sorted(TABLES)


# -- the examples ----------------------------------------------------------------------------------------------------------------


def test_every_library_has_a_page():
    assert {page_of(key) for key in LIBRARIES} == {path.name for path in DOCS if path.name.startswith("switching-")}
    for key in LIBRARIES:
        text = (ROOT / "docs" / page_of(key)).read_text()
        assert all(f"<!-- {kind}_{key} -->" in text for kind in ("same", "differs"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if blocks(page, "python")], ids=name_of)
def test_examples_run(page, tmp_path):
    """Every Python block of a page, in one namespace; those marked ``# needs:`` where it is there."""
    space: dict = {"__name__": "example"}
    ran = 0
    for code in blocks(page, "python"):
        needs = re.match(r"# needs: (.*)", code)
        if needs and needs[1] == "pytorch-metric-learning" and importlib.util.find_spec("pytorch_metric_learning") is None:
            continue
        stands = needs and needs[1] in stand_ins.LIBRARIES
        assert not needs or stands or needs[1] in ("pytorch-metric-learning", "torch.distributed"), needs[1]
        space |= data(tmp_path)
        ranks = needs and needs[1] == "torch.distributed"
        if ranks:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            with stand_ins.compat(needs[1]) if stands else contextlib.nullcontext():
                exec(compile(small(code), name_of(page), "exec"), space)
        finally:
            if ranks:
                dist.destroy_process_group()
        ran += 1
        for name, v in space.items():
            held = v.state_dict() if isinstance(v, torch.nn.Module) else {"": v, "gradient": getattr(v, "grad", None)}
            for key, u in held.items():
                if isinstance(u, torch.Tensor) and u.is_floating_point() and not u.is_meta:
                    assert u.isfinite().all(), (name, key)
    assert ran > 0


def own_margins() -> dict[str, type[mk.Margin]]:
    found: dict[str, type[mk.Margin]] = {}
    for page in (README, *DOCS):
        for code in blocks(page, "python"):
            if "(mk.Margin)" in code:
                space = data(Path())
                exec(small(code), space)
                made = (v for v in space.values() if isinstance(v, type) and issubclass(v, mk.Margin))
                found |= {f"{name_of(page)}:{cls.__name__}": cls for cls in made}
    return found


OWN = own_margins()


@pytest.mark.parametrize("own", OWN)
def test_own_margins_are_fused_everywhere(own):
    case = testing.Case.random(12, 40, 101)
    for name, b in FUSED.items():
        if b.unavailable_reason() is None and "cpu" in b.device_types:
            found = testing.errors(case, copy.deepcopy(OWN[own]()), name)
            assert max(found.values()) <= testing.TOLERANCE[torch.float32], (name, found)


def test_own_margin_of_the_readme_is_short():
    (code,) = (code for code in blocks(README, "python") if "(mk.Margin)" in code)
    body = [line for line in code.split("head =")[0].splitlines() if line.strip()]
    assert len(body) <= 5


COMMANDS = {"marginkernels": marginkernels.__main__.COMMANDS, "benchmarks": benchmarks.__main__.COMMANDS}


@pytest.mark.parametrize("page", PAGES[:-1], ids=name_of)
def test_commands_exist(page, tmp_path, monkeypatch):
    """Those named in the text, and in blocks with their options; the records that they read are there."""
    record = (ROOT / "benchmarks" / "results" / "cpu-full.json").read_text()
    monkeypatch.chdir(tmp_path)
    for program, command in re.findall(r"python -m (marginkernels|benchmarks) (\w+)", page.read_text()):
        assert command in COMMANDS[program], (program, command)
    for line in "\n".join(blocks(page, "")).splitlines():
        words = shlex.split(line, comments=True) if line.startswith(("make ", "python ")) else []
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        if words[:2] == ["python", "-m"] and words[2] in COMMANDS:
            module = marginkernels.__main__.COMMANDS[words[3]][0] if words[2] == "marginkernels" else words[3]
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"{words[2]}.{module}").add_arguments(parser)
            for word in (word for word in words[4:] if word.endswith((".json", ".py"))):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).write_text(record)
            parser.parse_args(["cpu" if word == "cuda" else word for word in words[4:]])


# -- what the text says ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each link that stays in the repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "RESULTS.md"], ids=name_of)
def test_links_resolve(page):
    for target, anchor in links(page):
        assert target.exists(), f"{name_of(page)}: no {target}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: no #{anchor} in {name_of(target)}"


def test_every_page_is_reachable_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target, _ in links(page) if target.suffix == ".md"]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", [*PAGES, *TEMPLATES], ids=name_of)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:marginkernels|csrc|tests|benchmarks|docs|examples)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page", PAGES[:-1], ids=name_of)
def test_names_of_the_package_exist(page):
    """``mk.optim.SGD``, ``marginkernels.backend.cpu.release_memory`` and the like, none of them deprecated."""
    for name in set(re.findall(r"\b(?:mk|marginkernels)((?:\.[A-Za-z_]\w*)+)", page.read_text())):
        parts = name[1:].split(".")
        library = parts[1] if parts[0] == "compat" and len(parts) > 1 else ""
        with stand_ins.compat(library) if library in stand_ins.LIBRARIES else contextlib.nullcontext():
            found = mk
            for part in parts:
                if not hasattr(found, part):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part)


BANNED = (
    *("slab", "centre", "kin", "room", "judge", "proven", "colour", "behaviour", "normalise", "neighbour", "memory accelerator"),
    *("matrix unit", "wait for the next step", "of our own", "never replaced", "used or refused"),
)


@pytest.mark.parametrize("page", [*PAGES, *TEMPLATES], ids=name_of)
def test_language(page):
    """Words that this project does not use, outside of code."""
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.S | re.M)
    found = re.findall(rf"\b(?:{'|'.join(BANNED)})(?:s|d)?\b", " ".join(prose.split()), re.I)
    assert not found, f"{name_of(page)}: {found}"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_readme_says_what_is_verified():
    """The status table and the sentence on ``auto`` follow the backends' ``verified``."""
    text = README.read_text()
    rows = [line for line in text.split("## Status")[1].split("## ")[0].splitlines() if line.startswith("| `")]
    for name, b in FUSED.items():
        (row,) = (row for row in rows if f"`{name}`" in row.split("|")[1])
        assert ("never run on a GPU" in row) == (not b.tested_on), row
    on_gpu = registry.FALLBACK
    assert f'On a GPU, `backend="auto"` takes `{on_gpu}`' in text


def test_readme_names_every_loss():
    missing = [cls.__name__ for cls in (*margins.ALL, mk.CenterLoss) if f"`{cls.__name__}`" not in README.read_text()]
    assert not missing


def test_readme_asks_for_what_the_package_asks_for():
    project = (ROOT / "pyproject.toml").read_text()
    python, torch_ = re.search(r"Python >= ([\d.]+), torch >= ([\d.]+)", README.read_text()).groups()
    assert f'requires-python = ">={python}"' in project
    assert f'"torch>={torch_}"' in project


def test_citation_has_what_a_reader_needs_and_no_address():
    text = (ROOT / "CITATION.cff").read_text()
    assert all(f"{key}:" in text for key in ("cff-version", "message", "title", "authors", "license"))
    assert "://" not in text


def test_changelog_names_what_is_deprecated():
    text = (ROOT / "CHANGELOG.md").read_text()
    for name in (*_deprecated.KEYS, *_deprecated.ATTRIBUTES, *_deprecated.MODULES, *_deprecated.DISTRIBUTED, *_deprecated.COMMANDS):
        assert name in text, name


if __name__ == "__main__":
    for page in (README, *DOCS):
        page.write_text(written(page))
