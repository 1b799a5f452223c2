"""The planner: its memory compared with measured peaks, its figures with each other, and the command."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from marginkernels.__main__ import main
from marginkernels.cli import plan
from marginkernels.cli._gpus import GPUS, INSIGHTFACE

SHAPE = {"classes": 30_000_000, "dim": 512, "ranks": 8, "batch": 128}
#: Largest difference between a measured peak and the planner's sum, as a share of the sum.
TOLERANCE = 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_is_what_is_measured():
    cases = [
        {"classes": 600_000, "dim": 128, "batch": 32, "sample_rate": 1.0, "optimizer": "sgd", "backend": "auto", "workspace": 64 << 20},
        {"classes": 600_000, "dim": 128, "batch": 32, "sample_rate": 0.2, "optimizer": "adamw", "backend": "auto", "workspace": 0},
        {"classes": 1_200_000, "dim": 128, "batch": 32, "sample_rate": 1.0, "optimizer": "sgd", "backend": "torch", "workspace": 0},
    ]
    cases[-1]["fused_step"] = True
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


def test_memory_longhand():
    """10 classes on 3 ranks of 5 rows: 4 classes and 15 rows on the rank with the most; every part in plain arithmetic."""
    shape = {"classes": 10, "dim": 8, "ranks": 3, "batch": 5}
    rows = 15 * 8 * (4 + 4 + 4 + 5 * 8)
    assert plan.memory(**shape) == {
        "class centers": 4 * 8 * 4,
        "optimizer state": 4 * 8 * 4,
        "gradient": 4 * 8 * 4,
        "rows": rows,
        "chunks": 6 * 4 * 15 * 4 + 4 * 4,  # more than the copy of the optimizer
    }
    adamw = plan.memory(**shape, optimizer="adamw", weight_bytes=2, embedding_bytes=2, workspace=77)
    assert adamw == {
        "class centers": 4 * 8 * 2,
        "optimizer state": 4 * (2 * 8 * 2 + 4),
        "gradient": 4 * 8 * 2,
        "rows": 15 * 8 * (2 + 2 + 4 + 5 * 8),
        "chunks": 6 * 4 * 15 * 4 + 4 * 4,
        "workspace": 77,
    }


def test_the_fused_step_longhand():
    """No gradient but that of a chunk; of drawn classes as before."""
    shape = {"classes": 10, "dim": 8, "ranks": 3, "batch": 5}
    dense, fused = plan.memory(**shape), plan.memory(**shape, fused_step=True)
    logits = 6 * 4 * 15 * 4 + 4 * 4
    assert fused == dense | {"gradient": 0, "chunks": logits + 2 * 4 * 4 * 8}
    assert plan.memory(**shape, sample_rate=0.5, fused_step=True) == plan.memory(**shape, sample_rate=0.5)
    found = [plan.bytes_per_weight(*given) for given in (("sgd", 4, False), ("sgd", 4, True), ("adamw", 4, True), ("sgd", 2, True))]
    assert found == [12, 8, 12, 4]
    rest = {"sample_rate": 1.0, "optimizer": "sgd", "weight_bytes": 4}
    assert plan.traffic(10, 8, 1, 5, **rest, fused_step=True) == (2 * 320, 3 * 320)
    assert plan.traffic(10, 8, 1, 5, **rest) == (3 * 320, 5 * 320)
    # One card of 24 GB and ten million identities of 256 dimensions, in bfloat16.
    assert sum(plan.memory(10**7, 256, 1, 256, weight_bytes=2, embedding_bytes=2, fused_step=True, gpu_memory=24 * 10**9).values()) < 24e9


def test_memory_of_sampled_classes_longhand():
    """1,001 classes on 2 ranks: 501 held, of which a tenth, 50, are drawn."""
    for optimizer, moments, steps in (("sgd", 1, 0), ("adamw", 2, 4)):
        found = plan.memory(1001, 16, 2, 4, sample_rate=0.1, optimizer=optimizer)
        assert found["class centers"] == 501 * 64
        assert found["optimizer state"] == 501 * (moments * 64 + steps)
        assert found["gradient"] == 50 * 64
        assert found["drawn classes"] == 40 * 501  # the keys, more than the copies
        assert found["rows"] == 8 * 16 * 52
        assert found["chunks"] == max(6 * 4 * 16 * 50 + 4 * 50, (moments + 1) * 4 * 50 * 16)  # more numbers in centers than logits
    wide = plan.memory(1001, 512, 2, 4, sample_rate=0.1)
    assert wide["drawn classes"] == 50 * 2048
    assert wide["chunks"] == 6 * 4 * 50 * 512 + 4 * 50
    assert plan.memory(1001, 4, 2, 512, sample_rate=0.1)["chunks"] == 6 * 4 * 501 * 1024 + 4 * 501  # draws all classes for so many rows
    # Chunks end at their limits: 4M logits or as many numbers of centers, more on a GPU; 16M elements of the optimizer.
    assert plan.memory(10**7, 512, 1, 1, gpu_memory=80 << 30)["chunks"] == 24 * 40 * 2**20 + 4 * 10**7
    assert plan.memory(10**7, 4, 1, 64)["chunks"] == max(24 * 2**22 + 4 * 10**7, 4 * 2**24)
    assert plan.memory(10**7, 512, 1, 1, optimizer="adamw")["chunks"] == max(24 * 2**22 + 4 * 10**7, 2 * 4 * 2**24)


def test_other_figures_longhand():
    assert plan.met_classes(1001, 2, 4, 1) == 501
    assert plan.met_classes(1001, 2, 4, 0.1) == 50
    assert plan.met_classes(1001, 2, 40, 0.1) == 80  # the rows of all ranks may each be of another class
    assert plan.met_classes(10, 2, 40, 0.1) == 5
    # Rings of 4 ranks with 3 rows each: 3 others; targets are summed, reduced and gathered.
    assert plan.exchanged(8, 4, 3, embedding_bytes=2) == {
        "embeddings": 3 * 3 * 8 * 2,
        "labels": 3 * (3 + 1) * 8,  # and the dtypes
        "targets": 2 * 3 * 12 * 24 // 4,
        "log-sum-exps": 3 * 12 * 16,  # in float64
        "embedding gradients": 3 * 3 * 8 * 4,
    }
    fine = plan.exchanged(8, 4, 3, embedding_bytes=8, label_smoothing=True)
    assert fine["log-sum-exps"] == 3 * 12 * 24
    assert fine["embedding gradients"] == fine["embeddings"] == 3 * 3 * 8 * 8
    assert plan.flops(1001, 16, 2, 4) == 8 * 8 * 16 * 501
    assert plan.flops(1001, 16, 2, 4, 0.1) == 8 * 8 * 16 * 50
    shape = {"classes": 1001, "dim": 16, "ranks": 2, "batch": 4, "weight_bytes": 2}
    assert plan.traffic(**shape, sample_rate=1, optimizer="sgd") == (3 * 501 * 32, 5 * 501 * 32)
    assert plan.traffic(**shape, sample_rate=1, optimizer="adamw") == (3 * 501 * 32, 7 * 501 * 32)
    # Drawn: the copy of W, and W and the moments copied out and back, each read and written.
    assert plan.traffic(**shape, sample_rate=0.1, optimizer="sgd") == (3 * 50 * 32, (5 + 2 + 8) * 50 * 32 + 240 * 501)
    assert plan.traffic(**shape, sample_rate=0.1, optimizer="adamw") == (3 * 50 * 32, (7 + 2 + 12) * 50 * 32 + 240 * 501)


def test_limits_by_brute_force():
    for options in ({}, {"optimizer": "adamw", "sample_rate": 0.3}):

        def need(c, r, options=options):
            return sum(plan.memory(c, 8, r, 2, **options).values())

        for limit in (3_000, 20_000):
            fitting = [c for c in range(0, 600, 3) if need(c, 3) <= limit]
            assert plan.most_classes(limit, 8, 3, 2, **options) == (fitting[-1] if fitting else 0)
            ranks = next((r for r in range(1, 70) if need(300, r) <= limit), None)
            if ranks is not None:
                assert plan.fewest_ranks(limit, 300, 8, 2, **options) == ranks
        assert plan.fewest_ranks(need(300, 1), 300, 8, 2, **options) == 1
        assert plan.fewest_ranks(need(300, 1) - 1, 300, 8, 2, **options) != 1


def test_plan_in_numbers(capsys):
    """Every figure of the command from its arguments."""
    words = ["plan", "--classes", "1e6", "--dim", "64", "--gpus", "2", "--memory", "30", "--batch", "16", "--reserve", "4", "--json"]
    words += ["--rate", "100", "--bandwidth", "1000", "--link", "20", "--workspace-mb", "3", "--weight", "bf16", "--embedding", "fp32"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    parts = plan.memory(10**6, 64, 2, 16, weight_bytes=2, embedding_bytes=4, workspace=3 << 20, gpu_memory=30 * 10**9)
    assert found["bytes"] == parts | {"reserve": 4 * 10**9}
    assert found["fits"] is True
    assert found["exchanged"] == plan.exchanged(64, 2, 16, embedding_bytes=4)
    work = 8 * 32 * 64 * 500_000
    assert found["flops"] == work
    assert found["seconds"]["passes"] == pytest.approx(max(work / 100e12, 3 * 500_000 * 128 / 1000e9))
    assert found["seconds"]["optimizer"] == pytest.approx(5 * 500_000 * 128 / 1000e9)
    assert found["seconds"]["exchange"] == pytest.approx(sum(found["exchanged"].values()) / 20e9)
    passes, update = 3 * 500_000 * 128, 5 * 500_000 * 128
    sent = sum(found["exchanged"].values()) / 20e9
    least = {"tensor cores": work / 100e12, "memory": (passes + update) / 1000e9, "link": sent}
    assert found["least_seconds"] == pytest.approx(least)
    rates, names = (1.0, 0.1), ("sgd", "adamw")
    every = [(r, name, w, fused) for r in rates for name in names for w in ("fp32", "bf16") for fused in (False, True)]
    assert [(o["sample_rate"], o["optimizer"], o["weight"], o["fused_step"]) for o in found["options"]] == every
    for o in found["options"]:
        size = {"fp32": 4, "bf16": 2}[o["weight"]]
        step = {"sample_rate": o["sample_rate"], "optimizer": o["optimizer"], "weight_bytes": size, "fused_step": o["fused_step"]}
        options = step | {"gpu_memory": 30 * 10**9}
        assert o["bytes_per_weight"] == plan.bytes_per_weight(o["optimizer"], size, o["fused_step"])
        assert o["bytes"] == sum(plan.memory(10**6, 64, 2, 16, **options).values()) + 4 * 10**9
        assert o["fits"] is (o["bytes"] <= 30 * 10**9)
        operations = plan.flops(10**6, 64, 2, 16, o["sample_rate"]) / 100e12
        assert o["least_seconds"] == pytest.approx(max(operations, sum(plan.traffic(10**6, 64, 2, 16, **step)) / 1000e9, sent))
        assert o["most_classes"] == plan.most_classes(26 * 10**9, 64, 2, 16, **options)
        assert o["fewest_gpus"] == plan.fewest_ranks(26 * 10**9, 10**6, 64, 16, **options)
    # It fits by the sum of its parts, the reserve among them; chunks on a GPU so small are as on a CPU.
    assert main([*words, "--memory", "5"]) == 0
    total = sum(json.loads(capsys.readouterr().out)["bytes"].values()) / 1e9
    assert total < 5
    for memory, status in ((total * 1.001, 0), (total * 0.999, 1)):
        assert main([*words, "--memory", f"{memory}"]) == status
        assert json.loads(capsys.readouterr().out)["fits"] is (status == 0)


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


def test_a_named_gpu_by_hand(capsys):
    """29 million identities on eight V100, a tenth of them in a step: every figure from the data sheet's, or from the published table."""
    words = ["plan", "--classes", "29e6", "--gpu", "v100", "--sample-rate", "0.1", "--embedding", "fp16", "--published", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    held, met, center = 3_625_000, 362_500, 512 * 4
    assert found["met_classes"] == met
    assert found["bytes"]["class centers"] == held * center
    # 8 N D C operations at 125 TFLOP/s. The passes read W twice and write dW; the update reads dW, and reads and writes W and momentum; W
    # is copied, and W and momentum copied out and back; 30 times 8 bytes of each class for the draw. At 900 GB/s.
    operations = 8 * 1024 * 512 * met / 125e12
    moved = ((3 + 5 + 2 + 4 * 2) * met * center + 240 * held) / 900e9
    received = 7 * (128 * 512 * 2 + 129 * 8 + 128 * 512 * 4) + 2 * 7 * 1024 * 24 // 8 + 7 * 1024 * 16
    assert found["least_seconds"] == pytest.approx({"tensor cores": operations, "memory": moved, "link": received / 150e9})
    assert (round(1e3 * operations, 2), round(1e3 * moved, 2)) == (12.16, 15.81)
    (option,) = (
        o for o in found["options"] if (o["sample_rate"], o["optimizer"], o["weight"], o["fused_step"]) == (0.1, "sgd", "fp32", False)
    )
    assert option["least_seconds"] == pytest.approx(moved)
    assert option["fits"]
    last = found["published"][-1]
    assert last["samples_per_second"] == 1855
    assert last["megabytes"] == 32324
    assert last["seconds_beyond_the_first"] == pytest.approx(1024 / 1855 - 1024 / 5004)
    assert last["least_seconds"] == pytest.approx(moved)
    assert last["bytes"] == sum(found["bytes"].values()) - found["bytes"]["reserve"]
    whole = found["published"][-2]
    assert whole["samples_per_second"] is whole["megabytes"] is whole["seconds_beyond_the_first"] is None
    assert whole["least_seconds"] == pytest.approx(10 * operations)


def test_what_is_said_of_a_named_gpu(capsys):
    assert main(["plan", "--classes", "29e6", "--gpu", "h100", "--link", "40", "--published"]) == 0
    text = capsys.readouterr().out
    assert "8 GPUs of 80 GB" in text
    assert "assumed: 989.5 TFLOP/s, 3350 GB/s memory bandwidth, 40 GB/s link bandwidth" in text
    assert "by NVIDIA H100 Tensor Core GPU, data sheet" in text
    assert "No time here was measured." in text
    assert "on eight V100 of 32 GB" in text
    assert "out of memory" in text
    assert main(["plan", "--classes", "1e6"]) == 0
    assert "data sheet" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--classes", "29e6", "--link", "40", "--gpu", "h100"])  # it would be forgotten
    assert "expected before --link" in capsys.readouterr().err


def test_data_sheets_are_in_the_units_of_the_arguments():
    for gpu in GPUS.values():
        assert f"{gpu.memory} GB" in gpu.title
        assert 100 <= gpu.rate <= 5000  # TFLOP/s
        assert 10 * gpu.link < gpu.bandwidth * 2 < 1000 * gpu.link  # GB/s, both
    ordered = sorted(INSIGHTFACE.items())
    assert list(INSIGHTFACE) == [identities for identities, _ in ordered]
    for (_, fewer), (_, more) in pairwise(ordered):
        for a, b in zip(fewer, more, strict=True):
            assert b is None or (a is not None and b[0] < a[0] and b[1] > a[1])  # slower, and in more memory


@pytest.mark.parametrize(
    "wrong", [["--sample-rate", "0"], ["--gpus", "0"], ["--classes", "-5"], ["--memory", "0"], ["--optimizer", "lion"]]
)
def test_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--classes", "1e6", *wrong])
    assert caught.value.code not in (0, 1, None)
    assert wrong[0] in capsys.readouterr().err + str(caught.value)
