"""``python -m examples.study render | train-features | heads | report | all``; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import machine
from marginkernels.cli._text import folder, integer, number, refuse, writable_file, writable_folder

from . import features, glyphs, heads, report

above_zero = number(0, open_low=True)

#: With ``--quick``: a few hundred identities from the typefaces of matplotlib, and as few steps as show that all works.
QUICK = glyphs.Choice(None, script="any", least=5, most=8, identities=240)
QUICK_NETWORK = features.Network(dim=64, width=8, share=0.25, unseen=0.25, steps=12, batch=64)
QUICK_PLAN = heads.Plan(steps=12, identities=1000, batch=64, dim=32, hidden=64, seeds=2)
QUICK_RUNS = ("arcface", "curricularface", "adacos", "bf16-centers", "sampled-0.3")
#: Without it.
CHOICE = glyphs.Choice(Path("/usr/share/fonts"))
#: The steps are those that the budget affords.
PLAN = heads.Plan(steps=0, identities=20_000)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m examples.study", description="A benchmark of all heads on rendered characters.")
    commands = found.add_subparsers(dest="command", required=True)
    whats = {
        "render": "render the images",
        "train-features": "train the network and write its features of all images",
        "heads": "train and measure every head on the features; goes on where it was stopped",
        "report": "write the page and the figures from the records",
        "all": "the four above, one after the other",
    }
    for name, what in whats.items():
        one = commands.add_parser(name, help=what, description=what)
        add = one.add_argument
        one.set_defaults(run=globals()[name.replace("-", "_") + "_command"])
        if name != "report":
            add(
                "--cache",
                type=writable_folder,
                default=Path("runs/study/cache"),
                metavar="DIR",
                help="images and features (default: %(default)s)",
            )
            add("--quick", action="store_true", help="a few hundred identities and steps, to see in seconds that everything works")
        if name in ("render", "all"):
            add("--fonts", type=folder, metavar="DIR", help=f"where the fonts are, besides matplotlib's (default: {CHOICE.fonts})")
            add("--script", choices=list(glyphs.SCRIPTS), help=f"ideographs, or all characters (default: {CHOICE.script})")
            add("--least", type=integer(3), help=f"fewest images of an identity (default: {CHOICE.least})")
            add("--most", type=integer(3), help=f"most images of an identity (default: {CHOICE.most})")
            add("--jobs", type=integer(), default=2, help="processes that render (default: %(default)s)")
        if name in ("train-features", "all"):
            add("--feature-steps", type=integer(2), help=f"steps of the network's training (default: {features.Network.steps})")
        if name in ("heads", "all"):
            group = one.add_mutually_exclusive_group()
            group.add_argument("--budget-minutes", type=above_zero, default=50.0, help="time of all runs, about (default: %(default)g)")
            group.add_argument("--steps", type=integer(), help="steps of each run, instead of a budget")
            add("--identities", type=integer(2), help=f"most training identities, C (default: {PLAN.identities:,})")
            add("--batch", type=integer(2), help=f"rows of a step (default: {PLAN.batch})")
            add("--dim", type=integer(), help=f"embedding dimensions (default: {PLAN.dim})")
            add("--seeds", type=integer(), help=f"of the main heads and the variants (default: {PLAN.seeds})")
            known = [run.name for run in heads.runs(1)]
            add("--only", nargs="+", choices=known, metavar="NAME", help=f"these runs alone, of {', '.join(known)}")
            add("--plan", action="store_true", help="print what would be done and how long it takes, and do nothing")
            add("--out", type=writable_folder, default=Path("runs/study/records"), metavar="DIR", help="the records (default: %(default)s)")
        if name == "report":
            add("--records", type=folder, default=report.RECORDS, metavar="DIR", help="(default: those that are committed)")
            add(
                "--page",
                type=writable_file,
                metavar="PATH",
                help="(default: docs/study.md for the committed records, else study.md beside them)",
            )
            add("--results", type=writable_file, metavar="PATH", help="write all records into one JSON file as well")
    return found


def given(base: Any, args: argparse.Namespace, *names: str) -> Any:
    """``base`` with what the command line gives."""
    return replace(base, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def render_command(args: argparse.Namespace) -> int:
    choice = QUICK if args.quick else CHOICE
    choice = given(choice, args, "fonts", "script", "least", "most")
    found = glyphs.render(args.cache, choice, 1 if args.quick else args.jobs)
    used = sum(f["images"] > 0 for f in found["typefaces"])
    print(f"{found['images']:,} images of {found['identities']:,} characters in {used} typefaces, {found['seconds']:.0f} s: {args.cache}")
    return 0


def train_features_command(args: argparse.Namespace) -> int:
    network = QUICK_NETWORK if args.quick else features.Network()
    network = replace(network, steps=args.feature_steps or network.steps)
    found = features.train(args.cache, network)
    print(f"{network.steps:,} steps, loss {found['loss'][0]:.2f} to {found['loss'][-1]:.2f}; seconds: {found['seconds']}")
    return 0


def heads_command(args: argparse.Namespace) -> int:
    saved = args.out / "plan.json"
    plan = given(QUICK_PLAN if args.quick else PLAN, args, "steps", "identities", "batch", "dim", "seeds")
    data = heads.Data.load(args.cache, plan.identities, plan.views)
    plan = replace(plan, identities=data.about["training"]["identities"])
    only = args.only or (QUICK_RUNS if args.quick else None)
    todo = heads.runs(plan.seeds, only)
    start = time.perf_counter()
    bare = heads.evaluate(torch.Tensor.float, data)  # also what tells how long an evaluation takes
    evaluation, step = time.perf_counter() - start, heads.step_seconds(plan, data)
    if saved.exists():
        known = heads.Plan(**json.loads(saved.read_text())["plan"])
        if replace(plan, steps=known.steps) != known or (args.steps and args.steps != known.steps):
            return refuse(f"--out: {args.out} was begun with {known}, and {plan} is asked for")
        plan = known
    elif plan.steps == 0:
        plan = replace(plan, steps=heads.affordable(todo, 60 * args.budget_minutes, step, evaluation))
    todo = [run for run in todo if not (args.out / run.file).exists()]
    print(describe(plan, data, todo, step, evaluation))
    if args.plan:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if not saved.exists():
        heads.write(args.out / f"{heads.BARE}-0.json", {"run": {"name": heads.BARE, "head": heads.BARE, "seed": 0}, **bare})
        command = " ".join(["python -m examples.study", *args.line])
        about = {name: json.loads((args.cache / f"{name}.json").read_text()) for name in ("data", "features")}
        heads.write(saved, {"plan": asdict(plan), "command": command, "environment": machine("cpu"), "used": data.about, **about})
    for run, found in heads.complete(todo, args.out, plan, data):
        tar = found["verification"]["tar"]["0.001"][0]
        print(
            f"{run.name} {run.seed}: loss {found['loss'][-1]:.3f}, TAR@FAR=1e-3 {tar:.3f}, {found['seconds']['training']:.0f} s", flush=True
        )
    return 0


def describe(plan: heads.Plan, data: heads.Data, todo: list[heads.Run], step: float, evaluation: float) -> str:
    """What will be done, and how long it takes."""
    seconds = heads.estimate(todo, plan.steps, step, evaluation)
    about = data.about
    epochs = plan.steps * plan.batch / about["training"]["images"]
    return "\n".join(
        [
            f"{len(todo)} runs of {plan.steps:,} steps of {plan.batch} rows ({epochs:.1f} epochs), D = {plan.dim}:",
            "  " + ", ".join(f"{run.name}/{run.seed}" for run in todo),
            f"training: {about['training']['images']:,} images of {about['training']['identities']:,} identities",
            f"unseen: {about['unseen']['images']:,} images of {about['unseen']['identities']:,}; {about['distractors']:,} distractors",
            f"a step of ArcFace takes {1e3 * step:.0f} ms here, an evaluation {evaluation:.0f} s: about {seconds / 60:.1f} minutes in all",
        ]
    )


def report_command(args: argparse.Namespace) -> int:
    page = args.page or (report.PAGE if args.records == report.RECORDS else args.records / "study.md")
    found = report.Records.read(args.records)
    if not found.runs and args.records != report.RECORDS:
        return refuse(f"--records: expected a folder with records, as heads writes them, got {str(args.records)!r}")
    pictures = report.draw(found, args.records)
    page.write_text(report.render(found, page))
    if args.results is not None:
        args.results.write_text(json.dumps(found.together(), indent=1) + "\n")
    print(f"{page} and {len(pictures)} figures from {len(found.runs)} records in {args.records}")
    return 0


def all_command(args: argparse.Namespace) -> int:
    render_command(args)
    train_features_command(args)
    status = heads_command(args)
    if status or args.plan:
        return status
    return report_command(argparse.Namespace(records=args.out, page=None, results=args.out.parent / "results.json"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.line = argv
    try:
        status: int = args.run(args)
    except ValueError as error:
        return refuse(f"--{error}")
    return status


if __name__ == "__main__":
    sys.exit(main())
