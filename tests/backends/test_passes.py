"""The two passes of the ``torch`` and ``cpu`` backends against their definition, written out over the whole N x C matrix: every transform
and sum, chunks of any width, several parts, every instruction set and number of threads."""

import itertools

import pytest
import torch
from helpers.chunks import chunks_of
from helpers.passes import check_passes, longhand, pass_inputs
from torch import nn

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED, cpu
from marginkernels.core.types import Reduction

KINDS = list(itertools.product(mk.NonTarget, Reduction, (True, False)))
CPU = FUSED["cpu"].unavailable_reason() is None
FLOATS = (torch.float32, torch.float32)


def inputs(dtypes, non_target, normalize, bias, dim=23, **shape):
    return pass_inputs(dim, dtypes, non_target, normalize_weight=normalize, bias=bias, **shape)


def test_the_problem_has_what_it_should():
    """Hard and easy classes in every row, labels of the first and of later chunks, and rows whose target is not here."""
    p = inputs(FLOATS, mk.NonTarget.HARD_LINEAR, True, True)
    c = (p.x @ (p.w / p.w.norm(dim=1, keepdim=True)).T) * p.row_factor[:, None]
    hard = (c > p.threshold[:, None]).sum(1)
    assert (hard > 0).all()
    assert (hard < 300).all()
    assert (p.labels < 0).any()
    assert (p.labels >= 300).any()
    assert ((p.labels >= 0) & (p.labels < 60)).any()
    assert ((p.labels >= 240) & (p.labels < 300)).any()
    row, classes = longhand(p, Reduction.LOG_SUM_EXP)
    assert all(v.isfinite().all() and v.abs().max() > 0.01 for v in (*row.values(), *classes.values()))


@pytest.mark.parametrize(("non_target", "reduction", "normalize"), KINDS)
def test_chunks_of_any_width(non_target, reduction, normalize):
    """float64 and float32, chunks of one class, of some, of all but one, and one chunk; with and without a bias."""
    for width, bias, dtype in (
        (1, True, torch.float64),
        (7, False, torch.float32),
        (30, True, torch.float32),
        (89, True, torch.float64),
        (None, False, torch.float64),
        (None, True, torch.float32),
    ):
        with chunks_of(width):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            check_passes(FUSED["torch"], inputs((dtype, dtype), non_target, normalize, bias, n=30, c=90), reduction, tolerance)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
def test_chunks_of_mixed_dtypes(dtypes):
    for width in (50, 150):
        for non_target, reduction in itertools.product(mk.NonTarget, Reduction):
            with chunks_of(width):
                check_passes(FUSED["torch"], inputs(dtypes, non_target, True, True), reduction, 6e-3)


def test_slopes_that_float16_cannot_hold():
    """Near a cosine of 1 the upstream is past 65504: each class is taken times its own power of two, and back."""
    for steep in (1e4, 1e6, 1e9):
        for width in (40, None):
            with chunks_of(width):
                p = inputs((torch.float16, torch.float32), mk.NonTarget.IDENTITY, True, True, n=30, c=90)
                check_passes(FUSED["torch"], p, Reduction.LOG_SUM_EXP, 6e-3, steep=steep)


def test_softmaxes_that_float16_cannot_hold():
    """A sure row's softmax lies below 6e-8: so does its gradient, but it is no zero."""
    case = testing.Case.random(1, 100, 30, torch.float16, weight_dtype=torch.float32)
    near = testing.Case((case.x.float() + 30 * case.w[case.labels]).half(), case.w, case.labels, None)
    found = testing.errors(near, mk.CosFace(), "torch")
    assert 1e-15 < float(testing.run(near, mk.CosFace(), "torch")["loss"]) < 1e-9
    assert max(found["loss"], found["dw"]) <= testing.TOLERANCE[torch.float16], found  # dx, in float16, is


@pytest.mark.skipif(not CPU, reason="not built")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("level", cpu.levels() if CPU else [])
def test_parts_and_instruction_sets(level, threads, monkeypatch):
    """So many classes that one block of rows is divided into parts, and so many rows that there are several blocks; with all of the
    exponentials saved, some, and none."""
    serves = {"avx512_bf16": torch.bfloat16, "amx": torch.bfloat16}
    dtype = serves.get(level, torch.float32)
    monkeypatch.setattr(FUSED["cpu"], "level", level)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, (non_target, reduction, normalize) in enumerate(KINDS):
            shape = ({"n": 9, "c": 2100, "dim": 640}, {"n": 300, "c": 530})[i // 2 % 2]  # the first: enough work for three threads
            p = inputs((dtype, dtype), non_target, normalize, i % 3 > 0, **shape)
            workspace = (0, 1 << 40, 40_000)[(i + threads) % 3]
            check_passes(FUSED["cpu"], p, reduction, 1e-5 if dtype == torch.float32 else 6e-3, workspace=workspace)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sub_centers", [2, 3, 5])
def test_sub_centers_in_chunks(sub_centers):
    for i, (non_target, reduction, normalize) in enumerate(KINDS):
        p = inputs(FLOATS, non_target, normalize, i % 3 > 0, n=30, c=18 * sub_centers, sub_centers=sub_centers)
        with chunks_of((1, 7, None)[i % 3]):
            check_passes(FUSED["torch"], p, reduction, 1e-5)


@pytest.mark.skipif(not CPU, reason="not built")
@pytest.mark.parametrize("level", cpu.levels() if CPU else [])
def test_sub_centers_on_every_instruction_set(level, monkeypatch):
    """Classes that fill a chunk of centers and that leave some of it empty, of as many centers as a chunk has too, over several parts; with
    all of the exponentials saved, some, and none."""
    dtype = {"avx512_bf16": torch.bfloat16, "amx": torch.bfloat16}.get(level, torch.float32)
    backend = FUSED["cpu"]
    monkeypatch.setattr(backend, "level", level)
    for i, (non_target, reduction, normalize) in enumerate(KINDS):
        k, classes = ((3, 100), (2, 263), (5, 77), (backend.max_sub_centers, 3), (3, 1001))[i % 5]
        p = inputs((dtype, dtype), non_target, normalize, i % 3 > 0, n=70, c=k * classes, sub_centers=k, dim=33)
        tolerance = 1e-5 if dtype == torch.float32 else 6e-3
        check_passes(backend, p, reduction, tolerance, workspace=(0, 1 << 40, 60_000)[i // 2 % 3])


class Trained(mk.Margin):
    """A hard transform whose scale is one number a row, trained, beside a threshold and a t that are computed from a parameter: both are
    constants to the gradient."""

    def __init__(self, non_target):
        super().__init__(None)
        self.non_target = non_target
        self.s = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
        self.m = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    @property
    def t(self):
        return 0.5 * self.m

    def row_scale(self, batch):
        return self.s + 0.5 * batch.norm

    def target(self, cos, batch):
        return cos - self.m, torch.ones_like(cos)

    def threshold(self, cos, batch):
        return cos - 2 * self.m


def by_hand(case, non_target, smoothing):
    """Loss and gradients in x, w, the bias, s and m of :class:`Trained`, by autograd through the whole matrix in float64."""
    x, w, b = (v.detach().double().requires_grad_() for v in (case.x, case.w, case.bias))
    s, m = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, 0.3))
    c = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    own = case.labels[:, None] == torch.arange(len(w))
    kept = case.labels >= 0
    cy = c.gather(1, case.labels.clamp_min(0)[:, None])
    t = 0.15
    raised = (1 + t) * c + t if non_target == mk.NonTarget.HARD_LINEAR else c * (t + c)
    hard = c.detach() > cy.detach() - 0.6
    assert hard[kept].any()
    assert not hard[kept].all()
    z = (s + 0.5 * x.norm(dim=1, keepdim=True)) * torch.where(own, c - m, torch.where(hard, raised, c)) + b
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    rows = -(1 - smoothing) * log_p.gather(1, case.labels.clamp_min(0)[:, None])[:, 0] - smoothing * log_p.mean(1)
    loss = rows[kept].sum() / kept.sum()
    return {"loss": loss.detach()} | dict(zip(("dx", "dw", "dbias", "ds", "dm"), torch.autograd.grad(loss, (x, w, b, s, m)), strict=True))


@pytest.mark.parametrize("non_target", [mk.NonTarget.HARD_LINEAR, mk.NonTarget.HARD_QUADRATIC])
@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("cpu", marks=pytest.mark.skipif(not CPU, reason="not built"))])
def test_hard_forms_with_a_trained_scale(backend, non_target):
    for smoothing in (0.0, 0.2):
        case = testing.Case.random(15, 20, 700, bias=True)
        want = by_hand(case, non_target, smoothing)
        for width in (1, 100, None) if backend == "torch" else (None,):
            with chunks_of(width):
                got = testing.run(case, Trained(non_target), backend, label_smoothing=smoothing)
            assert got.keys() == want.keys()
            for name, v in want.items():
                assert testing.relative_error(got[name], v) <= 2e-5, (width, smoothing, name)
