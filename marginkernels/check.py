"""``python -m marginkernels check``: every backend on this machine against the float64 reference, one table of errors."""

from __future__ import annotations

import argparse
import itertools
import math

import torch

from . import verify
from .backend import FUSED
from .progress import tqdm
from .text import table, usable_device

#: (N, D, C, bias and label smoothing): sizes that are multiples of nothing a kernel might tile by.
PROBLEMS = ((5, 24, 19, False), (33, 67, 259, True), (66, 136, 1031, False))
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: What every head has; a trainable margin has gradients of its own besides.
OUTPUTS = ("loss", "dx", "dw", "dbias")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=usable_device, default="cpu", help="where to run, such as cpu or cuda (default: %(default)s)")
    parser.add_argument("--backend", action="append", choices=["reference", *FUSED], help="only this one (may be given again)")
    parser.add_argument("--head", action="append", choices=list(verify.HEADS), metavar="NAME", help="only this one (may be given again)")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="of embeddings and weight; only this one (may be given again)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 where every error is within its tolerance, 1 where one is not or nothing could be checked."""
    device = torch.device(args.device)
    heads = args.head or list(verify.HEADS)
    asked = list(itertools.product(args.backend or ["reference", *FUSED], [DTYPES[name] for name in args.dtype or DTYPES]))
    refusals = {pair: _refusal(pair[0], device.type, pair[1]) for pair in asked}
    served = [pair for pair, reason in refusals.items() if reason is None]
    worst: dict[tuple[str, torch.dtype], dict[str, tuple[float, str]]] = {pair: {} for pair in served}
    failures: list[tuple[str, torch.dtype, str, str]] = []
    dtypes = list(dict.fromkeys(dtype for _, dtype in served))
    for dtype, head, (n, d, c, extras) in tqdm(list(itertools.product(dtypes, heads, PROBLEMS)), desc="check", unit="problem"):
        case = verify.Case.random(n, d, c, dtype, bias=extras, seed=args.seed, device=args.device)
        margin, options = verify.HEADS[head](c), {"label_smoothing": 0.1 if extras else 0.0}
        what = f"N={n} D={d} C={c}" + (", bias, label smoothing" if extras else "")
        want = verify.run(case, margin, "reference", dtype=torch.float64, **options)
        for name in [name for name, kind in served if kind == dtype]:
            try:
                got = verify.run(case, margin, name, **options)
            except Exception as error:  # one that crashes must not hide how the others do
                failures.append((name, dtype, head, f"{what}: {type(error).__name__}: {error}"))
                continue
            for output in want:
                error = verify.relative_error(got[output], want[output])
                if not error <= verify.TOLERANCE[dtype]:  # NaN is not within anything
                    failures.append((name, dtype, head, f"{what}: {output} is off by {error:.1e}"))
                seen = worst[name, dtype]
                if output not in seen or not error <= seen[output][0]:
                    seen[output] = (error, head)
    print(
        f"\n{len(heads)} heads, {len(PROBLEMS)} problems each, on {device}: largest relative error |got - want| / |want| against float64\n"
    )
    rows = []
    for (name, dtype), seen in worst.items():
        margins = [v for k, v in seen.items() if k not in OUTPUTS]
        shown = [seen.get(output) for output in OUTPUTS] + [max(margins, default=None)]
        cells = ["-" if v is None else f"{v[0]:.1e}" for v in shown]
        hardest = max(seen.values(), key=lambda v: math.inf if math.isnan(v[0]) else v[0], default=(0, "-"))[1]
        verdict = "FAIL" if any(f[:2] == (name, dtype) for f in failures) else "pass"
        rows.append([name, _short(dtype), *cells, f"{verify.TOLERANCE[dtype]:.0e}", verdict, hardest])
    print(table(["backend", "dtype", *OUTPUTS, "margin's own", "allowed", "", "largest at"], rows, right=range(2, 8)))
    left_out = [(name, _short(dtype), reason) for (name, dtype), reason in refusals.items() if reason is not None]
    if left_out:
        print("\nNot checked\n\n" + table(["backend", "dtype", "reason"], left_out))
    if failures:
        print("\nFailures\n\n" + table(["backend", "dtype", "head", "what"], [(f[0], _short(f[1]), *f[2:]) for f in failures]))
    print(
        "\n"
        + (f"FAILED: {len(failures)} errors out of bounds" if failures else "All within bounds" if served else "Nothing could be checked")
    )
    return 0 if served and not failures else 1


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    if name == "reference":
        return None
    backend = FUSED[name]
    return backend.unavailable() or backend.refuses(device, dtype, dtype, PROBLEMS[-1][1])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
