"""``make gpu-report OUT=DIR``: build, GPU tests, sanitizers, benchmarks and profile of one GPU, each within its own time limit.

Every step runs in a process group of its own and adds to a file; one that fails, hangs or cannot run here leaves its reason in
``summary.md`` and the next goes on. A step whose limit no longer fits into ``--seconds`` is left for another call (``STEPS="NAME ..."``).
"""

from __future__ import annotations

import argparse
import contextlib
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
#: Where CUDA's own tools lie where they are not on the path.
CUDA_BIN = Path("/usr/local/cuda/bin")
#: Files in OUT, summary.md among them.
MOST_FILES = 8
#: Seconds of one call.
SECONDS = 540


@dataclass(frozen=True)
class Step:
    """``command`` gives the words to run, given OUT; ``missing`` the reason why it cannot run here, or None. Steps may share a ``file``."""

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


def tool(name: str) -> str | None:
    """The path of one of CUDA's tools, or None."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_BIN))


def no_sanitizer() -> str | None:
    return no_gpu() or (None if tool("compute-sanitizer") else "compute-sanitizer is not installed")


def make(target: str) -> list[str]:
    """The target by itself: a build that failed has said so, and what needs no build goes on."""
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
    """Each of our backends with and without what the row pass may keep for the class pass, in one run."""
    from .peers import providers

    names = [name for name, provider in providers().items() if provider.ours]
    chosen = [name for name in names if name.endswith("+workspace") or f"{name}+workspace" in names]
    cases = [word for n in (512, 1024, 4096) for word in ("--case", f"arcface,bf16,{n},512,1000000")]
    path = str(out / "workspace.json")
    return [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--providers", ",".join(chosen), *cases, "--json", path]


#: What must be right first, then what is measured.
STEPS = (
    Step("build", 130, "tests.txt", lambda out: make("build"), no_gpu),
    Step("small", 60, "tests.txt", small, no_gpu),
    Step("memcheck", 60, "sanitizer.txt", sanitizer("memcheck"), no_sanitizer),
    Step("racecheck", 60, "sanitizer.txt", sanitizer("racecheck"), no_sanitizer),
    Step("repeat", 40, "tests.txt", pytest("repeat"), no_gpu),
    Step("graph", 40, "tests.txt", pytest("graph"), no_gpu),
    Step("tests", 120, "tests.txt", pytest("not repeat and not graph and not sanitizer"), no_gpu),
    Step("benchmark", 180, "benchmark.txt", benchmark, no_gpu),
    Step("workspace", 100, "benchmark.txt", workspace, no_gpu),
    Step("profile", 50, "profile.txt", lambda out: [sys.executable, "-m", "benchmarks.gpu_profile"], no_gpu),
)


def run_step(step: Step, out: Path) -> tuple[str, float]:
    """Outcome and seconds."""
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
            outcome = f"ended at its limit of {step.seconds} s; what it had written stands"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started and left behind
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return outcome, time.monotonic() - start


def report(out: Path, steps: tuple[Step, ...] = STEPS, seconds: float = SECONDS) -> dict[str, str]:
    """Run the steps; step -> outcome. Writes ``summary.md`` after each, so that it is there whatever happens."""
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
            outcome, took = f"skipped: its {step.seconds} s do not fit into what is left of {seconds:.0f}", 0.0
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
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"at most {MOST_FILES} files go here")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these, in the usual order")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no step that may take longer than what is left of these")
    args = parser.parse_args()
    steps = tuple(step for step in STEPS if not args.steps or step.name in args.steps)
    outcomes = report(args.out.resolve(), steps, args.seconds)
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
