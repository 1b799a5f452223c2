"""``python -m benchmarks precision``: what class centers and moments in low precision cost, on rendered glyphs.

Trains the demo's network and head with the fused step in float32 and in bfloat16, rounded at random and to nearest, with several seeds, and
verifies on identities that were not trained on. Writes one JSON file, anew after each run.
"""

from __future__ import annotations

import argparse

from marginkernels import testing
from marginkernels.cli._text import integer, writable_file

from .run import write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable_file, required=True, metavar="PATH", help="output file; rewritten after each run")
    heads = list(testing.HEADS)
    parser.add_argument("--head", choices=heads, default="arcface", metavar="NAME", help="of the demo's list (default: %(default)s)")
    parser.add_argument("--seeds", type=integer(), default=3, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=integer(), help="instead of the demo's eight epochs")
    parser.add_argument("--most", type=integer(), metavar="N", help="identities, at most (default: all that the fonts have)")


def run(args: argparse.Namespace) -> int:
    from marginkernels.demo import STEPS, data, train
    from marginkernels.demo.evaluate import FARS

    from .environment import describe

    results = {"environment": describe("cpu"), "records": []}
    for seed in range(args.seeds):
        glyphs = data.load(min_typefaces=4, seed=seed, max_identities=args.most)  # as the demo
        training, unseen = glyphs.split(0.2, seed)
        for kind in STEPS:
            settings = train.Settings(steps=args.steps, seed=seed, fused_step=kind)
            found = train.fit(args.head, training, unseen, settings)
            results["records"].append(
                {
                    "head": args.head,
                    "kind": kind,
                    "seed": seed,
                    "identities": len(training.characters),
                    "images": len(training.images),
                    "verified_on": len(unseen.characters),
                    "steps": len(found.losses),
                    "batch": settings.batch_size,
                    "dim": settings.dim,
                    "loss": round(sum(found.losses[-50:]) / len(found.losses[-50:]), 4),
                    "tar": {f"{far:g}": round(found.verification.tar(far), 5) for far in FARS},
                    "rank1": round(found.verification.rank1, 5),
                    "seconds": round(found.seconds, 1),
                }
            )
            write(args.json, results)
    print(f"{len(results['records'])} runs in {args.json}")
    return 0
