"""The CUDA sources compile wherever there is nvcc, with or without a GPU, and use no more of its resources than they should."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import resources, resources_cuda

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(resources_cuda.unavailable_reason() is not None, reason=str(resources_cuda.unavailable_reason()))


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "arch", "count"), [("generic.cu", "sm_80", 30), ("generic.cu", "sm_90", 30), ("hopper.cu", "sm_90", 61)]
)
def test_no_stack_no_spills_nothing_serialized(source, arch, count):
    assert source in resources_cuda.FILES[arch]
    report = resources_cuda.compile_source(source, arch)
    records = resources_cuda.parse(report)
    assert len(records) == count
    assert faults(report) == []


def faults(report):
    """What a compiler report must not contain: stack, spills, warpgroup products that wait for each other."""
    found = resources.faults([{"backend": "", "arch": "", **r} for r in resources_cuda.parse(report)])
    found += [f"{r['kernel']} spills" for r in resources_cuda.parse(report) if r["spill_bytes"]]
    return found + [word for word in ("warning", "serialized", "warpgroup.arrive is injected", "setmaxnreg") if word in report]


@needs_nvcc
@pytest.mark.parametrize("limit", [None, 1000])
def test_a_debug_build_names_its_barriers(limit, tmp_path):
    """One fused kernel as PTX: with the macro each wait counts, and ends with the barrier's name; without it nothing of that is left."""
    source = (resources_cuda.SOURCES / "hopper.cu").read_text()
    start = source.index("template <template <bool, bool, bool> class Elements, class Args>")  # one kernel is enough
    kernel = "launch_fused<bf16, 512, RowElements<true, true, false>>"
    one = f"template void {kernel}(const void*, int, const void*, int, int, const FusedRow&, int, void*);"
    (tmp_path / "hopper.cu").write_text(source[:start] + one + "}\n}\n")
    command = ["nvcc", "-std=c++17", "-O3", f"-I{resources_cuda.SOURCES}", "-gencode=arch=compute_90a,code=compute_90a", "-ptx"]
    command += [f"-DMK_BARRIER_LIMIT={limit}"] * (limit is not None) + [str(tmp_path / "hopper.cu"), "-o", str(tmp_path / "out.ptx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "out.ptx").read_text()
    strings = {bytes(map(int, found.split(", "))).rstrip(b"\0").decode() for found in re.findall(r"\.b8 .*\[\d+\] = \{([\d, ]+)\}", ptx)}
    names = {"empty", "full", "weights_empty", "weights_full", "maxima_full", "stationary_full"}
    if limit is None:
        assert "mbarrier.try_wait.parity" in ptx
        assert "trap" not in ptx
        assert not strings & names
    else:
        assert "mbarrier.try_wait.parity" not in ptx
        assert "__assertfail" in ptx
        assert "trap" in ptx
        assert strings >= names


@needs_nvcc
def test_a_spill_is_noticed(tmp_path):
    """A kernel with fewer registers than its products need puts an array on the stack and spills: both are faults."""
    for name in ("hopper.cu", "hopper.h", "hopper_ptx.h", "device.h"):
        text = (resources_cuda.SOURCES / name).read_text()
        (tmp_path / name).write_text(text.replace('"../scalar.h"', f'"{ROOT}/csrc/scalar.h"'))
    source = (tmp_path / "hopper.cu").read_text()
    assert "CONSUMER_REGISTERS = 240" in source
    start = source.index("template <template <bool, bool, bool> class Elements, class Args>")  # one kernel is enough
    kernel = "launch_fused<bf16, 512, RowElements<true, true, false>>"
    one = f"template void {kernel}(const void*, int, const void*, int, int, const FusedRow&, int, void*);"
    (tmp_path / "hopper.cu").write_text(source[:start].replace("CONSUMER_REGISTERS = 240", "CONSUMER_REGISTERS = 160") + one + "}\n}\n")
    found = faults(resources_cuda.compile_source("hopper.cu", "sm_90", tmp_path))
    assert any("bytes of stack, unexplained" in fault for fault in found), found
    assert any("spills" in fault for fault in found), found


@pytest.fixture
def setup_module(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return load("setup", ROOT / "setup.py")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
def test_setup_builds_for_what_is_asked(setup_module, tmp_path, monkeypatch):
    """Without a GPU and without a PyTorch that has CUDA; the fused kernels only if 9.0 is asked for."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    setup_module.build_cuda(tmp_path / "_cuda.so", tmp_path / "objects")
    built = load("_cuda", tmp_path / "_cuda.so")
    assert hasattr(built, "row_chunk")
    assert not hasattr(built, "fused_row")
    assert built.runtime_version() >= 12000
    assert (built.driver_version() >= 12000) == torch.cuda.is_available()  # 0 where there is no driver


@needs_nvcc
@pytest.mark.parametrize(("wanted", "what"), [("Hopper", "expected numbers"), ("7.5", "8.0 or later")])
def test_setup_refuses_architectures(setup_module, monkeypatch, wanted, what):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(setup_module.CannotBuild, match=what):
        setup_module.build_cuda(Path("unused.so"), Path("unused"))


def test_setup_says_that_nvcc_is_missing(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(setup_module.CannotBuild, match="no nvcc on the PATH"):
        setup_module.build_cuda(tmp_path / "_cuda.so", tmp_path)


def test_report_is_read():
    report = """ptxas info    : Compiling entry function '_ZN2mk12_GLOBAL__N_110row_kernelI6__halfEEvNS_8RowChunkE' for 'sm_80'
ptxas info    : Function properties for _ZN2mk12_GLOBAL__N_110row_kernelI6__halfEEvNS_8RowChunkE
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 256 bytes smem, 504 bytes cmem[0]
"""
    if resources_cuda.unavailable_reason() and "c++filt" in resources_cuda.unavailable_reason():
        pytest.skip(resources_cuda.unavailable_reason())
    assert resources_cuda.parse(report) == [
        {"kernel": "row_kernel<float16>", "registers": 31, "stack_bytes": 16, "spill_bytes": 20, "shared_bytes": 256}
    ]
