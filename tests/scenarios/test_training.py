"""Training loops as people write them, each of a few steps on the CPU: what they change must not be the head's gradient or state."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import marginkernels as mk

N, D, C, STEPS = 8, 12, 30, 4
HEADS = {
    "arcface": lambda: mk.ArcFace(16.0, 0.3),
    "adacos": lambda: mk.AdaCos(C),
    "curricularface": lambda: mk.CurricularFace(16.0, 0.3),
    "l2-softmax": lambda: mk.L2Softmax(16.0, trainable=True),
}


class Net(nn.Module):
    """A linear backbone and a head."""

    def __init__(self, head="arcface", **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, D)
        self.head = mk.MarginHead(D, C, HEADS[head](), **options)

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def batch(step, n=N):
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, D, generator=g), torch.randint(C, (n,), generator=g)


def sgd(net, lr=0.1):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def train(net, optimizer, steps=range(STEPS), after=lambda: None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = net(*batch(step))
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def same(a, b):
    """The same bits in both state dicts."""
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_a_plain_loop_learns(head):
    net = Net(head)
    optimizer = sgd(net, 0.05)
    x, y = batch(0)
    first = net(x, y).item()
    for _ in range(30):
        optimizer.zero_grad()
        net(x, y).backward()
        optimizer.step()
    assert net(x, y).item() < 0.8 * first


def test_gradient_accumulation():
    """Four quarters of a batch, each loss over four, have the gradient of the whole."""
    net = Net(reduction="mean")
    x, y = batch(0, 16)
    net(x, y).backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in range(4):
        (net(x[4 * part : 4 * part + 4], y[4 * part : 4 * part + 4]) / 4).backward()
    for p, want in zip(net.parameters(), whole, strict=True):
        assert (p.grad - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("head", HEADS)
def test_exponential_moving_average(head):
    """torch's AveragedModel of backbone and head: parameters are averaged, and it evaluates."""
    net = Net(head)
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    want = net.head.weight.detach().clone()
    seen = []

    def after():
        ema.update_parameters(net)
        seen.append(net.head.weight.detach().clone())

    train(net, sgd(net), after=after)
    want = seen[0]
    for v in seen[1:]:
        want = 0.5 * want + 0.5 * v
    torch.testing.assert_close(ema.module.head.weight.detach(), want)
    assert ema.module.eval()(*batch(9)).isfinite()


def test_stochastic_weight_averaging_and_schedulers():
    net = Net()
    optimizer = sgd(net)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        torch.optim.lr_scheduler.LinearLR(optimizer),
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    ]
    seen = []

    def after():
        averaged.update_parameters(net)
        seen.append(net.head.weight.detach().clone())
        for schedule in schedules:
            schedule.step()

    train(net, optimizer, after=after)
    torch.testing.assert_close(averaged.module.head.weight.detach(), torch.stack(seen).mean(0))
    torch.optim.swa_utils.update_bn([], averaged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype):
    """Embeddings are cast, parameters stay float32, and unscaled gradients are near those without autocast."""
    net, plain = Net(), Net()
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = batch(0)
    plain(x, y).backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = net(x, y)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm()
    before = net.head.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(net.head.weight, before)


def test_grad_scaler_skips_a_step_that_overflows():
    net = Net()
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = batch(0)
    scaler.scale(net(x, y)).backward()
    net.head.weight.grad[0, 0] = torch.inf
    before = copy.deepcopy(net.state_dict())
    scaler.step(optimizer)
    scaler.update()
    same(net.state_dict(), before)
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_resume_to_the_same_bits(head, sample_rate):
    """A run that is saved after two steps, loaded into new objects and continued ends where one without a pause does."""

    def fresh():
        net = Net(head, sample_rate=sample_rate)
        if sample_rate == 1:
            return net, torch.optim.AdamW(net.parameters(), 0.01)
        return net, mk.optim.AdamW(net.parameters(), 0.01)

    whole, optimizer = fresh()
    train(whole, optimizer)
    first, optimizer = fresh()
    train(first, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    nn.init.normal_(second.head.weight)
    second.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(2, STEPS))
    same(whole.state_dict(), second.state_dict())


@pytest.mark.parametrize("frozen", ["backbone", "head"])
def test_a_frozen_part(frozen):
    """The frozen part keeps its bits and gets no gradient; the other's gradient is that of the whole."""
    net, plain = Net("curricularface"), Net("curricularface")
    getattr(net, frozen).requires_grad_(False)
    x, y = batch(0)
    net(x, y).backward()
    plain(x, y).backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is None if name.startswith(frozen) else torch.equal(p.grad, q.grad), name
    before = copy.deepcopy(getattr(net, frozen))
    train(net, sgd(net))
    for p, q in zip(getattr(net, frozen).parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return torch.randn(D, generator=g), i % C


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers(start):
    """Worker processes that are started after the head has computed (and has threads) do not change what it learns."""
    results = []
    for workers in (0, 2):
        net = Net()
        net(*batch(0)).backward()
        optimizer = sgd(net)
        loader = DataLoader(Rows(), batch_size=8, num_workers=workers, multiprocessing_context=start if workers else None)
        for x, y in loader:
            optimizer.zero_grad()
            net(x, y).backward()
            optimizer.step()
        results.append(net.state_dict())
    same(*results)


def test_a_head_in_a_forked_process():
    """A forked child computes with the head of its parent, whose threads it does not have."""
    net = Net()
    x, y = batch(0)
    want = net(x, y)
    want.backward()
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        torch.set_num_threads(1)
        net.zero_grad()
        loss = net.head(net.backbone(x), y)
        queue.put(float(loss.detach()))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        pytest.fail("the child hangs")
    assert process.exitcode == 0
    assert queue.get() == pytest.approx(want.item(), rel=1e-5)


def test_two_threads_use_one_head():
    """Losses and gradients of the inputs are those of one thread after the other."""
    net = Net()
    problems = [batch(step, 32) for step in range(8)]

    def step(x, y):
        x = x.clone().requires_grad_()
        loss = net(x, y)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    want = [step(*problem) for problem in problems]
    found, errors = {}, []

    def work(which):
        try:
            for _ in range(5):
                for i in which:
                    found[i] = step(*problems[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(k, 8, 2),)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i, (loss, dx) in enumerate(want):
        assert torch.equal(found[i][0], loss)
        assert torch.equal(found[i][1], dx)


def test_containers():
    """In a ModuleList, a ModuleDict and a Sequential: parameters, state and modes are reached."""
    torch.manual_seed(0)
    heads = nn.ModuleDict({"faces": mk.MarginHead(D, C, mk.CurricularFace()), "voices": mk.MarginHead(D, 7, mk.ArcFace())})
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)), "heads": heads})
    x, y = batch(0)
    embeddings = model["body"](x)
    (heads["faces"](embeddings, y) + 0.5 * heads["voices"](embeddings, y % 7)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert "heads.faces.margin.t" in model.state_dict()
    assert not model.eval()["heads"]["faces"].margin.training
    listed = nn.ModuleList([heads["faces"], heads["voices"]]).double()
    assert listed[0].weight.dtype == torch.float64
    assert listed[1](x.double(), y % 7).dtype == torch.float64


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_apart_and_alike(head, how):
    """A copy in the middle of training continues with the same bits, and its original does not move with it."""
    net = Net(head)
    train(net, sgd(net), range(2))
    other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    before = copy.deepcopy(net.state_dict())
    losses = train(other, sgd(other), range(2, STEPS))
    same(net.state_dict(), before)
    assert train(net, sgd(net), range(2, STEPS)) == losses
    same(net.state_dict(), other.state_dict())


def test_evaluation_leaves_no_trace():
    """eval(), no_grad() and inference_mode() in the middle of an epoch: state and gradients stay, training goes on."""
    net = Net("curricularface")
    net(*batch(0)).backward()
    before, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    net.eval()
    with torch.no_grad():
        net(*batch(1))
    with torch.inference_mode():
        assert net(*batch(2)).isfinite()
        net.head.topk(net.backbone(batch(3)[0]), 3)
    same(net.state_dict(), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    net.train()
    net(*batch(1)).backward()


def test_two_losses_before_one_backward():
    """Both views of a batch, as in self-distillation: the gradient is the sum of theirs."""
    net = Net()
    (xa, ya), (xb, yb) = batch(0), batch(1)
    net(xa, ya).backward()
    net(xb, yb).backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    a, b = net(xa, ya), net(xb, yb)
    (a + b).backward()
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w)


def test_retained_graph():
    """Two backward passes through one forward pass accumulate twice the gradient."""
    net = Net()
    loss = net(*batch(0))
    loss.backward(retain_graph=True)
    once = net.head.weight.grad.clone()
    loss.backward()
    assert torch.equal(net.head.weight.grad, 2 * once)
