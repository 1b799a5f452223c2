"""``python -m benchmarks.worker``: run one case in this process; the case comes on standard input, events go to standard output.

An event is a line of ``EVENT`` followed by JSON: ``{"running": provider}`` before a provider runs, so that the parent process knows which
provider killed this one, and ``{"record": {...}}`` for each finished measurement.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from marginkernels import testing

from .cases import DTYPES, Case, inputs
from .measure import Device, Series, in_turn, matrix_product
from .peers import Provider, Work, providers
from .reference import Expected, expected

EVENT = "EVENT "
#: A slower step is sampled once per phase instead of three times, and has no peak memory of the forward phase.
SLOW_MS = 8_000.0
#: The tolerance of each output is ``testing.TOLERANCE``, or eager's error in that output and dtype times this, whichever is larger.
OVER_EAGER = 3.0
#: Errors after which a process can no longer use its GPU.
STICKY = ("illegal memory access", "illegal instruction", "misaligned address", "device-side assert", "launch failure")


def emit(**event: object) -> None:
    print(EVENT + json.dumps(event), flush=True)


def without_folders(text: str) -> str:
    """``text`` with paths reduced to their last part, because records are published."""
    return re.sub(r"(?:/[^\s/:'\"()]+)+/", "", text)


def reason_of(error: Exception) -> tuple[str, str]:
    """The status of a record, and the reason in one line."""
    text = without_folders(" ".join(str(error).split()))
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text or "can't allocate memory" in text:
        return "oom", text[:160]
    return "failed", f"{type(error).__name__}: {text}"[:160]


class Runner:
    """One provider on one case. ``optimizers`` is shared by all runners of a case: id of a weight -> its optimizer."""

    def __init__(
        self,
        provider: Provider,
        case: Case,
        device: Device,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        optimizers: dict[int, torch.optim.Optimizer],
    ):
        self.provider, self.case, self.device = provider, case, device
        self.x, self.labels = x, labels
        self.work: Work = provider.build(case, w)
        self._optimizers = optimizers

    def forward(self) -> Tensor:
        return self.work.loss(self.x, self.labels)

    def step(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss

    def train(self) -> None:
        self.step()
        self._optimizer().step()

    def _optimizer(self) -> torch.optim.Optimizer:
        """One for each weight, so that providers that share the centers also share the momentum. The learning rate is 0: the work is the
        same, and the centers do not change."""
        weight = self.work.weight
        if id(weight) not in self._optimizers:
            self._optimizers[id(weight)] = torch.optim.SGD([weight], lr=0.0, momentum=0.9, weight_decay=5e-4, fused=weight.is_cuda)
        return self._optimizers[id(weight)]

    def release(self) -> None:
        self.x.grad = None
        self.work.weight.grad = None

    def milliseconds(self, phase: str) -> float:
        try:
            return self.device.milliseconds(getattr(self, phase))
        finally:
            self.release()

    def peak_mb(self, phase: str) -> float:
        """Peak memory beyond the inputs and, in phases that produce them, the gradients."""
        try:
            peak = self.device.peak_bytes(getattr(self, phase))
            made = 0 if self.x.grad is None else self.case.gradient_bytes()
            return max(0.0, (peak - made) / 2**20)
        finally:
            self.release()


def check(runner: Runner, want: Expected) -> tuple[dict[str, float], float]:
    """Errors of the provider on the same case that is timed, and the seconds that its first step took."""
    start = time.perf_counter()
    loss = runner.step()
    runner.device.synchronize()
    seconds = time.perf_counter() - start
    errors = want.errors(loss.detach(), runner.x.grad, runner.work.weight_gradient())
    runner.release()
    return errors, seconds


def run(case: Case, kind: str, names: list[str], seconds: float, memory_bytes: int | None) -> None:
    """Emit a record for every phase of each provider of ``names``, all of which support the case.

    Args:
        seconds: sampling time of each provider and phase.
        memory_bytes: how much this process may allocate; allocations beyond it fail as out of memory. None for no limit.
    """
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    # The modules and what else is here by now need not be looked at in every collection, of which there is one for each round.
    gc.collect()
    gc.freeze()
    device = Device(kind)
    known = providers()
    x, w, labels = inputs(case, kind)
    references: dict[bool, Expected | None] = {False: None, True: None}  # by whether the target gradient is detached
    x.requires_grad_()
    w.requires_grad_()
    optimizers: dict = {}
    runners: dict[str, Runner] = {}
    checks: dict[str, dict] = {}
    slow: set[str] = set()
    tolerance = dict.fromkeys(("loss", "dx", "dw_own", "dw_rest"), testing.TOLERANCE[DTYPES[case.dtype]])

    def fail(name: str, status: str, reason: str) -> None:
        if kind == "cuda" and any(text in reason for text in STICKY):
            emit(running=name)  # the parent process goes on without this provider
            print(reason, file=sys.stderr, flush=True)
            os._exit(70)
        runners.pop(name, None)
        for phase in case.phases:
            emit(record=_record(case, known[name], phase, status=status, reason=reason, **checks.get(name, {})))
        gc.collect()
        if kind == "cuda":
            torch.cuda.empty_cache()

    for name in names:
        emit(running=name)
        detached = case.head in known[name].detached_heads
        try:
            want = references[detached]
            if want is None:
                want = references[detached] = expected(x, w, labels, case.head, detached)
            runners[name] = Runner(known[name], case, device, x, w, labels, optimizers)
            errors, first = check(runners[name], want)
        except Exception as error:
            x.grad = w.grad = None
            fail(name, *reason_of(error))
            continue
        if name == "eager":
            tolerance = {k: max(v, OVER_EAGER * errors[k]) for k, v in tolerance.items()}
        # The output with the largest error relative to its tolerance; NaN counts as infinite.
        worst = max(errors, key=lambda k: errors[k] / tolerance[k] if errors[k] == errors[k] else float("inf"))
        checks[name] = {"error": errors[worst], "error_in": worst, "tolerance": tolerance[worst]}
        if not errors[worst] <= tolerance[worst]:
            fail(name, "failed check", f"relative error {errors[worst]:.2e} in {worst}, tolerance {tolerance[worst]:.2e}")
        elif first * 1e3 > SLOW_MS:
            slow.add(name)
    references.clear()
    want = None
    gc.collect()

    peaks: dict[tuple[str, str], float] = {}
    series: dict[str, Series] = {}
    for name, runner in list(runners.items()):
        emit(running=name)
        try:
            for phase in reversed(case.phases):  # a slow provider was warmed up by its check
                if name not in slow:
                    runner.milliseconds(phase)
                start = time.perf_counter()
                if phase != "forward" or name not in slow:
                    peaks[name, phase] = runner.peak_mb(phase)
                if 1e3 * (time.perf_counter() - start) <= SLOW_MS and phase != "forward":
                    slow.discard(name)  # its check was slow because it compiled
        except Exception as error:
            fail(name, *reason_of(error))
            continue
        for phase in case.phases:
            # Measuring a peak has emptied the caches of freed memory that a training loop would have.
            least, dropped = (1, 0) if name in slow else (3, 1)
            series[f"{name}|{phase}"] = Series(
                lambda runner=runner, phase=phase: runner.milliseconds(phase), 1e3 * seconds, least=least, dropped=dropped
            )
    call, flop = matrix_product(device, DTYPES[case.dtype])
    for _ in range(3):
        call()
    series["matrix product|"] = Series(call, 500.0, least=5)

    def failed(key: str, error: Exception) -> None:
        name = key.split("|")[0]
        if name in runners:
            fail(name, *reason_of(error))

    emit(running="rounds")
    in_turn(series, failed)
    mm_tflops = flop / (1e9 * series["matrix product|"].percentile(50))
    for name in runners:
        for phase in case.phases:
            taken = series[f"{name}|{phase}"]
            median = taken.percentile(50)
            tflops = case.flop(phase) / (1e9 * median)
            emit(
                record=_record(
                    case,
                    known[name],
                    phase,
                    ms_p20=taken.percentile(20),
                    ms_p50=median,
                    ms_p80=taken.percentile(80),
                    samples=len(taken.ms),
                    tflops=tflops,
                    share=tflops / mm_tflops,
                    mm_tflops=mm_tflops,
                    peak_mb=peaks.get((name, phase)),
                    **checks[name],
                )
            )


def _record(case: Case, provider: Provider, phase: str, *, status: str = "ok", reason: str | None = None, **figures: Any) -> dict:
    record = {
        "provider": provider.name,
        "head": case.head,
        "phase": phase,
        "N": case.N,
        "D": case.D,
        "C": case.C,
        "dtype": case.dtype,
        "weight_dtype": "fp32",
        "status": status,
        "reason": reason,
    }
    names = ("ms_p20", "ms_p50", "ms_p80", "samples", "tflops", "share", "mm_tflops", "peak_mb", "error", "error_in", "tolerance")
    return record | {name: _rounded(figures.get(name)) for name in names} | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _rounded(v: Any) -> Any:
    """Floats to five significant digits, and None for NaN and infinity, which JSON does not have."""
    if isinstance(v, float):
        return float(f"{v:.5g}") if v == v and abs(v) != float("inf") else None
    return v


def main() -> None:
    job = json.load(sys.stdin)
    run(Case(**job["case"]), job["device"], job["providers"], job["seconds"], job["memory_bytes"])


if __name__ == "__main__":
    main()
