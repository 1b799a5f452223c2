"""Records of ``python -m marginkernels verify``: which backend is right, and how fast, on one kind of machine; what ``auto`` makes of them.

A record is a JSON file of :class:`Record`. The user's lie in :func:`folder`, the package's in ``SHIPPED``; both are read the same way. One
serves where :func:`why_not` finds nothing against it. Reading never raises: a file that is damaged is one more that does not serve.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.nontarget import NonTarget
from ..core.types import Reduction
from . import cpu

SCHEMA = "marginkernels.verified/1"
#: Records that come with the package.
SHIPPED = Path(__file__).parent / "shipped"
#: What serves where nothing else is verified.
FALLBACK = "torch"

#: Verdicts on a backend. One that is BAD is never chosen; UNFINISHED and UNAVAILABLE say nothing for or against it.
RIGHT, UNFINISHED, UNAVAILABLE = "right", "unfinished", "unavailable"
WRONG, NOT_FINITE, UNEQUAL_BITS, ERROR, CRASH, HANG = "wrong value", "not finite", "unequal bits", "error", "crash", "hang"
BAD = (WRONG, NOT_FINITE, UNEQUAL_BITS, ERROR, CRASH, HANG)


@dataclass(frozen=True)
class SizeClass:
    """Problems for which one backend is taken to be the fastest.

    Attributes:
        most_logits, most_dim: the largest N C and D that are in it.
        timed: (N, D, C) that stands for it, by type of device; a device that has none is not timed at that size.
    """

    name: str
    most_logits: float
    most_dim: float
    timed: Mapping[str, tuple[int, int, int]]


#: The one table of thresholds; a problem is of the first class that holds it.
SIZE_CLASSES = (
    SizeClass("small, narrow", 1 << 22, 256, {"cpu": (64, 128, 10_007), "cuda": (64, 128, 10_007)}),
    SizeClass("small, wide", 1 << 22, math.inf, {"cpu": (64, 512, 10_007), "cuda": (64, 512, 10_007)}),
    SizeClass("medium, narrow", 1 << 27, 256, {"cuda": (512, 128, 100_003)}),
    SizeClass("medium, wide", 1 << 27, math.inf, {"cuda": (512, 512, 100_003)}),
    SizeClass("large, narrow", math.inf, 256, {"cuda": (1024, 128, 1_000_003)}),
    SizeClass("large, wide", math.inf, math.inf, {"cuda": (1024, 512, 1_000_003)}),
)


def size_class(rows: int | None, classes: int | None, dim: int) -> str:
    """The name of a problem's size class; the largest where N or C is not known."""
    logits = math.inf if rows is None or classes is None else rows * classes
    return next(s.name for s in SIZE_CLASSES if logits <= s.most_logits and dim <= s.most_dim)


def pair(dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """How a record names the dtypes of embeddings and weight: ``"bfloat16/float32"``."""
    return f"{dtype}/{weight_dtype}".replace("torch.", "")


#: What a search for the nearest classes asks of a backend, with one center a class and with several.
SEARCH = ("search", "search of sub-centers")


def features(non_target: NonTarget, reduction: Reduction, sub_centers: int) -> tuple[str, ...]:
    """What a loss asks of a backend's kernels, as a record names it: the transform of non-target similarities, the sum over the classes,
    and several centers a class."""
    return (non_target.label, reduction.label, *(["sub-centers"] if sub_centers > 1 else []))


# -- machines ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a record is about. The first four are its key; with an older torch or driver than the record's it does not serve.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        name: of the GPU; of a CPU, processor and best instruction set of the kernels.
        triton: its minor version such as ``"3.7"``, or ``"none"``.
        kernels: a hash of the kernels' sources.
        torch: its version.
        driver: the GPU driver's version; empty on a CPU, or where it is not known.
    """

    device_type: str
    name: str
    triton: str
    kernels: str
    torch: str
    driver: str = ""

    @property
    def file_name(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.device_type} {self.name}".lower()).strip("-")
        return f"{slug}-triton-{self.triton}-{self.kernels}.json"


def here(device: torch.device) -> Machine:
    """This machine, as far as records of ``device`` are concerned."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    else:
        name, driver = f"{processor()}, {(cpu.levels() or ['no C++ kernels'])[-1]}", ""
    return Machine(device.type, name, _triton(), kernels_hash(device.type), torch.__version__, driver)


def processor() -> str:
    """The name of the processor."""
    return cpu_field("model name") or platform.processor() or platform.machine() or "unknown"


def cpu_field(name: str) -> str | None:
    """The first value of a field of Linux's /proc/cpuinfo, or None."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    match = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else None


def _triton() -> str:
    try:  # Triton itself is not imported for its version
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        if match:
            return match[1]
    return ""


def kernels_hash(device_type: str) -> str:
    """Changes with anything that the results of a device's kernels come from: ``core``, the backends, and the sources of the extension."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*package.glob("core/*.py"), *package.glob("backend/**/*.py")]):
        if path.name not in ("records.py", "registry.py"):
            digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    digest.update(_extension_hash(package, "_cuda" if device_type == "cuda" else "_cpu"))
    return digest.hexdigest()[:12]


def _extension_hash(package: Path, name: str) -> bytes:
    """What the build wrote down of an extension's sources (setup.py), so that the same sources count as the same on every machine."""
    built = sorted(package.glob(f"{name}.*.so"))
    if not built:
        return b"not built"
    noted = package / f"{name}.sha256"
    return noted.read_bytes() if noted.exists() else hashlib.sha256(built[0].read_bytes()).digest()


# -- records -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What was found of one backend.

    Attributes:
        verdict: ``RIGHT``, one of ``BAD``, ``UNFINISHED`` or ``UNAVAILABLE``.
        why: one line, where it is not right.
        pairs: the dtypes, as :func:`pair`, in which every check passed.
        checks: by kind of check, how many passed, or why none was made.
        errors: by pair, the largest relative error of each output.
        seconds: how long it took.
        features: what the checks in each of ``pairs`` tried, as :func:`features` and :data:`SEARCH` name it; ``auto`` takes the backend for
            nothing else.
    """

    verdict: str
    why: str = ""
    pairs: tuple[str, ...] = ()
    checks: Mapping[str, int | str] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Time:
    """Milliseconds of a step (forward and backward), and of ``torch``'s in the same process, in turn with it."""

    ms: float
    torch_ms: float

    @property
    def ratio(self) -> float:
        return self.ms / self.torch_ms


@dataclass(frozen=True)
class Record:
    """What ``verify`` found on one machine.

    Attributes:
        made: when, in UTC.
        backends: name -> verdict.
        times: size class -> dtype of the embeddings -> name -> time. Beside the backends it may have peers, which ``auto`` does not know.
        tiles: of the Triton kernels that were verified, as ``tune`` writes them; empty for the default ones.
        about: whatever else is worth noting.
    """

    machine: Machine
    made: str
    backends: Mapping[str, Verdict]
    times: Mapping[str, Mapping[str, Mapping[str, Time]]] = field(default_factory=dict)
    tiles: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str) -> Record:
        """
        Raises:
            ValueError: it is no record.
        """
        try:
            found = json.loads(text)
            if found["schema"] != SCHEMA:
                raise ValueError(f"expected the schema {SCHEMA!r}, got {found['schema']!r}")
            return cls(
                machine=Machine(**found["machine"]),
                made=str(found["made"]),
                backends={
                    name: Verdict(**(v | {"pairs": tuple(v["pairs"]), "features": tuple(v.get("features", ()))}))
                    for name, v in found["backends"].items()
                },
                times={
                    size: {dtype: {name: Time(**one) for name, one in of.items()} for dtype, of in each.items()}
                    for size, each in found["times"].items()
                },
                tiles=tuple(found["tiles"]),
                about=dict(found["about"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a record of {SCHEMA!r}, got one that lacks something: {error}") from None

    def digest(self) -> str:
        return hashlib.sha256(self.as_json().encode()).hexdigest()[:12]


def folder() -> Path | None:
    """Where the user's records lie; None where there is no home directory."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    system = {"darwin": home / "Library" / "Caches", "win32": Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")}
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if Path(cache).is_absolute() else system.get(sys.platform, home / ".cache")
    return base / "marginkernels" / "verified"


def write(record: Record) -> Path:
    """Put a record into the user's folder, in one step: whoever reads meanwhile sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    into = folder()
    if into is None:
        raise OSError("there is no home directory to keep records in")
    into.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=into, prefix=".new-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(record.as_json())
        path = into / record.machine.file_name
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


@dataclass(frozen=True)
class Reading:
    """The record that serves a machine, if there is one, where it lies, and the others with the reason why each does not serve."""

    record: Record | None
    path: Path | None
    ignored: tuple[tuple[Path, str], ...]


def read(machine: Machine, folders: Iterable[Path | None] | None = None) -> Reading:
    """Look for a machine's record: the user's own before the package's, and the newest of either."""
    serving: list[tuple[int, str, Path, Record]] = []
    ignored: list[tuple[Path, str]] = []
    for rank, each in enumerate((folder(), SHIPPED) if folders is None else folders):
        for path in _files(each):
            try:
                record = Record.of_json(path.read_text())
            except (OSError, ValueError) as error:  # UnicodeDecodeError and JSON's errors are ValueErrors
                ignored.append((path, f"cannot be read: {error}"))
                continue
            reason = why_not(record.machine, machine)
            if reason is None:
                serving.append((-rank, record.made, path, record))
            elif record.machine.device_type == machine.device_type:
                ignored.append((path, reason))
    if not serving:
        return Reading(None, None, tuple(ignored))
    best = max(serving, key=lambda s: s[:2])
    ignored += [(path, "another one is taken before it") for _, _, path, record in serving if record is not best[3]]
    return Reading(best[3], best[2], tuple(ignored))


def files() -> list[Path]:
    """Every record here, whatever it is of: the user's, then the package's."""
    return [path for each in (folder(), SHIPPED) for path in _files(each)]


def _files(each: Path | None) -> list[Path]:
    try:
        return [] if each is None else sorted(p for p in each.glob("*.json") if not p.name.startswith("."))
    except OSError:
        return []


def why_not(theirs: Machine, ours: Machine) -> str | None:
    """Why a record of the machine ``theirs`` does not serve on ``ours``, or None."""
    for name, what in (("device_type", "device type"), ("name", "device"), ("triton", "Triton"), ("kernels", "kernels")):
        was, now = getattr(theirs, name), getattr(ours, name)
        if was != now:
            return f"foreign: of {what} {was!r}, here is {now!r}" if name != "kernels" else f"stale: of other kernels ({was}, here {now})"
    for name in ("torch", "driver"):
        was, now = getattr(theirs, name), getattr(ours, name)
        if _numbers(now) < _numbers(was):
            return f"stale: of {name} {was}, here is {'an unknown one' if not now else f'the older {now}'}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# -- the choice --------------------------------------------------------------------------------------------------------------------


def bad(record: Record | None) -> dict[str, str]:
    """Backends that a record takes away, and why."""
    if record is None:
        return {}
    return {name: f"{v.verdict}: {v.why}" if v.why else v.verdict for name, v in record.backends.items() if v.verdict in BAD}


def fastest(record: Record, candidates: Sequence[str], dtypes: str, size: str, asked: Sequence[str] = ()) -> str | None:
    """The fastest of ``candidates`` that the record verifies in these dtypes, for all that is ``asked`` (see :func:`features`), and was
    timed at this size; ``FALLBACK`` needs no time, since the others are timed against it."""
    timed = record.times.get(size, {}).get(dtypes.partition("/")[0], {})
    ratios = {}
    for name in candidates:
        verdict = record.backends.get(name)
        if verdict is not None and verdict.verdict == RIGHT and dtypes in verdict.pairs and {*asked} <= {*verdict.features}:
            ratio = 1.0 if name == FALLBACK else timed[name].ratio if name in timed else math.inf
            if math.isfinite(ratio):
                ratios[name] = ratio
    return min(ratios, key=lambda name: ratios[name], default=None)
