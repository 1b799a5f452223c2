"""The command line: ``python -m marginkernels doctor | verify | plan | suggest | migrate | tune | demo``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import _deprecated
from ._version import __version__

#: Each command's module, which defines ``add_arguments(parser)`` and ``run(args) -> exit status``; only the one asked for is imported.
COMMANDS = {
    "doctor": ("cli.doctor", "what this machine has, and which backends can run on it"),
    "verify": ("cli.verify", "compare every backend with the float64 reference on this machine"),
    "plan": ("cli.plan", "memory and time of a head at a given size"),
    "suggest": ("cli.suggest", "bounds of scale and margin for a number of identities, and whether to sample"),
    "migrate": ("cli.migrate", "switch a training script from another library's head, or print the diff that would"),
    "tune": ("cli.tune", "time tiles of the Triton kernels around the heuristics' choice, on request and on a GPU"),
    "demo": ("demo", "train a small network with a margin head on rendered glyphs, and report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _deprecated.COMMANDS:
        new = _deprecated.COMMANDS[argv[0]]
        print(f"marginkernels: the command {argv[0]} is deprecated and goes with the next release; use {new}", file=sys.stderr)
        argv[0] = new
    parser = argparse.ArgumentParser(prog="python -m marginkernels", description="Fused margin-softmax heads.")
    parser.add_argument("--version", action="version", version=f"marginkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv[:1] == [name]:
            command = importlib.import_module(f".{module}", __package__)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
