"""``python -m marginkernels tune``: time tiles of the Triton kernels near the default ones on this GPU, and write the fastest to a file.

Nothing is tuned automatically: a process loads the file with ``marginkernels.backend.triton.use_tiles(path)``. Tiles are tuned for plain
cosine heads (no bias, no hard transform). Before a candidate is timed it must compile without using the stack, fit the GPU's shared memory
and agree with the default tile. Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend.triton import TritonBackend, heuristics, use_tiles
from ..backend.triton.heuristics import Key, Tile
from ..core.nontarget import NonTarget
from ..core.types import PassInputs, Request, Upstream
from ..testing import TOLERANCE, relative_error
from ._progress import tqdm
from ._text import integer, number, table, writable_file

if TYPE_CHECKING:
    from ..backend.triton.aot import Resources

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: How candidates differ from the default tile: factors of its sizes, and the number of stages added.
CHANGES: tuple[dict[str, float], ...] = (
    {},
    {"queries": 2},
    {"queries": 0.5},
    {"keys": 2},
    {"keys": 0.5},
    {"stages": 1},
    {"stages": -1},
    {"warps": 2},
    {"warps": 0.5},
    {"queries": 0.5, "keys": 2},
    {"queries": 2, "keys": 0.5},
    {"queries": 0.5, "stages": 1},
    {"keys": 0.5, "stages": 1},
)
#: One more candidate: the columns of the accumulator or, in kernels without one, of one product.
WIDTH: dict[str, float] = {"width": 0.5}
DEPTH: dict[str, float] = {"depth": 2}
#: A tile replaces the default one where its median time is below this share of the default's.
FASTER = 0.98


@dataclass(frozen=True)
class Shape:
    """The shape of one head: N rows, D, C classes, and the dtypes of the products and of the class centers."""

    n: int
    dim: int
    c: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def keys(self, arch: str, *, saved: bool) -> dict[str, Key]:
        """The kernels to tune: a readable name -> the kernel's key."""
        online = self.dtype == torch.float16  # float16 exponentials always use a running maximum

        def of(kernel: str, **switches: bool) -> Key:
            return Key.of(kernel, self.dim, self.dtype, arch, **switches)

        found = {"row pass": of("row", online=online), "row pass, no gradient": of("row", online=online, accumulates=False)}
        if saved:
            found |= {"row pass, weights saved": of("row", online=online, saves=True), "class pass, weights saved": of("saved")}
        return found | {"class pass": of("class")}


def candidates(key: Key) -> list[Tile]:
    """The default tile, then the valid ones near it."""
    first = heuristics.default(key)
    found = []
    for change in (*CHANGES, WIDTH if key.accumulates else DEPTH):
        sizes = {name: int(getattr(first, name) * factor) for name, factor in change.items() if name != "stages"}
        one = replace(first, **sizes, stages=first.stages + int(change.get("stages", 0)))
        if one not in found and heuristics.fault(key, one) is None:
            found.append(one)
    return found


@contextlib.contextmanager
def trying(key: Key, tile: Tile) -> Iterator[None]:
    """A context in which the kernel ``key`` runs with ``tile``."""
    before = dict(heuristics.CHOSEN)
    heuristics.CHOSEN[key] = tile
    try:
        yield
    finally:
        heuristics.CHOSEN.clear()
        heuristics.CHOSEN.update(before)


def inspect(shape: Shape, key: Key, tile: Tile) -> Resources:
    """Registers, stack and shared memory of the kernel with this tile, compiled for the key's architecture."""
    from ..backend.triton import aot

    inputs = aot.meta_inputs(shape.n, shape.dim, shape.c, shape.dtype, shape.weight_dtype)
    with trying(key, tile):
        launches = aot.launches(inputs, key.arch, need_center=key.accumulates, saved=float(key.kernel == "saved" or key.saves))
    name = f"{key.kernel}_pass_kernel"
    online = (key.online, None)  # None: kernels without a running maximum
    return aot.resources(
        aot.compile(next(o for o in launches if o.kernel.__name__ == name and o.constants.get("ONLINE") in online), key.arch)
    )


def examine(shape: Shape, key: Key, tile: Tile, look: Callable[[Shape, Key, Tile], Resources]) -> tuple[Resources | None, str]:
    """The tile's resources, or None where it does not compile; and why it is rejected, or ""."""
    try:
        used = look(shape, key, tile)
    except Exception as error:  # a compiler may raise anything
        return None, f"does not compile ({type(error).__name__})"
    limit = heuristics.shared_limit(key.arch)
    if used.shared_bytes > limit:
        return used, f"more shared memory than {limit} bytes"
    return used, "uses the stack" if used.stack_bytes else ""


def passes(shape: Shape, device: str, workspace: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Kernel name of a :class:`Key` -> a function that runs the pass on random data and gives its outputs; ``"row without"`` is the row
    pass without gradient, ``"row saves"`` the one that leaves its weights."""
    from ..backend.triton import launch

    g = torch.Generator(device).manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(shape.n, shape.dim, device=device, generator=g))
    w = torch.randn(shape.c, shape.dim, device=device, generator=g, dtype=shape.weight_dtype)
    scale = torch.full((shape.n,), 64.0, device=device)
    labels = torch.randint(shape.c, (shape.n,), device=device, generator=g)
    inputs = PassInputs(
        x=(0.7 * unit).to(shape.dtype),
        row_factor=torch.full((shape.n,), 1 / 0.7, device=device),
        w=w,
        bias=None,
        labels=labels,
        scale=scale,
        threshold=None,
        t=None,
        non_target=NonTarget.IDENTITY,
        normalize_weight=True,
    )
    here, run = launch.Device.of(inputs.x), launch.Launch.run
    first = launch.row_pass(inputs, Request.log_sum_exp(workspace_bytes=workspace), here, run)
    upstream = Upstream(lse=first.lse, d_lse=scale / shape.n, d_logit_sum=None, d_target_cos=-scale / shape.n, d_target_bias=None)

    def class_pass(saved: Tensor) -> list[Tensor]:
        return [launch.class_pass(inputs, upstream, first.class_factor, saved, True, False, here, run).d_weight]

    def row_pass(need_center: bool, saved: int = 0) -> list[Tensor]:
        out = launch.row_pass(inputs, Request.log_sum_exp(need_center=need_center, workspace_bytes=saved), here, run)
        return [out.lse, out.mean_center] if need_center else [out.lse]

    return {
        "row": lambda: row_pass(True),
        "row without": lambda: row_pass(False),
        "row saves": lambda: row_pass(True, workspace),
        "class": lambda: class_pass(first.saved[:0]),
        "saved": lambda: class_pass(first.saved),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """The time of one call on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def tune(
    shape: Shape,
    device: str,
    arch: str,
    *,
    workspace: int = 0,
    rounds: int = 20,
    timer: Callable[[Callable[[], object]], float] = milliseconds,
    look: Callable[[Shape, Key, Tile], Resources] = inspect,
) -> list[dict[str, Any]]:
    """Time the candidates of every kernel of a step, in turn.

    Args:
        workspace: bytes that the row pass saves for the class pass; more than 0 also tunes the class pass that uses them.
        rounds: how often each candidate is timed.
        timer: gives the milliseconds of one call.
        look: gives the resources of a tile, as :func:`inspect`.

    Returns:
        A row for each candidate: ``what`` (the kernel), ``key``, ``tile``, ``used`` (resources), ``ms`` (median) or None, ``why`` it was
        rejected or "", and whether it is the ``best``.
    """
    runs = passes(shape, device, workspace)
    rows: list[dict[str, Any]] = []
    for what, key in shape.keys(arch, saved=workspace > 0).items():
        run = runs[f"{key.kernel} without" if not key.accumulates else f"{key.kernel} saves" if key.saves else key.kernel]
        with trying(key, heuristics.default(key)):
            want = run()
        tried: list[dict[str, Any]] = []
        for tile in tqdm(candidates(key), desc=what, unit="tile"):
            used, why = examine(shape, key, tile, look)
            if not why:
                why = disagreement(key, tile, run, want)
            tried.append({"what": what, "key": key, "tile": tile, "used": used, "ms": None, "why": why, "best": False})
        good = [row for row in tried if not row["why"]]
        times: list[list[float]] = [[] for _ in good]
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
    """Why the results with this tile are not those of the default tile, or ""."""
    try:
        with trying(key, tile):
            got = run()
    except Exception as error:  # such as a launch that asks for too many resources
        return f"does not run ({type(error).__name__})"
    off = max(relative_error(g, v) for g, v in zip(got, want, strict=True))
    return "" if off <= TOLERANCE[DTYPES[key.dtype]] else f"off by {off:.0e}"


def compiled(shape: Shape, arch: str, *, saved: bool, look: Callable[[Shape, Key, Tile], Resources] = inspect) -> list[dict[str, Any]]:
    """As :func:`tune`, but candidates are only compiled."""
    rows: list[dict[str, Any]] = []
    for what, key in shape.keys(arch, saved=saved).items():
        for tile in tqdm(candidates(key), desc=what, unit="tile"):
            used, why = examine(shape, key, tile, look)
            rows.append({"what": what, "key": key, "tile": tile, "used": used, "ms": None, "why": why, "best": False})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The candidates as a table."""
    header = ("kernel", *Tile.__annotations__, "registers", "stack", "shared", "ms", "")
    lines = []
    for row in rows:
        used = list(asdict(row["used"]).values()) if row["used"] else ["-"] * 3
        ms = "-" if row["ms"] is None else f"{row['ms']:.3f}"
        note = row["why"] or ("best" if row["best"] else "default" if row["tile"] == heuristics.default(row["key"]) else "")
        lines.append((row["what"], *asdict(row["tile"]).values(), *used, ms, note))
    return table(header, lines, right=range(1, 11))


def architecture(text: str) -> str:
    """The ``argparse`` type of ``--compile-only``: a GPU architecture such as ``sm_90`` that Triton can compile for.

    LLVM ends the process where it cannot, so an architecture that the heuristics do not list is tried in a process of its own.
    """
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise argparse.ArgumentTypeError(f"expected an architecture such as sm_90, got {text!r}")
    if text in heuristics.SHARED or TritonBackend().unavailable_reason() is not None:
        return text
    words = [sys.executable, "-c", f"from marginkernels.cli.tune import try_architecture; try_architecture({text!r})"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode != 0 or "not a recognized processor" in done.stderr:
        listed = ", ".join(sorted(heuristics.SHARED, key=lambda name: int(name[3:])))
        raise argparse.ArgumentTypeError(f"expected an architecture that Triton can compile for, such as {listed}, got {text!r}")
    return text


def try_architecture(arch: str) -> None:
    """Compile one kernel for it; ends the process, or raises, where Triton cannot."""
    shape = Shape(64, 64, 1024, torch.bfloat16, torch.float32)
    key = shape.keys(arch, saved=False)["row pass"]
    inspect(shape, key, heuristics.default(key))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=integer(), default=1_000_000, help="C, such as 1e6 (default: %(default)s)")
    parser.add_argument("--dim", type=integer(high=heuristics.MAX_DIM), default=512, help="D (default: %(default)s)")
    parser.add_argument("--batch", type=integer(), default=1024, help="N (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the embeddings (default: %(default)s)")
    parser.add_argument("--weight-dtype", choices=DTYPES, default="float32", help="dtype of the class centers (default: %(default)s)")
    parser.add_argument(
        "--workspace-mb",
        type=number(0, 2**40),
        default=0.0,
        help="workspace_mb of the head; tunes that class pass too (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=integer(high=1000), default=20, help="how often each tile is timed (default: %(default)s)")
    parser.add_argument("--json", type=writable_file, metavar="PATH", help="write the fastest tiles to this file, for use_tiles")
    parser.add_argument(
        "--compile-only",
        type=architecture,
        metavar="ARCH",
        help="only list candidates and their resources, for sm_90 or the like; needs no GPU",
    )


def run(args: argparse.Namespace) -> int:
    """Print the candidates, timed where there is a GPU, and write the fastest; returns 1 where nothing can be done."""
    reason = TritonBackend().unavailable_reason()
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
        print(show(compiled(shape, args.compile_only, saved=workspace > 0)))
        return 0
    from ..backend.triton.launch import Device

    arch = Device.of(torch.empty(0, device="cuda")).arch
    rows = tune(shape, "cuda", arch, workspace=workspace, rounds=args.rounds)
    print(show(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        save(args.json, rows, gpu=torch.cuda.get_device_name(), shape=str(shape))
        print(f"written to {args.json}; load it with marginkernels.backend.triton.use_tiles({str(args.json)!r})")
        print(f"python -m marginkernels verify --device cuda --tiles {args.json} verifies the kernels with them, and auto then takes them")
    return 0


def save(path: Path, rows: list[dict[str, Any]], **about: str) -> None:
    """Write the best tile of every kernel for :func:`use_tiles`, with its time and that of the default tile."""
    first = {row["key"]: row["ms"] for row in rows if row["tile"] == heuristics.default(row["key"])}
    best = [(row["key"], row["tile"], {"ms": row["ms"], "default_ms": first[row["key"]]}) for row in rows if row["best"]]
    heuristics.save_tiles(path, best, triton=__import__("triton").__version__, torch=torch.__version__, **about)
