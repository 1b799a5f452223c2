"""``python -m marginkernels demo``: train a small network with a margin head on rendered glyphs, and report.

An identity is a character, its images are renderings in many typefaces. Verification is measured on identities not seen in training.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from .. import __version__, testing
from .._deprecated import backend_name
from ..backend import NAMES, resolve
from ..cli._text import MAX_SEED, folder, integer, number, refuse, usable_device, writable_folder

#: The heads that ``--compare`` trains if it names none.
COMPARED = ("softmax", "normface", "sphereface-annealed", "cosface", "arcface", "adacos", "mv-arc", "curricularface")
#: Number of classes at which time and memory are measured, besides the demo's own.
MANY_CLASSES = 100_000
#: What ``--fused-step`` takes.
STEPS = ("fp32", "bf16", "bf16-nearest")
PACKAGES = "matplotlib, pillow and fonttools (pip install 'marginkernels[demo]')"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    heads = list(testing.HEADS)
    add("--head", default="arcface", choices=heads, metavar="NAME", help=f"one of {', '.join(heads)} (default: %(default)s)")
    several = f"train several heads, or all (default: {' '.join(COMPARED)})"
    add("--compare", nargs="*", choices=[*heads, "all"], metavar="NAME", help=several)
    add("--fonts", type=folder, metavar="DIR", help="a folder with more fonts (.ttf, .otf, .ttc), in addition to those of matplotlib")
    add("--min-typefaces", type=integer(), default=4, metavar="N", help="fewest distinct images of an identity (default: %(default)s)")
    add("--epochs", type=number(0, 1e6, open_low=True), default=8, help="passes over the training images (default: %(default)s)")
    add("--steps", type=integer(), help="training steps, instead of --epochs")
    add("--batch-size", type=integer(2), default=256, metavar="N", help="at least 2 (default: %(default)s)")
    add("--dim", type=integer(high=65536), default=128, metavar="D", help="embedding dimension (default: %(default)s)")
    add("--seed", type=integer(0, MAX_SEED), default=0, help="of the split, the weights and the order of images (default: %(default)s)")
    add(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or a GPU (default: a GPU where there is one)",
    )
    add("--backend", default="auto", type=backend_name, choices=NAMES, help="backend of the head (default: %(default)s)")
    about = "train with the fused optimizer step; class centers and their moments in fp32, or in bf16, rounded at random or to nearest"
    add("--fused-step", nargs="?", const="fp32", choices=STEPS, metavar="KIND", help=f"{about}: {', '.join(STEPS)}")
    add("--out", type=writable_folder, default=Path("runs/demo"), metavar="DIR", help="folder for plots and results (default: %(default)s)")
    add("--quick", action="store_true", help="only a few hundred identities and 60 steps, to see that everything works")


def run(args: argparse.Namespace) -> int:
    """Train, verify, measure, and write plots, ``results.json`` and ``report.html``; returns 1 where a package is missing, 2 where the
    arguments cannot work on this machine."""
    try:
        import fontTools  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        print(f"The demo needs {PACKAGES}: {error}")
        return 1
    from . import data, heads, plots, report, train
    from .evaluate import FARS

    device = torch.device(args.device)
    try:  # what argparse cannot see, before the minutes that rendering and training take
        chosen = resolve(args.backend, str(device), torch.float32, torch.float32, args.dim)
        data.font_files(args.fonts)
    except ValueError as error:
        return refuse(f"--{error}")
    names = [args.head] if args.compare is None else list(dict.fromkeys(args.compare or COMPARED))
    names = heads.names() if "all" in names else names
    quick = {"max_identities": 400} if args.quick else {}
    try:
        glyphs = data.load(args.fonts, min_typefaces=args.min_typefaces, seed=args.seed, **quick)
    except ValueError as error:
        return refuse(f"--{error}".replace("_", "-", 1))
    training, unseen = glyphs.split(0.2, args.seed)
    classes = len(training.characters)
    print(f"{len(glyphs.images):,} images of {len(glyphs.characters):,} characters in {len(glyphs.typefaces)} typefaces")
    print(f"train on {classes:,} identities ({len(training.images):,} images)")
    print(f"verify on {len(unseen.characters):,} identities not seen in training ({len(unseen.images):,} images)")
    settings = train.Settings(
        epochs=args.epochs,
        steps=args.steps if args.steps is not None else (60 if args.quick else None),
        batch_size=args.batch_size,
        dim=args.dim,
        seed=args.seed,
        device=args.device,
        backend=args.backend,
        fused_step=args.fused_step,
    )
    print(f"fused backend: {chosen} on {_device_name(device)}, {settings.total_steps(len(training.images))} steps of {args.batch_size}\n")

    runs = [train.fit(name, training, unseen, settings) for name in names]
    costs = []
    for c in (classes, MANY_CLASSES // (20 if args.quick else 1)):
        costs += heads.compare(
            heads.make(names[0], c), args.batch_size, args.dim, c, device=device, backend=args.backend, repeats=3 if args.quick else 7
        )

    args.out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        written = [
            plots.samples(glyphs, args.out / "samples.png", args.seed),
            plots.losses(runs, args.out / "losses.png"),
            plots.roc(runs, args.out / "roc.png"),
            *(plots.angles(r, args.out / f"angles-{r.head}.png") for r in runs),
            plots.target_logits(classes, args.out / "target-logits.png"),
        ]
    results = {
        "versions": {"marginkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "backend": chosen,
        "settings": asdict(settings),
        "data": {
            "typefaces": len(glyphs.typefaces),
            "train": {"identities": classes, "images": len(training.images)},
            "unseen": {"identities": len(unseen.characters), "images": len(unseen.images)},
        },
        "heads": [
            {
                "head": r.head,
                "loss": r.losses[-1],
                "top1": r.top1,
                "tar": {f"{far:g}": r.verification.tar(far) for far in FARS},
                "rank1": r.verification.rank1,
                "largest_difference": max(r.differences.values()),
                "checked_steps": len(r.differences),
                "seconds": r.seconds,
                "losses": r.losses,
                "unusual": heads.unusual(r.head, classes),
            }
            for r in runs
        ],
        "costs": costs,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.html").write_text(report.as_page(results, FARS, written), encoding="utf-8")
    print(f"\n{report.as_text(results, FARS)}\n\n{len(written)} plots, results.json and report.html in {args.out}")
    return 0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
