"""``python -m benchmarks run | train | many_identities | precision | plot | report | compare | resources | peers``."""

from __future__ import annotations

import argparse
import importlib
import sys

import marginkernels

#: Name -> what it does. Each command is a module of this package (of the same name, unless ``MODULES`` says otherwise) with
#: ``add_arguments(parser)`` and ``run(args) -> exit status``. Only the module of the given command is imported.
COMMANDS = {
    "run": "time every provider on the cases of a preset and write the records",
    "train": "time and peak memory of whole training steps, with the separate and the fused optimizer step",
    "many_identities": "train ten million identities in little memory and record loss and peak",
    "precision": "train on rendered glyphs with class centers in float32 and bfloat16, and verify",
    "plot": "draw the plots of record files",
    "report": "write RESULTS.md from record files",
    "compare": "fail where a new record file is slower than an old one, relative to the peers",
    "resources": "registers, stack and shared memory of the compiled kernels",
    "peers": "list every provider, and why one cannot run here",
}
MODULES = {"peers": "listing"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of the fused heads and their peers.")
    parser.add_argument("--version", action="version", version=f"benchmarks of marginkernels {marginkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        if argv[:1] == [name]:
            module = importlib.import_module(f"benchmarks.{MODULES.get(name, name)}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
