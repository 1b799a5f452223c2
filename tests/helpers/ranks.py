"""Runs functions on several Gloo ranks on this machine; the processes are started once for many checks, because starting takes seconds."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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
    for check in checks:
        torch.save("not run: an earlier check failed", Path(folder, f"{check.__name__}.{rank}"))
    with contextlib.suppress(_Failed), group(rank, size, Path(folder, "store"), timeout):
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
                raise _Failed  # the other ranks may wait for this one: let them fail too, and run no more checks


class _Failed(Exception):
    pass


@contextmanager
def group(rank: int, size: int, store: Path, timeout: float) -> Iterator[None]:
    """A Gloo group of all ranks, shut down in good order: none leaves while another still exchanges, and an error ends it too.

    A process that ends with a group open can be aborted as it exits, because the group's threads are running.
    """
    found = dist.FileStore(str(store), size)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
