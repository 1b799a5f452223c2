"""What each of five ranks does in test_checkpoint.py: save on some ranks, load on others, and continue with the same losses."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import marginkernels as mk
from marginkernels import optim
from marginkernels.distributed import export_centers, full_state_dict, import_centers, latest, load, save

D, C, STEPS = 8, 43, 10


def shared_folder() -> Path:
    """One temporary folder for all ranks."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def groups() -> dict[int, dist.ProcessGroup]:
    """Groups of the first k ranks, for each k that the checks use."""
    return {k: dist.new_group(list(range(k))) for k in (1, 2, 3, 5)}


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=g), torch.randint(C, (12,), generator=g)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "row sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "row adamw": lambda p: optim.AdamW(p, lr=0.01),
}
FUSED = {
    "fused sgd": lambda head: optim.FusedSGD(head, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "fused adamw": lambda head: optim.FusedAdamW(head, lr=0.01),
}


class Run:
    """A backbone and a head in one optimizer; every rank uses its part of the rows of each batch."""

    def __init__(self, group: dist.ProcessGroup | None, kind: str, c: int = C, seed: int = 0, **options):
        torch.manual_seed(seed)
        self.model = nn.Linear(6, D)
        self.group, self.size = group, 1 if group is None else group.size()
        self.head = mk.MarginHead(D, c, mk.AdaCos(c), bias=True, process_group=group, **options)
        if kind in FUSED:
            self.optimizer = FUSED[kind](self.head)
            self.optimizer.add_param_group({"params": list(self.model.parameters())})
        else:
            self.optimizer = OPTIMIZERS[kind]([*self.model.parameters(), *self.head.parameters()])
        self.step = 0

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x, y = data(self.step)
            rank = 0 if self.group is None else dist.get_rank(self.group)
            own = torch.arange(12).tensor_split(self.size)[rank]
            self.optimizer.zero_grad()
            loss = self.head(self.model(x[own]), y[own])
            loss.backward()
            if self.group is not None:
                for p in self.model.parameters():
                    dist.all_reduce(p.grad, group=self.group)
                    p.grad /= self.size
            self.optimizer.step()
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def extra(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def save(self, path: Path) -> None:
        save(path, self.head, self.optimizer, self.extra())

    def load(self, path: Path, **options) -> None:
        extra = load(path, self.head, self.optimizer, self.extra(), **options)
        self.model.load_state_dict(extra["model"])
        self.step = extra["step"]


def check_any_number_of_ranks():
    """Saved on 3 ranks, loaded on 1, 2, 3 and 5: the next ten losses are those of the uninterrupted run."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    for kind in (*OPTIMIZERS, *FUSED):
        path, want = folder / kind / "step-5", [None]
        if rank < 3:
            run = Run(every[3], kind)
            run.run(5)
            run.save(path)
            want = [run.run(STEPS)]
        dist.broadcast_object_list(want)
        for k, group in every.items():
            if rank < k:
                other = Run(group, kind, seed=k)
                other.load(path)
                losses = other.run(STEPS)
                if k == 3:
                    assert losses == want[0], kind  # the same ranks: the same bits
                np.testing.assert_allclose(losses, want[0], rtol=2e-5, err_msg=f"{kind}, {k} ranks")
                if k == 2 and kind == "sgd":
                    assert not np.allclose(losses, Run(group, kind, seed=k).run(STEPS), rtol=1e-3)
            dist.barrier()
        alone = Run(None, kind, seed=9)  # every rank a head with all classes
        alone.load(path)
        np.testing.assert_allclose(alone.run(STEPS), want[0], rtol=2e-5)


def check_sampled_run():
    """The draws are resumed too, on the same ranks to the same bits."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    for kind in ("row adamw", "fused adamw"):
        path = folder / kind / "step-5"
        if rank < 3:
            run = Run(every[3], kind, sample_rate=0.5)
            run.run(5)
            run.save(path)
            want = run.run(STEPS)
            other = Run(every[3], kind, seed=1, sample_rate=0.5)
            other.load(path)
            assert other.run(STEPS) == want
        dist.barrier()
        run = Run(every[5], kind, seed=1, sample_rate=0.5)
        run.load(path)
        assert int(run.head.sampler.draws) == 5
        assert np.isfinite(run.run(STEPS)).all()


def check_growing():
    """The saved classes become the first ones; the others keep their initial values, without optimizer state."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    whole, state = [None], [None]
    if rank < 3:
        run = Run(every[3], "row adamw")
        run.run(5)
        run.save(folder / "step-5")
        whole = [full_state_dict(run.head)]
        assert (whole[0] is None) == (rank != 0)
        moments = [torch.empty(0)] * 3
        dist.all_gather_object(moments, run.optimizer.state[run.head.weight], group=every[3])
        state = [{k: torch.cat([m[k] for m in moments]) for k in moments[0]}]
    dist.broadcast_object_list(whole)
    dist.broadcast_object_list(state)
    run = Run(every[5], "row adamw", c=C + 30, seed=4)
    start = run.head.weight.detach().clone()
    with pytest.raises(ValueError, match=f"num_classes = {C}, .* got {C + 30}; grow=True"):
        run.load(folder / "step-5")
    run.load(folder / "step-5", grow=True)
    low, high = run.head.shard.start, run.head.shard.stop
    old = slice(0, max(0, min(high, C) - low))
    assert torch.equal(run.head.weight[old], whole[0]["weight"][low : min(high, C)])
    assert torch.equal(run.head.bias[old], whole[0]["bias"][low : min(high, C)])
    assert torch.equal(run.head.weight[old.stop :], start[old.stop :])
    for name, v in run.optimizer.state[run.head.weight].items():
        assert torch.equal(v[old], state[0][name][low : min(high, C)]), name
        assert not v[old.stop :].any(), name
    assert np.isfinite(run.run(3)).all()


def check_fewer_classes_than_ranks():
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    head = mk.MarginHead(D, 3, mk.ArcFace(), process_group=every[5])
    save(folder / "step-1", head)
    whole = full_state_dict(head)
    export_centers(head, folder / "centers.npy")
    if rank < 2:
        other = mk.MarginHead(D, 3, mk.ArcFace(), process_group=every[2])
        load(folder / "step-1", other)
        again = full_state_dict(other)
        if rank == 0:
            assert torch.equal(again["weight"], whole["weight"])
            assert np.array_equal(np.load(folder / "centers.npy"), whole["weight"].numpy())


def check_export_and_import():
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    head = mk.MarginHead(D, C, mk.ArcFace(), bias=True, process_group=every[5])
    nn.init.normal_(head.bias)
    export_centers(head, folder / "centers.npy")
    whole = [full_state_dict(head)]
    dist.broadcast_object_list(whole)
    w = whole[0]["weight"]
    assert torch.equal(w[head.shard.start : head.shard.stop], head.weight)
    assert np.array_equal(np.load(folder / "centers.npy"), w.numpy())
    single = mk.MarginHead(D, C, mk.ArcFace(), bias=True)
    single.load_state_dict(whole[0])
    other = mk.MarginHead(D, C, mk.ArcFace(), bias=True, process_group=every[5])
    other.load_state_dict(whole[0])
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(other.bias, head.bias)
    other = mk.MarginHead(D, C, mk.ArcFace(), process_group=every[5])
    import_centers(other, folder / "centers.npy")
    assert torch.equal(other.weight, head.weight)
    if rank == 0:  # insightface: a file of each of three ranks
        for i, part in enumerate(w.tensor_split(3)):
            torch.save({"epoch": 1, "state_dict_softmax_fc": {"weight": part.clone()}}, folder / f"checkpoint_gpu_{i}.pt")
    dist.barrier()
    other = mk.MarginHead(D, C, mk.ArcFace(), process_group=every[5])
    import_centers(other, [folder / f"checkpoint_gpu_{i}.pt" for i in range(3)])
    assert torch.equal(other.weight, head.weight)


def check_an_error_of_the_first_rank_reaches_all():
    every, folder = groups(), shared_folder()
    head = mk.MarginHead(D, C, mk.ArcFace(), process_group=every[5])
    save(folder / "step-1", head)
    with pytest.raises(FileExistsError, match="path: expected a folder that does not exist yet"):
        save(folder / "step-1", head)
    assert latest(folder) == folder / "step-1"


def check_a_disk_that_is_full_for_one_rank():
    """All ranks raise, nothing is left, and the checkpoint before is whole."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    run = Run(every[3], "sgd") if rank < 3 else None
    if run:
        run.run(2)
        run.save(folder / "step-2")
        for which in range(3):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == which:
                resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
            with pytest.raises(OSError, match="path: expected room and leave to write a checkpoint") as raised:
                run.save(folder / "step-3")
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert f"OSError on rank {which} of 3: [Errno 27] File too large" in str(raised.value)
            assert raised.value.errno == errno.EFBIG
            dist.barrier(every[3])
            assert os.listdir(folder) == ["step-2"]
        run.load(folder / "step-2")
        run.save(folder / "step-3")
        assert latest(folder) == folder / "step-3"


def check_damage_that_one_rank_sees():
    """All ranks raise, and none has changed a parameter."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    run = Run(every[5], "sgd")
    run.run(2)
    run.save(folder / "step-2")
    file = folder / "step-2" / "__3_0.distcp"
    if rank == 0:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    other = Run(every[5], "sgd", seed=1)
    before = [p.detach().clone() for p in (*other.model.parameters(), *other.head.parameters())]
    with pytest.raises(ValueError, match=r"got a damaged one in .*: __3_0.distcp is not as it was written"):
        other.load(folder / "step-2")
    assert all(torch.equal(p, q) for p, q in zip((*other.model.parameters(), *other.head.parameters()), before, strict=True))


def check_a_folder_that_is_not_shared():
    """The first rank does not find what the others have written, and says so."""
    every, folder = groups(), shared_folder()
    head = mk.MarginHead(D, C, mk.ArcFace(), process_group=every[5])
    with pytest.raises(OSError, match="path: expected a folder on a file system that all ranks share"):
        save(folder / str(dist.get_rank()) / "step-1", head)
    assert latest(folder / "0") is None


def check_what_does_not_fit_on_one_rank():
    """An error that only one rank can see reaches all, instead of leaving them waiting."""
    every, folder, rank = groups(), shared_folder(), dist.get_rank()
    head = mk.MarginHead(D, C, mk.ArcFace(), process_group=every[5])
    save(folder / "step-1", head, extra={"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="extra: expected a tensor of shape"):
        load(folder / "step-1", head, extra={"w": torch.zeros(4 if rank == 4 else 3)})
    with pytest.raises(ValueError, match="path: expected a complete checkpoint"):
        load(folder / ("step-1" if rank != 2 else "step-2"), head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    if rank == 3:
        optimizer.param_groups[0]["f"] = open
    with pytest.raises(TypeError, match="optimizer: expected param_groups of numbers"):
        save(folder / "step-3", head, optimizer)
    assert latest(folder) == folder / "step-1"


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
