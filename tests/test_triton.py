"""The Triton backend without a GPU: under the interpreter, in processes of its own, and compiled for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import marginkernels as mk
from benchmarks import resources
from marginkernels.backend import FUSED

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("triton_checks.py")


@pytest.mark.parametrize("part", ["test_heads", "test_options or test_passes", "not test_heads and not test_options and not test_passes"])
def test_under_the_interpreter(part):
    """In three parts, so that parallel workers share them."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS), "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # tiles are too small to share
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def _compiled(arch, dim, dtype, weight_dtype):
    """Kernel name -> compiled kernel, of the launches that do the work of a step."""
    from marginkernels.backend.triton import aot

    p = aot.problem(1024, dim, 1_000_000, dtype, weight_dtype)
    wanted = [one for one in aot.distinct(aot.launches(p, arch)) if "pass" in one.kernel.__name__ and not one.constants.get("ONLINE")]
    return {one.kernel.__name__: aot.compile(one, arch) for one in wanted}


def test_the_million_class_kernels_on_hopper():
    """What the tile table promises for D = 512: no stack, Hopper's matrix unit, keys loaded by the memory accelerator, two products a
    step."""
    from marginkernels.backend.triton import aot, table

    found = _compiled("sm_90", 512, torch.bfloat16, torch.bfloat16)
    assert set(found) == {"row_pass_kernel", "class_pass_kernel"}
    for kernel in found.values():
        used = aot.resources(kernel)
        assert used.stack_bytes == 0
        assert used.shared_bytes <= table.SHARED["sm_90"]
        assert kernel.asm["ttgir"].count("= ttng.warp_group_dot ") == 2
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", torch.float16), ("sm_90", torch.float32), ("sm_100", torch.bfloat16)])
def test_compiles_ahead_of_time(arch, dtype):
    from marginkernels.backend.triton import aot, table

    for name, kernel in _compiled(arch, 64, dtype, torch.float32).items():
        assert aot.resources(kernel).shared_bytes <= table.SHARED[arch], name


def test_every_tile_fits_its_architecture():
    """Blocks of queries and keys alone, whatever else the compiler keeps in shared memory."""
    from marginkernels.backend.triton.table import MAX_DIM, SHARED, tile

    for arch, limit in SHARED.items():
        for dim in range(1, MAX_DIM + 1, 7):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for switches in range(8):
                    t = tile(dim, dtype, arch, accumulates=bool(switches & 1), online=bool(switches & 2), busy=bool(switches & 4))
                    whole = t.depth >= dim
                    held = t.queries * t.depth * (1 if whole else t.stages) + t.keys * t.depth * t.stages
                    assert held * dtype.itemsize <= limit, (arch, dim, dtype, t)
                    assert t.width >= dim or t.width % t.depth == 0


def test_never_chosen_by_auto_before_it_is_proven():
    assert not FUSED["triton"].proven
    assert "never run on a GPU" in FUSED["triton"].note


def test_refusals_say_why():
    x, w, y = torch.randn(3, 8), torch.randn(4, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="only under Triton's interpreter"):
        mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), backend="triton")
    assert "1024" in FUSED["triton"].refuses("cuda", torch.float32, torch.float32, 1032)
    assert "float64" in FUSED["triton"].refuses("cuda", torch.float64, torch.float32, 64)
    assert FUSED["triton"].refuses("cuda", torch.bfloat16, torch.float32, 512) is None


def test_the_package_does_not_import_the_kernels():
    code = "import sys, marginkernels; marginkernels.backends(); assert not any('backend.triton.' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKS.parents[1])


def test_resource_faults():
    good = {"kernel": "k", "backend": "b", "arch": "sm_90", "registers": 9, "stack_bytes": 0, "shared_bytes": 5, "shared_limit": 5}
    assert resources.faults([good, good | {"stack_bytes": 8, "explained": "why"}]) == []
    assert "8 bytes of stack" in resources.faults([good | {"stack_bytes": 8}])[0]
    assert "6 bytes of shared" in resources.faults([good | {"shared_bytes": 6}])[0]
