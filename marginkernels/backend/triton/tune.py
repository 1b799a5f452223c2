"""``python -m marginkernels tune``: time a few tiles around the table's on this GPU, and write the fastest to a file.

Nothing is tuned unasked: a process takes the file's tiles by ``marginkernels.backend.triton.use_tiles(path)``. Tiles are tuned for the
plain cosine heads (no bias, no hard form); every candidate must compile without stack, fit the GPU and agree with the table's tile before
it is timed. Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import forms
from ...progress import tqdm
from ...text import table as text_table
from ...verify import TOLERANCE, relative_error
from ..base import Problem, RowWeights
from . import table, use_tiles
from .table import Key, Tile

if TYPE_CHECKING:
    from .aot import Resources

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: What a candidate changes of the table's tile: factors, and stages added.
CHANGES = (
    {}, {"queries": 2}, {"queries": 0.5}, {"keys": 2}, {"keys": 0.5}, {"stages": 1}, {"stages": -1}, {"warps": 2}, {"warps": 0.5},
    {"queries": 0.5, "keys": 2}, {"queries": 2, "keys": 0.5}, {"queries": 0.5, "stages": 1}, {"keys": 0.5, "stages": 1},
)  # fmt: skip
#: Besides: columns of the accumulator, or of one product where there is none.
WIDTH, DEPTH = {"width": 0.5}, {"depth": 2}
#: A tile replaces the table's where its median is below this share of the table's.
FASTER = 0.98


@dataclass(frozen=True)
class Shape:
    """One head: N rows, D, C classes, and the dtypes of products and centres."""

    n: int
    dim: int
    c: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def keys(self, arch: str, *, kept: bool) -> dict[str, Key]:
        """What there is to tune: a name for people -> the kernel's key."""
        online = self.dtype == torch.float16  # whose exponentials are always taken against a running maximum
        of = lambda kernel, **switches: Key.of(kernel, self.dim, self.dtype, arch, **switches)  # noqa: E731
        found = {"row pass": of("row", online=online), "row pass, no gradient": of("row", online=online, accumulates=False)}
        return found | {"class pass": of("class")} | ({"class pass, weights kept": of("kept")} if kept else {})


def candidates(key: Key) -> list[Tile]:
    """The table's tile, then those around it that could serve."""
    first = table.default(key)
    found = []
    for change in (*CHANGES, WIDTH if key.accumulates else DEPTH):
        sizes = {name: int(getattr(first, name) * factor) for name, factor in change.items() if name != "stages"}
        one = replace(first, **sizes, stages=first.stages + change.get("stages", 0))
        if one not in found and table.fault(key, one) is None:
            found.append(one)
    return found


@contextlib.contextmanager
def trying(key: Key, tile: Tile) -> Iterator[None]:
    before = dict(table.CHOSEN)
    table.CHOSEN[key] = tile
    try:
        yield
    finally:
        table.CHOSEN.clear()
        table.CHOSEN.update(before)


def inspect(shape: Shape, key: Key, tile: Tile) -> Resources:
    """What the kernel takes with this tile, compiled for the key's architecture."""
    from . import aot

    p = aot.problem(shape.n, shape.dim, shape.c, shape.dtype, shape.weight_dtype)
    with trying(key, tile):
        launches = aot.launches(p, key.arch, need_u=key.accumulates, kept=float(key.kernel == "kept"))
    name = f"{key.kernel}_pass_kernel"
    online = (key.online, None)  # None: kernels that know no running maximum
    return aot.resources(
        aot.compile(next(o for o in launches if o.kernel.__name__ == name and o.constants.get("ONLINE") in online), key.arch)
    )


def judge(shape: Shape, key: Key, tile: Tile, look: Callable[[Shape, Key, Tile], Resources]) -> tuple[Resources | None, str]:
    """Resources where it compiles, and why it is out, or ""."""
    try:
        used = look(shape, key, tile)
    except Exception as error:  # whatever a compiler may raise
        return None, f"does not compile ({type(error).__name__})"
    limit = table.shared_limit(key.arch)
    if used.shared_bytes > limit:
        return used, f"more shared memory than {limit}"
    return used, "stack" if used.stack_bytes else ""


def passes(shape: Shape, device: str, kept: int) -> dict[str, Callable[[], list[Tensor]]]:
    """By the kernel names of :class:`Key`, with and without gradient: a pass on random data, and what it gives."""
    from . import launch

    g = torch.Generator(device).manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(shape.n, shape.dim, device=device, generator=g))
    w = torch.randn(shape.c, shape.dim, device=device, generator=g, dtype=shape.weight_dtype)
    scale = torch.full((shape.n,), 64.0, device=device)
    labels = torch.randint(shape.c, (shape.n,), device=device, generator=g)
    factor = torch.full((shape.n,), 1 / 0.7, device=device)
    p = Problem((0.7 * unit).to(shape.dtype), factor, w, None, labels, scale, None, None, forms.IDENTITY, True)
    here, run = launch.Device.of(p.x), launch.Launch.run

    def row_pass(need_u: bool, workspace: int = 0):
        return launch.row_pass(p, here, run, need_u=need_u, workspace=workspace)

    kept_by = row_pass(False, kept)
    weights = RowWeights(kept_by.total, scale / shape.n, None, -scale / shape.n, None)

    def class_pass(kept: Tensor | None):
        return list(launch.class_pass(p, weights, kept_by.class_factor, here, run, need_w=True, need_bias=False, kept=kept)[:1])

    def row(need_u: bool):
        r = row_pass(need_u)
        return [r.total, r.u] if need_u else [r.total]

    return {
        "row": lambda: row(True),
        "row without": lambda: row(False),
        "class": lambda: class_pass(None),
        "kept": lambda: class_pass(kept_by.kept),
    }


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def tune(
    shape: Shape,
    device: str,
    arch: str,
    *,
    workspace: int = 0,
    rounds: int = 20,
    timer: Callable[[Callable[[], object]], float] = milliseconds,
    look: Callable[[Shape, Key, Tile], Resources] = inspect,
) -> list[dict]:
    """Time the candidates of every kernel of a step, in turn.

    Returns:
        A row for each: ``what``, ``key``, ``tile``, ``used``, ``ms`` (median) or None, ``why`` it is out or "", ``best``.
    """
    runs = passes(shape, device, workspace)
    rows = []
    for what, key in shape.keys(arch, kept=workspace > 0).items():
        run = runs[key.kernel if key.accumulates else "row without"]
        with trying(key, table.default(key)):
            want = run()
        tried = []
        for tile in tqdm(candidates(key), desc=what, unit="tile"):
            used, why = judge(shape, key, tile, look)
            if not why:
                why = disagreement(key, tile, run, want)
            tried.append({"what": what, "key": key, "tile": tile, "used": used, "ms": None, "why": why, "best": False})
        good = [row for row in tried if not row["why"]]
        times = [[] for _ in good]
        for _ in tqdm(range(rounds if good else 0), desc=f"{what}, timed", unit="round"):
            for row, seen in zip(good, times, strict=True):
                with trying(key, row["tile"]):
                    seen.append(timer(run))
        for row, seen in zip(good, times, strict=True):
            row["ms"] = statistics.median(seen)
        if good:
            fastest, first = min(good, key=lambda row: row["ms"]), tried[0]
            worth = first["ms"] is None or fastest["ms"] < FASTER * first["ms"]
            (fastest if worth else first)["best"] = True
        rows += tried
    return rows


def disagreement(key: Key, tile: Tile, run: Callable[[], list[Tensor]], want: list[Tensor]) -> str:
    try:
        with trying(key, tile):
            got = run()
    except Exception as error:  # such as a launch that asks for too much
        return f"does not run ({type(error).__name__})"
    off = max(relative_error(g, v) for g, v in zip(got, want, strict=True))
    return "" if off <= TOLERANCE[DTYPES[key.dtype]] else f"off by {off:.0e}"


def compiled(shape: Shape, arch: str, *, kept: bool, look: Callable[[Shape, Key, Tile], Resources] = inspect) -> list[dict]:
    """As :func:`tune`, without running anything."""
    rows = []
    for what, key in shape.keys(arch, kept=kept).items():
        for tile in tqdm(candidates(key), desc=what, unit="tile"):
            used, why = judge(shape, key, tile, look)
            rows.append({"what": what, "key": key, "tile": tile, "used": used, "ms": None, "why": why, "best": False})
    return rows


def show(rows: list[dict]) -> str:
    header = ("kernel", *Tile.__annotations__, "registers", "stack", "shared", "ms", "")
    lines = []
    for row in rows:
        used = list(asdict(row["used"]).values()) if row["used"] else ["-"] * 3
        ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
        note = row["why"] or ("best" if row["best"] else "the table's" if row["tile"] == table.default(row["key"]) else "")
        lines.append((row["what"], *asdict(row["tile"]).values(), *used, ms, note))
    return text_table(header, lines, right=range(1, 11))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--classes", type=whole, default=1_000_000, help="C, such as 1e6 (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="D (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="N (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the embeddings (default: %(default)s)")
    parser.add_argument("--weight-dtype", choices=DTYPES, default="float32", help="of the class centres (default: %(default)s)")
    parser.add_argument("--workspace-mb", type=float, default=0.0, help="as given to the head: tunes its class pass too (default: none)")
    parser.add_argument("--rounds", type=int, default=20, help="how often each tile is timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the fastest tiles here, for use_tiles")
    parser.add_argument("--compile-only", metavar="ARCH", help="list the candidates for sm_90, or the like, and what they take; no GPU")


def run(args: argparse.Namespace) -> int:
    """Print the candidates, timed where there is a GPU, and write the fastest; 1 where nothing can be done."""
    from . import MAX_DIM, TritonBackend

    for name, most in (("classes", 2**31), ("dim", MAX_DIM), ("batch", 2**31), ("rounds", 1000)):
        if not 0 < getattr(args, name) <= most:
            raise SystemExit(f"--{name}: expected a number from 1 to {most}, got {getattr(args, name)}")
    if args.compile_only and not re.fullmatch(r"sm_\d+", args.compile_only):
        raise SystemExit(f"--compile-only: expected an architecture such as sm_90, got {args.compile_only!r}")
    reason = TritonBackend().unavailable()
    if reason is None and not args.compile_only and not torch.cuda.is_available():
        reason = "PyTorch sees no GPU to time kernels on; --compile-only sm_90 lists the candidates without one"
    if reason:
        print(f"tune: {reason}")
        return 1
    shape = Shape(args.batch, args.dim, args.classes, DTYPES[args.dtype], DTYPES[args.weight_dtype])
    limit = int(args.workspace_mb * 2**20)
    workspace = TritonBackend().workspace_bytes(shape.n, shape.c, shape.dtype, limit)
    use_tiles(None)
    if args.compile_only:
        print(show(compiled(shape, args.compile_only, kept=workspace > 0)))
        return 0
    from .launch import Device

    arch = Device.of(torch.empty(0, device="cuda")).arch
    rows = tune(shape, "cuda", arch, workspace=workspace, rounds=args.rounds)
    print(show(rows))
    if args.json:
        save(args.json, rows, gpu=torch.cuda.get_device_name(), shape=str(shape))
        print(f"written to {args.json}; a process takes it by marginkernels.backend.triton.use_tiles({str(args.json)!r})")
    return 0


def save(path: Path, rows: list[dict], **about: str) -> None:
    """The best tile of every kernel, as :func:`use_tiles` reads them, with its time and that of the table's."""
    first = {row["key"]: row["ms"] for row in rows if row["tile"] == table.default(row["key"])}
    best = [(row["key"], row["tile"], {"ms": row["ms"], "table_ms": first[row["key"]]}) for row in rows if row["best"]]
    table.save_tiles(path, best, triton=__import__("triton").__version__, torch=torch.__version__, **about)
