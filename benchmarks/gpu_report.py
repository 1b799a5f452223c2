"""``make gpu-report OUT=DIR``: build, GPU tests, sanitizer, benchmark and profile of one GPU, each within its own time limit.

Every step runs in a process group of its own and writes one file; one that fails, hangs or cannot run here leaves its reason in
``summary.md`` and the next goes on. All limits together stay below nine minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Files in OUT, summary.md among them.
MOST_FILES = 8


@dataclass(frozen=True)
class Step:
    """``command`` gives the words to run, given OUT; ``missing`` the reason why it cannot run here, or None."""

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


def no_sanitizer() -> str | None:
    if no_gpu():
        return no_gpu()
    from .gpu_small import tool

    return None if tool("compute-sanitizer") else "compute-sanitizer is not installed"


def make(target: str) -> list[str]:
    """The target by itself: a build that failed has said so, and what needs no build goes on."""
    return ["make", target, f"PYTHON={sys.executable}", *(["--old-file=build"] if target != "build" else [])]


def benchmark(out: Path) -> list[str]:
    path = str(out / "benchmark.json")
    return [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--preset", "quick", "--time-limit", "120", "--json", path]


STEPS = (
    Step("build", 120, "build.txt", lambda out: make("build"), no_gpu),
    Step("tests", 100, "tests.txt", lambda out: [*make("test-gpu"), "TESTS=-k 'not sanitizer'"], no_gpu),
    Step("benchmark", 180, "benchmark.txt", benchmark, no_gpu),
    Step("sanitizer", 80, "sanitizer.txt", lambda out: [sys.executable, "-m", "benchmarks.gpu_small", "--sanitize"], no_sanitizer),
    Step("profile", 50, "profile.txt", lambda out: [sys.executable, "-m", "benchmarks.gpu_profile"], no_gpu),
)


def run_step(step: Step, out: Path) -> tuple[str, float]:
    """Outcome and seconds."""
    reason = step.missing()
    if reason is not None:
        return f"skipped: {reason}", 0.0
    start = time.monotonic()
    with open(out / step.file, "w") as log:
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


def report(out: Path, steps: tuple[Step, ...] = STEPS) -> dict[str, str]:
    """Run the steps; step -> outcome. Writes ``summary.md`` after each, so that it is there whatever happens."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, str] = {}
    rows = ["# GPU report", "", _machine(), "", "| step | outcome | seconds | file |", "|---|---|---:|---|"]
    for step in steps:
        outcome, seconds = run_step(step, out)
        outcomes[step.name] = outcome
        file = step.file if (out / step.file).exists() else ""
        rows.append(f"| {step.name} | {outcome} | {seconds:.0f} | {file} |")
        (out / "summary.md").write_text("\n".join(rows) + "\n")
        print(f"{step.name}: {outcome} ({seconds:.0f} s)", flush=True)
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
    outcomes = report(parser.parse_args().out.resolve())
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
