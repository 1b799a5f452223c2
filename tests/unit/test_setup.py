"""The build: which flags a compiler is asked about, and what is built where it knows them and where it does not; with a stub compiler."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from backends.test_cuda_build import load

ROOT = Path(__file__).parents[2]
#: The macros that a compiler defines by each level's flags: what csrc/cpu/simd.h and the kernels use.
MACROS = {
    "avx2": {"__AVX2__", "__FMA__", "__F16C__"},
    "avx512": {"__AVX2__", "__FMA__", "__F16C__", "__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__"},
    "avx512_bf16": {"__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__", "__AVX512BF16__"},
    "amx": {"__AVX512F__", "__AVX512BF16__", "__AMX_TILE__", "__AMX_BF16__"},
}
#: What is built for every processor.
GENERAL = {"level_plain.cpp", "row_math.cpp", "driver.cpp", "topk.cpp", "bind.cpp"}
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return load("setup", ROOT / "setup.py")


@pytest.fixture
def stub(tmp_path):
    """Makes a compiler that refuses some flags, and sources without <immintrin.h>; it writes down what it was asked."""
    if os.name != "posix":
        pytest.skip("a shell script")

    def make(*refused):
        path = tmp_path / "stub-c++"
        log = tmp_path / "asked.txt"
        log.write_text("")
        path.write_text(
            f"""#!{sys.executable}
import pathlib, sys
words = sys.argv[1:]
with open({str(log)!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
source = pathlib.Path(words[words.index("-c") + 1])
bad = {list(refused)!r}
if any(word in bad for word in words) or "#include <immintrin.h>" not in source.read_text():
    sys.exit("error: unrecognized command-line option")
pathlib.Path(words[words.index("-o") + 1]).write_text("")
"""
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path), log

    return make


def test_a_compiler_understands_what_it_accepts(setup, stub):
    compiler, log = stub("-mavx512bf16")
    assert setup.understands(compiler, "-mavx2 -mfma")
    assert not setup.understands(compiler, "-mavx2 -mavx512bf16")
    first, second = log.read_text().splitlines()
    assert first.split()[:3] == ["-mavx2", "-mfma", "-c"]  # each flag a word of its own, and no linking
    assert second.split()[:3] == ["-mavx2", "-mavx512bf16", "-c"]
    assert setup.understands(f"{compiler} -pipe", "-mfma")  # CXX may hold options
    assert log.read_text().splitlines()[-1].split()[:3] == ["-pipe", "-mfma", "-c"]


def built(setup, monkeypatch, compiler):
    """What ninja would be asked to build: file -> flags, and the flags of the link."""
    found = {}

    def ninja_build(folder, name, rules, objects, link):
        assert name == compiler
        assert all(source == ROOT / "csrc" / "cpu" / source.name for source, _ in objects.values())
        assert all(target == folder / source.with_suffix(".o").name for target, (source, _) in objects.items())
        found.update({source.name: flags for source, flags in objects.values()}, link=link[1])

    monkeypatch.setattr(setup, "ninja_build", ninja_build)
    monkeypatch.setenv("CXX", compiler)
    setup.compile_cpu(Path("out.so"), Path("objects"), "bind.cpp", "-O1", "-shared", "-g")
    return found


@pytest.mark.parametrize(
    ("refused", "levels"),
    [
        ((), ["avx2", "avx512", "avx512_bf16", "amx"]),
        (("-mamx-bf16",), ["avx2", "avx512", "avx512_bf16"]),
        (("-mavx512bf16",), ["avx2", "avx512"]),
        (("-mavx512dq",), ["avx2"]),
        (("-mf16c",), []),
    ],
)
def test_levels_are_those_that_the_compiler_understands(setup, stub, monkeypatch, refused, levels):
    """One object for each, with its flags alone; the driver is told of each; no instruction set gets into what runs on any processor."""
    monkeypatch.setattr(setup, "is_x86", lambda: True)
    found = built(setup, monkeypatch, stub(*refused)[0])
    files = {f"level_{level}.cpp" for level in levels} | ({"level_amx_split.cpp"} if "amx" in levels else set())
    assert found.keys() == files | GENERAL | {"link"}
    for level in levels:
        assert f" {setup.LEVELS[level]}" in found[f"level_{level}.cpp"]
    if "amx" in levels:
        assert found["level_amx_split.cpp"] == found["level_amx.cpp"]
    for name in GENERAL:
        assert not any(flag.startswith("-m") for flag in found[name].split())
    assert {word for word in found["driver.cpp"].split() if word.startswith("-D")} == {f"-DMK_HAS_{level.upper()}" for level in levels}
    assert all("-g" in flags.split() for flags in found.values())
    assert "-O1" in found["bind.cpp"].split()
    assert "-shared" in found["link"].split()
    assert "-pthread" in found["link"].split()


def test_other_processors_have_the_plain_level_only(setup, stub, monkeypatch):
    monkeypatch.setattr(setup, "is_x86", lambda: False)
    compiler, log = stub()
    assert built(setup, monkeypatch, compiler).keys() == GENERAL | {"link"}
    assert log.read_text() == ""
    for machine, x86 in (("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)):
        monkeypatch.undo()
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert load_again(monkeypatch).is_x86() == x86


def load_again(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return load("setup", ROOT / "setup.py")


def test_every_level_has_a_file_and_its_flags(setup):
    assert setup.LEVELS.keys() == MACROS.keys()
    for level in setup.LEVELS:
        assert (ROOT / "csrc" / "cpu" / f"level_{level}.cpp").exists()
    driver = (ROOT / "csrc" / "cpu" / "driver.cpp").read_text()
    assert all(f"#if MK_HAS_{level.upper()}" in driver for level in setup.LEVELS)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("level", MACROS)
def test_flags_turn_on_what_the_kernels_use(setup, level):
    if not setup.is_x86() or not setup.understands(COMPILER, setup.LEVELS[level]):
        pytest.skip("not understood here")
    command = [COMPILER, *setup.LEVELS[level].split(), "-dM", "-E", "-x", "c++", os.devnull]
    defined = {line.split()[1] for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()}
    assert defined >= MACROS[level]
    assert not defined & (set().union(*MACROS.values()) - MACROS[level] - {"__AVX2__", "__FMA__", "__F16C__"} - MACROS["avx512"])


def test_the_hash_beside_an_extension(setup, monkeypatch, tmp_path):
    """Written where the extension was built, of its own sources; gone where it was not, so that no record of an older build is taken."""
    from setuptools import Distribution, Extension

    monkeypatch.setattr(setup, "HERE", tmp_path)
    for name in ("scalar.h", "cpu/kernels.h", "cuda/generic.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text("one")
    before = {part: setup.sources_hash(part) for part in ("cpu", "cuda")}
    (tmp_path / "csrc" / "cuda" / "generic.cu").write_text("two")
    assert setup.sources_hash("cpu") == before["cpu"]
    assert setup.sources_hash("cuda") != before["cuda"]
    (tmp_path / "csrc" / "scalar.h").write_text("two")
    assert setup.sources_hash("cpu") != before["cpu"]

    build = setup.BuildOptional(Distribution({"ext_modules": [Extension("marginkernels._cpu", [])]}))
    build.ensure_finalized()
    build.build_lib = str(tmp_path / "lib")
    hashed = tmp_path / "lib" / "marginkernels" / "_cpu.sha256"
    hashed.parent.mkdir(parents=True)
    monkeypatch.setitem(setup.BUILDERS, "marginkernels._cpu", lambda target, objects: target.write_text("built"))
    build.build_extension(build.extensions[0])
    assert hashed.read_text() == setup.sources_hash("cpu")

    def refuse(target, objects):
        raise setup.CannotBuild("no compiler")

    monkeypatch.setitem(setup.BUILDERS, "marginkernels._cpu", refuse)
    build.build_extension(build.extensions[0])
    assert not hashed.exists()
    assert hashed.with_suffix(".txt").read_text() == "no compiler\n"


def test_what_cannot_be_built_is_said(setup, stub, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(setup.CannotBuild, match=r"no C\+\+ compiler"):
        setup.compile_cpu(tmp_path / "out.so", tmp_path, "bind.cpp", "", "")
    with pytest.raises(setup.CannotBuild, match=r"failed: .*so it was"):
        setup.run(sys.executable, "-c", "import sys; print('so it was'); sys.exit(3)")
    setup.run(sys.executable, "-c", "pass")


def test_the_debug_build_of_the_cuda_kernels(setup, monkeypatch, tmp_path):
    """In place, with the macro for the fused kernels; the ordinary build takes it for out of date, and has no such macro."""
    from setuptools import Distribution

    seen = []

    def ninja_build(folder, compiler, rules, objects, link):
        seen.append({source.name: flags for source, flags in objects.values()})
        link[0].parent.mkdir(exist_ok=True)
        link[0].write_text("built")

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup, "ninja_build", ninja_build)
    monkeypatch.setattr(setup, "HERE", tmp_path)
    command = setup.BuildCudaDebug(Distribution())
    command.limit = "123"
    command.run()
    (target,) = (tmp_path / "marginkernels").iterdir()
    assert target.name.startswith("_cuda.")
    assert target.stat().st_mtime == 0
    setup.build_cuda(target, tmp_path)
    debug, ordinary = seen
    assert debug.pop("hopper.cu").split() == [*ordinary.pop("hopper.cu").split(), "-DMK_BARRIER_LIMIT=123"]
    assert debug == ordinary
    assert not any("BARRIER" in flags for flags in ordinary.values())
