"""``python -m benchmarks many_identities``: train a head of ten million identities in little memory, with the fused step.

Class centers and momentum are bfloat16 with stochastic rounding. The data are synthetic: a few thousand identities, each a fixed direction,
whose rows come back batch after batch with noise; a linear backbone learns with the head. The record has the loss and the time of every
step, and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import nn
from tqdm import tqdm

import marginkernels as mk
from marginkernels.cli._text import integer, writable_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=writable_file, required=True, metavar="PATH", help="output file")
    parser.add_argument("--classes", type=integer(), default=10_000_000, help="C (default: %(default)s)")
    parser.add_argument("--dim", type=integer(), default=256, help="D (default: %(default)s)")
    parser.add_argument("--batch", type=integer(), default=256, help="rows of a step (default: %(default)s)")
    parser.add_argument("--identities", type=integer(), default=4096, help="that the data have (default: %(default)s)")
    parser.add_argument("--steps", type=integer(), default=24, help="(default: %(default)s)")
    parser.add_argument("--seed", type=integer(low=0), default=0, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from .environment import describe
    from .measure import _status

    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    people = torch.randperm(args.classes, generator=g)[: args.identities]
    directions = torch.randn(len(people), args.dim, generator=g)
    backbone = nn.Linear(args.dim, args.dim)
    head = mk.MarginHead(args.dim, args.classes, mk.CosFace(scale=32.0, margin=0.2), dtype=torch.bfloat16)
    optimizer = mk.optim.FusedSGD(head, lr=2.0, momentum=0.9, weight_decay=1e-5, seed=args.seed)
    optimizer.add_param_group({"params": list(backbone.parameters()), "lr": 0.05, "weight_decay": 0.0})
    losses, seconds = [], []
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as bar:
        for _ in bar:
            start = time.perf_counter()
            chosen = torch.randint(len(people), (args.batch,), generator=g)
            x = directions[chosen] + 0.3 * torch.randn(args.batch, args.dim, generator=g)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = head(backbone(x), people[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(round(float(loss.detach()), 5))
            seconds.append(round(time.perf_counter() - start, 3))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", GB=f"{_status('VmHWM') / 1e9:.1f}")
    about = {name: getattr(args, name) for name in ("classes", "dim", "batch", "identities", "steps", "seed")}
    state = {"weight_dtype": str(head.weight.dtype), "state_dtype": str(optimizer.state[head.weight]["momentum_buffer"].dtype)}
    found = {"loss": losses, "seconds": seconds, "peak_gb": round(_status("VmHWM") / 1e9, 3)}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"environment": describe("cpu"), **about, **state, **found}, indent=1) + "\n")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps, peak {found['peak_gb']:.2f} GB; {args.json}")
    return 0 if losses[-1] < losses[0] else 1
