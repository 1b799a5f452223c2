"""Which GPU is asked, and what it says, on a machine that pretends to have some."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import marginkernels as mk
from marginkernels import loss, retrieval
from marginkernels.backend import FUSED, resolve
from marginkernels.core import labels as labels_module

ON_GPU = ("hopper", "cuda", "triton")
BF16_512 = (torch.bfloat16, torch.bfloat16, 512)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends GPUs of these compute capabilities, the first of them current, and an extension for them."""
    pytest.importorskip("triton")

    def pretend(*capabilities, driver=13000, runtime=13000):
        index = lambda device: device if isinstance(device, int) else torch.device(device).index or 0  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device="cuda": capabilities[index(device)])
        kernels = SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: runtime, fused_row=None)
        for name in ("cuda", "hopper"):
            monkeypatch.setattr(FUSED[name], "kernels", kernels, raising=False)

    return pretend


@pytest.mark.parametrize(("capability", "serve"), [((7, 5), ()), ((8, 0), ON_GPU[1:]), ((9, 0), ON_GPU), ((12, 0), ON_GPU[1:])])
def test_the_compute_capability_decides(gpus, capability, serve):
    gpus(capability)
    for name in ON_GPU:
        reason = FUSED[name].unavailable_reason()
        assert (reason is None) == (name in serve), (name, reason)
        assert reason is None or f"not {capability[0]}.{capability[1]}" in reason
        assert FUSED[name].unsupported_reason("cuda", *BF16_512) == reason


def test_the_gpu_asked_is_that_of_the_tensors(gpus):
    """Not the current one: a machine may have several kinds."""
    gpus((7, 5), (9, 0), (8, 6))
    for name in ON_GPU:
        assert FUSED[name].unavailable_reason() is None
        for device, serve in (("cuda", ()), ("cuda:0", ()), ("cuda:1", ON_GPU), ("cuda:2", ON_GPU[1:])):
            reason = FUSED[name].unsupported_reason(device, *BF16_512)
            assert (reason is None) == (name in serve), (name, device, reason)
    assert resolve("hopper", "cuda:1", *BF16_512) == "hopper"
    with pytest.raises(ValueError, match=r"on cuda:2 \(hopper: is for compute capability 9.0, not 8.6\)"):
        resolve("hopper", "cuda:2", *BF16_512)


def test_calls_ask_for_the_device_of_their_tensors(monkeypatch):
    asked = []
    for module in (loss.backends, retrieval):
        monkeypatch.setattr(module, "resolve", lambda name, device, *_: (asked.append(device), "torch")[1])
    with FakeTensorMode():
        x, w, y = (torch.ones(shape, device="cuda:1") for shape in ((2, 8), (4, 8), 2))
        for call in (lambda: mk.topk(x, w, 2), lambda: mk.margin_cross_entropy(x, w, y.long(), margin=mk.ArcFace())):
            with contextlib.suppress(Exception):  # there is no such device to go on with
                call()
    assert asked == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("driver", "runtime", "works"), [(12080, 13000, False), (13000, 13000, True), (12020, 12080, True), (13010, 12080, True)]
)
def test_a_runtime_newer_than_the_driver(gpus, driver, runtime, works):
    """Its first call would fail. Within a major version older drivers do."""
    gpus((9, 0), driver=driver, runtime=runtime)
    for name in ("hopper", "cuda"):
        reason = FUSED[name].unavailable_reason()
        assert (reason is None) == works, reason
        assert works or "was built with CUDA 13.0, and the driver is for CUDA 12.8" in reason


def test_labels_are_watched_on_their_own_device(monkeypatch):
    """Not on the current one: the event would be recorded on a stream that the copy is not on."""
    current, seen = ["cuda:0"], []

    class Event:
        def record(self):
            seen.append(("recorded", current[-1]))

    @contextlib.contextmanager
    def on(device):
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(labels_module, "_pending", [])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(seen.append(("asked", current[-1]))))
    with FakeTensorMode():
        labels_module._checked_labels._init_fn(torch.zeros(5, dtype=torch.int64, device="cuda:1"), 10, -100)
    assert seen == [("asked", "cuda:1"), ("recorded", "cuda:1")]
    assert len(labels_module._pending) == 1
