"""Training among threads, processes, signals and checkpoints: what goes on around a head must not change its bits."""

import copy
import random
import signal
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import marginkernels as mk

N, D, C, STEPS = 8, 12, 30, 6
OPTIONS = {"curricularface": {}, "sampled": {"sample_rate": 0.5}}


class Net(nn.Module):
    def __init__(self, kind="curricularface", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
        self.head = mk.MarginHead(D, C, mk.CurricularFace(16.0, 0.3), **OPTIONS[kind])

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(N, D, generator=g), torch.randint(C, (N,), generator=g)


def sgd(net):
    return mk.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train(net, optimizer, steps=range(STEPS), call=None):
    for step in steps:
        optimizer.zero_grad()
        (call or net)(*batch(step)).backward()
        optimizer.step()
    return net.state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


def together(jobs):
    """Run each in a thread of its own; give what they returned."""
    found, errors, start = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def work(i, job):
        try:
            start.wait()
            found[i] = job()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize("kind", OPTIONS)
def test_threads_train_a_head_each(kind):
    def job(seed):
        net = Net(kind, seed)
        optimizer = sgd(net)
        return lambda: train(net, optimizer, range(20))

    want = [job(seed)() for seed in range(3)]
    for found, one in zip(together([job(seed) for seed in range(3)]), want, strict=True):
        same(found, one)


def test_threads_evaluate_one_head():
    net = Net()
    train(net, sgd(net))
    net.eval()

    @torch.inference_mode()  # of each thread: it is not inherited
    def job():
        return [(net(*batch(i)), *net.head.topk(batch(i)[0], 3)) for i in range(20)]

    want = job()
    for found in together([job] * 4):
        for got, one in zip(found, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, one, strict=True))


def _train_in_a_child(net, queue, threads):
    torch.set_num_threads(threads)
    queue.put({name: v.clone().numpy() for name, v in train(net, sgd(net)).items()})


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_child_process_trains(start):
    """A copy of a head that its parent has used, forked or sent: it goes on like the parent's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has only its own thread, so it adds up in the order of one
    try:
        net = Net()
        train(net, sgd(net), range(2))
        other = copy.deepcopy(net)  # torch.multiprocessing sends a module with its memory shared
        context = torch.multiprocessing.get_context(start)
        queue = context.SimpleQueue()
        process = context.Process(target=_train_in_a_child, args=(net, queue, 1))
        process.start()
        found = queue.get()
        process.join(60)
        assert process.exitcode == 0
        same({name: torch.from_numpy(v) for name, v in found.items()}, train(other, sgd(other)))
    finally:
        torch.set_num_threads(threads)


class Stop(Exception):
    pass


@pytest.fixture
def alarm():
    """Sets what a timer's signal calls, and stops the timer at the end.

    Lines are not traced meanwhile: a handler that raises while the coverage tool holds its lock would leave that lock taken for good.
    """
    before, tracer = signal.getsignal(signal.SIGALRM), sys.gettrace()
    sys.settrace(None)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    sys.settrace(tracer)


def test_signals_in_every_moment_change_nothing(alarm):
    want, seen = train(one := Net(), sgd(one), range(40)), []
    alarm(lambda *_: seen.append(sum(range(100))))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    found = train(net := Net(), sgd(net), range(40))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(seen) > 3
    same(found, want)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_handler_that_raises_leaves_a_head_that_can_go_on(tmp_path, alarm, kind):
    """Stopped at random moments of a step, the same objects load the checkpoint before and end with the bits of a run without a stop."""
    want = train(one := Net(kind), sgd(one))
    stopped = 0

    def stop(*_):
        raise Stop

    alarm(stop)
    for trial in range(12):
        net = Net(kind)
        optimizer = sgd(net)
        train(net, optimizer, range(2))
        mk.distributed.save(tmp_path / f"{trial}", net.head, optimizer, {"backbone": net.backbone.state_dict()})
        try:
            signal.setitimer(signal.ITIMER_REAL, random.Random(trial).uniform(0.0001, 0.004))
            train(net, optimizer, range(2, STEPS))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Stop:
            stopped += 1
            torch.set_grad_enabled(True)  # torch.no_grad leaves it off, if the handler raises just as it is entered or left
        net.backbone.load_state_dict(
            mk.distributed.load(tmp_path / f"{trial}", net.head, optimizer, {"backbone": net.backbone.state_dict()})["backbone"]
        )
        same(train(net, optimizer, range(2, STEPS)), want)
    assert stopped > 3


def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, alarm):
    """As clusters ask a job to end (here with another signal): the handler notes it, the loop saves after its step."""
    want = train(one := Net("sampled"), sgd(one))
    net, asked = Net("sampled"), []
    optimizer = sgd(net)
    alarm(lambda *_: asked.append(True))
    step = 0
    while not asked:
        if step == 3:
            signal.raise_signal(signal.SIGALRM)
        train(net, optimizer, [step])
        step += 1
    mk.distributed.save(tmp_path / f"step-{step}", net.head, optimizer, {"backbone": net.backbone.state_dict(), "step": step})
    other = Net("sampled", seed=5)
    optimizer = sgd(other)
    loaded = mk.distributed.load(
        mk.distributed.latest(tmp_path), other.head, optimizer, {"backbone": other.backbone.state_dict(), "step": 0}
    )
    assert loaded["step"] == step == 4
    other.backbone.load_state_dict(loaded["backbone"])
    same(train(other, optimizer, range(step, STEPS)), want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_activation_checkpointing(kind, reentrant):
    """Of the backbone, and of backbone and head together."""
    want = train(one := Net(kind), sgd(one))
    net = Net(kind)

    def backbone(x, y):
        return net.head(checkpoint(net.backbone, x.requires_grad_(), use_reentrant=reentrant), y)

    same(train(net, sgd(net), call=backbone), want)
    net = Net(kind)
    same(train(net, sgd(net), call=lambda x, y: checkpoint(net, x.requires_grad_(), y, use_reentrant=reentrant)), want)
