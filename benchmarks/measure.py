"""Time and peak memory of calls in this process, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from marginkernels.backend.cpu import release_memory

#: Larger than the L2 cache of any current GPU.
FLUSH_BYTES = 256 << 20
#: Side of the square matrices whose product is taken as the machine's peak rate.
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}


class Device:
    """Times calls and measures their peak memory on device ``kind``, ``cpu`` or ``cuda``."""

    def __init__(self, kind: str):
        self.kind = kind
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=kind) if kind == "cuda" else None

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The time of one call. Its result is freed after the clock has stopped."""
        if self.kind == "cpu":
            start = time.perf_counter()
            result = call()
            stop = time.perf_counter()
            del result
            return 1e3 * (stop - start)
        self._flush.zero_()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Peak memory during ``call``, minus the memory in use before it."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        # Freed pages that the allocator has not returned would hide what the call needs.
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def _trim() -> None:
    release_memory()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@dataclass
class Series:
    """Samples of one measurement, in milliseconds.

    Attributes:
        call: takes one sample.
        budget_ms: sampling stops when the samples add up to this,
        least, most: but not before ``least`` samples, and never after ``most``.
        dropped: so many samples are taken first and not kept: they fill caches that later calls find full.
    """

    call: Callable[[], float]
    budget_ms: float
    least: int = 3
    most: int = 100
    dropped: int = 0
    ms: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.ms) >= self.most or (len(self.ms) >= self.least and sum(self.ms) >= self.budget_ms)

    def percentile(self, p: float) -> float:
        """The ``p``-th percentile, interpolated linearly as in numpy."""
        if len(self.ms) == 1:
            return self.ms[0]
        return statistics.quantiles(self.ms, n=100, method="inclusive")[round(p) - 1]


def in_turn(series: dict[str, Series], failed: Callable[[str, Exception], None] = lambda *_: None) -> None:
    """Sample all series in rounds until each is done, in rotating order. A series that raises is reported to ``failed`` and dropped."""
    pending = dict(series)
    shift = 0
    enabled = gc.isenabled()
    gc.disable()
    try:
        while pending:
            names = list(pending)
            shift += 1
            for name in names[shift % len(names) :] + names[: shift % len(names)]:
                try:
                    taken = pending[name].call()
                except Exception as error:
                    failed(name, error)
                    del pending[name]
                    continue
                if shift <= pending[name].dropped:
                    continue
                pending[name].ms.append(taken)
                if pending[name].done:
                    del pending[name]
            gc.collect()
    finally:
        if enabled:
            gc.enable()


def matrix_product(device: Device, dtype: torch.dtype) -> tuple[Callable[[], float], float]:
    """A large square matrix product: a call that gives its time in ms, and its number of floating-point operations."""
    side = PEAK_SIDE[device.kind]
    # Random values, because a GPU draws less power and clocks higher on constant ones.
    a = torch.randn(side, side, device=device.kind, dtype=dtype)
    b = torch.randn(side, side, device=device.kind, dtype=dtype)
    out = torch.empty(side, side, device=device.kind, dtype=dtype)
    return lambda: device.milliseconds(lambda: torch.mm(a, b, out=out)), 2.0 * side**3


def copy_bandwidth(device: Device) -> float:
    """Bytes per second, read plus written, of the fastest of several large copies."""
    source = torch.ones((1 << 30 if device.kind == "cuda" else 1 << 28), dtype=torch.uint8, device=device.kind)
    target = torch.empty_like(source)
    best = min(device.milliseconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() / (1e-3 * best)
