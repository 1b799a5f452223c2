"""``PYTHONPATH=tests python -m mutants``: plant each mistake in a copy of the checkout, and see whether its tests notice it.

Each is *caught* (a named test fails, or does not end, and passes on the copy as it was), or it *survives*. Results go into a record at
once, and a later run does those again whose file, text or tests have changed since. Returns 1 where a mistake survives
that is not marked as equivalent, or where one cannot be planted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from marginkernels.cli._text import integer, writable_file

from .drawn import drawn
from .planted import ROOT, Mistake, planted

SCHEMA = "marginkernels.mutants/1"
#: Seconds after which tests that do not end count as a failure, and a build as broken.
LIMIT = 900


class Copy:
    """A copy of the checkout's files, with the C++ kernels built for this processor alone."""

    def __init__(self, folder: Path):
        self.root = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # A file's compiled form is recognized by second and size, which a mistake may leave as they are.
        self.environment = os.environ | {"PYTHONPATH": f"{folder}", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        self.built: Path | None = None
        self.clean: dict[str, str] = {}  # words for pytest that were tried without a mistake -> what was wrong then

    def build(self) -> str:
        """Compile ``marginkernels._cpu``; what the compiler says where it fails."""
        done = self._run([sys.executable, "setup.py", "build_kernels", f"--levels={','.join(_levels())}"])
        return done.stdout[-2000:] if done.returncode else ""

    def keep(self) -> None:
        """Of the built module, to put it back after a mistake in a kernel."""
        (self.built,) = self.root.glob("marginkernels/_cpu*.so")
        shutil.copy2(self.built, self.root / "kept.so")

    def test(self, words: str) -> subprocess.CompletedProcess[str]:
        """Run pytest with ``words``, until the first failure."""
        more = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if "interpreted_triton" in words else {}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *shlex.split(words)]
        return self._run(command, **more)

    def try_out(self, mistake: Mistake) -> tuple[str, str]:
        """``"caught"``, ``"survived"`` or ``"broken"``, and by which test or why."""
        found, by, words = self._planted(mistake)
        if found == "caught":
            if words not in self.clean:
                done = self.test(words)
                self.clean[words] = done.stdout[-1000:] if done.returncode else ""
            if self.clean[words]:
                return "broken", f"{words} does not pass without a mistake: {self.clean[words]}"
        return found, by

    def _planted(self, mistake: Mistake) -> tuple[str, str, str]:
        """The same, and the words for pytest."""
        path = self.root / mistake.file
        kernels = mistake.file.startswith("csrc/cpu/") or mistake.file == "csrc/scalar.h"
        right = path.read_text()
        path.write_text(mistake.mutated(self.root))
        try:
            if kernels and (said := self.build()):
                return "broken", said, ""
            for words in mistake.tests:
                done = self.test(words)
                if done.returncode in (1, 2):  # 2: it cannot even be imported
                    failed = [line.split(" ", 2)[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
                    return "caught", failed[0] if failed else words, words
                if done.returncode < 0:  # a signal: the process itself died
                    return "caught", f"{words} (signal {-done.returncode})", words
                if done.returncode:
                    return "broken", f"pytest returned {done.returncode}: {done.stdout[-500:]}", words
            return "survived", "", ""
        except subprocess.TimeoutExpired:
            return "caught", f"no end within {LIMIT} s", words
        finally:
            path.write_text(right)
            if kernels and self.built:
                shutil.copy2(self.root / "kept.so", self.built)

    def _run(self, command: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=self.root, env=self.environment | more, timeout=LIMIT, **to)


def _levels() -> list[str]:
    """The instruction sets that this processor has kernels for."""
    from marginkernels import _cpu

    return list(_cpu.levels())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORD", help="mistakes whose id, area or file has this in it (may be repeated)")
    parser.add_argument("--sample", type=integer(), metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=integer(0), default=0, help="of these draws (default: %(default)s)")
    parser.add_argument("--drawn", type=integer(), metavar="N", help="instead: N mistakes that cosmic-ray draws in the pure Python")
    parser.add_argument("--jobs", type=integer(), default=os.cpu_count() or 1, help="copies that work side by side (default: %(default)s)")
    parser.add_argument("--record", type=writable_file, metavar="PATH", help="read and write the results here")
    parser.add_argument("--again", action="store_true", help="do also those that the record has")
    parser.add_argument("--list", action="store_true", help="print the mistakes and end")
    args = parser.parse_args(argv)
    try:
        everything = drawn(args.drawn, args.seed) if args.drawn else planted()
    except ImportError:
        parser.error("argument --drawn: expected cosmic-ray, which is not installed: pip install cosmic-ray")
    faults = [fault for mistake in everything for fault in mistake.faults()]
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return 1
    chosen = [m for m in everything if not args.only or any(word in f"{m.area} {m.id} {m.file}" for word in args.only)]
    if args.sample:
        chosen = sorted(random.Random(args.seed).sample(chosen, min(args.sample, len(chosen))), key=lambda m: (m.file, m.id))
    if args.list:
        for m in chosen:
            print(f"{m.area:12} {m.id:40} {m.file}: {m.why}")
        return 0
    record = Record(args.record, everything)
    wanted = [m for m in chosen if args.again or not record.holds(m)]
    print(f"{len(everything)} planted, {len(chosen)} chosen, {len(wanted)} to do")
    if wanted and not _run(wanted, record, args.jobs):
        return 1
    print(record.summary())
    left = [m for m in chosen if record.found(m) != "caught" and not m.equivalent]
    for m in left:
        print(f"{record.found(m)}: {m.id} ({m.file}): {m.why}")
    for m in chosen:
        if m.equivalent and record.found(m) == "caught":
            left.append(m)
            print(f"caught, though marked as equivalent: {m.id}")
    return 1 if left else 0


def _run(wanted: list[Mistake], record: Record, jobs: int) -> bool:
    """Try them all; False where the kernels do not build."""
    jobs = min(jobs, len(wanted))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for i in range(jobs):
            (Path(folder) / str(i)).mkdir()
            copy = Copy(Path(folder) / str(i))
            if said := copy.build():
                print(f"the kernels do not build: {said}", file=sys.stderr)
                return False
            copy.keep()
            copies.put(copy)
        own = threading.local()

        def mine() -> Copy:
            if not hasattr(own, "copy"):
                own.copy = copies.get()
            return own.copy

        def take(mistake: Mistake) -> tuple[Mistake, str, str, float, str]:
            start = time.monotonic()
            found, by = mine().try_out(mistake)
            return mistake, found, by, time.monotonic() - start, mistake.fingerprint(mine().root)

        with ThreadPoolExecutor(jobs) as pool:
            bar = tqdm(pool.map(take, wanted), total=len(wanted), desc="planted", unit="mistake")
            for mistake, found, by, seconds, fingerprint in bar:
                record.add(mistake, found, by, seconds, fingerprint)
                if found != "caught":
                    bar.write(f"{found}: {mistake.id} ({mistake.file}): {mistake.why} {by}")
    return True


class Record:
    """The results by id, written after each one."""

    def __init__(self, path: Path | None, everything: Sequence[Mistake]):
        self.path = path
        self.everything = everything
        self.results: dict[str, dict[str, Any]] = {}
        if path and path.exists() and path.stat().st_size:
            read = json.loads(path.read_text())
            if read.get("schema") != SCHEMA:
                raise SystemExit(f"argument --record: expected a record of `python -m mutants`, got {str(path)!r}")
            self.results = read["mistakes"]
        from benchmarks.environment import commit

        self.commit = commit()

    def holds(self, mistake: Mistake) -> bool:
        return self.results.get(mistake.id, {}).get("fingerprint") == mistake.fingerprint()

    def found(self, mistake: Mistake) -> str:
        return str(self.results.get(mistake.id, {}).get("result", "not run"))

    def add(self, mistake: Mistake, found: str, by: str, seconds: float, fingerprint: str) -> None:
        line = {"file": mistake.file, "result": found, "by": by, "seconds": round(seconds, 1), "commit": self.commit}
        if mistake.equivalent:
            line["equivalent"] = mistake.equivalent
        self.results[mistake.id] = line | {"fingerprint": fingerprint}
        if self.path:
            known = [m.id for m in self.everything]
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(self.results[name])}" for name in known if name in self.results)
            text = f'{{\n "schema": "{SCHEMA}",\n "total": {json.dumps(self.total())},\n "mistakes": {{\n{lines}\n }}\n}}\n'
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(text)
            os.replace(part, self.path)

    def total(self) -> dict[str, int]:
        counts = Counter("equivalent" if m.equivalent else self.found(m) for m in self.everything)
        return {"planted": len(self.everything)} | dict(sorted(counts.items()))

    def summary(self) -> str:
        total = self.total()
        able = total["planted"] - total.get("equivalent", 0)
        return f"{total.get('caught', 0)} of {able} caught ({total.get('caught', 0) / max(able, 1):.1%}); {total}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
