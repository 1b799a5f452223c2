"""``make gpu-report OUT=DIR``: build, GPU tests, sanitizers, benchmarks and profile of one GPU, each within its own time limit.

Every step runs in its own process group and appends to a log file. If a step fails, hangs or cannot run here, the reason goes to
``summary.md`` and the next step runs. A step whose time limit exceeds what is left of ``--seconds`` is skipped; run it in another call
(``STEPS="NAME ..."``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Where to look for CUDA's tools that are not on the PATH.
CUDA_BIN = Path("/usr/local/cuda/bin")
#: The most files in OUT, including summary.md.
MOST_FILES = 8
#: Default time limit of one call, in seconds.
SECONDS = 540


@dataclass(frozen=True)
class Step:
    """One step of the report.

    Attributes:
        seconds: its time limit.
        file: the log in OUT that its output is appended to; steps may share one.
        command: OUT -> the command line to run.
        missing: () -> why it cannot run here, or None.
    """

    name: str
    seconds: int
    file: str
    command: Callable[[Path], list[str]]
    missing: Callable[[], str | None]


def no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def no_triton() -> str | None:
    return no_gpu() or (None if importlib.util.find_spec("triton") else "Triton is not installed")


def tool(name: str) -> str | None:
    """The path of a CUDA tool, or None."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_BIN))


def no_sanitizer() -> str | None:
    return no_gpu() or (None if tool("compute-sanitizer") else "compute-sanitizer is not installed")


def make(target: str) -> list[str]:
    """Make one target without its prerequisite ``build``: a failed build is reported by its own step, and must not stop the others."""
    return ["make", target, f"PYTHON={sys.executable}", *(["--old-file=build"] if target != "build" else [])]


def pytest(words: str) -> Callable[[Path], list[str]]:
    return lambda out: [sys.executable, "-m", "pytest", "-m", "gpu", "-k", words, "--durations=5", "-p", "no:cacheprovider"]


def small(out: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_small"]


def sanitizer(name: str) -> Callable[[Path], list[str]]:
    words = [tool("compute-sanitizer") or "compute-sanitizer", "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
    return lambda out: words + small(out)


def benchmark(out: Path) -> list[str]:
    path = str(out / "benchmark.json")
    return [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--preset", "quick", "--time-limit", "120", "--json", path]


def workspace(out: Path) -> list[str]:
    """Each backend of this package with and without a workspace (what the row pass saves for the class pass), in one run."""
    from .peers import providers

    names = [name for name, provider in providers().items() if provider.ours]
    chosen = [name for name in names if name.endswith("+workspace") or f"{name}+workspace" in names]
    cases = [word for n in (512, 1024, 4096) for word in ("--case", f"arcface,bf16,{n},512,1000000")]
    path = str(out / "workspace.json")
    return [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--providers", ",".join(chosen), *cases, "--json", path]


#: Correctness first, then measurements.
STEPS = (
    Step("build", 130, "tests.txt", lambda out: make("build"), no_gpu),
    Step("kernels", 90, "tests.txt", lambda out: [sys.executable, "-m", "benchmarks.gpu_kernels"], no_triton),
    Step("small", 40, "tests.txt", small, no_gpu),
    Step("memcheck", 50, "sanitizer.txt", sanitizer("memcheck"), no_sanitizer),
    Step("racecheck", 50, "sanitizer.txt", sanitizer("racecheck"), no_sanitizer),
    Step("repeat", 30, "tests.txt", pytest("repeat"), no_gpu),
    Step("graph", 30, "tests.txt", pytest("graph"), no_gpu),
    Step("tests", 120, "tests.txt", pytest("not repeat and not graph and not sanitizer"), no_gpu),
    Step("benchmark", 180, "benchmark.txt", benchmark, no_gpu),
    Step("workspace", 100, "benchmark.txt", workspace, no_gpu),
    Step("profile", 50, "profile.txt", lambda out: [sys.executable, "-m", "benchmarks.gpu_profile"], no_gpu),
)


def run_step(step: Step, out: Path) -> tuple[str, float]:
    """Run one step; its outcome in words and the seconds that it took."""
    reason = step.missing()
    if reason is not None:
        return f"skipped: {reason}", 0.0
    start = time.monotonic()
    with open(out / step.file, "a") as log:
        print(f"==== {step.name}", file=log, flush=True)
        try:
            child = subprocess.Popen(
                step.command(out), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            return f"failed: {error.strerror}", 0.0
        try:
            code = child.wait(step.seconds)
            outcome = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped at its limit of {step.seconds} s; its output so far is in the log"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also the processes that it left behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return outcome, time.monotonic() - start


def report(out: Path, steps: tuple[Step, ...] = STEPS, seconds: float = SECONDS) -> dict[str, str]:
    """Run the steps; gives step -> outcome. ``summary.md`` is rewritten after each step, so that it is complete up to any interruption."""
    out.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (out / step.file).unlink(missing_ok=True)
    end = time.monotonic() + seconds
    outcomes: dict[str, str] = {}
    rows = ["# GPU report", "", _machine(), "", "| step | outcome | seconds | file |", "|---|---|---:|---|"]
    for step in steps:
        if step.seconds <= end - time.monotonic():
            outcome, took = run_step(step, out)
        else:
            outcome, took = f"skipped: its limit of {step.seconds} s exceeds what is left of {seconds:.0f} s", 0.0
        outcomes[step.name] = outcome
        file = step.file if (out / step.file).exists() else ""
        rows.append(f"| {step.name} | {outcome} | {took:.0f} | {file} |")
        (out / "summary.md").write_text("\n".join(rows) + "\n")
        print(f"{step.name}: {outcome} ({took:.0f} s)", flush=True)
    return outcomes


def _machine() -> str:
    from .environment import commit

    try:
        import torch
    except ImportError:
        return f"Commit {commit()}, no PyTorch."
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit()}."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"output folder; at most {MOST_FILES} files")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="run only these steps, in the usual order")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="total time limit; a step whose own limit exceeds what is left is skipped"
    )
    args = parser.parse_args()
    if not 0 < args.seconds < float("inf"):
        parser.error(f"argument --seconds: expected a finite number > 0, got {args.seconds}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder that can be written, got {str(args.out)!r} ({error.strerror})")
    steps = tuple(step for step in STEPS if not args.steps or step.name in args.steps)
    outcomes = report(args.out.resolve(), steps, args.seconds)
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
