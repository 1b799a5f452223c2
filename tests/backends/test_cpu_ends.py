"""The C++ kernels where their arithmetic ends: squares that overflow, cosines that round past 1, NaN, the last class of a chunk."""

import pytest
import torch

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED, cpu
from marginkernels.core.types import HeadInputs

pytestmark = pytest.mark.skipif(FUSED["cpu"].unavailable_reason() is not None, reason=f"{FUSED['cpu'].unavailable_reason()}")


@pytest.fixture(params=cpu.levels())
def level(request, monkeypatch):
    """Every instruction set in turn; the dtype that it serves."""
    monkeypatch.setattr(FUSED["cpu"], "level", request.param)
    return torch.bfloat16 if request.param in ("avx512_bf16", "amx") else torch.float32


@pytest.mark.parametrize("length", [1e-29, 1e-22, 1e22, 1e37])
def test_lengths_whose_squares_leave_float32(level, length):
    """Centers of that length, every other one, and embeddings: what the directions alone give."""
    case = testing.Case.random(9, 40, 70)
    w, x = case.w, case.x
    w[::2] *= length / w[::2].norm(dim=1, keepdim=True)
    x[::3] *= length / x[::3].norm(dim=1, keepdim=True)
    w, x = w.to(level), x.to(level)
    wild = testing.Case(x, w, case.labels, None)
    want = testing.run(wild, mk.CosFace(), "reference", dtype=torch.float64)
    got = testing.run(wild, mk.CosFace(), "cpu")
    assert testing.relative_error(got["loss"], want["loss"]) <= testing.TOLERANCE[level]
    for name, rows in (("dw", w), ("dx", x)):  # in units of one over the length, which alone may overflow
        size = rows.double().norm(dim=1, keepdim=True)
        held = (want[name].abs().amax(1) < 3e38) & (want[name].abs().amax(1) > 1e-36)
        tolerance = 1e-4 if level == torch.float32 else 3e-2
        assert testing.relative_error((got[name].double() * size)[held], (want[name] * size)[held]) <= tolerance


def test_no_cosine_exceeds_one():
    """Rounding would take some of these past 1, of which no arccosine is a number."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4000, 7, generator=g)
    x = w * torch.linspace(-3, 3, 4000)[:, None]
    unit = torch.nn.functional.normalize
    assert (unit(x.double()) * unit(w.double())).sum(1).abs().max() > 1
    rows = FUSED["cpu"].prepare_inputs(HeadInputs(x, w, torch.arange(4000), True, True))
    assert rows.target_cos.abs().max() == rows.target_similarity.abs().max() == 1


def test_nan_reaches_every_gradient(level):
    """Of the row itself, of the classes that it is compared with, and of none of the other rows."""
    case = testing.Case.random(6, 24, 300, level, ignored=False, bias=True)
    case.x[2, 5] = torch.nan
    x, w, b = (v.clone().requires_grad_() for v in (case.x, case.w, case.bias))
    mk.margin_cross_entropy(x, w, case.labels, margin=mk.CosFace(), bias=b, reduction="sum", backend="cpu").backward()
    assert w.grad.isnan().all()
    assert b.grad.isnan().all()
    assert x.grad.isnan().all(1).tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize("what", ["w", "bias"])
@pytest.mark.parametrize("margin", [mk.CosFace(), mk.CurricularFace()], ids=["plain", "hard"])
def test_nan_of_a_class_that_is_nobodys_target(level, margin, what):
    """It is in every row's softmax: every loss is NaN."""
    case = testing.Case.random(6, 24, 300, level, ignored=False, bias=True)
    getattr(case, what)[299] = torch.nan
    case.labels[:] = torch.arange(6)
    loss = mk.margin_cross_entropy(case.x, case.w, case.labels, margin=margin, bias=case.bias, reduction="none", backend="cpu")
    assert loss.isnan().all()


@pytest.mark.parametrize("label", [0, 126, 127, 128, 255, 256, 298, 299])
def test_a_target_at_the_ends_of_its_chunk(level, label):
    """Alone in its block of rows, so that no other row's target tells that the chunk has one."""
    case = testing.Case.random(1, 24, 300, level, bias=True)
    alone = testing.Case(case.x, case.w, torch.tensor([label]), case.bias)
    for margin in (mk.CosFace(), mk.CurricularFace()):
        found = testing.errors(alone, margin, "cpu", label_smoothing=0.1)
        assert max(found.values()) <= testing.TOLERANCE[level], (label, found)


@pytest.mark.parametrize("margin", [mk.CosFace(), mk.CurricularFace()], ids=["plain", "hard"])
def test_chunks_of_the_target_alone(level, margin):
    """All other classes of the first two chunks are masked, so that the sums start with nothing; and a problem of one class."""
    case = testing.Case.random(9, 24, 300, level, bias=True)
    case.bias[:257] = -torch.inf
    case.labels[:] = 3
    case.bias[3] = 0
    want, got = testing.run(case, margin, "reference", dtype=torch.float64), testing.run(case, margin, "cpu")
    assert testing.relative_error(got["loss"], want["loss"]) <= testing.TOLERANCE[level]
    assert testing.relative_error(got["dw"], want["dw"]) <= testing.TOLERANCE[level]
    one = testing.run(testing.Case(case.x, case.w[:1], torch.zeros(9, dtype=torch.int64), None), margin, "cpu")
    assert all((v == 0).all() for v in one.values())


def test_prepared_from_any_layout():
    """The backend takes views, whoever calls it."""
    case = testing.Case.random(8, 24, 30)
    labels = torch.stack([case.labels, case.labels.flip(0)], 1)[:, 0]
    assert not labels.is_contiguous()
    want = FUSED["cpu"].prepare_inputs(HeadInputs(case.x, case.w, case.labels, True, True))
    got = FUSED["cpu"].prepare_inputs(HeadInputs(case.x.t().contiguous().t(), case.w.t().contiguous().t(), labels, True, True))
    assert torch.equal(got.target_similarity, want.target_similarity)
    assert torch.equal(got.x, want.x)
