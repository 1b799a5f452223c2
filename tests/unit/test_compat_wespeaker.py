"""``marginkernels.compat.wespeaker`` against wespeaker's formulas, longhand, and beside wespeaker itself where it is there."""

import copy
import json
import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import recorded_wespeaker as recorded
from helpers.shims import SAME, assert_same, near
from torch import nn
from torch.nn import functional as F

from marginkernels.compat import wespeaker as ours

N, D, C = 48, 16, 24
DTYPES = pytest.mark.parametrize("dtype", SAME, ids=lambda dtype: str(dtype).removeprefix("torch."))

#: Class, arguments, and the margins that a scheduler sets before the step.
CASES = [
    ("ArcMarginProduct", {}, []),
    ("ArcMarginProduct", {"margin": 0.0, "easy_margin": True}, [0.1, 0.5]),
    ("ArcMarginProduct", {"scale": 8.0, "margin": 2.0}, []),  # most rows are past pi - m
    ("AddMarginProduct", {}, []),
    ("AddMarginProduct", {"scale": 16.0, "margin": 0.0}, [0.1, 0.35]),
    ("SphereProduct", {}, []),
    ("SphereProduct", {"margin": 4}, []),
    ("ArcMarginProduct_intertopk_subcenter", {}, []),  # no penalty yet
    ("ArcMarginProduct_intertopk_subcenter", {"margin": 0.0}, [0.1, 0.3]),
    ("ArcMarginProduct_intertopk_subcenter", {"K": 2, "mp": 0.1, "k_top": 3, "easy_margin": True}, [0.3]),
    ("ArcMarginProduct_intertopk_subcenter", {}, [0.4, 0.0005]),
    ("ArcMarginProduct_intertopk_subcenter", {"do_lm": True}, [0.5]),
    ("SphereFace2", {}, []),
    ("SphereFace2", {"scale": 16.0, "margin": 0.0, "t": 2, "lanbuda": 0.6}, [0.3]),
]
HEADS = pytest.mark.parametrize(("name", "options", "margins"), CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)])


def made(name, options, margins, dtype, module=ours):
    torch.manual_seed(3)
    head = getattr(module, name)(D, C, **options).to(dtype)
    for margin in margins:
        head.update(margin)
    if name == "SphereProduct":
        head.iter = 700  # the annealing has gone far enough for the margin to count
    return head


def batch(head, dtype):
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(5))
    return near(head.weight, y * (head.weight.shape[0] // C), dtype), y


# -- wespeaker/models/projections.py, longhand ------------------------------------------------------------------------------------


def turned(cos, m, easy):
    """cos(theta + m); past pi cos(theta) - (1 - cos m), or with ``easy`` no margin from pi / 2 on."""
    phi = cos * math.cos(m) - torch.sqrt(1 - cos**2) * math.sin(m)
    return torch.where(cos > 0, phi, cos) if easy else torch.where(cos > -math.cos(m), phi, cos - (1 - math.cos(m)))


def softplus(z):
    return torch.logaddexp(z, torch.zeros_like(z))


def longhand(name, options, margins, x, w, bias, y):
    """(logits, loss) of a step; ``w`` and ``bias`` as the head holds them."""
    given = {"scale": 32.0, "margin": 0.2, "easy_margin": False, "K": 3, "mp": 0.06, "k_top": 5, "do_lm": False, "lanbuda": 0.7, "t": 3}
    given |= {"margin": 2} if name == "SphereProduct" else {}
    given |= options
    m, s, easy = (margins or [given["margin"]])[-1], given["scale"], given["easy_margin"]
    cos = F.normalize(x) @ F.normalize(w).T
    own = F.one_hot(y, C).bool()
    if name == "SphereProduct":
        lam = max(5.0, 1000.0 / (1 + 0.12 * 701))
        theta = cos.detach().clamp(-1, 1).acos()
        times = [None, lambda c: c, lambda c: 2 * c**2 - 1, None, lambda c: 8 * c**4 - 8 * c**2 + 1][m](cos)
        k = torch.floor(m * theta / math.pi)
        psi = (-1.0) ** k * times - 2 * k
        z = x.norm(dim=1, keepdim=True) * torch.where(own, (lam * cos + psi) / (1 + lam), cos)
    elif name == "SphereFace2":
        g = 2 * ((cos + 1) / 2) ** given["t"] - 1
        positive, negative = s * (g - m) + bias[0, 0], s * (g + m) + bias[0, 0]
        terms = torch.where(own, given["lanbuda"] * softplus(-positive), (1 - given["lanbuda"]) * softplus(negative))
        return s * torch.where(own, cos - m, cos), terms.sum(1).mean()
    elif name == "ArcMarginProduct_intertopk_subcenter":
        cos = cos.view(-1, C, given["K"]).amax(2)
        z = torch.where(own, turned(cos, m, easy), cos)
        penalty = given["mp"] * m / 0.2 if margins and m > 0.001 else 0.0
        if not given["do_lm"]:
            top = torch.zeros_like(own).scatter_(1, (cos - 2 * own.to(cos)).topk(given["k_top"], 1).indices, True)
            z = torch.where(top, cos * math.cos(penalty) + torch.sqrt(1 - cos**2) * math.sin(penalty), z)
        z = s * z
    else:
        z = s * torch.where(own, cos - m if name == "AddMarginProduct" else turned(cos, m, easy), cos)
    return z, F.cross_entropy(z, y)


def step(head, x, y):
    """(loss, gradients of the embeddings and of each parameter), and which rows are right."""
    x = x.clone().requires_grad_()
    head.zero_grad()
    found = head(x, y)
    outputs, loss = found if isinstance(found, tuple) else (found, F.cross_entropy(found, y))  # as wespeaker's executor does
    loss.backward()
    right = torch.from_numpy(outputs.cpu().detach().numpy()).topk(1, 1).indices[:, 0] == y
    return [loss.detach(), x.grad, *(p.grad for p in head.parameters())], right


@DTYPES
@HEADS
def test_loss_gradients_and_accuracy_longhand(name, options, margins, dtype):
    head = made(name, options, margins, dtype)
    assert head.fused
    x, y = batch(head, dtype)
    found, right = step(head, x, y)
    assert found[0].ndim == 0
    leaf = x.double().requires_grad_()
    held = [p.detach().double().requires_grad_() for p in head.parameters()]
    z, loss = longhand(name, options, margins, leaf, held[0], held[1] if len(held) > 1 else None, y)
    assert_same(found, [loss.detach(), *torch.autograd.grad(loss, [leaf, *held])], dtype)
    assert torch.equal(right, z.argmax(1) == y)
    assert 0 < right.sum() < N or options.get("margin") == 2.0


@pytest.mark.parametrize("seed", range(len(recorded.CASES)))
def test_what_wespeaker_itself_gave(seed):
    name, options, margins = recorded.CASES[seed]
    want = json.loads(recorded.RECORD.read_text())[seed]
    found = recorded.step(getattr(ours, name)(recorded.D, recorded.C, **options), seed, margins)
    assert found.keys() == want.keys()
    assert found.pop("right") == want.pop("right")
    numbers = ([torch.tensor(v, dtype=torch.float64) for v in some.values()] for some in (found, want))
    assert_same(*numbers, torch.float64)


@DTYPES
@HEADS
def test_beside_wespeaker(name, options, margins, dtype):
    theirs = pytest.importorskip("wespeaker.models.projections")
    expected, head = (made(name, options, margins, dtype, module) for module in (theirs, ours))
    assert list(head.state_dict()) == list(expected.state_dict())
    assert torch.equal(head.weight, expected.weight)
    x, y = batch(head, dtype)
    (found, right), (want, also) = step(head, x, y), step(expected, x, y)
    assert_same(found, want, dtype)
    assert torch.equal(right, also)
    expected.load_state_dict(head.state_dict())
    head.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES}))
def test_state_and_start(name):
    """The names of the checkpoint, and weights drawn as wespeaker's: uniform by Xavier's rule, of all K C rows, in one draw."""
    head = made(name, {}, [], torch.float32)
    rows = C * 3 if "subcenter" in name else C
    shapes = {"weight": (rows, D)} | ({"bias": (1, 1)} if name == "SphereFace2" else {})
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == shapes
    torch.manual_seed(3)
    assert torch.equal(head.weight, nn.init.xavier_uniform_(torch.empty(rows, D)))
    assert (head.in_features, head.out_features) == (D, C)
    if name == "SphereFace2":
        assert head.bias.item() == 0
        assert head.bias.requires_grad


@pytest.mark.parametrize("name", ["ArcMarginProduct", "AddMarginProduct", "ArcMarginProduct_intertopk_subcenter", "SphereFace2"])
def test_the_scheduler_sets_the_margin_and_reads_it_back(name):
    head = made(name, {"margin": 0.0}, [], torch.float32)
    x, y = batch(head, torch.float32)
    before = head(x, y)[1]
    for margin in (0.05, 0.2):
        head.update(margin=margin)
        assert head.margin == margin
        assert head(x, y)[1] > before
    assert torch.equal(head(x, y)[1], made(name, {}, [0.2], torch.float32)(x, y)[1])
    other = copy.deepcopy(head)
    other.update(0.0)
    assert torch.equal(other(x, y)[1], before)
    assert head(x, y)[1] > before


def test_the_outputs_are_what_the_meter_reads():
    right, labels = torch.tensor([True, False, True, False]), torch.tensor([0, 2, 1, 1])
    outputs = ours.Outputs(right, labels, 3)
    scores = outputs.cpu().detach().numpy()
    assert scores.shape == (4, 3)
    assert (torch.from_numpy(scores).argmax(1) == labels).tolist() == right.tolist()
    two, zeros = outputs.right_or_not()
    assert two.shape == (4, 2)
    assert (two.argmax(1) == zeros).tolist() == right.tolist()
    assert float(outputs.accuracy) == 0.5


CONF = {"embed_dim": D, "num_class": C, "scale": 24.0, "easy_margin": True}


@pytest.mark.parametrize(
    ("conf", "name", "expected"),
    [
        ({"project_type": "add_margin"}, "AddMarginProduct", {"scale": 24.0, "margin": 0.0}),
        ({"project_type": "arc_margin"}, "ArcMarginProduct", {"scale": 24.0, "margin": 0.0, "easy_margin": True}),
        (
            {"project_type": "arc_margin_intertopk_subcenter", "K": 2, "mp": 0.1},
            "ArcMarginProduct_intertopk_subcenter",
            {"K": 2, "mp": 0.1, "k_top": 5, "do_lm": False, "margin": 0.0},
        ),
        (
            {"project_type": "arc_margin_intertopk_subcenter", "do_lm": True},
            "ArcMarginProduct_intertopk_subcenter",
            {"K": 3, "mp": 0.0, "k_top": 0, "do_lm": True},
        ),
        ({"project_type": "sphere"}, "SphereProduct", {"margin": 4}),
        ({"project_type": "sphereface2", "t": 2}, "SphereFace2", {"t": 2, "lanbuda": 0.7, "margin": 0.0, "margin_type": "C"}),
    ],
)
def test_projections_by_configuration(conf, name, expected):
    head = ours.get_projection(CONF | conf)
    assert type(head) is getattr(ours, name)
    assert {key: getattr(head, key) for key in expected} == expected
    assert (head.in_features, head.out_features) == (D, C)
    for key, value in expected.items():
        assert f"{key}={value}" in repr(head)


@pytest.mark.parametrize(
    "conf", [{"project_type": "ham_margin"}, {"project_type": "softmax"}, {"project_type": "sphereface2", "margin_type": "A"}]
)
def test_what_cannot_be_fused_is_wespeakers_own(conf, monkeypatch):
    with pytest.raises(ValueError, match=r"^margin_type: expected 'C'"):
        ours.SphereFace2(D, C, margin_type="A")
    monkeypatch.setitem(sys.modules, "wespeaker.models", None)
    with pytest.raises(ImportError, match=r"project_type.*pip install .*wespeaker"):
        ours.get_projection(CONF | conf)
    there, models, theirs = (ModuleType(name) for name in ("wespeaker", "wespeaker.models", "wespeaker.models.projections"))
    theirs.get_projection = lambda given: ("theirs", given)
    models.projections = theirs
    for module in (there, models, theirs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert ours.get_projection(CONF | conf) == ("theirs", CONF | conf)


def test_no_tensor_is_rows_by_classes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.update(tuple(t.shape) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor))
            return out

    for name, options, margins in CASES:
        head = made(name, options, margins, torch.float32)
        x, y = batch(head, torch.float32)
        with Shapes() as shapes:
            shapes.seen = set()
            outputs, loss = head(x.requires_grad_(), y)
            loss.backward()
            outputs.cpu().right_or_not()
        assert not {(N, C), (N, 3 * C), (C, N)} & shapes.seen


def test_labels_of_a_column_and_autocast():
    head = made("ArcMarginProduct", {}, [], torch.float32)
    x, y = batch(head, torch.float32)
    assert torch.equal(head(x, y[:, None])[1], head(x, y)[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, y)[1]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(x, y)[1], rtol=0.02, atol=0)


def test_what_differs_fewer_others_than_the_penalty_takes():
    """wespeaker's ``topk`` then takes the own class too, or raises; here all others there are."""
    head = ours.ArcMarginProduct_intertopk_subcenter(D, 4, k_top=5)
    head.update(0.2)
    assert head(torch.randn(3, D), torch.arange(3))[1].isfinite()


def test_what_differs_a_cosine_of_one():
    """wespeaker's root of 1 - cos^2 has no slope there: NaN. Here the gradient is finite."""
    head = made("ArcMarginProduct", {}, [], torch.float64)
    head.weight.data[0] = torch.eye(D)[0]
    x, y = 2 * torch.eye(D, dtype=torch.float64)[:1], torch.zeros(1, dtype=torch.int64)
    assert all(part.isfinite().all() for part in step(head, x, y)[0])
    leaf = x.requires_grad_()
    assert torch.autograd.grad(longhand("ArcMarginProduct", {}, [], leaf, head.weight.detach(), None, y)[1], leaf)[0].isnan().any()


def test_what_differs_large_exponents():
    """wespeaker's log(1 + exp(z)) is infinite beyond 88 in float32, its own default of 32 times 2.4; here it is z."""
    head = made("SphereFace2", {"scale": 96.0}, [], torch.float32)
    y = torch.arange(C)
    assert head(-3 * head.weight[y].detach(), y)[1].isfinite()
    z = torch.tensor(96.0 * 1.2)
    assert torch.log(1 + torch.exp(z)).isinf()


def test_what_differs_margins_out_of_range():
    head = made("ArcMarginProduct", {}, [], torch.float32)
    with pytest.raises(ValueError, match="margin"):
        head.update(-0.1)
    assert head.margin == 0.2
