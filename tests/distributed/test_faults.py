"""A killed rank: the others raise an error and exit, and the run resumes from its last checkpoint with the same losses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import fault_worker

from marginkernels.distributed import latest

STEPS = 8
KILLS = 6


def run(folder: Path, name: str, kill_step: int = -1, place: str = "none", ranks: int = 3):
    """Exit status and output of each rank, and the losses by step."""
    command = [sys.executable, fault_worker.__file__]
    environment = os.environ | {"RUN": name, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder), str(STEPS), str(kill_step), place],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    outputs = [p.communicate(timeout=300) for p in started]
    losses = dict(line.split() for line in outputs[0][0].splitlines())
    return [p.returncode for p in started], [err for _, err in outputs], losses


def test_killed_at_random():
    """A few of the runs of ``make kills``, in a process that has not computed with torch yet, because it forks."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "helpers.kills", "--trials", str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} trials, 0 faults" in done.stdout


def test_the_record_of_kills_is_without_fault():
    record = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "kills.json").read_text())
    assert record["trials"] >= 200
    assert record["faults"] == []
    assert all(record["killed_in"][moment] >= 20 for moment in ("load", "step", "save"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a run without faults, and the seconds that it takes."""
    began = time.monotonic()
    codes, errors, losses = run(tmp_path_factory.mktemp("whole"), "whole")
    assert codes == [0, 0, 0], errors
    assert list(losses) == [str(step) for step in range(1, STEPS + 1)]
    return losses, time.monotonic() - began


@pytest.mark.parametrize(("step", "place"), [(4, "backward"), (5, "save")])
def test_killed_and_resumed(tmp_path, whole, step, place):
    whole, seconds = whole
    began = time.monotonic()
    codes, errors, losses = run(tmp_path, "killed", step, place)
    taken = time.monotonic() - began
    assert codes[1] == -9
    for rank in (0, 2):
        assert codes[rank] not in (0, -9), "the others must exit with an error"
        assert "RuntimeError" in errors[rank]
        if place == "backward":
            assert "process_group: rank" in errors[rank]
            assert "Stop every rank and resume from the last checkpoint" in errors[rank]
    assert taken < fault_worker.TIMEOUT + 3 * seconds  # most of the time goes into starting the processes
    assert latest(tmp_path) == tmp_path / "step-3"
    assert all(whole[s] == loss for s, loss in losses.items())
    codes, errors, losses = run(tmp_path, "resumed")
    assert codes == [0, 0, 0], errors
    assert losses == {s: loss for s, loss in whole.items() if int(s) > 3}  # to the last bit
