"""Class sampling on one device: what is drawn, what has a gradient, and that nothing else changes."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import marginkernels as mk
from marginkernels import optim, testing
from marginkernels.sampling import Sampler, draw_op

D = 8


def drawn(seed: int, step: int, c: int, k: int, labels=()) -> torch.Tensor:
    labels = torch.tensor(labels, dtype=torch.int64)
    return draw_op(torch.tensor(seed), torch.tensor(step), labels, 0, c, k)[0]


@pytest.mark.parametrize(
    ("c", "k", "labels"), [(100, 10, [3, 3, 99, -1, 0]), (7, 7, [6]), (5, 1, [4]), (50, 20, []), (1, 1, [-1]), (0, 0, [-1])]
)
def test_every_class_of_the_batch_and_no_class_twice(c, k, labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    for step in range(20):
        index, positive, place = draw_op(torch.tensor(5), torch.tensor(step), labels, 0, c, k)
        assert len(index) == k == len(set(index.tolist()))
        assert (index.diff() > 0).all()
        here = labels >= 0
        assert torch.equal(index[place[here]], labels[here])
        assert (place[~here] == -1).all()
        assert set(index[positive].tolist()) == set(labels[here].tolist())


def test_draws_are_uniform_and_independent():
    c, k, steps = 64, 16, 4000
    hits = torch.zeros(steps, c, dtype=torch.float64)
    for step in range(steps):
        hits[step, drawn(7, step, c, k)] = 1
    rate = k / c
    # How often each class is drawn, each pair of classes, and each class in two consecutive steps, in standard errors.
    share = (hits.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    assert share.abs().max() < 4.5
    both = (hits.T @ hits) / steps
    pair = rate * (k - 1) / (c - 1)
    z = (both - pair) / math.sqrt(pair * (1 - pair) / steps)
    assert z[~torch.eye(c, dtype=torch.bool)].abs().max() < 5.5
    again = ((hits[1:] * hits[:-1]).mean(0) - rate**2) / math.sqrt(rate**2 * (1 - rate**2) / steps)
    assert again.abs().max() < 4.5


def test_seed_and_step_give_the_draw():
    assert torch.equal(drawn(1, 5, 1000, 50), drawn(1, 5, 1000, 50))
    for other in (drawn(2, 5, 1000, 50), drawn(1, 6, 1000, 50), drawn(5, 1, 1000, 50)):
        assert len(set(other.tolist()) & set(drawn(1, 5, 1000, 50).tolist())) < 15  # 2.5 are expected
    assert len(set(drawn(-(2**63), 0, 1000, 50).tolist()) & set(drawn(2**63 - 1, 0, 1000, 50).tolist())) < 15


def test_numbers_of_drawn_classes():
    """The nearest integer to the share, at least one for each row, at most all."""
    from marginkernels.sampling import count

    shapes = ((0.1, 2, 100), (0.1, 2, 96), (0.1, 2, 94), (0.1, 30, 100), (0.5, 300, 100), (1.0, 1, 7), (0.001, 0, 10))
    assert [count(*shape) for shape in shapes] == [10, 10, 9, 30, 100, 7, 0]


def test_a_draw_depends_on_the_number_of_the_class():
    """The second half of the classes draws by its own numbers: not as the first half does, and as another rank would that begins there."""
    none = torch.full((1,), -1)

    def draw(first, c, k):
        return draw_op(torch.tensor(3), torch.tensor(9), none, first, c, k)[0] + first

    low, high = draw(0, 1000, 100), draw(1000, 1000, 100)
    assert len(set(low.tolist()) & {v - 1000 for v in high.tolist()}) < 30  # 10 are expected
    # The smallest hashes of a part are those of the whole that lie in it.
    whole = draw(0, 2000, 1)
    assert int(whole) in {int(draw(0, 1000, 1)), int(draw(1000, 1000, 1))}


@pytest.mark.parametrize("seed", [0, 1])
def test_log_q_makes_the_sum_unbiased(seed):
    """The mean over many draws of the sum of corrected exponentials is the sum over all classes."""
    case = testing.Case.random(4, D, 60, torch.float64, seed=seed, ignored=False)
    sampler = Sampler(0.3, seed, log_q=True).double()
    z = torch.nn.functional.normalize(case.x) @ torch.nn.functional.normalize(case.w).T * 4
    own = torch.nn.functional.one_hot(case.labels, 60).bool()
    want = z.masked_fill(own, -math.inf).exp().sum(1)
    found = []
    for _ in range(3000):
        w, _, labels, correction = sampler(case.w, None, case.labels)
        z = torch.nn.functional.normalize(case.x) @ torch.nn.functional.normalize(w).T * 4 + correction
        found.append(z.scatter(1, labels[:, None], -math.inf).exp().sum(1))
    found = torch.stack(found)
    error = (found.mean(0) - want).abs() / (found.std(0) / math.sqrt(len(found)))
    assert error.max() < 4


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", ["arcface", "curricularface", "adacos", "softmax", "lsoftmax", "l2-softmax-trainable", "arcface-focal"])
def test_loss_and_gradient_are_those_of_the_drawn_classes(name, backend):
    case = testing.Case.random(12, D, 300, bias=True)
    head = mk.MarginHead(D, 300, testing.HEADS[name](300), bias=True, sample_rate=0.1, label_smoothing=0.1, backend=backend)
    head.load_state_dict(head.state_dict() | {"weight": case.w, "bias": case.bias})
    single = copy.deepcopy(head.margin)
    single.bind = lambda num_classes: None  # the reference sees the drawn classes alone, fewer than the margin is for
    x = case.x.clone().requires_grad_()
    loss = head(x, case.labels)
    loss.backward()
    index = head.weight.grad.indices()[0]
    assert len(index) == 30
    assert torch.equal(index, head.bias.grad.indices()[0])
    leaf = [v.double().requires_grad_() for v in (case.x, case.w[index], case.bias[index])]
    labels = torch.where(case.labels < 0, -100, torch.searchsorted(index, case.labels))
    want = mk.margin_cross_entropy(*leaf[:2], labels, margin=single, bias=leaf[2], label_smoothing=0.1, backend="reference")
    want.backward()
    for got, expected in (
        (loss, want),
        (x.grad, leaf[0].grad),
        (head.weight.grad.values(), leaf[1].grad),
        (head.bias.grad.values(), leaf[2].grad),
        *((p.grad, q.grad) for p, q in zip(head.margin.parameters(), single.parameters(), strict=True)),
    ):
        assert testing.relative_error(got.detach(), expected.detach()) < 2e-5


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_log_q_under_smoothing_and_a_bias(backend):
    """The correction -log q stands beside the bias in the exponentials, and has no part in the mean logit of label smoothing."""
    case = testing.Case.random(4, D, 60, bias=True, ignored=False)
    head = mk.MarginHead(D, 60, mk.NormFace(6.0), bias=True, sample_rate=0.3, log_q=True, label_smoothing=0.2, backend=backend)
    head.load_state_dict(head.state_dict() | {"weight": case.w, "bias": case.bias})
    x = case.x.clone().requires_grad_()
    loss = head(x, case.labels)
    loss.backward()
    index = head.weight.grad.indices()[0]
    labels = torch.searchsorted(index, case.labels)
    own = len(set(labels.tolist()))
    z0, w, b = (v.double().requires_grad_() for v in (case.x, case.w[index], case.bias[index]))
    z = 6 * torch.nn.functional.normalize(z0) @ torch.nn.functional.normalize(w).T + b
    q = (len(index) - own) / (60 - own)
    drawn = torch.tensor([j not in labels.tolist() for j in range(len(index))])
    lse = torch.logsumexp(z - drawn * math.log(q), 1)
    want = (lse - 0.8 * z.gather(1, labels[:, None])[:, 0] - 0.2 * z.mean(1)).mean()
    want.backward()
    for got, expected in ((loss, want), (x.grad, z0.grad), (head.weight.grad.values(), w.grad), (head.bias.grad.values(), b.grad)):
        assert testing.relative_error(got.detach(), expected.detach()) < 2e-5


def test_draws_of_a_seed_stay_what_they_are():
    """A run resumes on another version: SplitMix64 in plain integers says which classes a seed and a step draw."""
    word = 1 << 64

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
        return (z ^ (z >> 31)) % (1 << 63)

    def keyed(counter, key):
        return mix((counter * 0x9E3779B97F4A7C15 + key) % word)

    for seed, step in ((0, 0), (7, 3), (-5, 1000), (2**63 - 1, 2)):
        key = keyed(step, keyed(seed % word, 0))
        order = sorted(range(200), key=lambda c, key=key: keyed(c, key))
        assert drawn(seed, step, 200, 15).tolist() == sorted(order[:15])
    head = mk.MarginHead(D, 200, mk.CosFace(), sample_rate=0.1, sample_seed=7)
    for step in range(2):  # the count of draws begins at 0
        head(torch.randn(3, D), torch.tensor([-100, -100, -100]))
        assert torch.equal(head.sampler.index, drawn(7, step, 200, 20))


def test_only_the_rows_of_the_last_draw_are_marked():
    """A gradient of as many other rows may not be in order."""
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    head(torch.randn(3, D), torch.tensor([1, 2, 3]))
    index = head.sampler.index
    for rows, marked in ((index, True), (index.flip(0), False), (index.clone(), False)):
        head.weight.grad = torch.sparse_coo_tensor(rows[None], torch.ones(10, D), (100, D), is_coalesced=False, check_invariants=False)
        head.sampler.mark(head.weight)
        assert head.weight.grad.is_coalesced() == marked


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_rows_do_not_change_by_a_bit(name):
    torch.manual_seed(0)
    head = mk.MarginHead(D, 500, mk.CosFace(scale=4.0), sample_rate=0.05, bias=True)
    optimizer = OPTIMIZERS[name](head.parameters())
    moved = torch.zeros(500, dtype=torch.bool)
    for _ in range(5):
        before = [v.clone() for v in _everything(head, optimizer)]
        optimizer.zero_grad()
        head(torch.randn(6, D), torch.randint(500, (6,))).backward()
        index = head.weight.grad.indices()[0]
        assert len(index) == 25
        optimizer.step()
        still = torch.ones(500, dtype=torch.bool)
        still[index] = False
        moved |= ~still
        for old, new in zip(before, _everything(head, optimizer), strict=False):
            assert new[still].numpy().tobytes() == old[still].numpy().tobytes()
        assert (head.weight[index] != before[0][index]).any(1).all()
    assert 25 < int(moved.sum()) < 126


def _everything(head, optimizer):
    return [head.weight.detach(), head.bias.detach(), *(v for p in (head.weight, head.bias) for v in optimizer.state[p].values())]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_torch_when_every_row_takes_part(name):
    torch.manual_seed(0)
    ours = [torch.randn(7, 3), torch.randn(5), torch.randn(())]
    theirs = [v.clone().requires_grad_() for v in ours]
    ours = [v.requires_grad_() for v in ours]
    a, b = OPTIMIZERS[name](ours), getattr(torch.optim, "AdamW" if name == "adamw" else "SGD")(theirs)
    for key in a.param_groups[0].keys() - {"params"}:
        b.param_groups[0][key] = a.param_groups[0][key]
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape)
            q.grad = g
            rows = torch.arange(len(p))[None] if p.ndim else None
            p.grad = (
                torch.sparse_coo_tensor(rows, g, p.shape, is_coalesced=True, check_invariants=False) if p.ndim and step % 2 else g.clone()
            )
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_row_sees_its_own_steps_only():
    """A row that takes part in every third step ends where it would if there were no other steps."""
    for make in OPTIMIZERS.values():
        p, q = (torch.ones(4, 2).requires_grad_() for _ in range(2))
        a, b = make([p]), make([q])
        for step in range(9):
            row, g = torch.tensor([[step % 3]]), torch.full((1, 2), float(step + 1))
            p.grad = torch.sparse_coo_tensor(row, g, p.shape, is_coalesced=True, check_invariants=False)
            a.step()
            if step % 3 == 1:
                q.grad = p.grad
                b.step()
        assert torch.equal(p[1], q[1])
        assert torch.equal(p[3], torch.ones(2))


def test_accumulated_gradients():
    """Two draws before one step: the gradient has the rows of both, each once, with the sum where both have a row."""
    head = mk.MarginHead(D, 200, mk.ArcFace(), sample_rate=0.3)
    x, y = torch.randn(6, D), torch.randint(200, (6,))
    head(x, y).backward()
    first = head.weight.grad.clone()
    head(x, y).backward()
    both = head.weight.grad.coalesce()
    head.weight.grad = None
    head.sampler.draws.zero_()
    head(x, y).backward()
    assert torch.equal(head.weight.grad.to_dense(), first.to_dense())
    head.weight.grad = None
    head(x, y).backward()
    torch.testing.assert_close(both.to_dense(), first.to_dense() + head.weight.grad.to_dense())
    before = head.weight.detach().clone()
    head.weight.grad = both
    optim.SGD([head.weight], lr=0.1).step()
    assert both.to_dense().any(1).sum() > 60  # more than one draw
    torch.testing.assert_close(head.weight.detach(), before - 0.1 * both.to_dense())


def test_eval_uses_every_class_and_draws_nothing():
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1).eval()
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    want = mk.margin_cross_entropy(x, head.weight, y, margin=mk.CosFace())
    assert torch.equal(head(x, y), want)
    assert int(head.sampler.draws) == 0


def test_resumed_draws_go_on():
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    a = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1, sample_seed=3)
    for _ in range(3):
        a(x, y)
    b = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x, y), b(x, y))


def test_under_compile():
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    a = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1, sample_seed=3)
    b = copy.deepcopy(a)
    compiled = torch.compile(b, backend="aot_eager")
    for _ in range(3):
        a.zero_grad()
        b.zero_grad()
        one, two = a(x, y), compiled(x, y)
        one.backward()
        two.backward()
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(a.weight.grad.to_dense(), b.weight.grad.to_dense())


def test_grad_scaler_takes_sparse_gradients():
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    optimizer = optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    x, y = torch.randn(5, D), torch.randint(100, (5,))
    scaler.scale(head(x, y)).backward()
    scaled = head.weight.grad.to_dense().clone()
    scaler.unscale_(optimizer)
    assert torch.equal(head.weight.grad.to_dense() * 16, scaled)
    before = head.weight.detach().clone()
    head.weight.grad.values()[0, 0] = math.inf
    scaler.step(optimizer)
    assert not torch.equal(head.weight, before)  # the gradients were unscaled before they became infinite, so the step is taken
    head.zero_grad()
    scaler.update()
    scaler.scale(head(x, y)).backward()
    head.weight.grad.values()[0, 0] = math.inf
    before = head.weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sample_rate": 0.0}, ValueError, "sample_rate"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate"),
        ({"sample_rate": "all"}, TypeError, "sample_rate"),
        ({"sample_rate": 0.5, "sample_seed": 2**63}, ValueError, "sample_seed"),
        ({"log_q": True}, ValueError, "log_q"),
        ({"batch_size": 5}, ValueError, "batch_size"),
        ({"process_group": "world"}, TypeError, "process_group"),
        ({"sparse_grad": 1}, TypeError, "sparse_grad"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing"),
        ({"backend": "bogus"}, ValueError, "backend"),
        ({"backend": None}, ValueError, "backend"),
        ({"workspace_mb": -1}, ValueError, "workspace_mb"),
        ({"workspace_mb": "all"}, TypeError, "workspace_mb"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"ignore_index": True}, TypeError, "ignore_index"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=f"{text}: expected"):
        mk.MarginHead(D, 10, mk.ArcFace(), **options)


def test_no_sampling_with_the_reference():
    head = mk.MarginHead(D, 10, mk.ArcFace(), sample_rate=0.5, backend="reference")
    with pytest.raises(ValueError, match="backend: expected a fused backend"):
        head(torch.randn(2, D), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 2}, {"backend": "bogus"}, {"workspace_mb": -1}, {"workspace_mb": math.nan}, {"ignore_index": 0.5}]
)
def test_the_constructor_says_what_a_call_says(options):
    x, w, y = torch.randn(2, D), torch.randn(10, D), torch.tensor([0, 1])
    with pytest.raises((ValueError, TypeError)) as called:
        mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), **options)
    with pytest.raises(type(called.value)) as made:
        mk.MarginHead(D, 10, mk.ArcFace(), **options)
    assert str(made.value) == str(called.value)


def test_a_backend_that_another_device_has_is_no_error_yet():
    mk.MarginHead(D, 10, mk.ArcFace(), backend="cuda", workspace_mb=math.inf, label_smoothing=1, ignore_index=-1)


def test_repr_shows_every_option_that_is_given():
    assert "reduction" not in repr(mk.MarginHead(D, 10, mk.ArcFace()))
    options = {"reduction": "none", "ignore_index": 7, "label_smoothing": 0.1, "workspace_mb": 3.5, "backend": "torch"}
    options |= {"sample_rate": 0.5, "sample_seed": 11, "log_q": True, "sparse_grad": False}
    text = repr(mk.MarginHead(D, 10, mk.ArcFace(), bias=True, **options)).splitlines()[1]
    for k, v in ({"embedding_dim": D, "num_classes": 10, "bias": True} | options).items():
        assert f"{k}={v!r}" in text


def dense_and_sparse(**options) -> list[mk.MarginHead]:
    """Two heads with the same gradient, the first one's dense; that of ``bias`` differs in size from that of ``weight``."""
    torch.manual_seed(0)
    case = testing.Case.random(6, D, 200, bias=True)
    heads = []
    for sparse_grad in (False, True):
        head = mk.MarginHead(D, 200, mk.CosFace(), sample_rate=0.1, bias=True, sparse_grad=sparse_grad, **options)
        head.load_state_dict(head.state_dict() | {"weight": case.w, "bias": case.bias})
        head(case.x, case.labels).backward()
        heads.append(head)
    return heads


def test_dense_gradients_have_the_values_of_sparse_ones():
    dense, sparse = dense_and_sparse()
    for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert p.grad.layout == torch.strided
        assert q.grad.is_sparse
        assert torch.equal(p.grad, q.grad.to_dense())


def test_torch_clips_dense_gradients_of_sampled_classes():
    dense, sparse = dense_and_sparse()
    wanted = [p.grad.to_dense() for p in sparse.parameters()]
    norm = float(torch.cat([g.flatten() for g in wanted]).norm())
    assert norm > 0.5
    assert float(torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.5)) == pytest.approx(norm, rel=1e-5)
    for p, g in zip(dense.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g * (0.5 / norm))
    dense, _ = dense_and_sparse()
    torch.nn.utils.clip_grad_value_(dense.parameters(), 0.01)
    for p, g in zip(dense.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, g.clamp(-0.01, 0.01))
        assert not torch.equal(p.grad, g)


@pytest.mark.parametrize("norm_type", [2.0, 1, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_that_of_torch(norm_type, max_norm):
    """With the values of sparse gradients, also of one whose rows are still to be merged."""
    dense, sparse = dense_and_sparse()
    net = torch.nn.Linear(3, 3)
    net(torch.ones(2, 3)).sum().backward()
    other = copy.deepcopy(net)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    rows, g = sparse.weight.grad.indices(), sparse.weight.grad.values()
    sparse.weight.grad = torch.sparse_coo_tensor(torch.cat([rows, rows], 1), torch.cat([g / 4, g * 3 / 4]), (200, D), check_invariants=True)
    assert not sparse.weight.grad.is_coalesced()
    want = torch.nn.utils.clip_grad_norm_([*net.parameters(), *dense.parameters()], max_norm, norm_type)
    got = mk.distributed.clip_grad_norm_((p for m in (other, sparse) for p in m.parameters()), max_norm, norm_type)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    for p, q in zip([*net.parameters(), *dense.parameters()], [*other.parameters(), *sparse.parameters()], strict=True):
        torch.testing.assert_close(q.grad.to_dense(), p.grad)
    assert sparse.weight.grad.is_sparse


def test_clipping_of_odd_parameters():
    clip = mk.distributed.clip_grad_norm_
    assert float(clip([], 1.0)) == 0
    assert float(clip([torch.nn.Parameter(torch.ones(2))], 1.0)) == 0
    half, fine = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float16, torch.float64))
    half.grad, fine.grad = torch.full_like(half, 6e4), torch.full_like(fine, 3.0)
    norm = clip([half, fine, half], 1.0)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(math.hypot(6e4, 6e4, 3, 3), rel=1e-3)  # float16 itself ends at 65504
    half.grad = torch.full_like(half, 3.0)
    assert float(clip(half, 1e9)) == pytest.approx(math.hypot(3, 3), rel=1e-6)
    half.grad[0] = math.nan
    with pytest.raises(RuntimeError, match=r"parameters: expected gradients of finite norm, got .* nan"):
        clip(half, 1.0, error_if_nonfinite=True)
    assert float(half.grad[1]) == 3
    for arguments, error, text in (
        (([half], -1.0), ValueError, "max_norm"),
        (([half], "1"), TypeError, "max_norm"),
        (([half], 1.0, 0), ValueError, "norm_type"),
        ((["weight"], 1.0), TypeError, "parameters"),
    ):
        with pytest.raises(error, match=f"{text}: expected"):
            clip(*arguments)


class Step(torch.nn.Module):
    """A backbone and a head as one function, for checkpointing."""

    def __init__(self, margin: mk.Margin, **options):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU())
        self.head = mk.MarginHead(D, 200, margin, **options)

    def forward(self, x, y):
        return self.head(self.net(x), y) ** 2  # a backward pass comes to the square before it comes to the head


def gradients(step: Step) -> list[torch.Tensor]:
    return [p.grad.to_dense().clone() for p in step.parameters()]


def state_of(step: Step) -> list[torch.Tensor]:
    return [b.clone() for b in step.buffers()]


MARGINS = {"cosface": mk.CosFace, "curricularface": mk.CurricularFace, "adacos": lambda: mk.AdaCos(200), "sphereface": mk.SphereFace}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_activation_checkpointing_repeats_draw_and_state(name, rate, reentrant, nested):
    margin = MARGINS[name]()
    plain, again = (Step(copy.deepcopy(margin), sample_rate=rate) for _ in range(2))
    losses = []
    for i in range(3):
        x, y = torch.randn(6, D), torch.randint(200, (6,))
        for step in (plain, again):
            step.zero_grad()

        def inner(x, y):
            return checkpoint(again, x, y, use_reentrant=reentrant) * 1

        want = plain(x, y)
        got = checkpoint(inner if nested else again, x.requires_grad_(), y, use_reentrant=reentrant)
        losses.append(got)  # keeps its graph
        for loss in (want, got):
            loss.backward()
        assert torch.equal(got, want)
        for a, b in zip(gradients(again) + state_of(again), gradients(plain) + state_of(plain), strict=True):
            assert torch.equal(a, b), i


def test_several_checkpointed_passes_are_told_apart():
    x, y = torch.randn(2, 6, D).requires_grad_(), torch.randint(200, (2, 6))
    plain, again = (Step(mk.CurricularFace(), sample_rate=0.1) for _ in range(2))
    (plain(x[0], y[0]) + plain(x[1], y[1])).backward()
    sum(checkpoint(again, x[i], y[i], use_reentrant=False) for i in (0, 1)).backward()
    for a, b in zip(gradients(again) + state_of(again), gradients(plain) + state_of(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_that_cannot_be_told_raises():
    x, y = torch.randn(2, 6, D).requires_grad_(), torch.randint(200, (2, 6))
    step = Step(mk.CosFace(), sample_rate=0.1)
    losses = {
        "reentrant": lambda: sum(checkpoint(step, x[i], y[i], use_reentrant=True) for i in (0, 1)),
        "twice": lambda: checkpoint(lambda x, y: step(x[0], y[0]) + step(x[1], y[1]), x, y, use_reentrant=False),
    }
    for make in losses.values():
        loss = make()
        before = state_of(step)
        with pytest.raises(RuntimeError, match="checkpoint: expected one outstanding forward pass"):
            loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(step), strict=True))
        step.head.reset_parameters()  # forgets what is outstanding


def test_passes_without_state_are_never_confused():
    x, y = torch.randn(2, 6, D).requires_grad_(), torch.randint(200, (2, 6))
    plain, again = (Step(mk.CosFace()) for _ in range(2))
    (plain(x[0], y[0]) + plain(x[1], y[1])).backward()
    sum(checkpoint(again, x[i], y[i], use_reentrant=True) for i in (0, 1)).backward()
    for a, b in zip(gradients(again), gradients(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_without_checkpointing():
    step = Step(mk.CurricularFace(), sample_rate=0.1)
    loss = step(torch.randn(6, D), torch.randint(200, (6,)))
    assert not step.head._passes.outstanding
    checkpointed = checkpoint(step, torch.randn(6, D), torch.randint(200, (6,)), use_reentrant=False)
    assert len(step.head._passes.outstanding) == 1
    assert not copy.deepcopy(step).head._passes.outstanding
    del loss, checkpointed
    step(torch.randn(6, D), torch.randint(200, (6,)))
    checkpoint(step, torch.randn(6, D), torch.randint(200, (6,)), use_reentrant=False).backward()
    assert len(step.head._passes.outstanding) <= 1


def test_a_head_of_the_meta_device_starts_like_another():
    def make(**options):
        torch.manual_seed(2)
        return mk.MarginHead(D, 100, mk.CosFace(), bias=True, sample_rate=0.1, sample_seed=-5, **options)

    want, head = make(), make(device="meta").to_empty(device="cpu")
    for v in (*head.parameters(), *head.buffers()):
        v.data.fill_(77)
    torch.manual_seed(2)
    head.reset_parameters()
    assert head.state_dict().keys() == want.state_dict().keys()
    for k, v in head.state_dict().items():
        assert torch.equal(v, want.state_dict()[k]), k
    x, y = torch.randn(6, D), torch.randint(100, (6,))
    for h in (want, head):
        h(x, y).backward()
        assert h.weight.grad.is_coalesced()
        assert h.bias.grad.is_coalesced()
    assert torch.equal(head.weight.grad.to_dense(), want.weight.grad.to_dense())


def test_reset_parameters_resets_the_margin_too():
    class Counting(mk.CosFace):
        count = 0

        def reset_parameters(self):
            self.count += 1

    head = mk.MarginHead(D, 10, Counting(), sample_rate=0.5)
    assert head.margin.count == 0  # what the margin holds when the head is made is its own
    head(torch.randn(2, D), torch.tensor([0, 1]))
    head.reset_parameters()
    assert head.margin.count == 1
    assert int(head.sampler.draws) == 0
    assert head.stats == {}


def test_loaded_parameters_keep_their_hooks():
    """Parameters that take the place of others, as with ``assign=True``, have sparse gradients whose rows are marked as merged."""
    head = mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1)
    head.load_state_dict({k: v.clone() for k, v in head.state_dict().items()}, assign=True)
    head(torch.randn(6, D), torch.randint(100, (6,))).backward()
    assert head.weight.grad.is_coalesced()


def test_a_frozen_head_can_be_copied_and_trained_later():
    head = copy.deepcopy(mk.MarginHead(D, 100, mk.CosFace(), sample_rate=0.1).requires_grad_(False))
    assert not head.weight.requires_grad
    head.requires_grad_()(torch.randn(6, D), torch.randint(100, (6,))).backward()
    assert head.weight.grad.is_coalesced()
