"""The transforms of torch.func, forward mode and second derivatives: they are right, or an error says what does it."""

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vmap
from torch.nn.utils.parametrizations import weight_norm

import marginkernels as mk
from marginkernels.backend import FUSED

BACKENDS = [name for name, b in FUSED.items() if b.unavailable_reason() is None and "cpu" in b.device_types]
N, D, C = 6, 8, 10
G = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=G) for shape in ((N, D), (C, D), (C,)))
Y = torch.tensor([0, 3, 3, 9, 5, 1])
MARGINS = {
    "arcface": lambda: mk.ArcFace(16.0, 0.3, focal_gamma=1.0),
    "softmax": mk.Softmax,
    "mv-arc": lambda: mk.MVSoftmax(scale=16.0),
    "curricularface": lambda: mk.CurricularFace(16.0).eval(),
    "lsoftmax": mk.LSoftmax,
    "elasticface": lambda: mk.ElasticFace(scale=16.0, std=0.1).eval(),
    "l2-softmax": lambda: mk.L2Softmax(16.0, trainable=True),
}


def loss(backend, name, x, w, b, y=Y, **options):
    options = {"label_smoothing": 0.1, "backend": backend} | options
    return mk.margin_cross_entropy(x, w, y, margin=MARGINS[name](), bias=b, **options)


def close(got, want):
    for v, u in zip(got, want, strict=True):
        assert (v - u).norm() <= 2e-5 * u.norm()


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, name):
    """grad, grad_and_value and jacrev give autograd's gradients."""
    leaves = [v.clone().requires_grad_() for v in (X, W, B)]
    value = loss(backend, name, *leaves)
    want = torch.autograd.grad(value, leaves)
    found, same = grad_and_value(lambda x, w, b: loss(backend, name, x, w, b), (0, 1, 2))(X, W, B)
    assert torch.equal(same, value)
    assert all(torch.equal(v, u) for v, u in zip(found, want, strict=True))
    assert torch.equal(grad(lambda w: loss(backend, name, X, w, B))(W), want[1])
    each = jacrev(lambda x: loss(backend, name, x, W, B, reduction="none"))(X)
    close([each.mean(0)], want[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_each_row(backend):
    """vmap over grad, and grad over vmap."""
    each = vmap(grad(lambda w, x, y: loss(backend, "arcface", x[None], w, B, y[None])), in_dims=(None, 0, 0))(W, X, Y)
    want = [grad(lambda w, i=i: loss(backend, "arcface", X[i : i + 1], w, B, Y[i : i + 1]))(W) for i in range(N)]
    close(each, want)
    many = torch.stack([W, 2 * W + X[:1]])
    whole = grad(lambda w: vmap(lambda v: loss(backend, "arcface", X, v, B))(w).sum())(many)
    close(whole, [grad(lambda v: loss(backend, "arcface", X, v, B))(v) for v in many])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(backend):
    head = mk.MarginHead(D, C, mk.CurricularFace(16.0), backend=backend)
    parameters, buffers = dict(head.named_parameters()), dict(head.named_buffers())
    want = torch.autograd.grad(head.eval()(X, Y), head.weight)[0]
    found = grad(lambda p: functional_call(head, (p, buffers), (X, Y)))(parameters)["weight"]
    assert torch.equal(found, want)
    assert head.stats == {}
    head.train()
    with pytest.raises(RuntimeError, match=r"margin: expected a state that torch\.func may write.*CurricularFace.*eval\(\)"):
        grad(lambda p: functional_call(head, (p, buffers), (X, Y)))(parameters)

    def step(p, b):  # the state as an argument moves there, and there alone
        return functional_call(head, (p, b), (X, Y)), b

    before = head.margin.t.clone()
    given = {k: v.clone() for k, v in buffers.items()}
    found, moved = grad(step, has_aux=True)(parameters, given)
    head(X, Y).backward()
    assert torch.equal(found["weight"], head.weight.grad)
    assert torch.equal(moved["margin.t"], head.margin.t)
    assert not torch.equal(before, head.margin.t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused(backend):
    for call in (
        lambda: jvp(lambda x: loss(backend, "arcface", x, W, B), (X,), (X,)),
        lambda: hessian(lambda x: loss(backend, "arcface", x, W, B))(X),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        loss(backend, "arcface", torch.autograd.forward_ad.make_dual(X, X), W, B)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda x: grad(lambda v: loss(backend, "arcface", v, W, B))(x).sum())(X)
    head = mk.MarginHead(D, C, mk.ArcFace(), backend=backend, sample_rate=0.7)
    with pytest.raises(RuntimeError, match=r"sample_rate: expected a count of draws that torch\.func may write"):
        grad(lambda x: head(x, Y))(X)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainable_scale_has_no_second_derivative(backend, smoothing):
    """It was given without what passes through the mean of the centers: a wrong number."""
    margin = mk.L2Softmax(16.0, trainable=True)
    value = mk.margin_cross_entropy(X, W, Y, margin=margin, backend=backend, label_smoothing=smoothing)
    (g,) = torch.autograd.grad(value, [margin.alpha], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g, [margin.alpha])


def test_sampled_weight_that_is_computed():
    head = weight_norm(mk.MarginHead(D, C, mk.ArcFace(), sample_rate=0.7))
    with pytest.raises(RuntimeError, match="sparse_grad: expected False for a weight or bias that is computed"):
        head(X, Y)
    head.eval()(X, Y).backward()
    head = weight_norm(mk.MarginHead(D, C, mk.ArcFace(), sample_rate=0.7, sparse_grad=False))
    head(X, Y).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
