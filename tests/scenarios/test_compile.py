"""torch.compile and torch.export of heads with shapes that are static, ragged, dynamic and named."""

import pytest
import torch
from torch import nn

import marginkernels as mk
from marginkernels.backend import FUSED

D, C = 16, 50
BACKENDS = [name for name in ("torch", "cpu") if FUSED[name].unavailable_reason() is None]

#: workspace_mb and a margin's scale are floats, which dynamic=True makes symbolic: their bytes are no size that an operator can take.


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def head(backend="torch", margin=None, **options):
    torch.manual_seed(0)
    return mk.MarginHead(D, C, margin or mk.ArcFace(16.0, 0.3), backend=backend, **options)


def batch(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, D, generator=g, requires_grad=True), torch.randint(C, (n,), generator=g)


def same_steps(eager, compiled, sizes, *, mark=False):
    """Loss and all gradients have the same bits, compiled and not, in batches of these sizes."""
    for n in sizes:
        x, y = batch(n)
        z = x.detach().clone().requires_grad_()
        want = eager(z, y)
        want.backward()
        weight = eager.weight.grad.clone()
        eager.weight.grad = None
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(y, 0)
        got = compiled(x, y)
        got.backward()
        assert torch.equal(got, want), n
        assert torch.equal(x.grad, z.grad), n
        assert torch.equal(eager.weight.grad, weight), n
        eager.weight.grad = None


class Frames:
    """A compiler that counts what it is given to compile."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("backend", BACKENDS)
def test_static(backend):
    one, frames = head(backend), Frames()
    same_steps(one, torch.compile(one, fullgraph=True, dynamic=False, backend=frames), (8, 8, 8))
    assert frames.count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged(backend):
    """The last batch of an epoch is smaller: one more graph, for all sizes."""
    one, frames = head(backend), Frames()
    same_steps(one, torch.compile(one, fullgraph=True, backend=frames), (8, 8, 5, 7, 9))
    assert frames.count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_mb", [None, 0.0, 0.5, 1])
def test_dynamic(backend, workspace_mb):
    one, frames = head(backend, workspace_mb=workspace_mb), Frames()
    same_steps(one, torch.compile(one, fullgraph=True, dynamic=True, backend=frames), (8, 5, 7, 9))
    assert frames.count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_marked_dynamic(backend):
    one, frames = head(backend), Frames()
    same_steps(one, torch.compile(one, fullgraph=True, backend=frames), (8, 5, 7), mark=True)
    assert frames.count == 1


@pytest.mark.parametrize("margin", [mk.CurricularFace, mk.CosFace, lambda: mk.AdaCos(C), lambda: mk.AdaFace(momentum=0.5)])
def test_dynamic_with_state(margin):
    one, other = head(margin=margin()), head(margin=margin())
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 5, 7):
        x, y = batch(n)
        assert torch.equal(compiled(x, y), one(x, y))
    for name, v in one.state_dict().items():
        assert torch.equal(v, other.state_dict()[name]), name


class Scored(nn.Module):
    """The loss of embeddings, as an evaluation exports it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_a_named_batch(backend):
    model = Scored(head(backend)).eval()
    x, y = batch(6)
    n = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (x.detach(), y), dynamic_shapes={"x": {0: n}, "y": {0: n}})
        for size in (6, 3, 11):
            x, y = batch(size)
            assert torch.equal(program.module()(x.detach(), y), model(x.detach(), y))


class Nearest(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.topk(x, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [mk.ArcFace, mk.Softmax])
def test_export_of_topk(backend, margin):
    model = Nearest(head(backend, margin(), bias=margin is mk.Softmax)).eval()
    n = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (batch(6)[0].detach(),), dynamic_shapes={"x": {0: n}})
        for size in (6, 3, 11):
            x = batch(size)[0].detach()
            for got, want in zip(program.module()(x), model(x), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_topk(backend):
    frames = Frames()
    model = Nearest(head(backend)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=frames)
    for size in (8, 5, 7):
        x = batch(size)[0].detach()
        for got, want in zip(compiled(x), model(x), strict=True):
            assert torch.equal(got, want)
    assert frames.count == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"margin": mk.CurricularFace}, {"margin": mk.ArcFace, "sample_rate": 0.5}])
def test_a_checkpointed_compiled_head_is_refused(options, reentrant):
    """Its repetition would draw other classes, or move the state again."""
    options = dict(options)
    head = mk.MarginHead(8, 20, options.pop("margin")(), backend="torch", **options)
    step = torch.compile(head, backend="aot_eager")
    x, y = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    loss = torch.utils.checkpoint.checkpoint(step, x, y, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint: expected a MarginHead that is not compiled"):
        loss.backward()


def test_a_fused_optimizer_beside_a_compiled_model():
    """The graph breaks at the head's sums, whose backward pass leaves its rows to the step."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        backbone, head = torch.nn.Linear(16, 16), mk.MarginHead(16, 50, mk.ArcFace(scale=16.0))
        optimizer = mk.optim.FusedSGD(head, lr=0.5, momentum=0.9)
        optimizer.add_param_group({"params": list(backbone.parameters())})

        def loss(x, y, backbone=backbone, head=head):
            return head(backbone(x).relu(), y)

        step = torch.compile(loss) if compiled else loss
        for _ in range(3):
            optimizer.zero_grad()
            step(torch.randn(8, 16), torch.randint(50, (8,))).backward()
            assert head.weight.grad is None
            optimizer.step()
        results.append((head.weight.detach(), backbone.weight.detach()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
