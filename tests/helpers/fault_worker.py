"""One rank of the runs in test_faults.py: trains, saves every third step, and can be told to kill itself.

Arguments: rank, ranks, folder, steps, and the step and place (``backward`` or ``save``) where rank 1 kills itself, or -1 and ``none``.
Rank 0 prints ``step loss`` in each step. Resumes from the latest complete checkpoint in the folder.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import marginkernels as mk
from helpers import ranks
from marginkernels import optim
from marginkernels.distributed import checkpoint, latest, load, save

D, C, TIMEOUT = 8, 43, 40


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def main(rank: int, size: int, folder: Path, steps: int, kill_step: int, kill_place: str) -> None:
    torch.set_num_threads(1)
    with ranks.group(rank, size, folder / f"store-{os.environ['RUN']}", TIMEOUT):
        torch.manual_seed(0)
        # Averaged by hand: DDP regroups its gradients after its first step, so a resumed run might add those of the ranks in another order.
        model = nn.Linear(6, D)
        head = mk.MarginHead(D, C, mk.CurricularFace(), process_group=dist.group.WORLD, batch_size=4, sample_rate=0.5)
        optimizer = optim.SGD([*model.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
        step = 0
        if path := latest(folder):
            extra = load(path, head, optimizer, {"model": model.state_dict(), "step": 0})
            model.load_state_dict(extra["model"])
            step = extra["step"]
        while step < steps:
            g = torch.Generator().manual_seed(step)
            x, y = torch.randn(4 * size, 6, generator=g), torch.randint(C, (4 * size,), generator=g)
            optimizer.zero_grad()
            embeddings = model(x[rank * 4 : rank * 4 + 4])
            dying = rank == 1 and step == kill_step
            loss = head(embeddings, y[rank * 4 : rank * 4 + 4])
            if dying and kill_place == "backward":
                loss.register_hook(die)
            loss.backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= size
            optimizer.step()
            step += 1
            if rank == 0:
                print(step, loss.item().hex(), flush=True)
            if step % 3 == 0:
                if dying and kill_place == "save":
                    checkpoint.dcp.save = die
                save(folder / f"step-{step}", head, optimizer, {"model": model.state_dict(), "step": step})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
