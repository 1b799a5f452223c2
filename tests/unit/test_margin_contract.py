"""What a margin owes a head: hooks of the right shapes, slopes that are derivatives, state that stays finite, settings that can change."""

import copy
import itertools
import math
import pickle

import pytest
import torch

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED
from marginkernels.margins.angular import BEYOND_PI, GRADIENTS

N, D, C = 6, 16, 40
BACKENDS = ["reference", *(name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types)]
# The cosine of row i is that of label i; triton under its interpreter is slow and has its own tests.
QUICK = [name for name in BACKENDS if name != "triton"]


def batch(seed=0, n=N, c=C):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randn(c, D, generator=g), torch.arange(n)


# -- what the hooks return -----------------------------------------------------------------------------------------------------


class Mine(mk.Margin):
    """A margin whose hooks return what a test says."""

    def __init__(
        self, target=lambda c: (c - 0.3, torch.ones_like(c)), scale=lambda n: 20.0, threshold=None, t=0.2, regularizer=lambda n: None
    ):
        super().__init__()
        self._regularizer = regularizer
        self._target, self._row_scale, self._threshold, self.t = target, scale, threshold, t
        if threshold is not None:
            self.non_target = mk.NonTarget.HARD_LINEAR

    def target(self, cos, batch):
        return self._target(cos)

    def row_scale(self, batch):
        return self._row_scale(batch.embeddings.shape[0])

    def threshold(self, cos, batch):
        return self._threshold(cos)

    def regularizer(self, batch):
        return self._regularizer(batch.embeddings.shape[0])


def ones(c):
    return torch.ones_like(c)


WRONG = {
    "column value": (
        lambda: Mine(lambda c: (c[:, None], ones(c))),
        ValueError,
        "Mine.target: expected value and slope of shape (6,), got (6, 1)",
    ),
    "column slope": (
        lambda: Mine(lambda c: (c, ones(c)[:, None])),
        ValueError,
        "Mine.target: expected value and slope of shape (6,), got (6, 1)",
    ),
    "scalar value": (
        lambda: Mine(lambda c: (c.mean(), ones(c))),
        ValueError,
        "Mine.target: expected value and slope of shape (6,), got ()",
    ),
    "one value": (lambda: Mine(lambda c: c), TypeError, "Mine.target: expected two values, the target's value and its slope, got Tensor"),
    "three values": (
        lambda: Mine(lambda c: (c, c, c)),
        TypeError,
        "Mine.target: expected two values, the target's value and its slope, got 3",
    ),
    "number as value": (lambda: Mine(lambda c: (0.5, ones(c))), TypeError, "Mine.target: expected a tensor as the value, got float"),
    "no slope": (lambda: Mine(lambda c: (c, None)), TypeError, "Mine.target: expected a tensor as the slope, got NoneType"),
    "half value": (lambda: Mine(lambda c: (c.half(), ones(c))), TypeError, "Mine.target: expected the value in torch.float"),
    "integer slope": (lambda: Mine(lambda c: (c, ones(c).long())), TypeError, "Mine.target: expected the slope in torch.float"),
    "negative scale": (lambda: Mine(scale=lambda n: -5.0), ValueError, "Mine.row_scale: expected a finite number > 0"),
    "scale nan": (lambda: Mine(scale=lambda n: math.nan), ValueError, "Mine.row_scale: expected a finite number > 0"),
    "scale of columns": (lambda: Mine(scale=lambda n: torch.ones(n, 1)), ValueError, "Mine.row_scale: expected a finite number > 0"),
    "scale of others": (lambda: Mine(scale=lambda n: torch.ones(n + 1)), ValueError, "Mine.row_scale: expected a finite number > 0"),
    "scale of integers": (lambda: Mine(scale=lambda n: torch.ones(n).long()), TypeError, "Mine.row_scale: expected a finite number > 0"),
    "scale a string": (lambda: Mine(scale=lambda n: "64"), TypeError, "Mine.row_scale: expected a finite number > 0"),
    "threshold of columns": (lambda: Mine(threshold=lambda c: c[:, None]), ValueError, "Mine.threshold: expected shape (6,), got (6, 1)"),
    "threshold a number": (
        lambda: Mine(threshold=lambda c: 0.5),
        TypeError,
        "Mine.threshold: expected a floating tensor of shape (6,), got float",
    ),
    "regularizer of columns": (
        lambda: Mine(regularizer=lambda n: torch.ones(n, 1)),
        ValueError,
        "Mine.regularizer: expected shape (6,), got (6, 1)",
    ),
    "regularizer a number": (
        lambda: Mine(regularizer=lambda n: 0.5),
        TypeError,
        "Mine.regularizer: expected None or a floating tensor of shape (6,), got float",
    ),
    "t of columns": (lambda: Mine(threshold=ones, t=torch.ones(6, 1)), ValueError, "Mine.t: expected a finite number"),
    "t missing": (lambda: Mine(threshold=ones, t=None), TypeError, "Mine.t: expected a finite number"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_hook_is_named(name, backend):
    make, error, message = WRONG[name]
    x, w, y = batch()
    with pytest.raises(error) as caught:
        mk.margin_cross_entropy(x, w, y, margin=make(), backend=backend)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("backend", QUICK)
def test_a_slope_may_be_a_number(backend):
    x, w, y = batch()
    case = testing.Case(x, w, y, None)
    number, tensor = (testing.run(case, Mine(lambda c, s=slope: (c - 0.3, s(c))), backend) for slope in (lambda c: 1.0, ones))
    assert all(torch.equal(number[k], tensor[k]) for k in tensor)


class Column(mk.Margin):
    def target(self, cos, batch):
        return cos[:, None] - 0.3, torch.ones_like(cos)


def test_checks_do_not_break_the_graph():
    x, _, y = batch()
    for margin in (mk.CurricularFace(), mk.AdaCos(C), mk.AdaFace(momentum=0.5)):
        torch._dynamo.reset()
        head = mk.MarginHead(D, C, margin)
        compiled = copy.deepcopy(head)
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        x[0, 0] = math.inf  # its state stays finite there too
        run(x, y)
        head(x, y)
        state = dict(head.margin.named_buffers())
        assert all(torch.equal(v, state[k]) and torch.isfinite(v).all() for k, v in compiled.margin.named_buffers())


# -- check_margin --------------------------------------------------------------------------------------------------------------

OPTIONS = {
    mk.Softmax: [{}, {"normalize_weight": True}],
    mk.NormFace: [{}],
    mk.L2Softmax: [{}, {"alpha": 9.0, "trainable": True}, {"num_classes": 50}],
    mk.SphereFace: [{"margin": m, "annealing": a} for m in (1, 2, 3, 4, 5, 7) for a in (None, True)] + [{"scale": 30.0}],
    mk.LSoftmax: [{"margin": m, "scale": s} for m in (1, 2, 3, 4, 5) for s in (1.0, 8.0)],
    mk.CosFace: [{"margin": m} for m in (0.0, 0.35, 2.0, torch.linspace(0, 2, 30))],
    mk.ArcFace: [
        {"margin": m, "beyond_pi": b, "gradient": g}
        for b in BEYOND_PI
        for g in GRADIENTS
        for m in (0.0, 0.5, 1.7, 3.0, torch.linspace(0, 3, 30))
    ],
    mk.SphereFaceR: [
        {"version": v, "margin": m, "normalization": n, "gradient": g}
        for v in ("v0", "v1", "v2")
        for m in (1.0, 1.5, 4.0)
        for n in ("hard", "none", "soft")
        for g in GRADIENTS
    ],
    mk.Circle: [{"margin": m} for m in (0.0, 0.25, 1.0)],
    mk.CombinedMargin: [
        {"m1": m1, "m2": m2, "m3": 0.2, "beyond_pi": b, "gradient": g}
        for (m1, m2), b, g in itertools.product(((1.0, 0.3), (0.7, 0.0), (1.35, 1.2), (4.0, 0.1)), BEYOND_PI, GRADIENTS)
    ],
    mk.AdaCos: [{"num_classes": 50}, {"num_classes": 50, "dynamic": False}],
    mk.MVSoftmax: [{}, {"kind": "am", "margin": 0.35}],
    mk.InterTopK: [{"beyond_pi": b, "margin": m} for b in BEYOND_PI for m in (0.0, 0.2, 1.7, 3.0)] + [{"kind": "cos", "margin": 0.35}],
    mk.CurricularFace: [{}, {"margin": 1.7}],
    mk.ElasticFace: [{"kind": k, "std": s, "plus": p} for k in ("arc", "cos") for s in (0.0, 0.5) for p in (None, "paper", "code")],
    mk.MagFace: [{"beyond_pi": b, "margin_range": r} for b in BEYOND_PI for r in ((0.45, 0.8), (0.0, 3.0), (0.5, 0.5))],
    mk.SphereFace2: [
        {"num_classes": 50, "kind": k, "margin": m, "gradient": g} for k, m in (("C", 0.4), ("A", 0.5), ("M", 1.7)) for g in GRADIENTS
    ],
    mk.UniFace: [{"num_classes": 50}, {"num_classes": 50, "margin": 0.0}],
    mk.AdaFace: [{}, {"h": 5.0}, {"h": 5.0, "margin": 1.7}, {"margin": 0.0}],
}


@pytest.mark.parametrize("margin", OPTIONS, ids=lambda m: m.__name__)
def test_check_margin_passes_what_ships(margin):
    assert set(mk.margins.ALL) <= set(OPTIONS)
    for options in OPTIONS[margin]:
        testing.check_margin(margin(**options))


class Planted(mk.Margin):
    """A right margin and what is done to it."""

    def __init__(self, value=lambda c, b: 0, slope=lambda c, b: 0):
        super().__init__()
        self._value, self._slope = value, slope
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def target(self, cos, batch):
        return cos - 0.3 * (1 - cos) ** 2 + self._value(cos, batch), 1 + 0.6 * (1 - cos) + self._slope(cos, batch)


class Leaking(Planted):
    def target(self, cos, batch):
        self.seen += 1
        return super().target(cos, batch)


PLANTED = {
    "sign": (lambda: Planted(slope=lambda c, b: -1.2 * (1 - c)), "autograd"),
    "small": (lambda: Planted(slope=lambda c, b: 1e-5), "autograd"),
    "near the end": (lambda: Planted(slope=lambda c, b: 0.01 * (c > 0.99)), "autograd"),
    "past a right angle": (lambda: Planted(slope=lambda c, b: 0.01 * (c < -0.5)), "autograd"),
    "for large norms": (lambda: Planted(slope=lambda c, b: 0.01 * (b.norm > 100)), "autograd"),
    "for one label": (lambda: Planted(slope=lambda c, b: 0.01 * (b.labels == 3)), "autograd"),
    "detached value": (lambda: Planted(lambda c, b: (c * c).detach()), "finite differences"),
    "infinite slope at an end": (lambda: Planted(slope=lambda c, b: torch.where(c == 1, math.inf, 0.0)), "finite slope"),
    "nan value at an end": (lambda: Planted(lambda c, b: torch.where(c == -1, math.nan, 0.0)), "finite value"),
    "jumps all over": (lambda: Planted(lambda c, b: (c * 1e8).detach().round() % 2), "jumps"),
    "state in target": (Leaking, "the buffer seen unchanged"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_check_margin_finds(name):
    make, message = PLANTED[name]
    testing.check_margin(Planted())
    with pytest.raises(AssertionError, match=message) as caught:
        testing.check_margin(make())
    assert str(caught.value).startswith(type(make()).__name__)


def test_check_margin_takes_what_is_declared():
    """A straight-through slope is that of autograd; one that is neither fails."""

    class Declared(mk.Margin):
        straight_through = True

        def target(self, cos, batch):
            return cos + (-0.3 * (1 - cos) ** 2).detach(), torch.ones_like(cos)

    testing.check_margin(Declared())
    Declared.straight_through = False
    with pytest.raises(AssertionError, match="finite differences"):
        testing.check_margin(Declared())
    Declared.straight_through = True
    Declared.target = lambda self, cos, batch: (cos + (cos**2).detach(), 1 + 2 * cos)
    with pytest.raises(AssertionError, match="autograd"):
        testing.check_margin(Declared())


def test_check_margin_leaves_the_margin_alone():
    margin = mk.L2Softmax()
    testing.check_margin(margin)
    assert margin.alpha is None
    with pytest.raises(ValueError, match=r"Column\.target"):
        testing.check_margin(Column())
    with pytest.raises(TypeError, match="margin"):
        testing.check_margin(0.5)


# -- state ---------------------------------------------------------------------------------------------------------------------


class RunningMean(mk.Margin):
    """State of one's own, which does not look at ``valid`` and trusts the embeddings."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def update(self, cos, batch, non_target_lse):
        self.mean.copy_(0.9 * self.mean + 0.1 * cos.mean() + 0.0 * batch.norm.mean())
        self.steps += 1

    def target(self, cos, batch):
        return cos - 0.1 * self.mean, torch.ones_like(cos)


STATEFUL = {
    "curricularface": mk.CurricularFace,
    "adacos": lambda: mk.AdaCos(C),
    "sphereface": lambda: mk.SphereFace(annealing=True),
    "adaface": mk.AdaFace,
    "elasticface": lambda: mk.ElasticFace(std=0.2),
    "own": RunningMean,
}


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_survives_what_is_not_finite(name, bad, backend):
    x, w, y = batch()
    margin = STATEFUL[name]()
    broken, all_broken = x.clone(), torch.full_like(x, bad)
    broken[2, 3] = bad
    for embeddings in (x, broken, all_broken):
        before = copy.deepcopy(margin.state_dict())
        mk.margin_cross_entropy(embeddings, w, y, margin=margin, backend=backend)
        assert all(torch.isfinite(v).all() for v in margin.state_dict().values())
    assert all(torch.equal(v, before[k]) for k, v in margin.state_dict().items())  # nothing finite in the last batch: nothing moved
    assert math.isfinite(mk.margin_cross_entropy(x, w, y, margin=margin, backend=backend))


@pytest.mark.parametrize("backend", QUICK)
def test_a_bad_row_takes_no_part_in_the_state(backend):
    x, w, y = batch()
    for name in ("curricularface", "adacos", "adaface"):
        some, kept = STATEFUL[name](), STATEFUL[name]()
        x[2] = math.nan
        mk.margin_cross_entropy(x, w, y, margin=some, backend=backend)
        y_without = y.clone()
        y_without[2] = -100
        mk.margin_cross_entropy(x.nan_to_num(1.0), w, y_without, margin=kept, backend=backend)
        for k, v in kept.state_dict().items():
            torch.testing.assert_close(some.state_dict()[k], v, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_gradient_scale_recovers(name):
    x, _, y = batch()
    torch.manual_seed(0)
    head = mk.MarginHead(D, C, STATEFUL[name]())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(7):
        embeddings = x.clone()
        if step == 1:
            embeddings[0, 0] = math.inf
        optimizer.zero_grad()
        scaler.scale(head(embeddings, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[1] == 512.0
    assert scales[-1] >= 1024.0
    assert torch.isfinite(head.weight).all()


@pytest.mark.parametrize("name", ["curricularface", "adacos", "sphereface", "adaface", "elasticface", "alpha"])
def test_reset_parameters(name):
    make = {**STATEFUL, "alpha": lambda: mk.L2Softmax(alpha=9.0, trainable=True)}[name]
    x, w, y = batch()
    start, margin = make().state_dict(), make()
    mk.margin_cross_entropy(x, w, y, margin=margin)
    if name == "alpha":
        margin.alpha.data += 1
    assert any(not torch.equal(v, start[k]) for k, v in margin.state_dict().items())
    margin.reset_parameters()
    assert all(torch.equal(v, start[k]) for k, v in margin.state_dict().items())
    for p in margin.parameters():
        assert p.requires_grad
    empty = make().to("meta").to_empty(device="cpu")
    for v in empty.state_dict().values():
        v.fill_(77)
    empty.reset_parameters()
    assert all(torch.equal(v, start[k]) for k, v in empty.state_dict().items())


def test_settings_survive_the_meta_device():
    """What a margin reads in a step follows from its floats, so that memory without values does not spoil it."""
    x, w, y = batch()
    with torch.device("meta"):
        made = mk.CombinedMargin(m1=1.2, m2=0.3, m3=0.1)
    for margin in (made.to_empty(device="cpu"), mk.CombinedMargin(m1=1.2, m2=0.3, m3=0.1).to("meta").to_empty(device="cpu")):
        want = mk.margin_cross_entropy(x, w, y, margin=mk.CombinedMargin(m1=1.2, m2=0.3, m3=0.1))
        assert torch.equal(mk.margin_cross_entropy(x, w, y, margin=margin), want)


def test_bound_to_another_number_of_classes():
    x, w, y = batch()
    for margin in (mk.AdaCos(5000), mk.AdaCos(5000, dynamic=False), mk.L2Softmax(num_classes=5000)):
        with pytest.raises(ValueError, match=f"num_classes: expected {C} .*got 5000"):
            mk.MarginHead(D, C, margin)
        with pytest.raises(ValueError, match=f"num_classes: expected {C} .*got 5000"):
            mk.margin_cross_entropy(x, w, y, margin=margin)
        with pytest.raises(ValueError, match=f"num_classes: expected {C} .*got 5000"):
            mk.topk(x, w, 1, margin)
    for shared in (mk.L2Softmax(), mk.L2Softmax(trainable=True)):
        mk.MarginHead(D, C, shared)
        mk.MarginHead(D, C, shared)
        with pytest.raises(ValueError, match=f"num_classes: expected 50 .*got {C}"):
            mk.MarginHead(D, 50, shared)
    fixed = mk.L2Softmax(alpha=9.0)
    mk.MarginHead(D, C, fixed)
    mk.MarginHead(D, 50, fixed)


# -- set_margin ----------------------------------------------------------------------------------------------------------------

SETTABLE = {
    "cosface": (mk.CosFace, [(0.1,), (0.2,), (0.35,)], "margin"),
    "arcface": (mk.ArcFace, [(0.1,), (0.2,), (0.5,)], "margin"),
    "arcface-clip": (lambda margin=0.5: mk.ArcFace(20.0, margin, "clip"), [(0.0,), (1.7,), (0.4,)], "margin"),
    "combined": (
        lambda m1=1.0, m2=0.5, m3=0.0: mk.CombinedMargin(64.0, m1, m2, m3),
        [(1.0, 0.3, 0.1), (1.2, 0.2, 0.0), (0.5, 0.0, 0.3)],
        None,
    ),
    "curricularface": (lambda margin=0.5: mk.CurricularFace(margin=margin), [(0.1,), (0.2,), (0.3,)], "margin"),
    "mv-arc": (lambda margin=0.5: mk.MVSoftmax(margin=margin), [(0.1,), (0.2,), (3.0,)], "margin"),
    "mv-am": (lambda margin=0.5: mk.MVSoftmax("am", margin=margin), [(0.1,), (0.2,), (0.3,)], "margin"),
    "inter-topk": (lambda margin=0.5: mk.InterTopK(margin=margin), [(0.1,), (0.2,), (3.0,)], "margin"),
    "sphereface": (lambda margin=4: mk.SphereFace(margin), [(1,), (2,), (5,)], "margin"),
    "lsoftmax": (lambda margin=4: mk.LSoftmax(margin), [(1,), (2,), (5,)], "margin"),
    "circle": (lambda margin=0.25: mk.Circle(64.0, margin), [(0.0,), (0.1,), (0.4,)], "margin"),
    **{
        f"sphereface-r-{v}": (
            lambda margin=1.5, v=v: mk.SphereFaceR(v, margin=margin, gradient="exact"),
            [(1.0,), (1.2,), (3.3,)],
            "margin",
        )
        for v in ("v0", "v1", "v2")
    },
    "adaface": (lambda margin=0.4: mk.AdaFace(margin=margin), [(0.0,), (0.2,), (3.0,)], "margin"),
    "elasticface": (lambda margin=0.5: mk.ElasticFace(margin=margin, plus="paper"), [(0.0,), (0.2,), (3.0,)], "margin"),
    "magface": (
        lambda margin_range=(0.4, 0.8): mk.MagFace(16.0, (1.0, 9.0), margin_range, 1.0),
        [((0.0, 0.1),), ((0.2, 0.2),), ((0.3, 3.0),)],
        "margin_range",
    ),
}


def make_with(make, values, setting):
    return make(**{setting: values[0]}) if setting else make(*values)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("name", SETTABLE)
def test_set_margin_is_as_the_constructor(name, backend):
    make, schedule, setting = SETTABLE[name]
    x, w, y = batch()
    if setting:
        margin = mk.CosFace(margin=0.1) if name == "cosface" else make()
    else:
        margin = make()
    keys = margin.state_dict().keys()
    for values in schedule:
        margin.set_margin(*values)
        fresh = make_with(make, values, setting)
        fresh.load_state_dict(margin.state_dict())
        copies = [margin, copy.deepcopy(margin), pickle.loads(pickle.dumps(margin)), copy.deepcopy(margin).half()]
        want = testing.run(testing.Case(x, w, y, None), fresh, backend)
        for one in copies:
            got = testing.run(testing.Case(x, w, y, None), one, backend)
            assert all(torch.equal(got[k], want[k]) for k in want)
            assert repr(one) == repr(fresh)
            assert one.fingerprint() == fresh.fingerprint()
        shown = [getattr(margin, setting)] if setting else [margin.m1, margin.m2, margin.m3]
        assert shown == list(values)
        kind = {"sphereface": int, "lsoftmax": int, "magface": tuple}.get(name, float)
        assert all(type(v) is kind for v in shown)
    assert margin.state_dict().keys() == keys
    assert not [k for k, _ in margin.named_buffers() if k not in keys]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in SETTABLE if name not in ("sphereface", "lsoftmax")])
def test_a_changing_margin_compiles_once(name, compiler):
    make, schedule, _ = SETTABLE[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x, _, y = batch()
    torch.manual_seed(0)
    head = mk.MarginHead(D, C, make())
    run = torch.compile(head, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for values in schedule:
            head.margin.set_margin(*values)
            eager = copy.deepcopy(head)
            head.weight.grad = None
            loss, want = run(x, y), eager(x, y)
            loss.backward()
            want.backward()
            assert torch.equal(loss, want)
            assert torch.equal(head.weight.grad, eager.weight.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_combined_takes_names_and_a_tuple():
    margin = mk.CombinedMargin(m1=1.1, m2=0.2, m3=0.1)
    margin.set_margin(m2=0.4)
    assert (margin.m1, margin.m2, margin.m3) == (1.1, 0.4, 0.1)
    margin.set_margin((1.0, 0.5, 0.0))
    assert (margin.m1, margin.m2, margin.m3) == (1.0, 0.5, 0.0)
    for wrong in (((1.2, 0.3, 0.1), 0.2), (0.3,), (1.0, 0.5), ()):
        with pytest.raises(TypeError, match="expected m1, m2 and m3"):
            margin.set_margin(*wrong)
    with pytest.raises(ValueError, match="m3: expected"):
        margin.set_margin(1.2, 0.3, -1.0)  # and the first two are not taken either
    assert (margin.m1, margin.m2, margin.m3) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("margin", "wrong"),
    [
        (mk.CosFace(), -5),
        (mk.CosFace(), 2.5),
        (mk.ArcFace(), 28.6),
        (mk.ArcFace(), math.nan),
        (mk.CurricularFace(), -0.1),
        (mk.MVSoftmax(), 3.2),
        (mk.MVSoftmax("am"), 2.1),
        (mk.SphereFace(), 1.5),
        (mk.SphereFace(), math.nan),
        (mk.SphereFace(), None),
        (mk.LSoftmax(), 0),
        (mk.AdaFace(), 3.2),
        (mk.ElasticFace(), 3.2),
        (mk.ElasticFace("cos"), 2.1),
    ],
)
def test_a_wrong_margin_is_refused_and_nothing_changes(margin, wrong):
    before = margin.margin
    with pytest.raises(ValueError, match="margin: expected"):
        margin.set_margin(wrong)
    with pytest.raises(ValueError, match="margin: expected"):
        margin.margin = wrong
    assert margin.margin == before
    margin.margin = 1  # within every range
    assert margin.margin == 1


@pytest.mark.parametrize("margin", [mk.Softmax(), mk.NormFace(), mk.L2Softmax(9.0), mk.AdaCos(10), Mine()], ids=lambda m: type(m).__name__)
def test_no_margin_to_set(margin):
    with pytest.raises(TypeError, match=f"{type(margin).__name__} has no margin to set"):
        margin.set_margin(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", *(name for name in QUICK if name != "reference")])
def test_a_margin_may_change_before_the_backward_pass(backend, dtype):
    """In float64, in which the numbers of a margin are held, and with a factor of the angle, which autograd keeps for the backward pass."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("no float64")
    x, w, y = (v.to(dtype) if v.is_floating_point() else v for v in batch())
    margin, grads = mk.CombinedMargin(m1=1.2, m2=0.3, m3=0.1), []
    for change in ((1.2, 0.3, 0.1), (1.5, 0.6, 0.2)):
        margin.set_margin((1.2, 0.3, 0.1))
        leaf = w.clone().requires_grad_()
        loss = mk.margin_cross_entropy(x, leaf, y, margin=margin, backend=backend)
        margin.set_margin(change)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# -- rows and classes that do not count ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_ignored_row_may_hold_anything(backend, bad):
    x, w, y = batch()
    y[[1, 4]] = -100
    bias = torch.randn(C, generator=torch.Generator().manual_seed(1))
    broken = x.clone()
    broken[1], broken[4, 2] = bad, -bad
    for name in ("softmax", "sphereface", "arcface", "l2-softmax-trainable", "adacos", "curricularface", "adaface"):
        make = testing.HEADS[name]
        for options in ({}, {"label_smoothing": 0.1}):
            want = testing.run(testing.Case(x, w, y, bias), make(C), backend, **options)
            got = testing.run(testing.Case(broken, w, y, bias), make(C), backend, **options)
            for key in want:
                assert torch.equal(got[key], want[key]), (name, key)


def test_an_ignored_row_of_the_center_loss():
    x, _, y = batch()
    y[[1, 4]] = -100
    loss = mk.CenterLoss(C, D)
    x[1] = math.nan
    x.requires_grad_()
    loss(x, y).backward()
    assert torch.isfinite(loss.centers.grad).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", QUICK)
def test_a_bias_of_minus_infinity_masks_a_class(backend):
    x, w, y = batch()
    bias = torch.randn(C, generator=torch.Generator().manual_seed(1))
    masked = torch.zeros(C, dtype=torch.bool)
    masked[[20, 33]] = True
    for name in ("softmax", "normface", "sphereface", "arcface", "mv-arc", "curricularface", "arcface-focal"):
        got = testing.run(testing.Case(x, w, y, bias.masked_fill(masked, -math.inf)), testing.HEADS[name](C), backend)
        want = testing.run(testing.Case(x, w[~masked], y, bias[~masked]), testing.HEADS[name](C), "reference", dtype=torch.float64)
        for key in ("dw", "dbias"):
            assert float(got[key][masked].abs().max()) == 0, (name, key)
            got[key] = got[key][~masked]
        for key in want:
            assert testing.relative_error(got[key], want[key]) < testing.TOLERANCE[torch.float32], (name, key)


@pytest.mark.parametrize("backend", QUICK)
def test_a_masked_class_under_smoothing_is_as_in_torch(backend):
    x, w, y = batch()
    bias = torch.zeros(C)
    bias[20] = -math.inf
    theirs = torch.nn.functional.cross_entropy(x @ w.T + bias, y, label_smoothing=0.1)
    ours = mk.margin_cross_entropy(x, w, y, margin=mk.Softmax(), bias=bias, label_smoothing=0.1, backend=backend)
    assert float(ours) == float(theirs) == math.inf
    own = mk.margin_cross_entropy(x, w, torch.full_like(y, 20), margin=mk.Softmax(), bias=bias, backend=backend)
    assert float(own) == math.inf


def test_eager_is_the_reference_in_the_dtype_of_the_embeddings():
    case = testing.Case.random(9, 5, 30, torch.float64, bias=True)
    for name in ("arcface", "curricularface", "l2-softmax-trainable"):
        want = testing.run(case, testing.HEADS[name](30), "reference")
        got = testing.eager(case, testing.HEADS[name](30))
        for key, v in got.items():
            torch.testing.assert_close(v, want[key])


@pytest.mark.parametrize("backend", QUICK)
def test_all_other_classes_masked(backend):
    """Nothing is left to tell the own class from: no loss and no gradient, and none that is not a number."""
    case = testing.Case.random(5, 4, 3, ignored=False)
    labels = torch.zeros(5, dtype=torch.int64)
    bias = torch.tensor([0.0, -math.inf, -math.inf])
    for name in ("arcface", "curricularface", "softmax"):
        found = testing.run(testing.Case(case.x, case.w, labels, bias), testing.HEADS[name](3), backend)
        assert all(not v.any() for v in found.values()), name


def test_upstream_of_a_run():
    """The gradient of the loss that a comparison is told is used: twice the gradients, and row by row for losses of rows."""
    case = testing.Case.random(6, 5, 9)
    for backend in ("reference", "torch"):
        plain, twice = (testing.run(case, mk.CosFace(8.0), backend, upstream=u) for u in (None, torch.tensor(2.0)))
        torch.testing.assert_close(twice["dx"], 2 * plain["dx"])
        only = testing.run(case, mk.CosFace(8.0), backend, upstream=torch.eye(6)[1], reduction="none")
        assert only["dx"].any(1).tolist() == [i == 1 for i in range(6)]


def test_errors_are_measured_against_what_is_right():
    want, got = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0], dtype=torch.float64)
    assert testing.relative_error(got, want) == 1.0
    assert testing.relative_error(want, want) == 0
    assert testing.relative_error(want * 0, want) == 1
    assert testing.relative_error(torch.full((2,), 1e-20), want * 0) > 1e200
    assert math.isnan(testing.relative_error(want * math.nan, want))
