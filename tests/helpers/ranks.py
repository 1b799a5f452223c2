"""Runs functions on several Gloo ranks on this machine; the processes are started once for many checks, because starting takes seconds."""

from __future__ import annotations

import datetime
import faulthandler
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start(checks: list, size: int, timeout: float = 180.0) -> dict[str, str | None]:
    """Run each function of ``checks`` on ``size`` ranks; gives by name the errors of any rank, or None."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, checks, folder, timeout), nprocs=size)
        found = {}
        for check in checks:
            reports = [torch.load(Path(folder, f"{check.__name__}.{rank}"), weights_only=True) for rank in range(size)]
            wrong = [f"rank {rank}: {text}" for rank, text in enumerate(reports) if text]
            found[check.__name__] = "\n".join(wrong) or None
        return found


def _rank(rank: int, size: int, checks: list, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout)
    init(rank, size, folder, timeout)
    for check in checks:
        text, began = None, time.perf_counter()
        try:
            torch.manual_seed(0)
            check()
        except Exception:
            text = traceback.format_exc()
        if rank == 0:
            print(f"{size} ranks: {check.__name__} {time.perf_counter() - began:.2f} s", flush=True)
        torch.save(text, Path(folder, f"{check.__name__}.{rank}"))
        if text:
            # The other ranks may wait for this one: let them fail too, and run no more checks.
            dist.destroy_process_group()
            for other in checks[checks.index(check) + 1 :]:
                torch.save("not run: an earlier check failed", Path(folder, f"{other.__name__}.{rank}"))
            return
    dist.destroy_process_group()


def init(rank: int, size: int, folder: str, timeout: float) -> None:
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
