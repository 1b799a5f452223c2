"""What each rank does in test_distributed.py. Each ``check_*`` runs on all ranks of a group; an error on any rank fails its test."""

from __future__ import annotations

import copy
import math
import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import marginkernels as mk
from helpers import insightface as recorded
from helpers import pages
from marginkernels import optim, testing
from marginkernels.backend import FUSED, records, registry, resolve
from marginkernels.backend.chunked import ChunkedBackend
from marginkernels.backend.records import BAD, Reading, Record, Verdict
from marginkernels.cli import plan
from marginkernels.compat import insightface
from marginkernels.distributed import GradScaler, clip_grad_norm_
from marginkernels.distributed import _collectives as collectives
from marginkernels.distributed._shard import bounds
from marginkernels.loss import head_losses

TOLERANCE = 5e-5
D = 16
ROWS = (5, 0, 7, 3)  # by rank


def mine(n: int | None = None) -> slice:
    """This rank's rows of the whole batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [n] * size if n is not None else ROWS[:size]
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def case(c: int, bias: bool = False, seed: int = 0) -> testing.Case:
    """Among its labels are the last class of the first shard and the first of the second, where shards have more than a few."""
    size = dist.get_world_size()
    found = testing.Case.random(sum(ROWS[:size]), D, c, bias=bias, seed=seed)
    width = -(-c // size)
    if size > 1 and width > 3:
        found.labels[(found.labels >= 0).nonzero()[:2, 0]] = torch.tensor([width, width - 1])
    return found


def sharded(whole: testing.Case, margin: mk.Margin, **options) -> mk.MarginHead:
    head = mk.MarginHead(D, whole.w.shape[0], margin, bias=whole.bias is not None, process_group=dist.group.WORLD, **options)
    state = head.state_dict() | {"weight": whole.w}
    if whole.bias is not None:
        state["bias"] = whole.bias
    head.load_state_dict(state)
    return head


def same_everywhere(*values: torch.Tensor) -> None:
    """Bit for bit."""
    for v in values:
        every = [torch.empty_like(v) for _ in range(dist.get_world_size())]
        dist.all_gather(every, v.detach().contiguous())
        for other in every:
            assert other.numpy().tobytes() == v.detach().numpy().tobytes(), (other, v)


def compare(got: torch.Tensor, want: torch.Tensor, what, scale: float | None = None) -> None:
    """Compare ``got`` with ``want``: the whole, or this rank's part of it; then ``scale`` is the norm of the whole."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm()) / max(float(want.norm()) if scale is None else scale, 1e-300)
    assert error <= TOLERANCE, (what, error)


def against_one_process(
    whole: testing.Case,
    margin: mk.Margin,
    steps: int = 1,
    reduction: str = "mean",
    mix: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options,
) -> None:
    """Compare loss, gradients and state of ``steps`` steps with the float64 reference in one process."""
    single = copy.deepcopy(margin)
    head = sharded(whole, margin, reduction=reduction, **options)
    options.pop("batch_size", None)
    rank, size, own = dist.get_rank(), dist.get_world_size(), mine()
    start, stop = bounds(whole.w.shape[0], size, rank)
    assert (head.class_start, tuple(head.weight.shape)) == (start, (stop - start, D))
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = whole.x.roll(step, 0)
        ours = x[own].clone().requires_grad_()
        upstream = torch.rand(x.shape[0] if reduction == "none" else (), generator=g) + 0.5
        head.zero_grad()
        loss = head(ours, whole.labels[own], **({} if mix is None else {"mix": (mix[0][own], mix[1][own])}))
        loss.backward(upstream[own] if reduction == "none" else upstream)
        leaf = [None if v is None else v.double().requires_grad_() for v in (x, whole.w, whole.bias)]
        single.zero_grad()
        want = mk.margin_cross_entropy(
            *leaf[:2], whole.labels, margin=single, bias=leaf[2], backend="reference", reduction=reduction, mix=mix, **options
        )
        want.backward(upstream.double())
        if reduction == "none":
            compare(loss, want[own], "loss", float(want.detach().norm()))
        else:
            same_everywhere(loss)
            compare(loss, want, "loss")
        same_everywhere(*head.margin.buffers(), *head.stats.values())
        for (name, b), other in zip(head.margin.named_buffers(), single.buffers(), strict=True):
            compare(b, other, name)
        dx, dw = leaf[0].grad, leaf[1].grad
        compare(ours.grad / size, dx[own], "dx", float(dx.norm()))
        compare(head.weight.grad, dw[start:stop], "dw", float(dw.norm()))
        if whole.bias is not None:
            compare(head.bias.grad, leaf[2].grad[start:stop], "dbias", float(leaf[2].grad.norm()))
        for (name, p), other in zip(head.margin.named_parameters(), single.parameters(), strict=True):
            same_everywhere(p.grad)
            compare(p.grad, other.grad, name)


def check_every_head():
    for c in (37, 40):
        for name, make in testing.HEADS.items():
            try:
                against_one_process(case(c), make(c), steps=2)
            except AssertionError as error:
                raise AssertionError(f"{name}, C = {c}") from error


def check_options():
    for make in (mk.ArcFace, mk.Softmax, mk.CurricularFace, lambda: mk.L2Softmax(trainable=True), mk.SphereFace):
        against_one_process(case(37, bias=True), make(), label_smoothing=0.1)
        against_one_process(case(37, bias=True), make(), batch_size=9)
    against_one_process(case(37), mk.ArcFace(focal_gamma=2.0), label_smoothing=0.2)
    for reduction in ("none", "sum"):
        against_one_process(case(37, bias=True), mk.MVSoftmax(), reduction=reduction, label_smoothing=0.1)
        for make in (mk.SphereFace2, mk.UniFace):
            against_one_process(case(37, bias=True), make(37), reduction=reduction, batch_size=9)
    whole = case(37)
    some = (torch.arange(len(whole.labels)) % 3 == 0) | (whole.labels == -100)
    ignored = testing.Case(whole.x, whole.w, torch.where(some, 7, whole.labels), None)
    against_one_process(ignored, mk.ArcFace(), ignore_index=7)


def check_class_weights_and_mixed_labels():
    """Each rank holds the weights of all classes, and brings its own rows' second labels and shares; a rank without rows brings none."""
    whole, g = case(37, bias=True), torch.Generator().manual_seed(2)
    n, weight = len(whole.labels), torch.rand(37, generator=g)
    other = torch.randint(37, (n,), generator=g)
    other[n // 3] = -100
    mix = (other, torch.rand(n, generator=g))
    for make in (mk.ArcFace, mk.CurricularFace, mk.AdaFace, lambda: mk.L2Softmax(trainable=True), lambda: mk.MagFace(norm_range=(1, 9))):
        for smoothing in (0.0, 0.2):
            against_one_process(whole, make(), steps=2, class_weight=weight, label_smoothing=smoothing)
            against_one_process(whole, make(), steps=2, mix=mix, label_smoothing=smoothing, batch_size=9)
    for reduction in ("none", "sum"):
        against_one_process(whole, mk.MVSoftmax(), reduction=reduction, mix=mix, class_weight=weight, label_smoothing=0.1)
    if dist.get_world_size() > 1:
        rank = dist.get_rank()
        _raises(ValueError, "class_weight: expected one value on all ranks", lambda: _head(37, class_weight=torch.full((37,), 1.0 + rank)))


def check_sub_centers():
    """Shards are of classes, each with all its centers: loss, gradients, top-k and the dominant centers are those of one process; also
    where a rank has no class."""
    own, size, rank = mine(), dist.get_world_size(), dist.get_rank()
    for c, make in ((37, mk.ArcFace), (37, mk.CurricularFace), (4, lambda: mk.MVSoftmax(scale=16.0)), (37, lambda: mk.LSoftmax(3))):
        drawn = case(3 * c)
        whole = testing.Case(drawn.x, drawn.w, torch.where(drawn.labels < 0, drawn.labels, drawn.labels // 3), None)
        start, stop = bounds(c, size, rank)
        head = mk.MarginHead(D, c, make(), sub_centers=3, process_group=dist.group.WORLD)
        head.load_state_dict(head.state_dict() | {"weight": whole.w})
        assert tuple(head.weight.shape) == (3 * (stop - start), D)
        ours = whole.x[own].clone().requires_grad_()
        loss = head(ours, whole.labels[own])
        loss.backward()
        want = testing.run(whole, make(), "reference", dtype=torch.float64, sub_centers=3)
        same_everywhere(loss, *head.stats.values())
        compare(loss, want["loss"], "loss")
        compare(ours.grad / size, want["dx"][own], "dx", float(want["dx"].norm()))
        compare(head.weight.grad, want["dw"][3 * start : 3 * stop], "dw", float(want["dw"].norm()))
        expected = mk.topk(whole.x[own], whole.w, 3, head.margin, sub_centers=3)
        assert torch.equal(head.topk(whole.x[own], 3)[1], expected[1])
        single = mk.MarginHead(D, c, copy.deepcopy(head.margin), sub_centers=3)
        single.load_state_dict(single.state_dict() | {"weight": whole.w})
        counts, every = head.sub_center_counts(whole.x[own], whole.labels[own]), single.sub_center_counts(whole.x, whole.labels)
        assert torch.equal(counts, every[start:stop])
        found, alone = head.outliers(whole.x[own], whole.labels[own], angle=1.2), single.outliers(whole.x, whole.labels, angle=1.2)
        assert torch.equal(found.far, alone.far[own])
        assert torch.equal(found.dominant, alone.dominant[start:stop])
        head.prune(counts)
        single.prune(every)
        assert torch.equal(head.weight, single.weight[start:stop])
        compare(head.eval()(whole.x[own], whole.labels[own]), single.eval()(whole.x, whole.labels), "pruned")


def check_nearest_classes():
    """The classes that are raised are the nearest of all ranks, also where a rank has fewer than k of them or none."""
    for c, k in ((37, 5), (37, 1), (6, 5), (2, 3)):
        for make in (lambda k=k: mk.InterTopK(scale=16.0, k=k, penalty=0.3), lambda k=k: mk.InterTopK("cos", 16.0, k=k, penalty=0.2)):
            against_one_process(case(c), make(), label_smoothing=0.1 if k == 1 else 0.0)


def check_statistics():
    """By value, of rows whose own class is the nearest, or is it in its shard alone, where another shard has a nearer one."""
    c, own, size = 37, mine(8), dist.get_world_size()
    whole = case(c)
    w = nn.functional.normalize(whole.w)
    y = torch.arange(8 * size) * 5 % c
    near = torch.where(torch.arange(8 * size) % 2 == 0, 0.4, 2.5)[:, None]
    x = w[y] + near * w[(y + c // 2) % c]
    y[3] = -100
    for margin in (mk.ArcFace(), mk.CurricularFace(), mk.L2Softmax(num_classes=c)):
        _, _, want = head_losses(x.double(), whole.w.double(), y, margin=copy.deepcopy(margin), backend="reference")
        head = sharded(whole, margin)
        head(x[own], y[own])
        same_everywhere(*head.stats.values())
        assert head.stats.keys() == want.keys()
        assert {k: float(v) for k, v in head.stats.items()} == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-5)
        assert 0.2 < float(want["top1"]) < 0.8


def check_statistics_of_norms():
    """Over all ranks' rows, of which some are ignored: of none, of one, whose spread is unknown, and of many of very different norms."""
    whole = case(37)
    x = whole.x * torch.logspace(-3, 1.5, len(whole.x))[:, None]
    for kept in (0, 1, 2, len(x)):
        labels = torch.where(torch.arange(len(x)) >= len(x) - kept, whole.labels, -100)
        one = testing.Case(x, whole.w, labels, None)
        against_one_process(one, mk.AdaFace(momentum=0.3), steps=3, **({"batch_size": 9} if kept == 2 else {}))


def check_drawn_margins():
    """Each rank finds what its own rows got, which is what one process gives them, ignored ones apart; with padding and without."""
    whole, own = case(37), mine()
    labels = torch.where(torch.arange(len(whole.labels)) % 4 == 2, -100, whole.labels)
    for plus in (None, "paper", "code"):
        for options in ({}, {"batch_size": 9}):
            single = mk.ElasticFace(std=0.2, plus=plus, seed=3)
            head = sharded(whole, copy.deepcopy(single), **options)
            for training in (True, True, False):
                head.train(training)
                head(whole.x[own], labels[own])
                mk.margin_cross_entropy(whole.x, whole.w, labels, margin=single.train(training), backend="torch")
                torch.testing.assert_close(head.margin.drawn, single.drawn[own], rtol=0, atol=0, equal_nan=True)
                assert torch.equal(head.margin.drawn.isnan(), labels[own] < 0)
                same_everywhere(head.margin.draws)


def check_fewer_classes_than_ranks():
    for c in (1, 2, 3):
        for make in (mk.CosFace, mk.Softmax, mk.CurricularFace):
            against_one_process(case(c, bias=True), make(), label_smoothing=0.1 if c > 1 else 0.0)  # with one class everything is exactly 0
        for margin in (mk.SphereFace2(c), mk.UniFace(c, 16.0)):
            against_one_process(case(c, bias=True), margin)
    assert mk.MarginHead(D, 3, mk.ArcFace(), process_group=dist.group.WORLD).topk(torch.randn(2, D), 3)[0].isfinite().all()


def check_repeated_runs():
    whole, own = case(37), mine()
    bits = set()
    for _ in range(3):
        head = sharded(whole, mk.AdaCos(37))
        x = whole.x[own].clone().requires_grad_()
        loss = head(x, whole.labels[own])
        loss.backward()
        bits.add(tuple(v.detach().numpy().tobytes() for v in (loss, x.grad, head.weight.grad, head.margin.s)))
    assert len(bits) == 1


def check_no_rows():
    """No rows on any rank, and rows without a graph on some: no rank waits forever."""
    whole = case(37)
    for batch_size in (None, 8):
        head = sharded(whole, mk.AdaCos(37), batch_size=batch_size)
        before = head.margin.s.clone()
        loss = head(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
        assert float(loss.detach()) == 0
        assert float(head.margin.s) == float(before)
        x = whole.x[mine()].clone().requires_grad_(dist.get_rank() == 0)
        head(x, whole.labels[mine()]).backward()
        assert head.weight.grad.isfinite().all()
        with torch.no_grad():
            same_everywhere(head(x, whole.labels[mine()]))


def check_half_precision():
    whole, own = case(64), mine()
    head = sharded(whole, mk.ArcFace())
    x = whole.x[own].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, whole.labels[own])
    loss.backward()
    single = mk.MarginHead(D, 64, mk.ArcFace())
    single.load_state_dict({"weight": whole.w})
    every = whole.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        single(every, whole.labels).backward()
    same_everywhere(loss)
    error = (x.grad / dist.get_world_size() - every.grad[own]).norm() / every.grad.norm()
    assert float(error) < testing.TOLERANCE[torch.bfloat16]


def check_topk():
    for c, k in ((37, 11), (5, 5)):  # more classes than asked for in every shard, and fewer
        whole = case(c, bias=True)
        for margin in (mk.ArcFace(), mk.Softmax()):
            single = mk.MarginHead(D, c, margin, bias=True)
            single.load_state_dict({"weight": whole.w, "bias": whole.bias})
            scores, classes = single.topk(whole.x, k)
            for batch_size in (None, 1):  # of training steps; a search may have more rows
                got = sharded(whole, copy.deepcopy(margin), batch_size=batch_size).topk(whole.x[mine()], k)
                assert torch.equal(got[1], classes[mine()])
                compare(got[0], scores[mine()], "scores", float(scores.norm()))


def check_start_does_not_depend_on_ranks():
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for c in (3, 10000):
        torch.manual_seed(5)
        head = mk.MarginHead(D, c, mk.ArcFace(), process_group=dist.group.WORLD)
        torch.manual_seed(5)
        whole = mk.MarginHead(D, c, mk.ArcFace(), process_group=alone).weight
        assert torch.equal(head.weight, whole[head.shard.start : head.shard.stop])
        assert abs(float(whole.detach().std()) / 0.01 - 1) < (0.5 if c == 3 else 0.02)


def check_errors_reach_every_rank():
    rank, size = dist.get_rank(), dist.get_world_size()
    head = mk.MarginHead(D, 37, mk.ArcFace(), process_group=dist.group.WORLD)
    _raises(ValueError, "labels: expected values in [0, 37)", lambda: head(torch.randn(2, D), torch.tensor([3, 37 if rank == 0 else 3])))
    if size > 1:
        _raises(ValueError, "num_classes: expected one value on all ranks", lambda: _head(37 + rank))
        _raises(ValueError, "margin: expected one value on all ranks", lambda: _head(37, mk.ArcFace(margin=0.1 * (rank + 1))))
    _raises(
        ValueError, "backend: expected a fused backend", lambda: _head(37, backend="reference")(torch.randn(2, D), torch.tensor([3, 3]))
    )
    _raises(ValueError, "at most batch_size = 1 rows, got 2", lambda: _head(37, batch_size=1)(torch.randn(2, D), torch.tensor([3, 3])))


def check_records_that_differ():
    """A backend that the record of one rank takes away serves on none: all ranks take the same one, with the same bits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong = Verdict(BAD[0], "as planted", ("float32/float32",), {"values": 1}, {}, 1.0)
    record = Record(records.here(torch.device("cpu")), "2026-01-02T03:04:05+00:00", {"cpu": wrong}, {}, (), {"threads": 1})
    x, y = torch.randn(4, D), torch.randint(37, (4,))
    for planted in ([size - 1], [0], []):
        with patch.dict(registry._READINGS, {"cpu": Reading(record if rank in planted else None, None, ())}):
            head = _head(37)
            with patch.object(ChunkedBackend, "row_pass", autospec=True, side_effect=ChunkedBackend.row_pass) as chunked:
                loss = head(x, y)
            same_everywhere(loss)
            without = planted or FUSED["cpu"].unavailable_reason() is not None
            assert chunked.called == bool(without), planted
            # For itself, a rank whose own record is good would choose otherwise.
            alone = resolve("auto", "cpu", torch.float32, torch.float32, D)
            assert (alone == "torch") == (rank in planted or FUSED["cpu"].unavailable_reason() is not None)


def _head(c: int, margin: mk.Margin | None = None, **options) -> mk.MarginHead:
    return mk.MarginHead(D, c, margin or mk.ArcFace(), process_group=dist.group.WORLD, **options)


def _raises(kind, text: str, what) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        what()


def check_large_scales():
    """Log-sum-exps of a thousand, whose exponentials no float32 holds, on some ranks or on all; and far apart between ranks."""
    for make in (lambda: mk.ArcFace(scale=1024.0), lambda: mk.NormFace(scale=1024.0), lambda: mk.MVSoftmax(scale=1024.0)):
        against_one_process(case(37, bias=True), make(), label_smoothing=0.1)
    whole = case(37)
    against_one_process(testing.Case(whole.x * 30, whole.w * 30, whole.labels, None), mk.Softmax())
    far = torch.where(torch.arange(37) < 20, 500.0, -500.0)
    against_one_process(testing.Case(whole.x, whole.w, whole.labels, far), mk.CosFace())


def check_copies():
    """A copied head is in the same group, and the gradient of its margin is still summed."""
    whole, own = case(37), mine()
    head = copy.deepcopy(sharded(whole, mk.L2Softmax(num_classes=37, trainable=True)))
    head(whole.x[own], whole.labels[own]).backward()
    same_everywhere(head.margin.alpha.grad)
    margin = mk.L2Softmax(num_classes=37, trainable=True)
    mk.margin_cross_entropy(whole.x.double(), whole.w.double(), whole.labels, margin=margin, backend="reference").backward()
    compare(head.margin.alpha.grad, margin.alpha.grad, "alpha")


def backbone(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D))


def one_process(c: int, batches: list[tuple[torch.Tensor, torch.Tensor]], lr: float = 0.1, **options):
    """Train a backbone and a head on one device: the losses, and both at the end. ``batches``: inputs and labels of all ranks."""
    model, head = backbone(), mk.MarginHead(D, c, mk.ArcFace(scale=16.0), **options)
    head.load_state_dict(head.state_dict() | {"weight": case(c).w})
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=lr, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = head(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model, head


def batches(c: int, steps: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(9)
    return [(torch.randn(rows, 12, generator=g), torch.randint(c, (rows,), generator=g)) for _ in range(steps)]


def train_beside(wrap, compile: bool = False) -> None:
    """Training a wrapped backbone with a sharded head gives the same as training in one process."""
    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    data = batches(c, 5, 4 * size)
    want, model, whole = one_process(c, data)
    net = wrap(backbone())
    head = sharded(testing.Case(torch.empty(0), case(c).w, torch.empty(0), None), mk.ArcFace(scale=16.0), batch_size=4)
    call = torch.compile(head, fullgraph=True) if compile else head
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9, foreach=False)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = call(net(x[rank * 4 : rank * 4 + 4]), y[rank * 4 : rank * 4 + 4])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    same_everywhere(losses)
    compare(losses, want, "losses")
    compare(head.weight, whole.weight[head.shard.start : head.shard.stop], "weight", float(whole.weight.detach().norm()))
    for p, q in zip(net.parameters(), model.parameters(), strict=True):
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        compare(full, q, "backbone")


def check_ddp():
    train_beside(nn.parallel.DistributedDataParallel)


def check_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train_beside(lambda net: fully_shard(net, mesh=mesh))


def check_compile():
    train_beside(nn.parallel.DistributedDataParallel, compile=True)


check_compile.sizes = (2,)  # compiling takes half a minute, and does not depend on the number of ranks


def check_accumulation():
    """Two backward passes of half the batch, with halved losses, give the gradient of the whole batch (all rows are valid)."""
    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    ((x, y),) = batches(c, 1, 4 * size)
    grads = []
    for parts in (1, 2):
        net = nn.parallel.DistributedDataParallel(backbone())
        head = sharded(testing.Case(torch.empty(0), case(c).w, torch.empty(0), None), mk.ArcFace(scale=16.0))
        own = torch.arange(rank * 4, rank * 4 + 4).chunk(parts)
        for i, rows in enumerate(own):
            net.require_backward_grad_sync = i == parts - 1
            (head(net(x[rows]), y[rows]) / parts).backward()
        grads.append([head.weight.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*grads, strict=True):
        compare(a, b, "gradient")


def check_accumulation_to_the_last_step():
    """Three steps of two half batches each end where one process ends with whole batches, momentum and all."""
    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    data = batches(c, 3, 4 * size)
    _, model, whole = one_process(c, data)
    net = nn.parallel.DistributedDataParallel(backbone())
    head = sharded(testing.Case(torch.empty(0), case(c).w, torch.empty(0), None), mk.ArcFace(scale=16.0))
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        for i, rows in enumerate(torch.arange(rank * 4, rank * 4 + 4).chunk(2)):
            net.require_backward_grad_sync = i == 1
            (head(net(x[rows]), y[rows]) / 2).backward()
        optimizer.step()
    compare(head.weight, whole.weight[head.shard.start : head.shard.stop], "weight", float(whole.weight.detach().norm()))
    for p, q in zip(net.parameters(), model.parameters(), strict=True):
        compare(p, q, "backbone")


def check_draws_are_those_of_no_other_rank():
    """Every rank draws from its own classes by numbers of its own: shards of equal size take unlike rows of theirs."""
    size = dist.get_world_size()
    head = _head(100 * size, sample_rate=0.3, sample_seed=4)
    head(torch.randn(2, D), torch.tensor([0, 1]))
    rows = [None] * size
    dist.all_gather_object(rows, head.sampler.index.tolist())
    assert all(len(r) == 30 for r in rows)
    assert len({tuple(r) for r in rows}) == size
    head(torch.randn(2, D), torch.tensor([0, 1]))
    again = [None] * size
    dist.all_gather_object(again, head.sampler.index.tolist())
    assert all(a != b for a, b in zip(rows, again, strict=True))


def check_sampling():
    """Only drawn rows have a gradient, that of the loss over the classes drawn by all ranks; the optimizer changes no other rows."""
    whole, own, size = case(400, bias=True), mine(), dist.get_world_size()
    weights = torch.rand(400, generator=torch.Generator().manual_seed(3))
    for make, log_q, smoothing, weight in (
        (mk.ArcFace, False, 0.0, None),
        (mk.ArcFace, True, 0.0, None),
        (mk.ArcFace, True, 0.2, None),
        (mk.ArcFace, True, 0.2, weights),
        (lambda: mk.SphereFace2(400), False, 0.0, None),
        (lambda: mk.UniFace(400, 16.0), False, 0.0, None),
    ):
        options = {"label_smoothing": smoothing, "class_weight": weight}
        head = sharded(whole, make(), sample_rate=0.2, sample_seed=4, log_q=log_q, **options)
        optimizer = optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(3):
            before = head.weight.detach().clone()
            start, held = head.class_start, head.weight.shape[0]
            x = whole.x[own].clone().requires_grad_()
            optimizer.zero_grad()
            loss = head(x, whole.labels[own])
            loss.backward()
            same_everywhere(loss)
            index = head.weight.grad.indices()[0]
            rows = -(-len(whole.labels) // size) if size == 1 else max(ROWS[:size]) * size  # padded
            assert len(index) == min(held, max(round(0.2 * held), rows))
            here = whole.labels[(whole.labels >= start) & (whole.labels < start + held)] - start
            assert torch.isin(here, index).all()
            # The same loss by the float64 reference, over the drawn classes of all ranks only.
            drawn = [None] * size
            dist.all_gather_object(drawn, (index + start).tolist())
            biases = torch.zeros(400, dtype=torch.float64)
            for r, classes in enumerate(drawn):
                low, high = bounds(400, size, r)
                positive = torch.isin(torch.tensor(classes), whole.labels)
                if log_q:
                    free = high - low - int(positive.sum())
                    biases[torch.tensor(classes)[~positive]] = -torch.log(torch.tensor(int((~positive).sum()) / free).double())
            every = torch.tensor([c for part in drawn for c in part])
            place = torch.searchsorted(every, whole.labels)
            w = [torch.empty(0)] * size
            dist.all_gather_object(w, before)
            b = [torch.empty(0)] * size
            dist.all_gather_object(b, head.bias.detach())
            leaf = [whole.x.double().requires_grad_(), torch.cat(w)[every].double().requires_grad_()]
            margin = copy.deepcopy(head.margin)
            margin.num_classes = len(every)  # where it has one: the head of all classes may sample
            margin.zero_grad()
            want = mk.margin_cross_entropy(
                *leaf,
                torch.where(whole.labels < 0, -100, place),
                margin=margin,
                bias=torch.cat(b)[every].double() + biases[every],
                class_weight=None if weight is None else weight[every],
                label_smoothing=smoothing,
                backend="reference",
            )
            if smoothing:  # whose sum takes the logits without the correction, and each term with its weight
                valid = whole.labels >= 0
                of = torch.ones(400) if weight is None else weight
                each = (of[every] * biases[every]).sum() / of[whole.labels[valid]].double().sum()
                want = want + smoothing / len(every) * valid.sum() * each
            want.backward()
            compare(loss, want, "loss")
            compare(x.grad / size, leaf[0].grad[own], "dx", float(leaf[0].grad.norm()))
            part = (every >= start) & (every < start + held)
            compare(head.weight.grad.values(), leaf[1].grad[part], "dw", float(leaf[1].grad.norm()))
            for p, q in zip(head.margin.parameters(), margin.parameters(), strict=True):
                same_everywhere(p.grad)
                compare(p.grad, q.grad, "gradient of the margin")
            optimizer.step()
            still = torch.ones(held, dtype=torch.bool)
            still[index] = False
            assert torch.equal(head.weight[still], before[still])
            assert not torch.equal(head.weight[index], before[index])


def check_clip_grad_norm():
    """DDP's backbone and a sharded head, clipped together: one norm on all ranks, that of one process, and replicas that stay the same."""
    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    data = batches(c, 3, 4 * size)
    for options in ({}, {"sample_rate": 0.2}):
        clips = []
        net = nn.parallel.DistributedDataParallel(backbone())
        head = copy.deepcopy(sharded(case(c, bias=True), mk.L2Softmax(num_classes=c, trainable=True), batch_size=4, **options))
        parameters = [*net.parameters(), *head.parameters()]
        optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9)
        model, whole = backbone(), mk.MarginHead(D, c, mk.L2Softmax(num_classes=c, trainable=True), bias=True)
        start = case(c, bias=True)
        whole.load_state_dict(whole.state_dict() | {"weight": start.w, "bias": start.bias})
        alone = [*model.parameters(), *whole.parameters()]
        single = torch.optim.SGD(alone, lr=0.1, momentum=0.9)
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            head(net(x[rank * 4 : rank * 4 + 4]), y[rank * 4 : rank * 4 + 4]).backward()
            norm = mk.distributed.clip_grad_norm_(iter(parameters), 0.5)
            assert norm.dtype == torch.float32
            same_everywhere(norm, *(p.grad for p in net.parameters()))
            clips.append(float(norm))
            again = mk.distributed.clip_grad_norm_(parameters, 0.5)
            assert float(again) == pytest.approx(0.5, rel=1e-4), (i, float(again))
            top = mk.distributed.clip_grad_norm_(parameters, 1e9, torch.inf)
            every = [None] * size
            dist.all_gather_object(every, [float(_held(p.grad).abs().max()) for p in parameters if _held(p.grad).numel()])
            assert float(top) == max(v for part in every for v in part)
            optimizer.step()
            if not options and rank == 0:
                single.zero_grad()
                whole(model(x), y).backward()
                assert clips[-1] == pytest.approx(float(nn.utils.clip_grad_norm_(alone, 0.5)), rel=1e-4)
                single.step()
        assert min(clips) > 0.5, clips  # every step was clipped
        same_everywhere(*net.parameters(), head.margin.alpha)
        if not options and rank == 0:
            for p, q in zip(net.parameters(), model.parameters(), strict=True):
                compare(p, q, "backbone")
            compare(head.weight, whole.weight[: head.shard.stop], "weight")
        for p in net.parameters():  # replicas that have drifted apart are scaled alike
            p.grad *= 1 + rank * 2.0**-16
        same_everywhere(mk.distributed.clip_grad_norm_(parameters, 0.5))
        if size > 1:
            _one_rank_infinite(head, parameters)


def _one_rank_infinite(head: mk.MarginHead, parameters: list) -> None:
    before = [p.grad.clone() for p in parameters]
    if dist.get_rank() == 0:
        _held(head.weight.grad)[0, 0] = torch.inf
        before = [p.grad.clone() for p in parameters]
    for kind in (2.0, torch.inf):
        _raises(
            RuntimeError,
            "parameters: expected gradients of finite norm",
            lambda kind=kind: _clip(parameters, kind, error_if_nonfinite=True),
        )
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(_held(p.grad), _held(old))


def _clip(parameters: list, kind: float, **options) -> torch.Tensor:
    return mk.distributed.clip_grad_norm_(parameters, 0.1, kind, **options)


def _held(g: torch.Tensor) -> torch.Tensor:
    return g._values() if g.is_sparse else g


def check_clip_beside_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    ((x, y),) = batches(c, 1, 4 * size)
    norms, grads = [], []
    for wrap in (nn.parallel.DistributedDataParallel, lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (size,)))):
        net = wrap(backbone())
        head = sharded(case(c), mk.ArcFace(scale=16.0))
        head(net(x[rank * 4 : rank * 4 + 4]), y[rank * 4 : rank * 4 + 4]).backward()
        norms.append(mk.distributed.clip_grad_norm_([*net.parameters(), *head.parameters()], 0.1))
        grads.append([p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()])
    same_everywhere(*norms)
    compare(norms[1], norms[0], "norm")
    assert float(norms[0]) > 0.1
    for a, b in zip(*grads, strict=True):
        compare(b, a, "gradient")


class _Both(nn.Module):
    def __init__(self, net: nn.Module, head: nn.Module):
        super().__init__()
        self.net, self.inner = net, nn.ModuleDict({"head": head})

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner["head"](self.net(x), y)


def check_ddp_around_the_head():
    """Refused before a center has changed, unless DDP ignores the head, and then right."""
    size, rank = dist.get_world_size(), dist.get_rank()
    c = 8 * size  # all ranks hold as many classes, so that DDP itself sees nothing wrong
    both = _Both(backbone(), sharded(case(c), mk.ArcFace(scale=16.0)))
    before = both.inner["head"].weight.detach().clone()
    if size == 1:
        nn.parallel.DistributedDataParallel(both)
        return
    for module in (both, copy.deepcopy(both)):
        _raises(
            ValueError, "module: expected a module without a sharded MarginHead", lambda m=module: nn.parallel.DistributedDataParallel(m)
        )
    assert torch.equal(both.inner["head"].weight, before)
    nn.parallel.DistributedDataParallel(both.net)
    both._ddp_params_and_buffers_to_ignore = [f"inner.head.{k}" for k in both.inner["head"].state_dict()]
    wrapped = nn.parallel.DistributedDataParallel(both)
    apart, net = sharded(case(c), mk.ArcFace(scale=16.0)), nn.parallel.DistributedDataParallel(backbone())
    ((x, y),) = batches(c, 1, 4 * size)
    own = slice(rank * 4, rank * 4 + 4)
    wrapped(x[own], y[own]).backward()
    apart(net(x[own]), y[own]).backward()
    assert torch.equal(both.inner["head"].weight.grad, apart.weight.grad)
    for p, q in zip(both.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def check_ddp_around_a_fused_step():
    """Refused at the first forward pass, whichever was made first; a sharded head that DDP ignores trains."""
    for fused_first in (False, True):
        both = _Both(backbone(), mk.MarginHead(D, 8, mk.ArcFace(scale=16.0)))
        if fused_first:
            optimizer = optim.FusedSGD(both.inner["head"], lr=0.1)
        wrapped = nn.parallel.DistributedDataParallel(both)
        if not fused_first:
            optimizer = optim.FusedSGD(both.inner["head"], lr=0.1)
        x, y = torch.randn(4, 12), torch.tensor([0, 3, 7, 3])
        _raises(RuntimeError, "module: expected a module without the weight of a head with a fused", lambda w=wrapped, x=x, y=y: w(x, y))
        del optimizer
    both = _Both(backbone(), sharded(case(8), mk.ArcFace(scale=16.0)))
    both._ddp_params_and_buffers_to_ignore = [f"inner.head.{k}" for k in both.inner["head"].state_dict()]
    wrapped = nn.parallel.DistributedDataParallel(both)
    optimizer = optim.FusedSGD(both.inner["head"], lr=0.1)
    before = both.inner["head"].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(x, y).backward()
        optimizer.step()
    assert len(before) == 0 or not torch.equal(both.inner["head"].weight, before)


def check_dtypes_differ():
    """An error on all ranks before a collective has tensors of different sizes, whichever rank is the odd one."""
    if dist.get_world_size() == 1:
        return
    odd = dist.get_rank() == 1
    x, y = torch.randn(3, D), torch.tensor([1, 2, 3])
    for options in ({"batch_size": 4}, {}):
        head = _head(37, **options)
        half = x.to(torch.bfloat16 if odd else torch.float32)
        want = "embeddings: expected one dtype of embeddings and weight on all ranks, got ['float32/float32', 'bfloat16/float32'"
        _raises(ValueError, want, lambda h=head, v=half: h(v, y))
        _raises(ValueError, want, lambda h=head, v=half: h.topk(v, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=odd):
            _raises(ValueError, want, lambda h=head, v=x: h(v, y))
        if odd:
            head.half()
        _raises(ValueError, "'float32/float16'", lambda h=head, v=x: h(v, y))
    _raises(ValueError, "dtype: expected one value on all ranks", lambda: _head(37, dtype=torch.float64 if odd else None))


def check_fsdp_around_the_head():
    """Both are refused, before FSDP1 has exchanged anything, unless they ignore the head."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    size = dist.get_world_size()

    def both() -> _Both:
        return _Both(backbone(), sharded(case(8 * size + 1), mk.ArcFace(scale=16.0)))

    def step(model: nn.Module, head: mk.MarginHead) -> torch.Tensor:
        ((x, y),) = batches(8 * size + 1, 1, 4 * size)
        own = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
        model(x[own], y[own]).backward()
        return head.weight.grad

    def fsdp1(module: nn.Module, **options) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)

    if size > 1:
        for wrap in (fsdp1, lambda m: fsdp1(m, use_orig_params=True, sync_module_states=True), fully_shard):
            _raises(ValueError, "module: expected a module without a sharded MarginHead for FSDP", lambda w=wrap: w(both()))
    plain, first, second = both(), both(), both()
    want = step(plain, plain.inner["head"])
    wrapped = fsdp1(first, ignored_modules=[first.inner["head"]])
    fully_shard(second, ignored_params=set(second.inner["head"].parameters()))
    for model, head in ((wrapped, first.inner["head"]), (second, second.inner["head"])):
        compare(step(model, head), want, "weight")


def check_transforms_are_refused():
    head = _head(37, batch_size=4)
    _raises(RuntimeError, "process_group: expected None under the transforms of torch.func", lambda: _func_grad(head))


def _func_grad(head: mk.MarginHead) -> torch.Tensor:
    found: torch.Tensor = torch.func.grad(lambda x: head(x, torch.tensor([1, 2, 3])))(torch.randn(3, D))
    return found


def check_a_shard_of_masked_classes():
    """A bias of -inf on all classes of a rank: they are as if they were not there, in the loss, the gradients and topk."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return
    head = _head(8 * size, mk.ArcFace(scale=16.0), bias=True)
    with torch.no_grad():
        head.bias.fill_(-torch.inf if rank == size - 1 else 0.0)
        weight = [torch.empty_like(head.weight) for _ in range(size)]
        dist.all_gather(weight, head.weight.detach())
    x, y = torch.randn(3, D, generator=torch.Generator().manual_seed(rank), requires_grad=True), torch.tensor([0, 3, 7])
    loss = head(x, y)
    loss.backward()
    rows = [torch.empty(3, D) for _ in range(size)]
    dist.all_gather(rows, x.detach())
    few = torch.cat(weight[:-1])
    want = mk.margin_cross_entropy(torch.cat(rows), few, y.repeat(size), margin=mk.ArcFace(scale=16.0))
    compare(loss, want, "loss")
    assert head.weight.grad.isfinite().all()
    if rank == size - 1:
        assert not head.weight.grad.any()
        assert not head.bias.grad.any()
    scores, classes = head.topk(x.detach(), 8 * size)
    assert (scores[:, : 8 * size - 8] > -torch.inf).all()
    assert (scores[:, 8 * size - 8 :] == -torch.inf).all()
    assert (classes[:, : 8 * size - 8] < 8 * size - 8).all()


def check_activation_checkpointing():
    """The repeated pass exchanges the same rows, draws the same classes and leaves the state as it is."""
    from torch.utils.checkpoint import checkpoint

    whole, own = case(400), mine(4)
    x = torch.randn(4 * dist.get_world_size(), D, generator=torch.Generator().manual_seed(1))
    y = torch.arange(4 * dist.get_world_size()) * 7
    found = []
    for reentrant in (None, False, True):
        head = sharded(whole, mk.CurricularFace(scale=16.0), sample_rate=0.1, batch_size=4)
        for _ in range(2):
            head.zero_grad()
            leaf = x[own].clone().requires_grad_()
            loss = head(leaf, y[own]) if reentrant is None else checkpoint(head, leaf, y[own], use_reentrant=reentrant)
            loss.backward()
        found.append([loss.detach(), leaf.grad, head.weight.grad.to_dense(), *head.margin.buffers(), head.sampler.draws])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def check_deferred_start():
    """A head of the meta device, filled afterwards, is a head like another: it starts, draws, clips and is refused by DDP alike."""
    torch.manual_seed(3)
    want = _head(400, mk.L2Softmax(num_classes=400, trainable=True), sample_rate=0.1, sample_seed=5)
    head = _head(400, mk.L2Softmax(num_classes=400, trainable=True), sample_rate=0.1, sample_seed=5, device="meta").to_empty(device="cpu")
    head.margin.load_state_dict(want.margin.state_dict())
    torch.manual_seed(3)
    head.reset_parameters()
    for k, v in head.state_dict().items():
        assert torch.equal(v, want.state_dict()[k]), k
    x, y = torch.randn(3, D), torch.tensor([0, 5, 7])
    norms = []
    for h in (want, head):
        loss = h(x, y)
        loss.backward()
        same_everywhere(loss, *(p.grad for p in h.margin.parameters()))
        norms.append(mk.distributed.clip_grad_norm_(h.parameters(), 1.0))
    assert torch.equal(*norms)
    assert torch.equal(head.margin.alpha.grad, want.margin.alpha.grad)
    assert head.weight.grad.is_coalesced()
    same_everywhere(*norms)


def check_grad_scaler():
    """With an infinite gradient on one rank, all ranks skip the step and lower the scale; else all take it."""
    for kind in (torch.optim.SGD, optim.SGD):
        head = _head(2 * dist.get_world_size() + 1, batch_size=3)
        optimizer = kind(head.parameters(), lr=0.1)
        scaler = GradScaler("cpu", init_scale=8.0, growth_interval=10, process_group=dist.group.WORLD)
        last = 1 % dist.get_world_size()
        for poisoned, without in (
            (None, None),
            (0, None),
            (last, None),
            (last, 0 if last else None),
        ):  # with 4 ranks the last holds no class
            optimizer.zero_grad()
            scaler.scale(head(torch.randn(3, D), torch.tensor([0, 1, 2]))).backward()
            if dist.get_rank() == poisoned:
                head.weight.grad[-1] = torch.inf
            if dist.get_rank() == without:
                optimizer.zero_grad(set_to_none=True)
            before, scale = head.weight.detach().clone(), scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(head.weight, before) == (poisoned is not None or not len(before))
            assert scaler.get_scale() == (scale if poisoned is None else scale / 2)


def _fused_loop(fused: bool, steps: int = 3, dtype: torch.dtype = torch.float32, rule: str = "sgd", **options):
    """Two micro-batches to a step, clipping over all ranks, gradient scaling, one step that is infinite on one rank."""
    c, size = 37, dist.get_world_size()
    data = batches(c, 2 * steps, 6 * size)
    net = nn.parallel.DistributedDataParallel(backbone())
    head = sharded(testing.Case(torch.empty(0), case(c).w, torch.empty(0), None), mk.ArcFace(scale=16.0), dtype=dtype, **options)
    kinds = {"sgd": (optim.SGD, optim.FusedSGD, {"momentum": 0.9}), "adamw": (optim.AdamW, optim.FusedAdamW, {})}
    dense, fused_kind, values = kinds[rule]
    optimizer = fused_kind(head, lr=0.05, **values) if fused else dense(head.parameters(), lr=0.05, **values)
    optimizer.add_param_group({"params": list(net.parameters())})
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=10, process_group=dist.group.WORLD)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for x, y in data[2 * step : 2 * step + 2]:
            loss = head(net(x[mine(6)]), y[mine(6)]) / 2
            scaler.scale(loss * (math.inf if step == 1 and dist.get_rank() == 0 else 1.0)).backward()
        if fused:
            assert head.weight.grad is None
        scaler.unscale_(optimizer)
        norms.append(float(clip_grad_norm_([*net.parameters(), *head.parameters()], 0.2).detach()))
        scaler.step(optimizer)
        scaler.update()
    return head, net, norms, scaler.get_scale()


def check_fused_step():
    """Ends where the separate step ends, on all ranks; every rank skips the infinite step and clips alike."""
    for rule, options in (("sgd", {}), ("adamw", {"batch_size": 6}), ("sgd", {"sample_rate": 0.5, "sample_seed": 2})):
        (head, net, norms, scale), (whole, other, wanted, kept) = (_fused_loop(fused, rule=rule, **options) for fused in (True, False))
        assert (scale, norms[0] > 0.2) == (kept, True)
        for i in (0, 2):
            assert abs(norms[i] - wanted[i]) < 1e-4 * wanted[i], (rule, norms, wanted)
        compare(head.weight, whole.weight, rule, float(whole.weight.detach().norm()) or 1.0)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            same_everywhere(p)
            compare(p, q, "backbone")


def check_fused_step_of_every_head():
    """Queued rows are those of all ranks; the trained parameters of a margin and the biases get the gradients that they had."""
    for name, make in testing.HEADS.items():
        found = []
        for fused in (False, True):
            torch.manual_seed(0)
            whole = case(40)
            head = sharded(whole, make(40))
            kind = optim.FusedSGD(head, lr=0.1) if fused else optim.SGD(head.parameters(), lr=0.1)
            for step in range(2):
                kind.zero_grad()
                for part in range(2):
                    head(whole.x.roll(step + 2 * part, 0)[mine()].clone().requires_grad_(), whole.labels[mine()]).backward()
                kind.step()
            found.append([p.detach() for n, p in head.named_parameters() if n != "probe"])
        for a, b in zip(*found, strict=True):
            compare(b, a, name, float(a.norm()) or 1.0)


def check_fused_step_rounds_alike_on_any_number_of_ranks():
    """Random numbers go by the global class: nearly all centers have the bits that one process gives them."""
    c, size = 37, dist.get_world_size()
    x, y = torch.randn(4 * size, D), torch.randint(c, (4 * size,))
    whole = case(c)
    alone = mk.MarginHead(D, c, mk.ArcFace(scale=16.0), dtype=torch.bfloat16)
    with torch.no_grad():
        alone.weight.copy_(whole.w)
    head = sharded(testing.Case(torch.empty(0), whole.w, torch.empty(0), None), mk.ArcFace(scale=16.0), dtype=torch.bfloat16)
    steps = [optim.FusedSGD(one, lr=0.1, momentum=0.9, seed=11) for one in (alone, head)]
    alone(x, y).backward()
    head(x[mine(4)], y[mine(4)]).backward()
    for one in steps:
        one.step()
    want = alone.weight[head.shard.start : head.shard.stop]
    assert len(want) == 0 or float((head.weight != want).double().mean()) < 0.02
    assert len(want) == 0 or not torch.equal(want, whole.w[head.shard.start : head.shard.stop].to(want.dtype))


def check_received_bytes():
    """The bytes that the collectives count are those that the planner states."""
    size = dist.get_world_size()
    for options, plan_options in (({}, {}), ({"label_smoothing": 0.1}, {"label_smoothing": True})):
        for dtype in (torch.float32, torch.bfloat16):  # whose gradients are summed in float32
            head = _head(37, batch_size=4, **options)
            collectives.forget(head.shard.group)
            x = torch.randn(3, D, dtype=dtype, requires_grad=True)
            head(x, torch.tensor([1, 2, 3])).backward()
            want = plan.exchanged(dim=D, ranks=size, batch=4, embedding_bytes=dtype.itemsize, **plan_options)
            assert collectives.received(head.shard.group) == want


def train_replicated(wrap) -> None:
    """A whole model, backbone and head with all classes, wrapped as one: the same as training in one process on all rows."""
    size, rank, c = dist.get_world_size(), dist.get_rank(), 37
    data = batches(c, 5, 4 * size)
    want, model, whole = one_process(c, data)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone(), mk.MarginHead(D, c, mk.ArcFace(scale=16.0))
            self.head.load_state_dict({"weight": case(c).w})

        def forward(self, x, y):
            return self.head(self.backbone(x), y)

    net = wrap(Model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = net(x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    compare(losses / size, want, "losses")
    for p, q in zip(net.parameters(), (*model.parameters(), *whole.parameters()), strict=True):
        compare(p.full_tensor() if hasattr(p, "full_tensor") else p, q, "parameters")


def check_ddp_around_a_whole_model():
    train_replicated(nn.parallel.DistributedDataParallel)


def check_fsdp2_around_a_whole_model():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train_replicated(lambda net: fully_shard(net, mesh=mesh))


def check_insightface() -> None:
    """The division, the loss and the gradients of insightface's head, as they were recorded on as many ranks."""
    for name in recorded.NAMES:
        recorded.check(name, dist.get_world_size())
    for classes in (10, 2):
        head = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.4), D, classes)
        assert list(head.state_dict()) == ["weight"]
        found: list = [None] * head.world_size
        dist.all_gather_object(found, (head.class_start, head.num_local, head.weight.shape[0]))
        assert found == {10: [(0, 4, 4), (4, 3, 3), (7, 3, 3)], 2: [(0, 1, 1), (1, 1, 1), (2, 0, 0)]}[classes]
        # Ranks may bring any number of rows, which insightface's may not.
        x, y = torch.randn(ROWS[head.rank], D), torch.randint(classes, (ROWS[head.rank],))
        loss = head(x, y)
        loss.backward()
        same_everywhere(loss)
        assert head.weight.grad.isfinite().all()
    head = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.4), D, 40, sample_rate=0.6)
    loss = head(torch.randn(2, D), torch.tensor([39, head.rank]))
    loss.backward()
    same_everywhere(loss)
    drawn = torch.zeros(head.num_local, dtype=torch.bool).index_fill(0, head.weight_index, True)
    assert int(drawn.sum()) == round(0.6 * head.num_local)
    assert (head.weight.grad[drawn].norm(dim=1) > 0).all()
    assert not head.weight.grad[~drawn].any()


check_insightface.sizes = (3,)


def check_examples_of_the_documentation() -> None:
    """Those that need several ranks, on each page in one namespace; the loss is the same on every rank."""
    found = [(page, code) for page in (pages.README, *pages.DOCS) for code in pages.blocks(page, "python") if code.startswith(pages.RANKS)]
    spaces: dict = {page: {} for page, _ in found}
    assert len(found) > len(spaces) > 2
    for page, code in found:
        space = spaces[page]
        space |= pages.data(page.parent)
        space.pop("loss", None)
        exec(compile(pages.small(code), str(page), "exec"), space)
        if "loss" in space:
            same_everywhere(space["loss"].detach())
        assert space["head"].weight.isfinite().all()


check_examples_of_the_documentation.sizes = (2,)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
