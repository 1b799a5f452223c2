"""Class-parallel training on rendered glyphs: the backbone is replicated with DDP, the class centers are divided over the ranks.

    python examples/distributed_glyphs.py                                        # one process, no process group
    torchrun --nproc-per-node 2 examples/distributed_glyphs.py                    # two CPU ranks (Gloo), or two GPUs (NCCL)
    torchrun --nproc-per-node 2 examples/distributed_glyphs.py --sample-rate 0.1  # a tenth of the classes in each step

To resume a stopped run from its last checkpoint, also on another number of ranks, start it again with the same ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import marginkernels as mk
from marginkernels import optim
from marginkernels.demo import data
from marginkernels.demo.evaluate import verify_pairs
from marginkernels.demo.model import GlyphNet
from marginkernels.demo.train import augment, embed
from marginkernels.distributed import export_centers, latest, load, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample-rate", type=float, default=1.0, help="share of the classes that take part in a step")
    parser.add_argument("--fused-step", action="store_true", help="update the class centers inside the class pass")
    parser.add_argument("--log-q", action="store_true", help="correct the logits of drawn classes for their probability of being drawn")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256, help="batch size over all ranks")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--identities", type=int, default=None, help="use only this many, drawn at random (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_torchelastic_launched():
        train(args, device, None)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device, dist.group.WORLD)
        dist.barrier()  # no rank leaves while another still exchanges
    finally:  # after an error too: a process that ends with a group open can be aborted as it exits
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> None:
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))

    glyphs = [data.load(max_identities=args.identities) if rank == 0 else None]
    if group is not None:
        dist.broadcast_object_list(glyphs, device=device)
    seen, test = glyphs[0].split(0.1, seed=args.seed)
    images, labels = torch.from_numpy(seen.images).to(device), torch.from_numpy(seen.identities).to(device)
    classes = len(seen.characters)

    torch.manual_seed(args.seed)
    net = GlyphNet(args.dim).to(device)
    model = net if group is None else nn.parallel.DistributedDataParallel(net)
    head = mk.MarginHead(
        args.dim,
        classes,
        mk.ArcFace(scale=32.0, margin=0.3),
        process_group=group,
        batch_size=None if group is None else -(-args.batch // ranks),
        sample_rate=args.sample_rate,
        sample_seed=args.seed,
        log_q=args.log_q,
        device=device,
    )
    # One optimizer for both: it updates all of the backbone, and with sampling only the drawn rows of the head.
    if args.fused_step:  # without a gradient of the class centers
        optimizer = optim.FusedAdamW(head, lr=args.learning_rate, weight_decay=0.05)
        optimizer.add_param_group({"params": list(model.parameters())})
    else:
        optimizer = optim.AdamW([*model.parameters(), *head.parameters()], lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.2)

    def extra(step: int) -> dict[str, Any]:
        return {"net": net.state_dict(), "schedule": schedule.state_dict(), "step": step}

    step = 0
    if (path := latest(args.folder)) is not None:
        loaded = load(path, head, optimizer, extra(0))
        net.load_state_dict(loaded["net"])
        schedule.load_state_dict(loaded["schedule"])
        step = loaded["step"]
        if rank == 0:
            print(f"resumed from {path}", flush=True)
    loss = torch.tensor(float("nan"))
    while step < args.steps:
        # Depends only on the step, so that the rows are the same on any number of ranks, also in a resumed run.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(labels), (args.batch,), generator=generator).tensor_split(ranks)[rank].to(device)
        embeddings = model(augment(images[chosen], generator))
        loss = head(embeddings, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}, top-1 {head.stats['top1'].item():.3f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(args.folder / f"step-{step}", head, optimizer, extra(step))
    export_centers(head, args.folder / "centers.npy")
    if rank == 0:
        found = verify_pairs(embed(net, torch.from_numpy(test.images).to(device)), torch.from_numpy(test.identities).to(device))
        rates = {f"TAR@FAR={far:g}": found.tar(far) for far in (1e-2, 1e-3, 1e-4)}
        settings = {
            "ranks": ranks,
            "steps": args.steps,
            "batch": args.batch,
            "sample_rate": args.sample_rate,
            "log_q": args.log_q,
            "seed": args.seed,
        }
        about = {"identities": classes, "verified_on": len(test.characters), "loss": loss.item()}
        (args.folder / "result.json").write_text(json.dumps({**settings, **about, **rates}))
        print(f"{classes} identities, verified on {len(test.characters)} others:", ", ".join(f"{k} {v:.4f}" for k, v in rates.items()))


if __name__ == "__main__":
    main()
