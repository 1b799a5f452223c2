"""Tile shapes by what a loop carries, by D, dtype and architecture.

They were found by compiling candidates for each architecture and reading registers, stack and shared memory
(``python -m benchmarks resources``). None has been timed, since none has run on a GPU. What limits them on sm_90, in 16-bit at D = 512, by
count:

- A step of 64 keys and 64 queries takes 2048 cycles of the tensor cores. Its first product uses 64x32x16 instructions, which read 3 KB of
  shared memory for 16 cycles of work. At 128 bytes a cycle that takes 24 cycles, so it runs at two thirds of the rate. The second product
  uses 64x64x16 and is balanced. Between the two are some 400 cycles of exponentials that nothing overlaps, since both warpgroups work on
  the same step.
- The accumulator takes half of the registers, 128 of 255. Twice the queries would spill; half of them would halve the work for each byte
  of keys that comes from L2.
- 205 KB of shared memory, for one block of queries and two of keys: one program per multiprocessor.

Whatever the loop carries beyond plain logits (a running maximum, a hard transform, a bias) costs a register for each of a thread's places
in the tile, hence the narrower query blocks. On sm_100 the accumulator is in tensor memory, but rescaling it by a running maximum brings
all of it into registers, which needs narrower blocks still.

A shift per row, fixed before the loop, could spare the running maximum up to twice the exponents, with the other way as what the device
falls back to where a sum underflows. It is left out as long as nothing has been timed: float16 has too few exponents for a shift that does
not know the row's maximum to within 13, the fallback would convert all centers again, chunk by chunk, and it costs a whole pass where it is
taken.

Tensor cores that take operands from registers (sm_80 to sm_89, sm_120) have narrower tiles: a thread holds fragments of both blocks beside
the accumulator. Where shared memory is 99 KB one copy of the key block is all that fits at D = 512, beside the queries; it serves both
products and is fetched a step ahead.

The class pass on saved weights has one product for each block of rows that it loads, where the other has two. By count it reads as many
bytes from L2 for half the work. It gains what the similarities and exponentials cost, and no more where L2 is the limit.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: The widest embedding that there are tiles for.
MAX_DIM = 1024
#: Shared memory a program may have, in bytes. The others have no more than the first.
SHARED = {"sm_86": 101376, "sm_80": 166912, "sm_87": 166912, "sm_90": 232448, "sm_100": 232448, "sm_103": 232448}


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut.

    Attributes:
        queries: rows (row pass) or classes (class pass) that stay with a program.
        keys: classes or rows that it takes at a time.
        depth: columns of D in one product for the similarities; at least D means that the query block stays on the chip.
        width: columns of the accumulated centers or of dw that one program accumulates; D / width programs then repeat the similarities.
        warps, stages: see Triton.
    """

    queries: int
    keys: int
    depth: int
    width: int
    warps: int = 8
    stages: int = 2


class Key(NamedTuple):
    """What a tile is for.

    Attributes:
        kernel: ``"row"``, ``"class"``, or ``"saved"``: the class pass where the row pass saved the weights.
        dim: D, up to a power of two.
        dtype: of the products, ``"bfloat16"`` and the like.
        arch: ``"sm_90"`` and the like, or ``"interpreter"``.
        accumulates: whether it accumulates centers or dw.
        online: whether the loop carries a running maximum.
        busy: whether it carries a hard transform, a bias, or sums beyond one.
        saves: whether it leaves the weights for the class pass.
    """

    kernel: str
    dim: int
    dtype: str
    arch: str
    accumulates: bool = True
    online: bool = False
    busy: bool = False
    saves: bool = False

    @classmethod
    def of(cls, kernel: str, dim: int, dtype: torch.dtype, arch: str, **switches: bool) -> Key:
        return cls(kernel, power_of_two(dim, 64), str(dtype).removeprefix("torch."), arch, **switches)


#: Tiles that this process takes in place of the defaults; see :func:`use_tiles`.
CHOSEN: dict[Key, Tile] = {}
SCHEMA = "marginkernels.tiles/2"

#: Widest D -> queries and stages, where products are 16-bit: for plain logits, busy, with a running maximum, with both.
LARGE = {64: ((128, 64, 64, 64), 3), 128: ((128, 64, 64, 32), 3), 256: ((64, 64, 32, 32), 3), 512: ((64, 32, 32, 16), 2)}
#: The same where the accumulator is in tensor memory, which it leaves through registers; plain class passes take those of ``LARGE``.
TENSOR_MEMORY = {64: ((64, 32, 32, 32), 3), 128: ((64, 32, 32, 16), 3), 256: ((64, 32, 16, 16), 3), 512: ((32, 32, 16, 16), 2)}
SMALL = {64: ((64, 32, 32, 32), 3), 128: ((64, 32, 32, 32), 3), 256: ((32, 32, 32, 16), 2), 512: ((32, 32, 16, 16), 2)}


def power_of_two(dim: int, least: int = 32) -> int:
    """The power of two, at least ``least``, that holds ``dim`` columns."""
    return max(least, 1 << (dim - 1).bit_length())


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED.get(arch, SHARED["sm_86"])


def large(arch: str) -> bool:
    """Whether there is shared memory for the large tiles."""
    return shared_limit(arch) >= SHARED["sm_90"]


def by_registers(arch: str) -> bool:
    """Whether tensor cores take both operands from registers, as mma.sync does."""
    return arch.startswith(("sm_8", "sm_12"))


def padded(dim: int, dtype: torch.dtype, arch: str) -> int:
    """Columns of rows that begin where wide loads can: TMA's do at 16 bytes, and of other strides Triton only knows multiples of 16.

    TMA brings whole rows of 16-bit numbers; slices of longer or wider ones are read without it."""
    step = 8 if dtype.itemsize == 2 and dim <= 512 and not by_registers(arch) else 16
    return -(-dim // step) * step


def parts(kernel: str, dim: int, tile: Tile, dtype: torch.dtype, arch: str) -> int:
    """In how many parts of columns a key block feeds both products; 0 where it is turned around for the second. See :mod:`.primitives`.

    As many as take the fewest registers: each part has an address of its own, and a wide one more numbers that are read at once.
    """
    if dtype.itemsize != 2 or not by_registers(arch) or dim > tile.depth or tile.width != tile.depth:
        return 0
    wide = {"row": 64 if tile.depth == 512 else 128, "class": 256, "saved": 128}[kernel]
    return max(1, tile.depth // wide)


def max_saved_tile(arch: str) -> int:
    """Classes that a saved pass's program may take: no more than any row pass's key block, which has one running maximum a row."""
    return 64 if large(arch) or arch == "interpreter" else 32


def tile(key: Key) -> Tile:
    """The tile chosen for a kernel in this process, else the default one.

    A row pass that leaves its weights takes the tile chosen for one that does not, where there is none of its own: narrower by as much as
    the default one is, since saving takes registers.
    """
    plain = key._replace(saves=False)
    if key in CHOSEN or plain not in CHOSEN:
        return CHOSEN.get(key) or default(key)
    narrower = default(plain).queries // default(key).queries
    return replace(CHOSEN[plain], queries=max(16, CHOSEN[plain].queries // narrower))


def default(key: Key) -> Tile:
    """The default tile."""
    kernel, d, dtype, arch, accumulates, online, busy, saves = key
    if arch == "interpreter":  # every program costs the same there; narrow columns take small tests through what large D does
        return Tile(32, 64, d, d, 1, 1) if kernel == "saved" else Tile(64, 128, 64, 64, 1, 1)
    if kernel == "saved":  # all of D at once, for the Jacobian's sake
        if dtype == "float32":
            return Tile(32 if d <= 256 else 16, 32 if d <= 128 else 16, d, d, stages=2 if d <= 512 else 1)
        if large(arch):
            return Tile(64, 64, d, d, stages=3) if d <= 512 else Tile(32, 32, d, d, stages=3)
        return Tile(32, 32, d, d) if d <= 512 else Tile(16, 16, d, d)
    if dtype == "float32":  # both parts of each operand in registers, or all of it without tensor cores
        row = kernel == "row" and accumulates
        narrow = accumulates and (online or busy) and (row or d <= 64 or arch.startswith("sm_12"))
        keys = 64 if large(arch) or row or not online else 32
        depth = 64 if row and d <= 64 and not by_registers(arch) else 32
        return Tile(16 if narrow else 32, keys, depth, min(d, 128) if row or (accumulates and large(arch)) else 64)
    blackwell = arch in ("sm_100", "sm_103")
    if not accumulates:
        if blackwell:
            return Tile(64 if online else 128, 64, 64, d, stages=3)
        return Tile(128, 64 if online or busy else 128, 64, d, stages=3) if large(arch) else Tile(64, 32, 64, d)
    if d > 512:  # the similarities in steps of D, the accumulator in two slices
        narrow = (online or busy) if blackwell else (online and busy)
        return Tile(16 if narrow else 32, 64, 128, 512) if large(arch) else Tile(16, 32, 128, 512)
    queries, stages = (TENSOR_MEMORY if blackwell and (kernel == "row" or busy) else LARGE if large(arch) else SMALL)[d]
    return Tile(queries[2 * online + (busy or (saves and d <= 128))], 64 if large(arch) else 32, d, d, stages=stages)


def fault(key: Key, tile: Tile) -> str | None:
    """Why a tile cannot serve, or None; whether the GPU has room for it is another matter."""
    numbers = {name: value for name, value in asdict(tile).items() if name != "stages"}
    if any(not isinstance(v, int) or v < 1 or v & (v - 1) for v in numbers.values()) or tile.stages < 1:
        return "has sizes that are no powers of two"
    if min(tile.queries, tile.keys, tile.depth, tile.width) < 16:
        return "has a size below 16"
    if key.kernel == "saved" and (tile.width < key.dim or tile.queries > max_saved_tile(key.arch)):
        return f"must span D and take at most {max_saved_tile(key.arch)} classes"
    if key.kernel == "row" and not max_saved_tile(key.arch) <= tile.keys <= 128:
        return f"must take between {max_saved_tile(key.arch)} and 128 classes at a time"
    return None


def save_tiles(path: str | Path, found: list[tuple[Key, Tile, dict[str, Any]]], **about: str) -> None:
    """Write tiles for :func:`use_tiles`, each with whatever is to be noted of it."""
    tiles = [{**key._asdict(), **asdict(tile), **note} for key, tile, note in found]
    Path(path).write_text(json.dumps({"schema": SCHEMA, **about, "tiles": tiles}, indent=1) + "\n")


def use_tiles(path: str | Path | None) -> list[Key]:
    """Take the tiles of a file that ``python -m marginkernels tune`` wrote, in this process; None goes back to the defaults.

    Returns:
        What there are tiles for now.

    Raises:
        ValueError: where the file is none of that kind, or has a tile that cannot serve.
    """
    found: dict[Key, Tile] = {}
    if path is not None:
        try:
            found = check_tiles(read_tiles(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    global _asked
    _asked = True
    CHOSEN.clear()
    CHOSEN.update(found)
    return list(found)


#: Whether :func:`use_tiles` has been called, after which a record's tiles are none of this process's business.
_asked = False


def read_tiles(path: str | Path) -> list[dict[str, Any]]:
    """The tiles of a file that :func:`save_tiles` wrote, as they stand there.

    Raises:
        ValueError: where the file is none of that kind.
    """
    read = json.loads(Path(path).read_text())
    if not isinstance(read, dict) or read.get("schema") != SCHEMA:
        raise ValueError(f"expected a file of {SCHEMA!r}")
    return list(read["tiles"])


def take_recorded(tiles: Iterable[Mapping[str, Any]]) -> None:
    """Take the tiles with which a record's backend was verified, unless this process has asked for others or for the defaults."""
    if not _asked and not CHOSEN:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a record that somebody edited is nobody's error here
            CHOSEN.update(check_tiles(tiles))


def check_tiles(tiles: Iterable[Mapping[str, Any]]) -> dict[Key, Tile]:
    """Tiles as :func:`save_tiles` writes them; raises ValueError where one cannot serve, KeyError or TypeError where it is none."""
    found: dict[Key, Tile] = {}
    for one in tiles:
        key = Key(**{name: one[name] for name in Key.__annotations__})
        tile = Tile(**{name: one[name] for name in Tile.__annotations__})
        reason = fault(key, tile)
        if reason:
            raise ValueError(f"the tile for {key} {reason}")
        found[key] = tile
    return found
