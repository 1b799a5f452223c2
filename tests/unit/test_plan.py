"""The planner: its memory compared with measured peaks, its figures with each other, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marginkernels.__main__ import main
from marginkernels.cli import plan

SHAPE = {"classes": 30_000_000, "dim": 512, "ranks": 8, "batch": 128}
#: Largest difference between a measured peak and the planner's sum, as a share of the sum.
TOLERANCE = 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_is_what_is_measured():
    cases = [
        {"classes": 600_000, "dim": 128, "batch": 32, "sample_rate": 1.0, "optimizer": "sgd", "backend": "auto", "workspace": 64 << 20},
        {"classes": 600_000, "dim": 128, "batch": 32, "sample_rate": 0.2, "optimizer": "adamw", "backend": "auto", "workspace": 0},
    ]
    script = str(Path(__file__).parents[1] / "helpers" / "peaks.py")
    out = subprocess.run([sys.executable, script, json.dumps(cases)], capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(cases)
    for case in found:
        planned = sum(case["parts"].values())
        assert abs(case["measured"] / planned - 1) <= TOLERANCE, case


def test_most_classes_and_fewest_ranks_are_the_limits():
    for options in ({}, {"sample_rate": 0.1}, {"optimizer": "adamw"}, {"weight_bytes": 2}):
        shape = {k: v for k, v in SHAPE.items() if k != "classes"}
        limit = 70 * 10**9
        most = plan.most_classes(limit, **shape, **options)
        assert sum(plan.memory(most, **shape, **options).values()) <= limit < sum(plan.memory(most + 8, **shape, **options).values())
        need = plan.fewest_ranks(limit, most, 512, 128, **options)
        assert need <= 8
        assert need == 1 or sum(plan.memory(most, 512, need - 1, 128, **options).values()) > limit
    assert plan.fewest_ranks(10**6, 10**9, 512, 128) is None
    assert plan.most_classes(0, 512, 8, 128) == 0


def test_sampling_and_ranks_shrink_what_they_should():
    whole, sampled = plan.memory(**SHAPE), plan.memory(**SHAPE, sample_rate=0.1)
    assert whole["class centers"] == sampled["class centers"] == 30_000_000 // 8 * 512 * 4
    assert sampled["gradient"] == whole["gradient"] // 10
    assert plan.memory(**SHAPE | {"ranks": 16})["gradient"] == whole["gradient"] // 2
    assert plan.flops(**SHAPE) == 8 * 1024 * 512 * 3_750_000
    assert plan.flops(**SHAPE, sample_rate=0.1) == plan.flops(**SHAPE) // 10
    assert plan.exchanged(512, 1, 128) == dict.fromkeys(plan.exchanged(512, 2, 128), 0)


def test_command(capsys):
    command = ["plan", "--classes", "30e6", "--dim", "512", "--gpus", "8", "--memory", "80"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "30,000,000 classes x 512, 8 GPUs of 80 GB" in text
    assert "fits in 80 GB" in text
    assert main([*command, "--json", "--sample-rate", "0.1", "--optimizer", "adamw"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["met_classes"] == 375_000
    assert found["bytes"]["optimizer state"] == 3_750_000 * (2 * 512 * 4 + 4)
    assert found["seconds"]["passes"] == pytest.approx(max(found["flops"] / 400e12, 3 * 375_000 * 512 * 4 / 2500e9))
    assert main(["plan", "--classes", "1e9", "--gpus", "1"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--sample-rate", "0"], ["--gpus", "0"], ["--classes", "-5"], ["--memory", "0"], ["--optimizer", "lion"]]
)
def test_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--classes", "1e6", *wrong])
    assert caught.value.code not in (0, 1, None)
    assert wrong[0] in capsys.readouterr().err + str(caught.value)
