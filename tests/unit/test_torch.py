"""The head among PyTorch's own machinery: autograd, operators, compile, autocast, scaling, state dicts."""

import copy
import dataclasses
import inspect
import io
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.chunks import chunks_of, errors
from torch import nn

import marginkernels as mk
from marginkernels import ops, testing
from marginkernels.backend import FUSED
from marginkernels.core.types import HeadInputs, PassInputs, Request, RowPassOutput, TopkInputs, Upstream

N, D, C = 12, 24, 53
BACKENDS = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]
# One head of each shape of problem: fixed, per-row scale, trainable scale, both hard forms, state that moves.
HEADS = ["softmax", "l2-softmax-trainable", "sphereface-annealed", "arcface", "arcface-focal", "adacos", "mv-arc", "curricularface"]


@pytest.fixture(autouse=True)
def narrow_chunks():
    """Three chunks of classes wherever the ``torch`` backend runs; :func:`helpers.chunks.errors` tries other widths as well."""
    with chunks_of(20):
        yield


def batch(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randint(C, (n,), generator=g)


def make_head(name="arcface", backend="auto", **options):
    torch.manual_seed(0)
    return mk.MarginHead(D, C, testing.HEADS[name](C), backend=backend, **options)


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Linear(D, D, bias=False)  # a bias's gradient is a sum that the compiler orders anew
        self.head = head

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def grads(module):
    return {name: p.grad for name, p in module.named_parameters()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("head", "backend"), [(h, BACKENDS[0]) for h in HEADS] + [("curricularface", b) for b in BACKENDS[1:]])
def test_compile_gives_the_same_bits(head, backend):
    torch._dynamo.reset()
    plain = Model(make_head(head, backend, bias=True, label_smoothing=0.1))
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True)
    for step in range(3):
        x, y = batch(step)
        y[step] = -100
        a, b = plain(x, y), run(x, y)
        assert torch.equal(a, b)
        a.backward(), b.backward()
        assert all(torch.equal(plain.head.stats[k], compiled.head.stats[k]) for k in plain.head.stats)
    same_bits(grads(plain), grads(compiled))
    same_bits(plain.state_dict(), compiled.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_follows_the_batch_size(backend):
    torch._dynamo.reset()
    head = make_head("arcface", backend)
    run = torch.compile(head, fullgraph=True)
    for n in (12, 7, 9, 1, 30):
        x, y = batch(n, n)
        assert torch.equal(run(x, y), head(x, y))


def sample_inputs(backend, dtype=torch.float32):
    """Arguments for each operator: what opcheck is asked about."""
    x, y = batch()
    x, w = x.to(dtype), make_head().weight.detach().to(dtype)
    rows = ops.prepare_inputs(HeadInputs(x, w, y, True, True), "torch")
    bias, ones = torch.randn(C), torch.ones(N)
    for non_target, normalized, b in ((0, True, None), (0, False, bias), (1, True, None), (2, True, bias)):
        head_inputs = HeadInputs(x, w, y, non_target == 0, normalized)
        yield ops.prepare_inputs, (head_inputs, backend)
        inputs = PassInputs(
            x=rows.x,
            row_factor=rows.row_factor,
            w=w,
            bias=b,
            labels=y,
            scale=torch.full((N,), 30.0),
            threshold=rows.target_similarity.float() - 0.2 if non_target else None,
            t=torch.full((N,), 0.1) if non_target else None,
            non_target=mk.NonTarget(non_target),
            normalize_weight=normalized,
        )
        for request in (Request.log_sum_exp(need_center=True), Request.log_sum_exp(), Request.logit_sum(need_center=True, need_cos=True)):
            yield ops.row_pass, (inputs, request, backend)
        out = ops.row_pass(inputs, Request.log_sum_exp(need_center=True), backend)
        upstream = Upstream(lse=out.lse, d_lse=ones, d_logit_sum=ones, d_target_cos=-ones, d_target_bias=ones)
        for need_weight, need_bias in ((True, True), (True, False), (False, True)):
            yield ops.class_pass, (inputs, upstream, out.class_factor, out.saved, need_weight, need_bias, backend)
        yield ops.center_sum, (w, out.class_factor, backend)
        yield ops.row_gradient, (head_inputs, upstream, out.mean_center, out.mean_center, backend)
        yield ops.topk, (TopkInputs(x, w, b, None if b is None else ones, non_target == 0, normalized), 3, backend)


def test_a_head_is_none_of_fsdp_until_it_is():
    """As TorchDynamo asks, which refuses to trace a module of FSDP without original parameters."""
    head = make_head()
    assert not inspect.getattr_static(head, "_is_fsdp_managed_module", False)
    assert not head._is_fsdp_managed_module
    head._is_fsdp_managed_module = True
    assert head._is_fsdp_managed_module


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for operator, args in sample_inputs(backend):
        torch.library.opcheck(operator.op, operator.flatten(*args))
    from marginkernels.core.labels import _checked_labels

    torch.library.opcheck(_checked_labels, (torch.tensor([0, 4, -100, 52]), C, -100))


def test_schemas_follow_the_records():
    """Every field of a record is an argument, or a result, of the operators that take or give it."""
    schema = str(torch.ops.marginkernels.class_pass.default._schema)
    for record, param in ((PassInputs, "inputs"), (Upstream, "upstream")):
        for field in dataclasses.fields(record):
            assert f" {param}_{field.name}" in schema
    assert "Tensor? inputs_bias" in schema
    returns = torch.ops.marginkernels.row_pass.default._schema.returns
    assert len(returns) == len(dataclasses.fields(RowPassOutput))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_gradients(backend):
    for operator, args in sample_inputs(backend):
        flat = operator.flatten(*args)
        leaves = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in flat)
        torch.library.opcheck(operator.op, leaves, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend, monkeypatch):
    """Which passes run, and what they are asked to compute, for each set of leaves."""
    asked = []
    b = FUSED[backend]
    row, cls = type(b).row_pass, type(b).class_pass
    monkeypatch.setattr(
        type(b), "row_pass", lambda self, p, request: (asked.append(("row", request.need_center)), row(self, p, request))[1]
    )
    monkeypatch.setattr(type(b), "class_pass", lambda self, *args: (asked.append(("class", *args[-2:])), cls(self, *args))[1])
    x, y = batch()
    for leaves, want in {
        "": [("row", False)],
        "x": [("row", True)],
        "w": [("row", False), ("class", True, False)],
        "b": [("row", False), ("class", False, True)],
        "xwb": [("row", True), ("class", True, True)],
    }.items():
        head = make_head("arcface", backend, bias=True)
        head.weight.requires_grad_("w" in leaves)
        head.bias.requires_grad_("b" in leaves)
        asked.clear()
        loss = head(x.clone().requires_grad_("x" in leaves), y)
        if leaves:
            loss.backward()
        assert asked == want, leaves
        assert (head.weight.grad is not None) == ("w" in leaves)
    asked.clear()
    with torch.no_grad():
        make_head("arcface", backend)(x.clone().requires_grad_(), y)
    assert asked == [("row", False)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_is_that_among_all(backend, smoothing):
    """Of embeddings, class centers, biases and a trained scale, where everything else is frozen."""
    x, y = batch()
    for name in ("l2-softmax-trainable", "curricularface"):

        def found(wanted=None, name=name):
            head = make_head(name, backend, bias=True, label_smoothing=smoothing)
            leaves = {"x": x.clone(), **dict(head.named_parameters())}
            for key, p in leaves.items():
                p.requires_grad_(wanted in (None, key))
            head(leaves["x"], y).backward()
            return {key: p.grad for key, p in leaves.items() if p.grad is not None}

        every = found()
        assert len(every) == (4 if name == "l2-softmax-trainable" else 3)
        for key, g in every.items():
            assert bool(g.any())
            (alone,) = found(key).values()
            assert testing.relative_error(alone, g) < 2e-6, (name, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_over_one_graph(backend):
    for name in HEADS:
        head = make_head(name, backend, label_smoothing=0.1)
        x, y = batch()
        x.requires_grad_()
        loss = head(x, y)
        loss.backward(retain_graph=True)
        once, own = x.grad.clone(), head.weight.grad.clone()
        loss.backward()
        assert torch.equal(x.grad, 2 * once)
        assert torch.equal(head.weight.grad, 2 * own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_moves_between_forward_and_backward(backend):
    """Two forwards, then their backwards: each uses the state of its own step."""
    for name in ("adacos", "curricularface", "sphereface-annealed"):
        (x0, y0), (x1, y1) = batch(0), batch(1)
        together, apart = make_head(name, backend), make_head(name, backend)
        first, second = together(x0, y0), together(x1, y1)
        first.backward()
        second.backward()
        apart(x0, y0).backward()
        apart(x1, y1).backward()
        same_bits(grads(together), grads(apart))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    head = make_head("arcface", backend)
    x, y = batch()
    x.requires_grad_()
    (g,) = torch.autograd.grad(head(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), x)
    plain = make_head("arcface", "reference")
    (g,) = torch.autograd.grad(plain(x, y), x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(g.square().sum(), x)[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients(backend):
    """reduction="none" under any weighting equals the weighted sum of the rows' own gradients."""
    case = testing.Case.random(N, D, C, bias=True)
    upstream = torch.randn(N)
    for head in ("arcface", "mv-arc", "softmax", "arcface-focal"):
        found = errors(case, testing.HEADS[head](C), backend, reduction="none", upstream=upstream, label_smoothing=0.1)
        assert max(found.values()) < testing.TOLERANCE[torch.float32], (head, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": 3}])
def test_options_on_every_head(backend, options):
    case = testing.Case.random(15, 24, C, bias=True, ignored=False)
    for name, make in testing.HEADS.items():
        found = errors(case, make(C), backend, **testing.accepted(name, **options))
        assert max(found.values()) < testing.TOLERANCE[torch.float32], (name, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    for x_dtype, w_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        case = testing.Case.random(31, 64, 600, x_dtype, weight_dtype=w_dtype, bias=True)
        for name in HEADS:
            found = errors(case, testing.HEADS[name](600), backend)
            # dw comes in the weight's dtype: bfloat16 rounds it to 2**-9.
            assert max(found.values()) < (3e-2 if x_dtype != torch.float32 else 4e-3), (name, x_dtype, found)


@pytest.mark.parametrize("around", ["forward", "both"])
@pytest.mark.parametrize("name", ["arcface", "curricularface", "l2-softmax-trainable"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast(backend, name, around):
    """The bits of embeddings that were cast beforehand, also where ``backward()`` runs under autocast."""
    head = make_head(name, backend, bias=True, label_smoothing=0.1)
    nn.init.normal_(head.bias)
    x, y = batch()
    x.requires_grad_()
    before = copy.deepcopy(head.margin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x, y)
        if around == "both":
            loss.backward()
    assert loss.dtype == torch.float32
    if around == "forward":
        loss.backward()
    assert x.grad.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32
    case = testing.Case(x.detach().bfloat16(), head.weight.detach(), y, head.bias.detach())
    want = testing.run(case, before, backend, label_smoothing=0.1)
    assert torch.equal(loss.detach(), want["loss"])
    for got, name in ((x.grad, "dx"), (head.weight.grad, "dw"), (head.bias.grad, "dbias")):
        if backend == "reference" and around == "both":  # eager products, which autocast takes to bfloat16 in the backward pass
            assert testing.relative_error(got, want[name]) < 3e-2
        else:
            assert torch.equal(got, want[name].float())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_leaves_float64_alone(backend):
    head = make_head("arcface", backend, dtype=torch.float64)
    x, y = batch()
    x = x.double().requires_grad_()
    want = head(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(x, y)
    assert got.dtype == torch.float64
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend):
    """float16 embeddings under a scale train like float32 ones, and an overflow skips the step."""
    x, y = batch()
    head, wide = make_head("arcface", backend), make_head("arcface", backend)
    optimizers = [torch.optim.SGD(h.parameters(), lr=0.1) for h in (head, wide)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(head(x.half(), y)).backward()
    wide(x.half().float(), y).backward()
    before = head.weight.detach().clone()
    scaled = head.weight.grad.clone()
    head.weight.grad[0, 0] = float("inf")
    scaler.step(optimizers[0])
    assert testing.relative_error(scaled / 2**12, wide.weight.grad) < 1e-2
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", ["adacos", "curricularface", "sphereface-annealed", "l2-softmax-trainable", "arcface"])
def test_resume_to_the_same_bits(name, backend):
    def fresh():
        model = Model(make_head(name, backend))
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(model, optimizer, i):
        optimizer.zero_grad()
        loss = model(*batch(i))
        loss.backward()
        optimizer.step()
        return loss.detach()

    model, optimizer = fresh()
    for i in range(4):
        step(model, optimizer, i)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    on, on_optimizer = fresh()
    for part, state in zip((on, on_optimizer), torch.load(saved).values(), strict=True):
        part.load_state_dict(state)
    for i in range(4, 9):
        assert torch.equal(step(model, optimizer, i), step(on, on_optimizer, i))
    same_bits(model.state_dict(), on.state_dict())


def test_stats_say_what_happened():
    for backend in [*BACKENDS, "reference"]:
        head = make_head("curricularface", backend)
        x, y = batch()
        x[:5] = head.weight[y[:5]].detach() * 7
        y[2] = -100
        head(x, y)
        cos = F.normalize(x) @ F.normalize(head.weight.detach()).T
        kept = y >= 0
        own = cos[kept].gather(1, y[kept, None])[:, 0]
        assert float(head.stats["target_cosine"]) == pytest.approx(float(own.mean()), abs=1e-6)
        assert float(head.stats["top1"]) == pytest.approx(float((cos[kept].argmax(1) == y[kept]).float().mean()))
        exact = F.cosine_similarity(x[kept].double(), head.weight.detach()[y[kept]].double()).clamp(-1, 1)
        # The reference has float32 cosines, of which an angle near 0 has an error of up to 5e-4.
        assert float(head.stats["target_angle"]) == pytest.approx(float(exact.acos().mean()), abs=1e-4 if backend == "reference" else 1e-6)
        assert 0 < float(head.stats["beyond_margin"]) <= float(head.stats["top1"])
        assert float(head.stats["scale"]) == 64.0
        assert float(head.stats["t"]) == pytest.approx(0.01 * float(own.mean()), rel=1e-5)
        assert not any(v.requires_grad for v in head.stats.values())


def test_topk_is_what_the_product_says():
    x, _ = batch()
    for name in ("arcface", "softmax", "w-norm-softmax", "l2-softmax"):
        for dtype in (torch.float32, torch.float64):
            head = make_head(name, bias=name != "arcface" or dtype == torch.float64, dtype=dtype)
            nn.init.normal_(head.weight)
            if head.bias is not None:
                nn.init.normal_(head.bias, std=20)
            side = F.normalize(x.to(dtype)) if head.margin.normalize_embedding else x.to(dtype)
            scores = side @ (F.normalize(head.weight) if head.margin.normalize_weight else head.weight).T.detach()
            if head.bias is not None:
                scale = {"arcface": 64.0, "l2-softmax": math.log(0.9 * (C - 2) / 0.1)}.get(name, 1.0)
                scores = scale * scores + head.bias.detach()
            want = scores.topk(7, 1)
            got = head.topk(x.to(dtype), k=7)
            assert torch.equal(got[1], want.indices)
            torch.testing.assert_close(got[0], want.values, rtol=1e-5, atol=1e-5)
    assert head.topk(x.double(), k=C)[1].sort(1).values.eq(torch.arange(C)).all()
    assert head.topk(x[:0].double(), k=3)[0].shape == (0, 3)


def test_topk_over_chunks_and_ties(monkeypatch):
    from marginkernels.backend import torch_topk

    monkeypatch.setattr(torch_topk, "CHUNK_SCORES", 1)
    monkeypatch.setattr(torch_topk, "LEAST_WIDTH", 256)
    torch.manual_seed(0)
    head = mk.MarginHead(8, 2000, mk.ArcFace())
    head.weight.data[1000:] = head.weight.data[:1000]
    head.weight.data[:3] = 0
    x = torch.randn(5, 8)
    for dtype in (torch.float32, torch.float64):
        scores, classes = head.to(dtype).topk(x.to(dtype), k=6)
        assert (classes[:, 1::2] == classes[:, 0::2] + 1000).all()
        assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_center_loss():
    loss = mk.CenterLoss(C, D)
    x, y = batch()
    y[0] = -100
    x.requires_grad_()
    found = loss(x, y)
    found.backward()
    rows = 0.5 * (x[1:] - loss.centers[y[1:]]).square().sum(1)
    assert float(found.detach()) == pytest.approx(float(rows.mean()), rel=1e-6)
    assert float(x.grad[0].abs().sum()) == 0
    torch.testing.assert_close(x.grad[1:], ((x - loss.centers[y.clamp_min(0)]) / (N - 1))[1:].detach())
    assert float(mk.CenterLoss(C, D, reduction="sum")(x[:0], y[:0])) == 0
    sparse = mk.CenterLoss(C, D, sparse=True)
    sparse(x.detach(), y).backward()
    assert sparse.centers.grad.is_sparse
    for dtype, by in ((torch.float16, 200.0), (torch.bfloat16, 1.0), (torch.float64, 1.0)):  # squares past what float16 holds
        near = (by * x.detach()).to(dtype)
        got = loss(near, y)
        want = 0.5 * (near[1:].double() - loss.centers.double()[y[1:]]).square().sum(1).mean()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
