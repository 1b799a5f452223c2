"""The inter-top-k penalty against the formula of the paper, on every backend and of sampled classes; which classes are raised; refusals."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.chunks import chunks_of

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import FUSED
from marginkernels.margins.inter_topk import TIED

SERVING = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types and b.max_sub_centers != 1]
PAST_PI = {
    "continuous": lambda c, m: c - (1 - math.cos(m)),
    "linear": lambda c, m: c - m * math.sin(m),
    "clip": lambda c, m: 0 * c - 1,
}


def by_the_paper(x, w, y, kind, scale, m, k, penalty, rule="continuous", sub_centers=1, bias=None, smoothing=0.0):
    """The mean loss in float64, a row at a time: equation 4 of the paper, and the rule of wespeaker's code past pi."""
    total = []
    for i, label in enumerate(y.tolist()):
        if label < 0:
            continue
        cos = (x[i] / x[i].norm()) @ (w / w.norm(dim=1, keepdim=True)).T
        cos = torch.stack([part.max() for part in cos.split(sub_centers)])
        others = [j for j in range(len(cos)) if j != label]
        raised = sorted(others, key=lambda j: -float(cos[j].detach()))[:k]
        z = []
        for j, c in enumerate(cos):
            theta = torch.acos(c)
            if j == label and kind == "cos":
                z.append(c - m)
            elif j == label:
                z.append(torch.cos(theta + m) if float(theta.detach()) + m < math.pi else PAST_PI[rule](c, m))
            elif j in raised:
                z.append(torch.cos(theta - penalty) if kind == "arc" else c + penalty)
            else:
                z.append(c)
        logits = scale * torch.stack(z) + (0 if bias is None else bias)
        log_p = torch.log_softmax(logits, 0)
        total.append(-(1 - smoothing) * log_p[label] - smoothing * log_p.mean())
    return torch.stack(total).mean()


def problem(n, d, c, seed=0):
    """Rows all around, two of them farther than pi - m from their center, and one that is ignored."""
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d), (c, d)))
    y = torch.randint(c, (n,), generator=g)
    b = torch.randn(c, generator=g, dtype=torch.float64)
    if n > 4:
        x[1], x[2] = -2 * w[y[1]] + 0.05 * x[1], -w[y[2]] + 0.02 * x[2]
        y[3] = -100
    return x, w, y, b


@pytest.mark.parametrize("backend", ["reference", *SERVING])
@pytest.mark.parametrize(("kind", "rule"), [("arc", "continuous"), ("arc", "linear"), ("arc", "clip"), ("cos", "continuous")])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_the_formula(backend, kind, rule, sub_centers):
    exact = backend != "cpu"
    for n, c, k, extra in ((9, 40, 5, {}), (9, 40, 1, {"smoothing": 0.2}), (7, 12, 3, {"bias": True}), (6, 4, 5, {}), (1, 7, 2, {})):
        if backend not in ("reference", "torch") and sub_centers > 1 and FUSED[backend].max_sub_centers == 1:
            continue
        x, w, y, b = problem(n, 13, c * sub_centers)
        y = torch.where(y < 0, y, y // sub_centers)
        b = b[:c] if extra.get("bias") else None
        dtype = torch.float64 if exact else torch.float32
        x, w, b = (None if v is None else v.to(dtype).double() for v in (x, w, b))
        want_leaves = [v.clone().requires_grad_() for v in (x, w, b) if v is not None]
        m = 0.3 if kind == "arc" else 0.25
        arguments = (kind, 12.0, m, k, 0.2, rule, sub_centers, want_leaves[2] if b is not None else None, extra.get("smoothing", 0.0))
        want = by_the_paper(*want_leaves[:2], y, *arguments)
        want_gradients = torch.autograd.grad(want, want_leaves)
        leaves = [v.to(dtype).requires_grad_() for v in (x, w, b) if v is not None]
        margin = mk.InterTopK(kind, 12.0, m, k, 0.2, rule)
        with chunks_of(5 if backend == "torch" else None):
            got = mk.margin_cross_entropy(
                leaves[0],
                leaves[1],
                y,
                margin=margin,
                bias=leaves[2] if b is not None else None,
                label_smoothing=extra.get("smoothing", 0.0),
                sub_centers=sub_centers,
                backend=backend,
            )
        gradients = torch.autograd.grad(got, leaves)
        for a, v in zip([got, *gradients], [want, *want_gradients], strict=True):
            limit = 1e-9 if exact else testing.TOLERANCE[torch.float32]
            assert testing.relative_error(a.detach(), v.detach()) <= limit, (n, c, k, extra)


def test_exactly_the_nearest_are_raised():
    """Of cosines that are known: k of them, none where the k-th and the next are equal beyond those before, all where there are no more."""
    w = torch.eye(6, dtype=torch.float64)
    x = torch.tensor([[0.1, 0.6, 0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    c = x / x.norm()

    def raised(k, x=x, y=0):
        seen = []

        class Watched(mk.InterTopK):
            def threshold(self, cos, batch):
                seen.append(super().threshold(cos, batch))
                return seen[-1]

        mk.margin_cross_entropy(x, w, torch.tensor([y]), margin=Watched(k=k), backend="torch")
        cos = (x / x.norm())[0]
        return [j for j in range(6) if j != y and float(cos[j]) > float(seen[0])]

    assert [raised(k) for k in (1, 2, 4, 5, 9)] == [[1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert raised(2, y=1) == [2, 3]
    even = torch.tensor([[0.1, 0.6, 0.5, 0.5, 0.3, 0.2]], dtype=torch.float64)
    assert raised(1, even) == [1]
    assert raised(2, even) == [1]
    assert raised(3, even) == [1, 2, 3]
    assert float(c[0, 1]) < 1


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("dtypes", itertools.product((torch.bfloat16, torch.float16), (None, torch.float32)))
def test_as_many_are_raised_where_centers_are_rounded(backend, dtypes):
    """Between the k-th cosine and the next may lie less than rounding the centers moves them: the search rounds as the passes do. One
    class more or less is worth log(6/5) or more."""
    dtype, weight_dtype = dtypes[0], dtypes[1] or dtypes[0]
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(400, 64, generator=g).to(dtype), torch.randn(2000, 64, generator=g).to(weight_dtype)
    y = torch.randint(2000, (400,), generator=g)
    got = mk.margin_cross_entropy(x, w, y, margin=mk.InterTopK("cos", 32.0, 0.2, 5, 0.5), backend=backend, reduction="none")
    cos = F.normalize(x.double()) @ F.normalize(w.double()).T
    own = F.one_hot(y, 2000).bool()
    highest = cos.masked_fill(own, -2).topk(6)
    apart = highest.values[:, 4] - highest.values[:, 5] > 2 * TIED
    assert apart.sum() > 390
    raised = torch.zeros_like(own).scatter_(1, highest.indices[:, :5], True)
    want = F.cross_entropy(32 * torch.where(own, cos - 0.2, torch.where(raised, cos + 0.5, cos)), y, reduction="none")
    assert (got - want)[apart].abs().max() < 0.05


def test_without_a_penalty_it_is_arcface_and_cosface():
    case = testing.Case.random(20, 16, 50, torch.float32, bias=True)
    for one, other in (
        (mk.InterTopK(scale=20.0, margin=0.3, penalty=0.0), mk.ArcFace(20.0, 0.3, beyond_pi="continuous")),
        (mk.InterTopK("cos", 20.0, 0.3, penalty=0.0), mk.CosFace(20.0, 0.3)),
    ):
        for backend in ("reference", *SERVING):
            found, want = (testing.run(case, margin, backend, label_smoothing=0.1) for margin in (one, other))
            for key, v in want.items():
                assert testing.relative_error(found[key], v) <= 3e-6, (backend, key)


@pytest.mark.parametrize("backend", ["reference", *SERVING])
def test_rows_on_class_centers_and_opposite_to_them(backend):
    """Cosines of 1 and -1, of the target and of others; one class; no rows; half precision."""
    w = torch.eye(8)
    x = torch.cat([torch.eye(8), -torch.eye(8), torch.eye(8)])
    y = torch.cat([torch.arange(8), torch.arange(8).roll(1), torch.arange(8).roll(1)])
    for kind in ("arc", "cos"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = testing.Case(x.to(dtype), w.to(dtype), y, None)
            assert all(v.isfinite().all() for v in testing.run(case, mk.InterTopK(kind), backend).values())
        for n, c in ((0, 9), (1, 1), (5, 1), (5, 2), (5, 5), (5, 6), (5, 7)):
            case = testing.Case.random(n, 8, c, torch.float32)
            assert all(v.isfinite().all() for v in testing.run(case, mk.InterTopK(kind), backend).values()), (n, c)


def test_sampled_the_nearest_are_of_the_classes_drawn():
    x, w, y, _ = problem(9, 16, 60)
    head = mk.MarginHead(16, 60, mk.InterTopK(scale=12.0), sample_rate=0.4, dtype=torch.float64)
    head.weight.data.copy_(w)
    loss = head(x, y)
    drawn = head.sampler.index
    place = torch.full((60,), -100).index_copy(0, drawn, torch.arange(len(drawn)))
    want = by_the_paper(x, w[drawn], torch.where(y < 0, -100, place[y.clamp_min(0)]), "arc", 12.0, 0.2, 5, 0.06)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-9, atol=1e-9)


def test_mixed_labels_have_their_own_nearest():
    case = testing.Case.random(12, 16, 30, torch.float32)
    other = case.labels.roll(1)
    for backend in SERVING:
        found = testing.errors(case, mk.InterTopK(scale=12.0), backend, mix=(other, 0.3))
        assert max(found.values()) <= testing.TOLERANCE[torch.float32], (backend, found)
    halves = [
        testing.run(testing.Case(case.x, case.w, y, None), mk.InterTopK(scale=12.0), "reference", dtype=torch.float64, reduction="sum")
        for y in (case.labels, other)
    ]
    both = testing.run(case, mk.InterTopK(scale=12.0), "reference", dtype=torch.float64, mix=(other, 0.3), reduction="sum")
    torch.testing.assert_close(both["loss"], 0.3 * halves[0]["loss"] + 0.7 * halves[1]["loss"])


def test_compile_and_set_margin():
    """One graph; a new margin and a new penalty are read by it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = testing.Case.random(8, 16, 30, torch.float32)
    head = mk.MarginHead(16, 30, mk.InterTopK())
    other = copy.deepcopy(head)
    compiled, graphs = torch.compile(other, fullgraph=True, backend="aot_eager"), []
    for margin, penalty in ((0.2, 0.06), (0.1, 0.03), (0.3, 0.0)):
        head.margin.set_margin(margin, penalty)
        other.margin.set_margin(margin=margin, penalty=penalty)
        losses = [h(case.x, case.labels) for h in (head, compiled)]
        assert torch.equal(*losses)
        graphs.append(float(losses[0].detach()))
        for loss in losses:
            loss.backward()
    assert len(set(graphs)) == 3
    assert torch.equal(head.weight.grad, other.weight.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_repr_and_what_is_refused():
    assert repr(mk.InterTopK()) == "InterTopK(kind='arc', scale=32.0, margin=0.2, k=5, penalty=0.06, beyond_pi='continuous')"
    assert "beyond_pi" not in repr(mk.InterTopK("cos"))
    for arguments, error, says in (
        ({"kind": "sin"}, ValueError, "kind: expected 'arc' or 'cos', got 'sin'"),
        ({"k": 0}, ValueError, "k: expected an integer >= 1, got 0"),
        ({"k": 2.5}, ValueError, "k: expected an integer >= 1, got 2.5"),
        ({"penalty": -0.1}, ValueError, "penalty: expected a finite number >= 0"),
        ({"penalty": 1.6}, ValueError, "penalty: expected a finite number >= 0 and <= 1.57"),
        ({"margin": math.pi}, ValueError, "margin: expected a finite number"),
        ({"margin": math.nan}, ValueError, "margin: expected"),
        ({"scale": 0.0}, ValueError, "scale: expected"),
        ({"beyond_pi": "never"}, ValueError, "beyond_pi: expected one of"),
    ):
        with pytest.raises(error, match=says):
            mk.InterTopK(**arguments)
    with pytest.raises(TypeError, match="set_margin: expected margin, penalty or both"):
        mk.InterTopK().set_margin()
    with pytest.raises(RuntimeError, match=r"nearest: expected a call from threshold\(\)"):
        mk.BatchInfo(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), 5).nearest(1)
