"""``python -m marginkernels verify``: compare every backend on this machine with the float64 reference; prints a table of errors."""

from __future__ import annotations

import argparse
import itertools
import math

import torch

from .. import testing
from .._deprecated import backend_name
from ..backend import FUSED
from ._progress import tqdm
from ._text import MAX_SEED, integer, table, usable_device

#: (N, D, C, whether there are bias and label smoothing): sizes that are no multiples of any tile.
SHAPES = ((5, 24, 19, False), (33, 67, 259, True), (66, 136, 1031, False))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: The outputs of every head; a margin with parameters also has their gradients.
OUTPUTS = ("loss", "dx", "dw", "dbias")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=usable_device, default="cpu", help="where to run, such as cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--backend", action="append", type=backend_name, choices=["reference", *FUSED], help="only this one (may be repeated)"
    )
    parser.add_argument("--head", action="append", choices=list(testing.HEADS), metavar="NAME", help="only this one (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="of embeddings and weight; only this one (may be repeated)")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="of the random problems (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 0 if every error is within its tolerance, 1 if one is not or nothing could be verified."""
    device = torch.device(args.device)
    heads = args.head or list(testing.HEADS)
    asked = list(itertools.product(args.backend or ["reference", *FUSED], [DTYPES[name] for name in args.dtype or DTYPES]))
    reasons = {pair: _reason(pair[0], str(device), pair[1]) for pair in asked}
    served = [pair for pair, reason in reasons.items() if reason is None]
    worst: dict[tuple[str, torch.dtype], dict[str, tuple[float, str]]] = {pair: {} for pair in served}
    failures: list[tuple[str, torch.dtype, str, str]] = []
    dtypes = list(dict.fromkeys(dtype for _, dtype in served))
    for dtype, head, (n, d, c, extras) in tqdm(list(itertools.product(dtypes, heads, SHAPES)), desc="verify", unit="problem"):
        case = testing.Case.random(n, d, c, dtype, bias=extras, seed=args.seed, device=args.device)
        margin, smoothing = testing.HEADS[head](c), 0.1 if extras else 0.0
        what = f"N={n} D={d} C={c}" + (", bias, label smoothing" if extras else "")
        want = testing.run(case, margin, "reference", dtype=torch.float64, label_smoothing=smoothing)
        for name in [name for name, kind in served if kind == dtype]:
            try:
                got = testing.run(case, margin, name, label_smoothing=smoothing)
            except Exception as error:  # a backend that crashes must not hide the results of the others
                failures.append((name, dtype, head, f"{what}: {type(error).__name__}: {error}"))
                continue
            for output in want:
                off = testing.relative_error(got[output], want[output])
                if not off <= testing.TOLERANCE[dtype]:  # also where it is NaN
                    failures.append((name, dtype, head, f"{what}: {output} is off by {off:.1e}"))
                seen = worst[name, dtype]
                if output not in seen or not off <= seen[output][0]:
                    seen[output] = (off, head)
    print(f"\n{len(heads)} heads, {len(SHAPES)} problems each, on {device}.")
    print("Largest relative error |got - want| / |want|, where want is from the float64 reference:\n")
    rows = []
    for (name, dtype), seen in worst.items():
        margins = [v for k, v in seen.items() if k not in OUTPUTS]
        shown = [seen.get(output) for output in OUTPUTS] + [max(margins, default=None)]
        cells = ["-" if v is None else f"{v[0]:.1e}" for v in shown]
        hardest = max(seen.values(), key=lambda v: math.inf if math.isnan(v[0]) else v[0], default=(0, "-"))[1]
        verdict = "FAIL" if any(f[:2] == (name, dtype) for f in failures) else "pass"
        rows.append([name, _short(dtype), *cells, f"{testing.TOLERANCE[dtype]:.0e}", verdict, hardest])
    print(table(["backend", "dtype", *OUTPUTS, "margin's own", "tolerance", "", "largest for"], rows, right=range(2, 8)))
    left_out = [(name, _short(dtype), reason) for (name, dtype), reason in reasons.items() if reason is not None]
    if left_out:
        print("\nNot verified\n\n" + table(["backend", "dtype", "reason"], left_out))
    if failures:
        print("\nFailures\n\n" + table(["backend", "dtype", "head", "what"], [(f[0], _short(f[1]), *f[2:]) for f in failures]))
    print(
        "\n"
        + (f"FAILED: {len(failures)} errors" if failures else "All errors are within tolerance" if served else "Nothing could be verified")
    )
    return 0 if served and not failures else 1


def _reason(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot be verified here, or None."""
    if name == "reference":
        return None
    backend = FUSED[name]
    return backend.unavailable_reason() or backend.unsupported_reason(device, dtype, dtype, SHAPES[-1][1])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
