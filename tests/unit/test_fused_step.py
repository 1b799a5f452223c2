"""Fused optimizers: training loops as people write them end where the separate step ends, and what cannot be supported raises.

Each loop runs twice, with a dense gradient and with the fused step, from the same start and on the same data, on ``torch`` and on ``cpu``.
"""

import copy
import gc
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import marginkernels as mk
from marginkernels import testing
from marginkernels.backend import get

C, D, N = 61, 12, 10
RULES = {
    "sgd": (mk.optim.SGD, mk.optim.FusedSGD, {"lr": 0.2}),
    "momentum": (mk.optim.SGD, mk.optim.FusedSGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (mk.optim.SGD, mk.optim.FusedSGD, {"lr": 0.2, "momentum": 0.8, "nesterov": True}),
    "adamw": (mk.optim.AdamW, mk.optim.FusedAdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


def backends() -> list[str]:
    return [name for name in ("torch", "cpu") if get(name).unavailable_reason() is None]


@pytest.fixture(params=backends())
def backend(request):
    return request.param


class Run:
    """A backbone, a head and an optimizer of both, from a fixed start."""

    def __init__(self, fused: bool, rule: str = "momentum", margin: mk.Margin | None = None, seed: int = 0, fused_options=None, **options):
        torch.manual_seed(seed)
        self.fused = fused
        self.backbone = nn.Linear(D, D)
        options.setdefault("workspace_mb", 0)
        self.head = mk.MarginHead(D, options.pop("num_classes", C), margin or mk.ArcFace(scale=16.0), **options)
        with torch.no_grad():
            self.head.weight.mul_(10)
        dense, of_head, values = RULES[rule]
        if fused:
            self.optimizer = of_head(self.head, **values, **(fused_options or {}))
        else:
            self.optimizer = dense(self.head.parameters(), **values)
        self.optimizer.add_param_group({"params": list(self.backbone.parameters()), "weight_decay": 0.0})
        self.data = torch.Generator().manual_seed(seed + 1)

    def loss(self, rows: int = N) -> torch.Tensor:
        x = torch.randn(rows, D, generator=self.data)
        labels = torch.randint(self.head.num_classes, (rows,), generator=self.data)
        return self.head(self.backbone(x), labels)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.backbone.parameters(), *self.head.parameters()]

    def train(self, steps: int = 3, micro: int = 1) -> "Run":
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(micro):
                (self.loss() / micro).backward()
            if self.fused:
                assert self.head.weight.grad is None
            self.optimizer.step()
        return self

    def state(self) -> dict[str, torch.Tensor]:
        found = {"weight": self.head.weight.detach()} | {f"head.{k}": v for k, v in self.head.state_dict().items()}
        found |= {f"backbone.{k}": v.detach() for k, v in self.backbone.named_parameters()}
        return found | {k: v for k, v in self.optimizer.state[self.head.weight].items() if k != "draws"}


def both(loop, **options) -> tuple[Run, Run]:
    """``loop(run)`` with a dense gradient and with the fused step."""
    runs = tuple(Run(fused, **copy.deepcopy(options)) for fused in (False, True))
    for run in runs:
        loop(run)
    return runs


def same(runs: tuple[Run, Run], rtol: float = 1e-4, atol: float = 2e-6, moved: bool = True) -> None:
    dense, fused = (run.state() for run in runs)
    assert dense.keys() == fused.keys()
    for name, want in dense.items():
        torch.testing.assert_close(fused[name], want, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    if moved:
        start = Run(False, num_classes=runs[0].head.num_classes, sub_centers=runs[0].head.sub_centers).head.weight
        assert start.shape != dense["weight"].shape or not torch.allclose(start, dense["weight"], atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_have_the_bits_of_the_separate_step(backend, rule):
    dense, fused = (Run(fused, rule, backend=backend).train(20).state() for fused in (False, True))
    for name, want in dense.items():
        assert torch.equal(fused[name], want), name


HEADS = {
    "bias": (lambda: mk.Softmax(), {"bias": True}),
    "unnormalized": (lambda: mk.Softmax(), {}),
    "sub-centers": (lambda: mk.ArcFace(scale=16.0), {"sub_centers": 3}),
    "softplus": (lambda: mk.SphereFace2(C, scale=16.0), {}),
    "shared bias": (lambda: mk.UniFace(C, scale=16.0), {}),
    "inter-top-k": (lambda: mk.InterTopK(scale=16.0, penalty=0.2), {}),
    "filter": (lambda: mk.CosFace(scale=16.0, filter_above=0.2), {}),
    "class weights": (lambda: mk.ArcFace(scale=16.0), {"class_weight": torch.linspace(0.5, 2, C)}),
    "smoothing": (lambda: mk.ArcFace(scale=16.0), {"label_smoothing": 0.2}),
    "smoothing, hard": (lambda: mk.MVSoftmax(scale=16.0), {"label_smoothing": 0.2}),
    "weighted smoothing": (lambda: mk.ArcFace(scale=16.0), {"class_weight": torch.linspace(0.5, 2, C), "label_smoothing": 0.2}),
    "norm of the center": (lambda: mk.LSoftmax(), {}),
    "state per call": (lambda: mk.CurricularFace(scale=16.0, momentum=0.5), {}),
    "trained margin": (lambda: mk.L2Softmax(alpha=8.0, trainable=True), {}),
    "magnitudes": (lambda: mk.MagFace(scale=16.0, norm_range=(1.0, 10.0)), {}),
    "circle": (lambda: mk.Circle(scale=16.0), {}),
    "focal": (lambda: mk.CosFace(scale=16.0, focal_gamma=2.0), {}),
}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head(backend, kind, micro):
    """CurricularFace's ``t`` moves from one micro-batch to the next: each row keeps its own."""
    margin, options = HEADS[kind]
    same(both(lambda run: run.train(4, micro), margin=margin(), backend=backend, **options))


@pytest.mark.parametrize("head", testing.HEADS)
def test_one_step_of_all_heads(head, backend):
    runs = both(lambda run: run.train(1, 2), margin=testing.HEADS[head](C), backend=backend, rule="sgd")
    same(runs, moved=False)
    assert runs[1].optimizer._queue.probe.grad is not None


def test_mixed_labels(backend):
    def loop(run):
        for _ in range(3):
            run.optimizer.zero_grad()
            x, (a, b) = torch.randn(N, D, generator=run.data), torch.randint(C, (2, N), generator=run.data)
            run.head(run.backbone(x), a, mix=(b, torch.rand(N, generator=run.data))).backward()
            run.optimizer.step()

    same(both(loop, backend=backend))


def test_a_frozen_backbone_and_a_head_alone(backend):
    def loop(run):
        run.backbone.requires_grad_(False)
        run.train(3)

    same(both(loop, backend=backend))


# -- 1. gradient scaling and clipping --------------------------------------------------------------------------------------------


def clipped_loop(run, clip=torch.nn.utils.clip_grad_norm_, steps=5, inf_at=2):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    norms = []
    for step in range(steps):
        run.optimizer.zero_grad()
        for part in range(3):
            loss = run.loss() / 3
            if step == inf_at and part == 1:
                loss = loss * math.inf
            scaler.scale(loss).backward()
        scaler.unscale_(run.optimizer)
        norms.append(float(clip(run.parameters(), 0.3).detach()))
        scaler.step(run.optimizer)
        scaler.update()
    run.norms, run.scale = norms, scaler.get_scale()


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
@pytest.mark.parametrize("clip", ["torch", "foreach", "distributed"])
def test_the_documented_loop_ends_at_the_dense_weights(backend, clip, rule):
    """GradScaler, three micro-batches, clipping and one infinite step."""
    function = {
        "torch": torch.nn.utils.clip_grad_norm_,
        "foreach": lambda p, n: torch.nn.utils.clip_grad_norm_(p, n, foreach=False),
        "distributed": mk.distributed.clip_grad_norm_,
    }[clip]
    runs = both(lambda run: clipped_loop(run, function), backend=backend, rule=rule)
    same(runs)
    assert runs[0].scale == runs[1].scale
    wanted = [v for i, v in enumerate(runs[0].norms) if i != 2]
    assert min(wanted) > 0.3  # every step was clipped
    assert [v for i, v in enumerate(runs[1].norms) if i != 2] == pytest.approx(wanted, rel=1e-4)
    assert not math.isfinite(runs[1].norms[2])


def test_a_scaler_skips_a_step_and_counts_it():
    run = Run(True)
    before, scaler = run.head.weight.detach().clone(), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(run.loss() * math.inf).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert torch.equal(run.head.weight, before)
    assert scaler.get_scale() == 2.0
    run.optimizer.zero_grad()
    scaler.scale(run.loss()).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert not torch.equal(run.head.weight, before)


class Passes:
    """Counts the class passes."""

    def __init__(self, monkeypatch, name):
        self.count, kind = 0, type(get(name))
        for method in ("class_pass", "class_step"):
            inner = getattr(kind, method)

            def counted(backend, *args, inner=inner, method=method, **options):
                out = inner(backend, *args, **options)
                self.count += method == "class_pass" or bool(out)
                return out

            monkeypatch.setattr(kind, method, counted)


def test_the_norm_costs_a_pass_only_where_somebody_looks(backend, monkeypatch):
    run, passes = Run(True, backend=backend), Passes(monkeypatch, backend)
    run.loss().backward()
    probe = run.head.probe
    assert passes.count == 0
    assert torch.isfinite(probe.grad)
    probe.grad.mul_(0.5)
    torch._foreach_mul_([probe.grad], 2.0)
    assert passes.count == 0
    norm = torch.linalg.vector_norm(probe.grad)
    assert passes.count == 1
    assert float(probe.grad) == float(norm)
    probe.grad.div_(4)
    assert float(probe.grad) == float(norm) / 4
    assert passes.count == 1
    run.loss().backward()
    assert passes.count == 1
    assert float(probe.grad) < 2 * float(norm)
    assert passes.count == 2
    run.optimizer.step()
    assert passes.count == 3


def test_the_bound_is_never_less_than_the_norm(backend):
    for head, make in testing.HEADS.items():
        run = Run(True, margin=make(C), backend=backend, rule="sgd")
        with torch.no_grad():  # unit centers: a bound of the gradient in them
            run.head.weight.div_(run.head.weight.norm(dim=1, keepdim=True))
        run.loss().backward()
        with torch._C.DisableTorchFunctionSubclass():
            bound = float(run.head.probe.grad)
        assert float(run.head.probe.grad) <= bound * (1 + 1e-5), head


def test_exact_norm_takes_it_at_once(backend, monkeypatch):
    run, passes = Run(True, backend=backend, fused_options={"exact_norm": True}), Passes(monkeypatch, backend)
    run.loss().backward()
    assert passes.count == 1
    with torch._C.DisableTorchFunctionSubclass():
        shown = float(run.head.probe.grad)
    dense = Run(False, backend=backend)
    dense.loss().backward()
    assert shown == pytest.approx(float(dense.head.weight.grad.norm()), rel=1e-5)


def test_gradients_that_are_replaced_scaled_and_zeroed(backend):
    """``p.grad = p.grad / 2``, ``p.grad *= 2``, zeros in place between two micro-batches."""

    def halved(run):
        run.optimizer.zero_grad()
        run.loss().backward()
        for p in run.parameters():
            if p.grad is not None:
                p.grad = p.grad / 2
        run.loss().backward()
        for p in run.parameters():
            if p.grad is not None:
                p.grad *= 3
        run.optimizer.step()

    def zeroed(run):
        run.loss().backward()
        run.head.zero_grad(set_to_none=False)
        run.loss().backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.loss().backward()
        run.optimizer.step()

    def scaled_to_zero(run):
        run.loss().backward()
        for p in run.parameters():
            if p.grad is not None:
                p.grad.mul_(0.0)
        run.optimizer.step()

    for loop in (halved, zeroed, scaled_to_zero):
        same(both(loop, backend=backend), moved=False)


def test_what_one_number_cannot_stand_for_raises():
    run = Run(True)
    run.loss().backward()
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match="clip_grad_value_: expected a head without a fused optimizer"):
            torch.nn.utils.clip_grad_value_([run.head.probe], 0.1, foreach=foreach)
    with pytest.raises(RuntimeError, match="norm_type: expected 2 for a head with a fused optimizer"):
        torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0, norm_type=math.inf)
    with pytest.raises(RuntimeError, match="norm_type: expected 2"):
        mk.distributed.clip_grad_norm_(run.parameters(), 1.0, norm_type=1.0)


# -- 2. accumulation, 4. the queue ------------------------------------------------------------------------------------------------


def test_seven_micro_batches_of_different_sizes(backend, monkeypatch):
    def loop(run):
        for _ in range(2):
            run.optimizer.zero_grad()
            for rows in (3, 1, 8, 0, 5, 2, 20):
                run.loss(rows).backward()
            run.optimizer.step()

    same(both(loop, backend=backend))
    passes, run = Passes(monkeypatch, backend), Run(True, backend=backend)
    for _ in range(5):
        run.loss().backward()
    run.optimizer.step()
    assert passes.count == 1


def test_a_forward_pass_before_the_step_sees_the_old_weight(backend):
    def loop(run):
        run.loss().backward()
        seen = run.head(torch.ones(1, D), torch.zeros(1, dtype=torch.int64))
        run.optimizer.step()
        run.seen = (seen, run.head(torch.ones(1, D), torch.zeros(1, dtype=torch.int64)))

    dense, fused = both(loop, backend=backend)
    for want, got in zip(dense.seen, fused.seen, strict=True):
        torch.testing.assert_close(got, want)
    assert dense.seen[0] != dense.seen[1]


def test_two_outstanding_forward_passes_and_a_step_between(backend):
    """As with a dense gradient, autograd notices that the weight has changed."""
    for fused in (False, True):
        run = Run(fused, backend=backend)
        first, second = run.loss(), run.loss()
        first.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


@pytest.mark.parametrize("write", ["mul_", "load_state_dict", "data"])
def test_a_weight_that_somebody_else_has_written_raises(write, backend):
    run = Run(True, backend=backend)
    run.loss().backward()
    with torch.no_grad():
        if write == "mul_":
            run.head.weight.mul_(1.5)
        elif write == "data":
            run.head.weight.data = run.head.weight.data.clone()
        else:
            run.head.load_state_dict(run.head.state_dict())
    held = run.head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="weight: expected the class centers as they were in the forward pass"):
        run.optimizer.step()
    with pytest.raises(RuntimeError, match="weight: expected the class centers as they were"):
        torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0)
    assert torch.equal(run.head.weight, held)
    run.optimizer.zero_grad()
    run.loss().backward()
    run.optimizer.step()


def test_second_backward_passes(backend):
    def loop(run):
        loss = run.loss()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        run.optimizer.step()

    same(both(loop, backend=backend), moved=False)


def test_gradients_of_other_tensors_leave_nothing():
    def loop(run):
        x = torch.randn(N, D, generator=run.data, requires_grad=True)
        labels = torch.randint(C, (N,), generator=run.data)
        torch.autograd.grad(run.head(x, labels), [x])
        run.head(x, labels).backward(inputs=[x])
        run.loss().backward()
        run.optimizer.step()

    runs = both(loop, rule="sgd")
    same(runs, moved=False)


def test_what_empties_the_queue():
    run = Run(True)
    model = nn.ModuleList([run.backbone, run.head])
    for empty in (run.optimizer.zero_grad, run.head.zero_grad, model.zero_grad):
        run.loss().backward()
        assert run.optimizer._queue.records
        empty()
        assert run.head.probe.grad is None
        before = run.head.weight.detach().clone()
        run.optimizer.step()  # nothing to do
        assert torch.equal(run.head.weight, before)
        assert not run.optimizer._queue.records


def test_a_gradient_is_used_once():
    run = Run(True)
    run.loss().backward()
    run.optimizer.step()
    with pytest.raises(RuntimeError, match="step: expected a backward pass since"):
        run.optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad: expected a call between"):
        run.loss().backward()
    run.optimizer.zero_grad()
    run.loss().backward()
    run.optimizer.step()


def test_another_loss_on_the_same_weight(backend):
    def loop(run):
        for _ in range(3):
            run.optimizer.zero_grad()
            (run.loss() + 0.1 * (run.head.weight**2).sum()).backward()
            run.optimizer.step()
        run.optimizer.zero_grad()
        (0.1 * (run.head.weight**3).sum()).backward()  # of that loss alone
        run.optimizer.step()

    same(both(loop, backend=backend))
    run = Run(True, backend=backend)
    (run.loss() + run.head.weight.sum()).backward()
    with pytest.raises(RuntimeError, match="the norm of the sum cannot be told from two norms"):
        torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0)


def test_a_collected_optimizer_returns_the_head_to_dense_gradients():
    run = Run(True)
    names = [name for name, _ in run.head.named_parameters()]
    assert names == ["weight", "probe"]
    run.loss().backward()
    outstanding = run.loss()
    del run.optimizer
    gc.collect()
    assert [name for name, _ in run.head.named_parameters()] == ["weight"]
    with pytest.raises(RuntimeError, match="optimizer: expected the fused optimizer that was attached"):
        outstanding.backward()
    run.loss().backward()
    assert run.head.weight.grad is not None
    mk.optim.FusedSGD(run.head)
    gc.collect()
    mk.optim.FusedSGD(run.head)


def test_copies_and_pickles_carry_no_queue():
    run = Run(True)
    run.loss().backward()
    buffer = io.BytesIO()
    torch.save(run.head, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(run.head), pickle.loads(pickle.dumps(run.head)), torch.load(buffer, weights_only=False)):
        assert [name for name, _ in twin.named_parameters()] == ["weight"]
        twin(torch.ones(2, D), torch.zeros(2, dtype=torch.int64)).backward()
        assert twin.weight.grad is not None
        optimizer = mk.optim.FusedSGD(twin, lr=0.1)
        optimizer.zero_grad()
        twin(torch.ones(2, D), torch.zeros(2, dtype=torch.int64)).backward()
        assert twin.weight.grad is None
        optimizer.step()
    assert run.head.probe.grad is not None
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"FusedSGD: expected state_dict\(\), got a copy"):
            copied(run.optimizer)


# -- 3. state, 6. groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_state_dicts(rule, backend):
    """To the same bits, also from what the separate optimizer saved, and as others expect of a state dict."""
    whole = Run(True, rule, backend=backend).train(3)
    half = Run(True, rule, backend=backend).train(2)
    saved = io.BytesIO()
    torch.save({"head": half.head.state_dict(), "backbone": half.backbone.state_dict(), "optimizer": half.optimizer.state_dict()}, saved)
    saved.seek(0)
    found = torch.load(saved, weights_only=True)
    assert "probe" not in found["head"]
    other = Run(True, rule, backend=backend, seed=5)
    other.head.load_state_dict(found["head"])
    other.backbone.load_state_dict(found["backbone"])
    other.optimizer.load_state_dict(found["optimizer"])
    other.data = half.data
    other.train(1)
    for name, want in whole.state().items():
        assert torch.equal(other.state()[name], want), name
    dense = Run(False, rule, backend=backend).train(2)
    mixed = Run(True, rule, backend=backend, seed=5)
    mixed.head.load_state_dict(dense.head.state_dict())
    mixed.backbone.load_state_dict(dense.backbone.state_dict())
    mixed.optimizer.load_state_dict(dense.optimizer.state_dict())
    mixed.data = dense.data
    mixed.train(1)
    for name, want in whole.state().items():
        torch.testing.assert_close(mixed.state()[name], want, msg=name)


def test_state_is_made_at_once_and_keeps_its_dtype():
    head = mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.bfloat16)
    optimizer = mk.optim.FusedAdamW(head, state_dtype=torch.float32)
    assert {k: v.dtype for k, v in optimizer.state[head.weight].items()} == {
        "step": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
        "draws": torch.int64,
    }
    optimizer.state[head.weight]["exp_avg"].fill_(1 + 2**-12)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[head.weight]["exp_avg"].dtype == torch.float32
    assert float(optimizer.state[head.weight]["exp_avg"][0, 0]) == 1 + 2**-12
    halves = mk.optim.FusedSGD(mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.bfloat16), momentum=0.9)
    assert [v.dtype for v in halves.state[halves._weight].values()] == [torch.bfloat16, torch.int64]
    quarter = mk.optim.FusedSGD(mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.float16), momentum=0.9)
    assert quarter.state[quarter._weight]["momentum_buffer"].dtype == torch.float32


def test_groups_schedulers_and_defaults(backend):
    def loop(run):
        assert run.optimizer.defaults["lr"] == 0.2
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
        for _ in range(3):
            run.train(1)
            scheduler.step()
        assert [group["lr"] for group in run.optimizer.param_groups] == [0.025, 0.025]
        run.optimizer.param_groups[0]["momentum"] = 0.5
        run.train(1)

    same(both(loop, backend=backend, bias=True, margin=mk.Softmax()))


def test_momentum_that_is_set_later(backend):
    def loop(run):
        run.train(1)
        run.optimizer.param_groups[0]["momentum"] = 0.5
        run.train(2)

    same(both(loop, backend=backend, rule="sgd"))


def test_closures(backend):
    def loop(run):
        def closure():
            run.optimizer.zero_grad()
            loss = run.loss()
            loss.backward()
            return loss

        run.losses = [float(run.optimizer.step(closure).detach()) for _ in range(3)]

    runs = both(loop, backend=backend)
    same(runs)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


BAD = [
    ({"rounding": "up"}, ValueError, "rounding: expected None"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype: expected None"),
    ({"exact_norm": 1}, TypeError, "exact_norm: expected True or False"),
    ({"seed": 0.5}, ValueError, "seed: expected an integer"),
    ({"lr": -1.0}, ValueError, "lr: expected"),
]


@pytest.mark.parametrize(("options", "kind", "text"), BAD)
def test_wrong_options_leave_the_head_alone(options, kind, text):
    head = mk.MarginHead(D, C, mk.ArcFace())
    for optimizer in (mk.optim.FusedSGD, mk.optim.FusedAdamW):
        with pytest.raises(kind, match=text):
            optimizer(head, **options)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    mk.optim.FusedSGD(head)


def test_heads_that_cannot_be_served():
    def head(**options):
        return mk.MarginHead(D, C, mk.ArcFace(), **options)

    with pytest.raises(TypeError, match="head: expected a MarginHead, got Linear"):
        mk.optim.FusedSGD(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend: expected a fused backend"):
        mk.optim.FusedSGD(head(backend="reference"))
    with pytest.raises(ValueError, match="sparse_grad: expected True"):
        mk.optim.FusedSGD(head(sample_rate=0.5, sparse_grad=False))
    with pytest.raises(TypeError, match="weight: expected a plain parameter"):
        mk.optim.FusedSGD(nn.utils.parametrizations.weight_norm(head()))
    one = head()
    keep = mk.optim.FusedSGD(one)
    with pytest.raises(RuntimeError, match="head: expected a head without a fused optimizer"):
        mk.optim.FusedAdamW(one)
    del keep
    pruned = head(sub_centers=2)
    optimizer = mk.optim.FusedSGD(pruned)
    pruned.prune(torch.ones(C, 2))
    with pytest.raises(RuntimeError, match="head: expected the weight that this optimizer was made with"):
        optimizer.step()


# -- transforms, compilation, checkpoints of activations ---------------------------------------------------------------------------


def test_transforms_of_torch_func_get_their_gradients():
    run = Run(True)
    x, labels = torch.randn(N, D), torch.randint(C, (N,))

    def loss(w):
        return torch.func.functional_call(run.head, {"weight": w}, (x, labels))

    got = torch.func.grad(loss)(run.head.weight.detach())
    assert got.shape == (C, D)
    assert not run.optimizer._queue.records


def test_activation_checkpointing(backend):
    def loop(run):
        for reentrant in (False, True):
            run.optimizer.zero_grad()
            x = torch.randn(N, D, generator=run.data, requires_grad=True)
            labels = torch.randint(C, (N,), generator=run.data)
            torch.utils.checkpoint.checkpoint(lambda v, y: run.head(run.backbone(v), y), x, labels, use_reentrant=reentrant).backward()
            run.optimizer.step()

    same(both(loop, backend=backend, margin=mk.CurricularFace(scale=16.0)))


def test_averages_of_a_model_with_its_head_last():
    run = Run(True)
    model = nn.ModuleDict({"backbone": run.backbone, "head": run.head})
    average, total = AveragedModel(model), {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    for _ in range(3):
        run.train(1)
        average.update_parameters(model)
        total = {k: total[k] + v for k, v in model.state_dict().items()}
    for name, v in total.items():
        torch.testing.assert_close(average.module.state_dict()[name], v / 3)


# -- sampled heads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_sampled_heads_update_the_drawn_rows_alone(backend, rule):
    """In one backward pass to the same bits; several draws make one step of all rows that any drew."""
    for micro, sub_centers in ((1, 1), (3, 1), (2, 2)):
        options = {"sample_rate": 0.3, "backend": backend, "rule": rule, "sub_centers": sub_centers, "log_q": True}
        runs = both(lambda run, micro=micro: run.train(4, micro), **options)
        same(runs, moved=False)
        if micro == 1:
            assert torch.equal(runs[0].head.weight, runs[1].head.weight)
    run = Run(True, rule, sample_rate=0.3, backend=backend)
    before = run.head.weight.detach().clone()
    run.train(1)
    drawn = torch.zeros(C, dtype=torch.bool)
    drawn[run.head.sampler.index] = True
    assert torch.equal(run.head.weight[~drawn], before[~drawn])
    assert not torch.equal(run.head.weight[drawn], before[drawn])
    clipped = both(lambda run: clipped_loop(run, mk.distributed.clip_grad_norm_), sample_rate=0.3, backend=backend, rule=rule)
    same(clipped, moved=False)


@pytest.mark.parametrize("rule", RULES)
def test_a_draw_without_rows_is_stepped_with_too(backend, rule):
    """The momentum and the decay of the drawn classes go on, whether or not the draw's batch had a row."""

    def loop(run: Run) -> None:
        for batches in ((N,), (0,), (N, 0), (0, 0)):
            run.optimizer.zero_grad()
            for rows in batches:
                run.loss(rows).backward()
            run.optimizer.step()

    runs = both(loop, sample_rate=0.3, backend=backend, rule=rule)
    same(runs, moved=False)


def test_draws_and_whole_batches_between_two_steps_raise():
    run = Run(True, sample_rate=0.3)
    run.loss().backward()
    run.head.eval()
    run.loss().backward()
    with pytest.raises(RuntimeError, match="sample_rate: expected micro-batches that all draw classes"):
        run.optimizer.step()


# -- memory ------------------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that is made, also by the C++ kernels."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.largest, cpu = 0, pytest.importorskip("marginkernels.backend.cpu")
        inner = cpu._empty

        def empty(shape, dtype, purpose):
            self.largest = max(self.largest, math.prod(shape) * dtype.itemsize)
            return inner(shape, dtype, purpose)

        monkeypatch.setattr(cpu, "_empty", empty)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {v.untyped_storage().data_ptr() for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
        for v in torch.utils._pytree.tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, v.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_weights_size_is_made(backend, rule, dtype, monkeypatch):
    """In backward passes, clipping and the step; a dense gradient is found by the same count."""
    monkeypatch.setattr("marginkernels.core.numerics.CHUNK_ELEMENTS", 1 << 12)
    monkeypatch.setattr("marginkernels.core.numerics.LEAST_CHUNK", 64)
    monkeypatch.setattr("marginkernels.optim.rows.CHUNK_ELEMENTS", 1 << 12)
    classes = 6000
    whole = classes * D * dtype.itemsize
    found = {}
    for fused in (False, True):
        run = Run(fused, rule, num_classes=classes, backend=backend, dtype=dtype)
        run.train(1)
        losses = [run.loss() for _ in range(2)]
        with Allocations(monkeypatch) as counted:
            run.optimizer.zero_grad()
            for loss in losses:
                loss.backward()
            torch.nn.utils.clip_grad_norm_(run.parameters(), 0.1)
            run.optimizer.step()
        found[fused] = counted.largest
    assert found[False] >= whole
    assert found[True] < whole / 2


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(True)
        run.train(2)
        clipped_loop(run)


# -- the cpu backend's kernel, and low precision -----------------------------------------------------------------------------------

needs_cpu = pytest.mark.skipif("cpu" not in backends(), reason="the C++ kernels are not built")


@needs_cpu
@pytest.mark.parametrize("kind", HEADS)
def test_which_heads_are_updated_inside_the_class_pass(kind, monkeypatch):
    """All but those whose gradient has a second part."""
    calls, cpu = [], type(get("cpu"))
    for method in ("class_pass", "class_step"):
        inner = getattr(cpu, method)

        def noted(self, *args, inner=inner, method=method):
            out = inner(self, *args)
            if (method == "class_step" and out) or (method == "class_pass" and args[4]):
                calls.append(method)
            return out

        monkeypatch.setattr(cpu, method, noted)
    margin, options = HEADS[kind]
    Run(True, margin=margin(), backend="cpu", **options).train(1, 2)
    second = kind in ("weighted smoothing", "norm of the center")
    assert set(calls) == {"class_pass" if second else "class_step"}


@needs_cpu
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_the_number_of_threads_does_not_show(rule):
    """In the step; a row pass of another number of threads differs in its last bits, so all run with one."""
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        run = Run(True, rule, num_classes=3000, backend="cpu", dtype=torch.bfloat16)
        for _ in range(2):
            torch.set_num_threads(1)
            run.optimizer.zero_grad()
            run.loss(64).backward()
            torch.set_num_threads(threads)
            run.optimizer.step()
        results.append(run.state())
    torch.set_num_threads(before)
    for one in results[1:]:
        for name, want in results[0].items():
            assert torch.equal(one[name], want), name


@needs_cpu
def test_a_workspace_serves_a_step_of_one_micro_batch():
    for micro in (1, 2):
        same(both(lambda run, micro=micro: run.train(3, micro), backend="cpu", workspace_mb=64, num_classes=700))


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_bfloat16_centers_and_state(backend, rule):
    """Near the float32 run, and the same twice; another seed rounds in another way."""
    exact = Run(False, rule, num_classes=300, backend=backend)
    runs = [Run(True, rule, num_classes=300, backend=backend, dtype=torch.bfloat16, fused_options={"seed": seed}) for seed in (0, 0, 1)]
    with torch.no_grad():
        for run in runs:  # not every version of PyTorch draws the same numbers in every dtype
            run.head.weight.copy_(exact.head.weight)
    for run in (exact, *runs):
        run.train(5)
    weights = [run.head.weight.detach() for run in runs]
    assert weights[0].dtype == torch.bfloat16
    assert all(v.dtype == torch.bfloat16 for k, v in runs[0].optimizer.state[runs[0].head.weight].items() if k not in ("step", "draws"))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[0].float(), exact.head.weight.detach(), rtol=0.05, atol=0.1 if rule == "adamw" else 0.02)


def test_backends_draw_the_same_numbers():
    """Where the sums of two backends agree, so do the centers: nearly all of them have the same bits."""
    if "cpu" not in backends():
        pytest.skip("the C++ kernels are not built")
    found = [Run(True, "sgd", backend=name, dtype=torch.bfloat16).train(1).head.weight.detach() for name in ("torch", "cpu")]
    other = Run(True, "sgd", backend="cpu", dtype=torch.bfloat16, fused_options={"seed": 3}).train(1).head.weight.detach()
    assert float((found[0] != found[1]).float().mean()) < 0.01
    assert float((found[0] != other).float().mean()) > 0.1


def test_rounding_to_nearest_is_asked_for_by_name():
    def state(**options):
        run = Run(True, dtype=torch.bfloat16, fused_options=options)
        return run.optimizer.state[run.head.weight].keys()

    assert "draws" in state()
    assert "draws" in state(rounding="stochastic")
    assert "draws" not in state(rounding="nearest")
    single = Run(True, fused_options={"rounding": "stochastic"})
    assert "draws" not in single.optimizer.state[single.head.weight]
    mixed = Run(True, fused_options={"state_dtype": torch.bfloat16})
    assert "draws" in mixed.optimizer.state[mixed.head.weight]


def test_a_resumed_run_draws_on():
    """The count of draws is in the state: the same bits as a run that was not interrupted."""
    whole = Run(True, dtype=torch.bfloat16).train(4)
    half = Run(True, dtype=torch.bfloat16).train(2)
    other = Run(True, dtype=torch.bfloat16, seed=9, fused_options={"seed": 77})
    other.head.load_state_dict(half.head.state_dict())
    other.backbone.load_state_dict(half.backbone.state_dict())
    other.optimizer.load_state_dict(half.optimizer.state_dict())
    other.data = half.data
    other.train(2)
    for name, want in whole.state().items():
        assert torch.equal(other.state()[name], want), name


# -- checkpoints -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints(rule, dtype, tmp_path):
    options = {"backend": "torch", "dtype": dtype, "bias": True, "margin": mk.Softmax()}
    whole, half = (Run(True, rule, **copy.deepcopy(options)).train(steps) for steps in (4, 2))
    mk.distributed.save(tmp_path / "step-2", half.head, half.optimizer, {"backbone": half.backbone.state_dict()})
    other = Run(True, rule, seed=4, **copy.deepcopy(options))
    found = mk.distributed.load(tmp_path / "step-2", other.head, other.optimizer, {"backbone": other.backbone.state_dict()})
    other.backbone.load_state_dict(found["backbone"])
    other.data = half.data
    other.train(2)
    for name, want in whole.state().items():
        assert torch.equal(other.state()[name], want), name


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw"])
def test_state_dicts_by_name(rule):
    """As ``torch.distributed.checkpoint`` and FSDP's users take them: no gradient is made for it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    whole, half, other = (Run(True, rule, seed=seed).train(steps) for seed, steps in ((0, 4), (0, 2), (6, 0)))
    models = [nn.ModuleDict({"backbone": run.backbone, "head": run.head}) for run in (half, other)]
    weights, state = get_state_dict(models[0], half.optimizer)
    assert half.head.weight.grad is None
    assert not any("probe" in name for name in weights)
    set_state_dict(models[1], other.optimizer, model_state_dict=weights, optim_state_dict=state)
    other.data = half.data
    other.train(2)
    for name, want in whole.state().items():
        assert torch.equal(other.state()[name], want), name


# -- what the planted mistakes ask for ----------------------------------------------------------------------------------------------


def test_a_scaled_upstream_reaches_every_part(backend):
    """Halved after the backward pass: label smoothing, the norm of the center, all parts of the gradient."""

    def loop(run):
        run.loss().backward()
        for p in run.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
        run.optimizer.step()

    for margin, options in (HEADS["smoothing"], HEADS["smoothing, hard"], HEADS["weighted smoothing"], HEADS["norm of the center"]):
        same(both(loop, margin=margin(), backend=backend, rule="sgd", **options), moved=False)


def test_cleared_rows_are_forgotten():
    """A module around the head sets gradients to None; the next step has the rows of the next pass alone."""

    def loop(run):
        run.loss().backward()
        for p in run.parameters():
            p.grad = None
        run.loss().backward()
        run.optimizer.step()

    same(both(loop, rule="sgd"), moved=False)


def test_chunks_of_classes(backend, monkeypatch):
    """The path by chunks, of several; two micro-batches, sub-centers, biases."""
    monkeypatch.setattr("marginkernels.core.numerics.CHUNK_ELEMENTS", 64)
    monkeypatch.setattr("marginkernels.core.numerics.LEAST_CHUNK", 7)
    for options in (
        {},
        {"sub_centers": 2},
        {"bias": True, "margin": mk.Softmax()},
        {"class_weight": torch.rand(C), "label_smoothing": 0.1},
    ):
        same(both(lambda run: run.train(2, 2), backend=backend, **copy.deepcopy(options)), moved=False)


def test_steps_draw_anew():
    run = Run(True, "sgd", dtype=torch.bfloat16, fused_options={"rounding": None})
    run.optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        run.head.weight.fill_(1.0)
    run.optimizer.param_groups[0].update(lr=1.0, weight_decay=2.0**-9)  # moves 1 by a quarter of a last place below it
    moved = []
    for _ in range(2):
        before = run.head.weight.detach().clone()
        run.optimizer.zero_grad()
        (run.loss() * 0).backward()
        run.optimizer.step()
        moved.append(run.head.weight != before)
        with torch.no_grad():
            run.head.weight.fill_(1.0)
    assert 0.1 < float(moved[0].float().mean()) < 0.9
    assert not torch.equal(*moved)
