"""The process in which one candidate is checked; whatever it does to that process is seen from outside (``processes.py``).

It reads a plan and writes a line of JSON when it is ready, before and after each check, and at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ... import margins, testing
from ...backend import FUSED, records, torch_topk
from ...backend.cpu import CpuBackend
from ...backend.triton import heuristics
from ...core.types import TopkInputs
from ...loss import margin_cross_entropy
from .plan import COMPILED, DTYPES, HEADS, Candidate, Check

#: Runs whose bits must be equal, failures after which a candidate is given up, and how often a step is timed, within so many seconds.
REPEATS, MOST_FAILURES, ROUNDS, ROUND_SECONDS = 3, 20, 25, {"cpu": 1.5, "cuda": 3.0}


def main(plan: str, results: str) -> None:
    """Make the checks of the file ``plan``, and write to the file ``results``."""
    asked = json.loads(Path(plan).read_text())
    with open(results, "w", buffering=1) as out:
        Worker(asked, out).run()


class Failed(Exception):
    """A check that found something.

    Args:
        verdict: one of ``records.BAD``.
    """

    def __init__(self, verdict: str, why: str, errors: dict[str, float] | None = None):
        super().__init__(why)
        self.verdict, self.errors = verdict, errors or {}


class Worker:
    """Makes the checks of one candidate.

    Args:
        asked: ``candidate``, ``device``, ``checks``, ``until`` (the time after which no other check is begun), ``seed``, ``threads``,
            ``tiles``.
        out: where events go.
    """

    def __init__(self, asked: dict[str, Any], out: TextIO):
        self.candidate = Candidate(**asked["candidate"])
        self.device, self.seed, self.until = asked["device"], asked["seed"], asked["until"]
        self.checks = [Check.of(one) for one in asked["checks"]]
        self.out = out
        torch.set_num_threads(asked["threads"])
        if asked["tiles"]:
            heuristics.take_recorded(asked["tiles"])
        if self.candidate.source:
            module, _, name = self.candidate.source.partition(":")
            FUSED[self.candidate.backend] = getattr(importlib.import_module(module), name)
        if self.candidate.level:
            FUSED["cpu"] = CpuBackend(self.candidate.level)

    def say(self, event: str, **facts: Any) -> None:
        self.out.write(json.dumps({"event": event, **facts}) + "\n")

    def run(self) -> None:
        self.say("ready")
        failures = 0
        for number, check in enumerate(self.checks):
            if time.time() > self.until or failures >= MOST_FAILURES:
                break
            self.say("start", check=number)
            found: dict[str, Any]
            try:
                found = {"verdict": records.RIGHT, **getattr(self, check.kind)(check)}
            except Failed as error:
                found = {"verdict": error.verdict, "why": str(error), "errors": error.errors}
            except Exception as error:
                if _lacks_memory(error) and check.size:
                    found = {"verdict": records.UNFINISHED, "why": "not enough memory"}
                else:
                    found = {"verdict": records.ERROR, "why": f"{type(error).__name__}: {error}"[:500]}
            failures += found["verdict"] in records.BAD
            self.say("done", check=number, **found)
            self._wait()  # an error that is left on the device ends the process here, and not in another check's name
        self.say("end")

    # -- checks: each gives what is to be noted, or raises -------------------------------------------------------------------------

    def values(self, check: Check) -> dict[str, Any]:
        """Loss and gradients against the float64 reference, on memory that holds NaN where nothing was written."""
        case, margin, options = self._problem(check)
        want = testing.run(case, margin, "reference", dtype=torch.float64, **options)
        with poisoned_memory():
            got = testing.run(case, margin, self.candidate.backend, **options)
        return {"errors": _compare(got, want, self._tolerance(check))}

    def bits(self, check: Check) -> dict[str, Any]:
        """Several runs: right, and the same bits."""
        case, margin, options = self._problem(check)
        want = testing.run(case, margin, "reference", dtype=torch.float64, **options)
        got = self._repeated(case, margin, options)
        return {"errors": _compare(got, want, self._tolerance(check))}

    def topk(self, check: Check) -> dict[str, Any]:
        """Scores against float64's; the classes of equal scores may differ by rounding."""
        case, _, _ = self._problem(check)
        inputs, k = TopkInputs(case.x, case.w, None, None, True, True, check.sub_centers), min(5, check.shape[2])
        exact = TopkInputs(case.x.double(), case.w.double(), None, None, True, True, check.sub_centers)
        want = torch_topk.topk(exact, k).scores
        with poisoned_memory():
            found = FUSED[self.candidate.backend].topk(inputs, k)
        rows = torch.nn.functional.normalize(exact.x) @ torch.nn.functional.normalize(exact.w).T
        rows = rows.unflatten(1, (-1, check.sub_centers)).amax(2)
        errors = _compare({"scores": found.scores}, {"scores": want}, self._tolerance(check))
        return {"errors": errors | _compare({"classes": rows.gather(1, found.classes)}, {"classes": want}, self._tolerance(check))}

    def graph(self, check: Check) -> dict[str, Any]:
        """A step captured in a CUDA graph, replayed on other embeddings: the bits of a step outside of it."""
        case, margin, options = self._problem(check)
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        margin = margin.to(self.device).eval()

        def step() -> tuple[Tensor, ...]:
            loss = margin_cross_entropy(x, w, case.labels, margin=margin, backend=self.candidate.backend, **options)
            return loss, *torch.autograd.grad(loss, (x, w))

        graph, captured = testing.captured(step, self.device)
        with torch.no_grad():
            x.copy_(x.roll(1, 0))
        graph.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(got, want) for got, want in zip(captured, step(), strict=True)):
            raise Failed(records.UNEQUAL_BITS, "a step replayed from a CUDA graph is not the step outside of it")
        return {}

    def sync(self, check: Check) -> dict[str, Any]:
        """A step that does not wait for the device: PyTorch raises where one does."""
        case, margin, options = self._problem(check)
        margin = margin.to(self.device)
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()

        def step() -> None:
            margin_cross_entropy(x, w, case.labels, margin=margin, backend=self.candidate.backend, **options).backward()

        step()  # kernels are loaded, and memory is reserved
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {}

    def size(self, check: Check) -> dict[str, Any]:
        """A problem of the size of real work, against plain PyTorch in a wider dtype: with each workspace right, and the same bits."""
        case = self._drawn(check)
        wide = torch.float64 if check.pair[0] == "float32" and self.device == "cpu" else torch.float32
        want, worst = testing.run(case, margins.ArcFace(), "torch", dtype=wide, sub_centers=check.sub_centers), dict[str, float]()
        for mb in (None, 0.0, math.inf):
            options = {"workspace_mb": mb, "sub_centers": check.sub_centers}
            for name, off in _compare(self._repeated(case, margins.ArcFace(), options, 2), want, self._tolerance(check)).items():
                worst[name] = max(worst.get(name, 0.0), off)
        return {"errors": worst}

    def time(self, check: Check) -> dict[str, Any]:
        """A step of this candidate and one of ``torch``, in turn."""
        case, kind = self._drawn(check), torch.device(self.device).type
        ours = compiled_step(case) if self.candidate.name == COMPILED else self._step(case, self.candidate.backend)
        steps = [ours] if self.candidate.name == records.FALLBACK else [ours, self._step(case, records.FALLBACK)]
        for step in steps:
            self._milliseconds(step)
        seen: list[list[float]] = [[] for _ in steps]
        began = time.monotonic()
        while not seen[0] or (len(seen[0]) < ROUNDS and time.monotonic() - began < ROUND_SECONDS[kind]):
            for step, each in zip(steps, seen, strict=True):
                each.append(self._milliseconds(step))
        medians = [statistics.median(each) for each in seen]
        return {"ms": medians[0], "torch_ms": medians[-1]}

    # -- what they are made of -----------------------------------------------------------------------------------------------------

    def _problem(self, check: Check) -> tuple[testing.Case, margins.Margin, dict[str, Any]]:
        (n, d, c), (x, w) = check.shape, (DTYPES[name] for name in check.pair)
        about: dict[str, Any] = {"seed": self.seed, "device": self.device, "sub_centers": check.sub_centers}
        case = testing.Case.random(n, d, c, x, weight_dtype=w, bias=check.extras, **about)
        workspace = math.inf if check.workspace_mb is not None and check.workspace_mb < 0 else check.workspace_mb
        options = {"label_smoothing": 0.1 if check.extras else 0.0, "workspace_mb": workspace, "sub_centers": check.sub_centers}
        margin = HEADS[check.head](c)
        return testing.settled(case, margin, check.sub_centers), margin, testing.accepted(margin, **options)

    def _drawn(self, check: Check) -> testing.Case:
        """A problem of real size, drawn on the device."""
        (n, d, c), (x, w) = check.shape, (DTYPES[name] for name in check.pair)
        g = torch.Generator(self.device).manual_seed(self.seed)
        k = check.sub_centers
        weight = torch.randn(c * k, d, generator=g, device=self.device).mul_(0.1)
        labels = torch.randint(c, (n,), generator=g, device=self.device)
        rows = torch.randn(n, d, generator=g, device=self.device)
        own = labels if k == 1 else testing.set_apart(rows, weight, labels, k, g)
        rows[::2] = 0.6 * rows[::2] + 12 * weight[own[::2]]
        labels[n // 2] = -100
        return testing.Case(rows.to(x), weight.to(w), labels, None)

    def _tolerance(self, check: Check) -> float:
        return max(testing.TOLERANCE[DTYPES[name]] for name in check.pair)

    def _repeated(self, case: testing.Case, margin: margins.Margin, options: dict[str, Any], times: int = REPEATS) -> dict[str, Tensor]:
        first = testing.run(case, margin, self.candidate.backend, **options)
        for _ in range(times - 1):
            again = testing.run(case, margin, self.candidate.backend, **options)
            for name, v in first.items():
                if not torch.equal(again[name], v) and bool(v.isfinite().all()):
                    raise Failed(records.UNEQUAL_BITS, f"{name} has other bits in another run")
            for v in again.values():  # what the next run gets for memory, it must write before it reads
                v.fill_(math.nan)
            del again
        return first

    def _step(self, case: testing.Case, backend: str) -> Callable[[], None]:
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        margin = margins.ArcFace().to(self.device)

        def step() -> None:
            x.grad = w.grad = None
            margin_cross_entropy(x, w, case.labels, margin=margin, backend=backend).backward()

        return step

    def _milliseconds(self, step: Callable[[], None]) -> float:
        self._wait()
        began = time.perf_counter()
        step()
        self._wait()
        return 1e3 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def compiled_step(case: testing.Case) -> Callable[[], None]:
    """ArcFace in plain PyTorch over the N x C logits, as people write it, compiled."""
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).to(x.dtype).T
        kept = labels >= 0
        own = cos.gather(1, labels.clamp_min(0)[:, None]).float().clamp(-1 + 1e-6, 1 - 1e-6)
        target = torch.cos(torch.acos(own) + 0.5).to(cos.dtype)
        logits = 64.0 * cos.scatter(1, labels.clamp_min(0)[:, None], target)
        losses = torch.nn.functional.cross_entropy(logits.float(), labels.clamp_min(0), reduction="none")
        return (losses * kept).sum() / kept.sum()

    run = torch.compile(loss)

    def step() -> None:
        x.grad = w.grad = None
        total: Tensor = run(x, w, case.labels)
        total.backward()

    return step


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """A context in which uninitialized tensors hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """The relative error of each output; raises where one is too large."""
    errors = {name: testing.relative_error(got[name], want[name]) for name in want}
    for name, off in errors.items():
        if not off <= tolerance:  # also where it is NaN
            finite = bool(got[name].isfinite().all())
            kept = {key: v if math.isfinite(v) else 1e308 for key, v in errors.items()}
            raise Failed(records.WRONG if finite else records.NOT_FINITE, f"{name} is off by {off:.1e}, tolerance {tolerance:.0e}", kept)
    return errors


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
