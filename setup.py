"""Builds the compiled backends with ninja. Each is optional: where one cannot be built the package installs without it, and a text
file in its place says why (``marginkernels.backends()`` shows it)."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
#: Instruction sets of the C++ kernels and their compiler flags. The build leaves out those that the compiler does not support; those that
#: the processor does not support are never called.
LEVELS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}


class CannotBuild(Exception):
    """Why an extension is left out."""


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stdout.strip()[-500:]}")


def ninja_build(folder: Path, compiler: str, rules: str, objects: dict[Path, tuple[Path, str]], link: tuple[Path, str]) -> None:
    """Compile ``objects`` (object -> source, flags) and link them to ``link`` (output, flags), in parallel."""
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja")
    if program is None:
        raise CannotBuild("ninja is not installed")

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [f"cxx = {compiler}", rules]
    for target, (source, flags) in objects.items():
        lines.append(f"build {escaped(target)}: compile {escaped(source)}\n  flags = {flags}")
    lines.append(f"build {escaped(link[0])}: link {' '.join(map(escaped, objects))}\n  flags = {link[1]}")
    folder.mkdir(parents=True, exist_ok=True)
    link[0].parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run(program, "-C", str(folder))


CXX_RULES = """\
rule compile
  command = $cxx -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in $flags -o $out"""


def build_cpu(target: Path, folder: Path, levels: Iterable[str] = LEVELS) -> None:
    """marginkernels._cpu: one object per instruction set, the driver and the O(N D) row math for any processor, and the binding."""
    import pybind11

    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}' -I'{sysconfig.get_path('platinclude')}'"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,-s"
    compile_cpu(target, folder, "bind.cpp", f"{includes} -O1", shared, levels=levels)


def compile_cpu(
    target: Path, folder: Path, front: str, front_flags: str, link_flags: str, extra: str = "", levels: Iterable[str] = LEVELS
) -> None:
    """The kernels for ``levels``, the driver and ``front`` (of csrc/cpu, compiled with ``front_flags``); ``extra`` flags to all steps."""
    if os.name != "posix":
        raise CannotBuild("the kernels are written for GCC and Clang on Linux and macOS")
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise CannotBuild("no C++ compiler: none of c++, g++ and clang++ is on the PATH")
    source = HERE / "csrc" / "cpu"
    known = {level: LEVELS[level] for level in LEVELS if level in levels and understands(compiler, LEVELS[level])} if is_x86() else {}
    # Multiply-adds may be fused, and a square root is one instruction. GCC's vector headers trigger its own warnings about uninitialized
    # values.
    kernel = f"-ffp-contract=fast -fno-math-errno -fno-exceptions -fno-rtti -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi {extra}"
    defines = " ".join(f"-DMK_HAS_{level.upper()}" for level in known)
    files = {
        "level_plain.cpp": kernel,
        "row_math.cpp": f"-pthread -Wno-psabi {extra}",
        "driver.cpp": f"{defines} -pthread {extra}",
        "topk.cpp": f"-pthread {extra}",
        front: f"{front_flags} {extra}",
    }
    for level, flags in known.items():
        files[f"level_{level}.cpp"] = f"{kernel} {flags}"
        if level == "amx":
            files["level_amx_split.cpp"] = f"{kernel} {flags}"
    objects = {folder / Path(name).with_suffix(".o"): (source / name, flags) for name, flags in files.items()}
    ninja_build(
        folder, compiler, CXX_RULES, objects, (target, f"{link_flags} -pthread {'-ldl' if sys.platform == 'linux' else ''} {extra}")
    )


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def understands(compiler: str, flags: str) -> bool:
    """Whether ``compiler`` supports the instruction set ``flags`` and its intrinsics."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <immintrin.h>\n")
        command = [*compiler.split(), *flags.split(), "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


NVCC_RULES = """\
rule compile
  command = $cxx -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -cudart static -Xlinker -s $in $flags -o $out"""
#: What the CUDA kernels are compiled for unless TORCH_CUDA_ARCH_LIST is set; later GPUs compile the PTX at load time.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def build_cuda(target: Path, folder: Path, debug: str = "") -> None:
    """marginkernels._cuda: needs nvcc, but neither a GPU nor a PyTorch that has CUDA. ``debug`` are more flags of the fused kernels."""
    import pybind11

    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise CannotBuild(f"no nvcc {f'in CUDA_HOME ({home})' if home else 'on the PATH'}")
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    found = [re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", word) for word in re.split(r"[;\s]+", asked.strip())]
    if None in found:
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: expected numbers such as {CUDA_ARCHITECTURES!r}, got {asked!r}")
    wanted = {major + minor: bool(ptx) for major, minor, ptx in (m.groups() for m in found) if int(major) >= 8}
    if not wanted:
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0 or later, got {asked!r}")
    general = " ".join(f"'-gencode=arch=compute_{n},code={f'[sm_{n},compute_{n}]' if ptx else f'sm_{n}'}'" for n, ptx in wanted.items())
    source = HERE / "csrc" / "cuda"
    objects = {folder / "generic.o": (source / "generic.cu", general)}
    # Warpgroup products exist on 9.0 only, as the architecture 9.0a, whose PTX does not run on later GPUs.
    if "90" in wanted:
        objects[folder / "hopper.o"] = (source / "hopper.cu", f"-gencode=arch=compute_90a,code=sm_90a {debug}")
    defines = f"-DMK_MODULE={target.name.partition('.')[0]} {'-DMK_FUSED' if '90' in wanted else ''}"
    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}' -I'{sysconfig.get_path('platinclude')}'"
    objects[folder / "module.o"] = (source / "module.cpp", f"{includes} {defines}")
    # In a toolkit that pip installed, the libraries are where nvcc does not look.
    ninja_build(folder, nvcc, NVCC_RULES, objects, (target, f"-L'{Path(nvcc).resolve().parents[1] / 'lib'}'"))


#: How often the debug build looks at a barrier before it gives up: some seconds.
BARRIER_LIMIT = 1 << 28


#: The function that builds each extension, from its path and a folder for its objects; raises CannotBuild.
BUILDERS = {"marginkernels._cpu": build_cpu, "marginkernels._cuda": build_cuda}


def sources_hash(part: str) -> str:
    """Of what an extension is built from, for ``marginkernels/backend/records.py``: the same on every machine and by every compiler."""
    source, digest = HERE / "csrc", hashlib.sha256()
    for path in sorted([*source.glob("*.h"), *(p for p in (source / part).rglob("*") if p.is_file())]):
        digest.update(f"{path.relative_to(source).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class BuildOptional(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        report = target.with_name(f"{ext.name.rpartition('.')[2]}.txt")
        report.unlink(missing_ok=True)
        hashed = report.with_suffix(".sha256")
        hashed.unlink(missing_ok=True)
        try:
            BUILDERS[ext.name](target, Path(self.build_temp).resolve() / ext.name)
            hashed.write_text(sources_hash(ext.name.rpartition("_")[2]))
        except (CannotBuild, ImportError, OSError) as error:
            target.unlink(missing_ok=True)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{error}\n")
            print(f"warning: {ext.name} is left out: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: copies what was built, or the reason why it was not, to the sources."""
        package = HERE / "marginkernels"
        for ext in self.extensions:
            built = Path(self.build_lib).resolve() / self.get_ext_filename(ext.name)
            name = ext.name.rpartition(".")[2]
            hashed = built.with_name(f"{name}.sha256")
            for file, other in ((built, f"{name}.txt"), (built.with_name(f"{name}.txt"), built.name), (hashed, hashed.name)):
                if file.exists():
                    (package / other).unlink(missing_ok=True)
                    shutil.copy2(file, package)


class BuildKernels(Command):
    """``marginkernels._cpu`` alone, in place, for some instruction sets: the quick build of tests/mutants."""

    user_options = [("levels=", None, "instruction sets, separated by commas, beside the plain one")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.levels = ",".join(LEVELS)

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        name = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")
        try:
            build_cpu(HERE / "marginkernels" / name, HERE / "build" / "kernels", self.levels.split(","))
        except CannotBuild as error:
            raise SystemExit(str(error)) from None


class BuildCudaDebug(Command):
    """``marginkernels._cuda`` alone, in place, with fused kernels that end, and name the barrier, where one is never reached. Needs nvcc,
    and 9.0 in TORCH_CUDA_ARCH_LIST where that is set. The next ordinary build replaces it."""

    user_options = [("limit=", None, "how often a thread looks at a barrier before it gives up")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.limit = str(BARRIER_LIMIT)

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        target = HERE / "marginkernels" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
        try:
            build_cuda(target, HERE / "build" / "cuda_debug", f"-DMK_BARRIER_LIMIT={int(self.limit)}")
        except CannotBuild as error:
            raise SystemExit(str(error)) from None
        os.utime(target, (0, 0))  # older than the objects of the ordinary build, which then links it anew


class BuildSelftest(Command):
    """csrc/cpu/selftest.cpp with the kernels, as a program to run under sanitizers: tests/backends/test_sanitizers.py."""

    user_options = [("output=", None, "the program"), ("flags=", None, "flags of every step")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.output, self.flags = "build/selftest", ""

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        target = Path(self.output).resolve()
        compile_cpu(target, target.parent / "objects", "selftest.cpp", "", "", self.flags)


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in BUILDERS],
    cmdclass={
        "build_ext": BuildOptional,
        "build_kernels": BuildKernels,
        "build_cuda_debug": BuildCudaDebug,
        "build_selftest": BuildSelftest,
    },
)
