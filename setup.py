"""Builds the compiled backends with ninja. Each is optional: where one cannot be built the package installs without it, and a text
file in its place says why (``marginkernels.backends()`` shows it)."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
#: Instruction sets of the C++ kernels and the flags of each: what this compiler does not know is left out, what the processor does not
#: know is never called.
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
    """Compile ``objects`` (object -> source, flags) and link them to ``link`` (output, flags), as many at once as there are cores."""
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


def build_cpu(target: Path, folder: Path) -> None:
    """marginkernels._cpu: one object for each instruction set, a driver and the rows' arithmetic for any processor, and the binding."""
    import pybind11

    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}' -I'{sysconfig.get_path('platinclude')}'"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,-s"
    compile_cpu(target, folder, "bind.cpp", f"{includes} -O1", shared)


def compile_cpu(target: Path, folder: Path, front: str, front_flags: str, link_flags: str, extra: str = "") -> None:
    """The kernels and the driver, and ``front`` (a file of csrc/cpu) with flags of its own; ``extra`` flags go to every step."""
    if os.name != "posix":
        raise CannotBuild("the kernels are written for GCC and Clang on Linux and macOS")
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise CannotBuild("no C++ compiler: none of c++, g++ and clang++ is on the PATH")
    source = HERE / "csrc" / "cpu"
    known = {level: flags for level, flags in LEVELS.items() if understands(compiler, flags)} if is_x86() else {}
    # Multiply-adds may be fused; GCC's own vector headers trip its warning about uninitialised values.
    kernel = f"-ffp-contract=fast -fno-exceptions -fno-rtti -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi {extra}"
    defines = " ".join(f"-DMK_HAS_{level.upper()}" for level in known)
    files = {
        "level_plain.cpp": kernel,
        "rows.cpp": f"-pthread -Wno-psabi {extra}",
        "driver.cpp": f"{defines} -pthread {extra}",
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
    """Whether ``compiler`` knows the instruction set ``flags`` and its intrinsics."""
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
#: What the CUDA kernels are compiled for unless TORCH_CUDA_ARCH_LIST says otherwise; later GPUs compile the PTX when they load it.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def build_cuda(target: Path, folder: Path) -> None:
    """marginkernels._cuda: needs nvcc, but neither a GPU nor a PyTorch that has CUDA."""
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
    objects = {folder / "slab.o": (source / "slab.cu", general)}
    # Warpgroup products exist on 9.0 alone, under a name of its own that takes no PTX to later GPUs.
    if "90" in wanted:
        objects[folder / "fused.o"] = (source / "fused.cu", "-gencode=arch=compute_90a,code=sm_90a")
    defines = f"-DMK_MODULE={target.name.partition('.')[0]} {'-DMK_FUSED' if '90' in wanted else ''}"
    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}' -I'{sysconfig.get_path('platinclude')}'"
    objects[folder / "module.o"] = (source / "module.cpp", f"{includes} {defines}")
    # In a toolkit installed by pip the libraries lie where nvcc does not look.
    ninja_build(folder, nvcc, NVCC_RULES, objects, (target, f"-L'{Path(nvcc).resolve().parents[1] / 'lib'}'"))


#: What builds each extension: (where it goes, a folder for its objects) -> nothing, or CannotBuild.
BUILDERS = {"marginkernels._cpu": build_cpu, "marginkernels._cuda": build_cuda}


class BuildOptional(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        report = target.with_name(f"{ext.name.rpartition('.')[2]}.txt")
        report.unlink(missing_ok=True)
        try:
            BUILDERS[ext.name](target, Path(self.build_temp).resolve() / ext.name)
        except (CannotBuild, ImportError, OSError) as error:
            target.unlink(missing_ok=True)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{error}\n")
            print(f"warning: {ext.name} is left out: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: what was built, or why it was not, to where the sources are."""
        package = HERE / "marginkernels"
        for ext in self.extensions:
            built = Path(self.build_lib).resolve() / self.get_ext_filename(ext.name)
            name = ext.name.rpartition(".")[2]
            for file, other in ((built, f"{name}.txt"), (built.with_name(f"{name}.txt"), built.name)):
                if file.exists():
                    (package / other).unlink(missing_ok=True)
                    shutil.copy2(file, package)


class BuildCheck(Command):
    """csrc/cpu/check.cpp with the kernels, as a program to run under sanitizers: tests/test_sanitizers.py."""

    user_options = [("output=", None, "the program"), ("flags=", None, "flags of every step")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.output, self.flags = "build/check", ""

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        target = Path(self.output).resolve()
        compile_cpu(target, target.parent / "objects", "check.cpp", "", "", self.flags)


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in BUILDERS],
    cmdclass={"build_ext": BuildOptional, "build_check": BuildCheck},
)
