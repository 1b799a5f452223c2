"""What ``verify`` asks of each candidate: the checks, in the order in which they are made, as values that JSON holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ... import margins, testing
from ...backend import FUSED, cpu, records

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: (N, D, C) that are no multiples of any tile, and the D that fixed kernels are made for. The second and the fourth have a bias and label
#: smoothing.
SHAPES = ((5, 24, 19), (33, 67, 259), (66, 136, 1031), (33, 128, 517), (130, 256, 1100))
EXTRAS = (1, 3)
#: Every head by name; the last one refuses a bias.
HEADS = testing.HEADS | {"uniface-clamped": lambda c: margins.UniFace(c, 32.0, clamp=True)}
WITHOUT_BIAS = ("uniface-clamped",)
#: Heads that between them take every path through the kernels: plain, raw sides, both hard transforms, a pass of the margin's own, a search
#: before it, a sum of softplus.
FAMILIES = ("arcface", "softmax", "l2-softmax", "mv-arc", "curricularface", "adacos", "inter-topk", "sphereface2")
#: Centers of a class where it has several: that of the paper, and one more. Neither divides a tile. And the heads that have them: plain, a
#: transform, one whose classes a search decides, a sum of softplus. Heads that jump at a threshold have one center a class: with several,
#: the problems' cosines lie close together, and too many near it.
SUB_CENTERS = (3, 5)
WITH_SUB_CENTERS = ("arcface", "circle", "inter-topk", "sphereface2")
#: The size class, timed on a GPU only, at which classes of several centers are tried too: the largest has enough to do with one.
SIZE_WITH_SUB_CENTERS = "medium, wide"
#: Kinds of check that need a GPU.
GPU_ONLY = ("graph", "sync")
#: A peer without a verdict: plain PyTorch, compiled.
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Candidate:
    """What gets a process and a verdict of its own.

    Attributes:
        name: in the record: the backend's, or ``cpu:avx2`` and the like for one instruction set of it.
        backend: what runs.
        level: the instruction set of ``cpu``; empty for the one it takes itself.
        source: ``module:attribute`` of a :class:`marginkernels.backend.Backend` that the registry does not have; for tests.
    """

    name: str
    backend: str
    level: str = ""
    source: str = ""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        kind: ``"values"``, ``"bits"``, ``"topk"``, ``"graph"``, ``"sync"``, ``"size"`` or ``"time"``.
        pair: dtypes of embeddings and weight.
        shape: (N, D, C).
        head: of :data:`HEADS`.
        extras: whether there are bias and label smoothing.
        workspace_mb: of the call; None for the backend's own choice, infinity as -1.
        size: the size class that it stands for.
        sub_centers: centers of each class.
    """

    kind: str
    pair: tuple[str, str]
    shape: tuple[int, int, int]
    head: str = "arcface"
    extras: bool = False
    workspace_mb: float | None = None
    size: str = ""
    sub_centers: int = 1

    @property
    def features(self) -> tuple[str, ...]:
        """What it tries of a backend, as records name it."""
        if self.kind == "topk":
            return (records.SEARCH[self.sub_centers > 1],)
        if self.kind != "values":
            return ()
        margin = HEADS[self.head](self.shape[2])
        return records.features(margin.non_target, margin.reduction, self.sub_centers)

    def __str__(self) -> str:
        n, d, c = self.shape
        workspace = "" if self.workspace_mb is None else f", workspace {'all' if self.workspace_mb < 0 else 'off'}"
        what = f"{self.kind}, {self.head}, {'/'.join(self.pair)}, N={n} D={d} C={c}" + f" K={self.sub_centers}" * (self.sub_centers > 1)
        return what + (", bias, label smoothing" if self.extras else "") + workspace

    @classmethod
    def of(cls, found: dict[str, Any]) -> Check:
        return cls(**(found | {"pair": tuple(found["pair"]), "shape": tuple(found["shape"])}))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def candidates(device: str, names: Sequence[str] | None) -> list[Candidate]:
    """Those that are asked for, by default all backends for this type of device and every instruction set of ``cpu``; ``torch`` first,
    since the others are timed against it."""
    kind = torch.device(device).type
    found = [Candidate(name, name) for name in (names or FUSED) if name == "reference" or names or kind in FUSED[name].device_types]
    if any(c.name == "cpu" for c in found) and kind == "cpu" and names is None:
        found += [Candidate(f"cpu:{level}", "cpu", level) for level in cpu.levels()]
    return sorted(found, key=lambda c: c.name != records.FALLBACK)


def unavailable(candidate: Candidate) -> str | None:
    """Why nothing at all of a candidate can be checked here."""
    return None if candidate.source or candidate.backend == "reference" else FUSED[candidate.backend].unavailable_reason()


def unsupported(candidate: Candidate, device: str, pair: tuple[str, str], dim: int, sub_centers: int = 1) -> str | None:
    """Why it cannot serve these dtypes, this D and so many centers a class."""
    if candidate.source or candidate.backend == "reference":
        return None
    x, w = (DTYPES[name] for name in pair)
    if candidate.level and (x, candidate.level) not in cpu.PANELS:
        return f"has no {pair[0]} products on {candidate.level}"
    backend = FUSED[candidate.backend]
    return backend.unsupported_reason(device, x, w, dim) or backend.sub_centers_reason(sub_centers)


def checks(candidate: Candidate, device: str, *, heads: Sequence[str] | None = None, dtypes: Sequence[str] | None = None) -> list[Check]:
    """The checks of a candidate on ``device``: small ones first, then the sizes of its work, then times.

    Args:
        heads, dtypes: only these heads, and these dtypes of embeddings and weight alike; then there are neither sizes nor times.
    """
    kind, narrowed = torch.device(device).type, heads is not None or dtypes is not None
    if dtypes is not None:
        pairs = [(name, name) for name in dtypes]
    else:
        mixed = [(x, w) for x in DTYPES for w in ("float32", x) if x != "float64"] + [("float64", "float64")]
        pairs = list(dict.fromkeys(mixed))
    found: list[Check] = []

    def add(*more: Check) -> None:
        found.extend(one for one in more if unsupported(candidate, device, one.pair, one.shape[1], one.sub_centers) is None)

    for pair, (index, head) in itertools.product(pairs, enumerate(heads or HEADS)):
        for i in _shapes(candidate, kind, pair, index):
            add(Check("values", pair, SHAPES[i], head, i in EXTRAS and head not in WITHOUT_BIAS, (0.0, -1.0)[i % 2]))
    for pair, head in itertools.product(pairs, heads or WITH_SUB_CENTERS):
        add(Check("values", pair, SHAPES[1], head, head not in WITHOUT_BIAS, 0.0, sub_centers=SUB_CENTERS[0]))
        if not _brief(candidate, kind, pair):
            add(Check("values", pair, SHAPES[2], head, False, -1.0, sub_centers=SUB_CENTERS[1]))
    several = [] if heads else [(pair, "arcface", -1.0, SUB_CENTERS[0]) for pair in pairs]
    once = [(*each, 1) for each in itertools.product(pairs, heads or FAMILIES, (0.0, -1.0))]
    for pair, head, mb, k in (*once, *several):
        shapes = (SHAPES[i] for i in ((2, 4) if kind == "cuda" else (3,)))
        add(*(Check("bits", pair, shape, head, workspace_mb=mb, sub_centers=k) for shape in shapes))
    if candidate.backend != "reference":
        searched = ((2, 1), (3, 1), (1, SUB_CENTERS[0]), (3, SUB_CENTERS[1]))
        add(*(Check("topk", pair, SHAPES[i], sub_centers=k) for pair in pairs for i, k in searched))
    if kind == "cuda":
        steps = [(head, 1) for head in ("arcface", "curricularface", "inter-topk", "sphereface2")] + [("arcface", SUB_CENTERS[0])]
        add(*(Check(one, pair, SHAPES[4], head, sub_centers=k) for one in GPU_ONLY for pair in pairs for head, k in steps))
    if narrowed or candidate.backend == "reference":
        return found
    sizes = [(s.name, s.timed[kind]) for s in records.SIZE_CLASSES if kind in s.timed and not candidate.level]
    real = [
        pair for pair in pairs if pair[0] != "float64" and (kind == "cuda" or pair in (("float32", "float32"), ("bfloat16", "bfloat16")))
    ]
    for name, shape in sizes:
        add(*(Check("size", pair, shape, size=name) for pair in real))
        if name == SIZE_WITH_SUB_CENTERS:
            add(*(Check("size", pair, shape, size=name, sub_centers=SUB_CENTERS[0]) for pair in real))
    for name, shape in sizes:
        # The embeddings' dtype decides what the products cost; the centers are float32, as in mixed-precision training.
        add(*(Check("time", (x, "float32"), shape, size=name) for x in dict.fromkeys(pair[0] for pair in real)))
    return found


def _shapes(candidate: Candidate, kind: str, pair: tuple[str, str], index: int) -> Sequence[int]:
    """The shapes of head number ``index``: all on a GPU. On a CPU one with every option and, in turn, one of the others."""
    if kind == "cuda":
        return range(len(SHAPES))
    return (1,) if _brief(candidate, kind, pair) else (1, (0, 2, 3)[index % 3])


def _brief(candidate: Candidate, kind: str, pair: tuple[str, str]) -> bool:
    """Whether one shape will do: on a CPU for dtypes that are mixed, and for one instruction set by itself, which is there to tell which of
    them is wrong."""
    return kind != "cuda" and (bool(candidate.level) or pair[0] != pair[1])


def compiled_checks(device: str) -> list[Check]:
    """What the compiled peer is timed at: compiling takes its time, so not at every size."""
    kind = torch.device(device).type
    sizes = [(s.name, s.timed[kind]) for s in records.SIZE_CLASSES if kind in s.timed and s.most_dim > 256]
    dtypes = ("float32",) if kind == "cpu" else ("float32", "float16", "bfloat16")
    return [Check("time", (x, "float32"), shape, size=name) for name, shape in sizes for x in dtypes]
