"""Kills ranks at random moments of save, step and load, and checks that nothing is lost but the steps since the last checkpoint.

    PYTHONPATH=tests python -m helpers.kills --trials 200 --record benchmarks/results/kills.json

Each trial starts a run from a checkpoint in its folder: a process without a group, or one to three Gloo ranks, that loads, trains and saves
every second step. A rank, or all of them, get SIGKILL at a random moment of a random phase. Then:

- the ranks that were not killed end within a time limit, and with an error that says what to do;
- every checkpoint whose save has returned is there, and is the last one or older;
- a run of new processes loads the last checkpoint, whose bits are those that were saved, and ends with the bits and losses of a run without
  a fault.

Runs are forked from this process, which has imported torch but never computed with it, so that a trial takes about a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import marginkernels as mk
from helpers.ranks import group
from marginkernels import optim
from marginkernels.distributed import latest, load, save

D, C, STEPS, EVERY = 8, 43, 8, 2
#: Seconds in which a rank must notice that another has died, and a run must end.
NOTICE, RUN = 30, 60
#: In ``average`` the loop itself exchanges the gradients of its backbone, as DDP would.
PHASES = ("start", "load", "step", "average", "save", "end")
#: Phases in which a trial kills, and how often they come in a run that starts from step ``EVERY``.
MOMENTS = {"load": 1, "step": STEPS - EVERY, "save": (STEPS - EVERY) // EVERY}
KINDS = {"one process": 0, "1 rank": 1, "2 ranks": 2, "3 ranks": 3}


class Board:
    """Shared memory in which each rank notes its phase and how many phases of that name it has begun."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)

    def enter(self, rank: int, phase: str, count: int) -> None:
        self.memory[2 * rank : 2 * rank + 2] = bytes([PHASES.index(phase), count])

    def read(self, rank: int) -> tuple[str, int]:
        phase, count = self.memory[2 * rank : 2 * rank + 2]
        return PHASES[phase], count


def digest(head: mk.MarginHead, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> str:
    """A hash of all that a rank saves."""
    found = hashlib.sha256(str(step).encode())
    for owner in (head, model):
        for name, v in sorted(owner.state_dict().items()):
            found.update(name.encode() + v.detach().contiguous().numpy().tobytes())
    for i, values in sorted(optimizer.state_dict()["state"].items()):
        for name, v in sorted(values.items()):
            found.update(f"{i}{name}".encode() + v.numpy().tobytes())
    return found.hexdigest()[:16]


def work(folder: Path, name: str, rank: int, ranks: int, steps: int, board: Board) -> None:
    """One rank: train from the last checkpoint in ``folder`` to ``steps``, and log what happens."""
    counts: Counter[str] = Counter()

    def enter(phase: str) -> None:
        counts[phase] += 1
        board.enter(rank, phase, counts[phase])

    log = os.open(folder / f"{name}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, step: int, value: str) -> None:
        os.write(log, f"{what} {step} {value}\n".encode())

    enter("start")
    with group(rank, ranks, folder / f"{name}.store", NOTICE) if ranks else contextlib.nullcontext():
        torch.manual_seed(0)
        model = nn.Linear(6, D)
        head = mk.MarginHead(D, C, mk.CurricularFace(), process_group=dist.group.WORLD if ranks else None, sample_rate=0.5)
        optimizer = optim.SGD([*model.parameters(), *head.parameters()], lr=0.05, momentum=0.9)
        step = 0
        if path := latest(folder):
            enter("load")
            extra = load(path, head, optimizer, {"model": model.state_dict(), "step": 0})
            model.load_state_dict(extra["model"])
            step = extra["step"]
            note("loaded", step, digest(head, model, optimizer, step))
        size = max(1, ranks)
        while step < steps:
            enter("step")
            g = torch.Generator().manual_seed(step)
            x, y = torch.randn(12, 6, generator=g), torch.randint(C, (12,), generator=g)
            own = torch.arange(12).tensor_split(size)[rank]
            optimizer.zero_grad()
            loss = head(model(x[own]), y[own])
            loss.backward()
            if ranks:
                enter("average")
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= size
            optimizer.step()
            step += 1
            note("loss", step, loss.item().hex())
            if step % EVERY == 0:
                enter("save")
                note("saving", step, digest(head, model, optimizer, step))
                save(folder / f"step-{step}", head, optimizer, {"model": model.state_dict(), "step": step})
                note("saved", step, "")
        enter("end")


class Run:
    """The processes of one run, forked from this one."""

    def __init__(self, folder: Path, name: str, ranks: int, steps: int = STEPS):
        self.folder, self.name, self.board, self.codes = folder, name, Board(), dict[int, int]()
        self.pids = [self._fork(rank, ranks, steps) for rank in range(max(1, ranks))]

    def _fork(self, rank: int, ranks: int, steps: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            error = os.open(self.folder / f"{self.name}.{rank}.err", os.O_WRONLY | os.O_CREAT)
            os.dup2(error, 2)
            work(self.folder, self.name, rank, ranks, steps, self.board)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self, rank: int) -> None:
        if self.running(rank):
            os.kill(self.pids[rank], signal.SIGKILL)

    def running(self, rank: int) -> bool:
        if rank not in self.codes:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return rank not in self.codes

    def wait(self, seconds: float) -> bool:
        """Whether all ranks have ended in time; those that have not are killed."""
        until = time.monotonic() + seconds
        while [rank for rank in range(len(self.pids)) if self.running(rank)]:
            if time.monotonic() > until:
                for rank in range(len(self.pids)):
                    self.kill(rank)
                self.wait(5)
                return False
            time.sleep(0.002)
        return True

    def log(self, rank: int) -> dict[str, dict[int, str]]:
        """What a rank has noted: values by step, by what was noted."""
        found: dict[str, dict[int, str]] = {what: {} for what in ("loaded", "loss", "saving", "saved")}
        path = self.folder / f"{self.name}.{rank}.log"
        for line in path.read_text().splitlines() if path.exists() else ():
            what, step, value = line.split(" ")
            found[what][int(step)] = value
        return found

    def error(self, rank: int) -> str:
        path = self.folder / f"{self.name}.{rank}.err"
        return path.read_text() if path.exists() else ""


class Whole:
    """A run without a fault for a number of ranks: its losses, the hashes that it saved, its first checkpoint, how long its phases take."""

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        folder.mkdir()
        run = Run(folder, "whole", ranks)
        assert run.wait(RUN), run.error(0)
        assert set(run.codes.values()) == {0}, [run.error(rank) for rank in run.codes]
        self.logs = [run.log(rank) for rank in range(len(run.pids))]
        for path in folder.glob("step-*"):
            if path.name != f"step-{EVERY}":
                shutil.rmtree(path)
        self.seconds = self._time()

    def _time(self) -> dict[str, float]:
        """How long each phase takes on rank 0, in a run from the first checkpoint on."""
        copy = self.folder.with_name(f"{self.folder.name}-time")
        shutil.copytree(self.folder, copy)
        run = Run(copy, "time", self.ranks)
        spent, last = Counter[tuple[str, int]](), time.monotonic()
        while run.running(0):
            now = time.monotonic()
            spent[run.board.read(0)] += now - last
            last = now
            time.sleep(0.0002)
        run.wait(RUN)
        shutil.rmtree(copy)
        return {moment: max(0.001, max(s for (phase, _), s in spent.items() if phase == moment)) for moment in MOMENTS}


@dataclass
class Trial:
    """One run that is killed."""

    kind: str
    everyone: bool
    moment: str
    count: int
    share: float
    victim: int

    @classmethod
    def draw(cls, seed: int) -> Trial:
        g = random.Random(seed)
        kind = g.choices(list(KINDS), (3, 2, 4, 2))[0]
        ranks = max(1, KINDS[kind])
        moment = list(MOMENTS)[seed % len(MOMENTS)]
        return cls(kind, ranks == 1 or g.random() < 0.3, moment, g.randint(1, MOMENTS[moment]), g.random(), g.randrange(ranks))

    def run(self, folder: Path, whole: Whole) -> tuple[str, list[str]]:
        """The phase in which the victim was when it died ("none" if it had ended before), and what was wrong."""
        folder.mkdir()
        shutil.copytree(whole.folder / f"step-{EVERY}", folder / f"step-{EVERY}")
        run = Run(folder, "killed", whole.ranks)
        until = time.monotonic() + RUN
        while run.running(self.victim) and run.board.read(self.victim) != (self.moment, self.count) and time.monotonic() < until:
            time.sleep(0.0002)
        time.sleep(self.share * whole.seconds[self.moment])
        for rank in range(len(run.pids)) if self.everyone else [self.victim]:
            run.kill(rank)
        began = time.monotonic()
        wrong = [] if run.wait(NOTICE) else [f"a rank was still running {NOTICE} s after another died"]
        phase = run.board.read(self.victim)[0] if run.codes[self.victim] == -signal.SIGKILL else "none"
        if time.monotonic() - began > NOTICE / 2:
            wrong.append(f"ranks took {time.monotonic() - began:.0f} s to end")
        wrong += self._survivors(run, phase)
        wrong += self._nothing_lost(folder, run, whole)
        return phase, wrong

    def _survivors(self, run: Run, phase: str) -> list[str]:
        wrong = []
        for rank, code in run.codes.items():
            text = run.error(rank)
            if code == -signal.SIGKILL or (code == 0 and phase in ("end", "none")):
                continue
            last = [line for line in text.splitlines() if line and not line.startswith(" ")][-1:]
            clear = last and "process_group: rank" in last[0] and "resume from the last checkpoint" in last[0]
            # Before a head is made, where the loop itself exchanges, and after the last step there is only torch's own error.
            if code != 1 or not (clear or (run.board.read(rank)[0] in ("start", "average", "end") and "RuntimeError: " in last[0])):
                wrong.append(f"rank {rank} ended with {code} in {run.board.read(rank)[0]} and {last}: {text[-1500:]}")
        return wrong

    def _nothing_lost(self, folder: Path, run: Run, whole: Whole) -> list[str]:
        wrong = []
        logs = [run.log(rank) for rank in range(len(run.pids))]
        completed = max([EVERY, *(step for log in logs for step in log["saved"])])
        path = latest(folder)
        step = int(path.name.split("-")[1]) if path else 0
        if step < completed:
            wrong.append(f"the last checkpoint is of step {step}, though the save of step {completed} had returned")
        for rank, log in enumerate(logs):
            for what in ("loaded", "loss", "saving"):
                expected = whole.logs[rank]["saving" if what == "loaded" else what]
                if any(expected[at] != value for at, value in log[what].items()):
                    wrong.append(f"rank {rank} {what} {log[what]} instead of {expected} before it was killed")
        again = Run(folder, "resumed", whole.ranks)
        if not again.wait(RUN) or set(again.codes.values()) != {0}:
            return [*wrong, f"resuming from step {step} ended with {again.codes}: {again.error(0)[-1500:]}"]
        for rank in range(len(again.pids)):
            log, expected = again.log(rank), whole.logs[rank]
            if log["loaded"] != {step: expected["saving"][step]}:
                wrong.append(f"rank {rank} loaded {log['loaded']}, saved was {expected['saving']}")
            if log["loss"] != {at: v for at, v in expected["loss"].items() if at > step}:
                wrong.append(f"rank {rank} went on with other losses: {log['loss']} instead of {expected['loss']}")
            if log["saving"] != {at: v for at, v in expected["saving"].items() if at > step}:
                wrong.append(f"rank {rank} ended with other bits: {log['saving']} instead of {expected['saving']}")
        if left := [p.name for p in folder.glob(".*") if p.name != f".step-{STEPS}.partial"]:
            wrong.append(f"left over: {left}")
        return wrong


def trials(count: int, seed: int) -> tuple[list[tuple[Trial, str]], list[str], int]:
    """Trials with the seeds from ``seed`` on, until ``count`` have killed: with the phase in which each did, the faults, the last seed."""
    torch.set_num_threads(1)
    done, faults, wholes = list[tuple[Trial, str]](), list[str](), dict[str, Whole]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        while len(done) < count:
            trial = Trial.draw(seed)
            if trial.kind not in wholes:
                wholes[trial.kind] = Whole(root / trial.kind.replace(" ", "-"), KINDS[trial.kind])
            phase, wrong = trial.run(root / str(seed), wholes[trial.kind])
            shutil.rmtree(root / str(seed))
            if phase != "none":  # the run can have ended before its time, on a machine that is busier than it was
                done.append((trial, "step" if phase == "average" else phase))
            faults += [f"--seed {seed}: {trial}: {text}" for text in wrong]
            print(f"{seed}: {trial.kind}, {'all' if trial.everyone else 'one'} killed in {phase}", *wrong, sep="\n    ", flush=True)
            seed += 1
    return done, faults, seed - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="how many that kill")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--record", type=Path, default=None, help="file to write counts and faults to")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.environment import commit

    about, began = {"command": f"make kills N={args.trials}", "commit": commit()}, time.monotonic()
    done, faults, last = trials(args.trials, args.seed)
    by_moment = Counter(phase for _, phase in done)
    by_kind = Counter(f"{t.kind}, {'all' if t.everyone else 'one'} killed" for t, _ in done)
    print(f"{len(done)} trials, {len(faults)} faults; by moment {dict(by_moment)}, by kind {dict(by_kind)}")
    if args.record:
        record = {
            "schema": "marginkernels.kills/1",
            **about,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": {"marginkernels": mk.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "seeds": [args.seed, last],
            "trials": len(done),
            "seconds": round(time.monotonic() - began),
            "killed_in": {name: by_moment[name] for name in PHASES if name != "average"},
            "kinds": dict(sorted(by_kind.items())),
            "faults": faults,
        }
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
