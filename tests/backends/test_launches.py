"""How many kernels a step asks of a GPU, counted without one.

The tensors are on the CPU, and the step is sent the way that one on a GPU takes: the Triton backend takes CPU tensors as it does under its
interpreter, tiles and splits are those of an H100, labels are checked as on a GPU, and a launch goes through Triton's own binder and is
counted instead of compiled. Every operator of PyTorch that writes numbers counts as one launch, inside the package's own operators too;
views and empty tensors do not. The margin, the sums and the gradients are thus all there, with numbers that nobody computed.
"""

import contextlib

import pytest
import torch
from helpers.launches import Launches

import marginkernels as mk

pytest.importorskip("triton")


class _Event:
    """What the check of labels asks of an event on a GPU: it is never done."""

    def record(self):
        pass

    def query(self):
        return False


@pytest.fixture
def step(monkeypatch):
    """A function that runs a training step as on an H100 and gives the names of its launches, forward and backward."""
    from marginkernels.backend.triton import aot, backend, launch
    from marginkernels.core import labels
    from marginkernels.ops import rows

    monkeypatch.setattr(backend, "interpreting", lambda: True)
    monkeypatch.setattr(launch.Device, "of", classmethod(lambda cls, x: cls("sm_90", 132)))
    monkeypatch.setattr(labels, "on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(labels, "_pending", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    # Labels on the CPU are read at once; these are not.
    monkeypatch.setattr(rows, "checked_labels", None)
    monkeypatch.setattr("marginkernels.ops.checked_labels", lambda y, c, ignored, x, name: rows.mark_labels(y, c, ignored, name))

    def run(n, c, dim=512, dtype=torch.bfloat16, weight_dtype=torch.float32, margin=None, **options):
        x, w = torch.randn(n, dim, dtype=dtype, requires_grad=True), torch.randn(c, dim, dtype=weight_dtype, requires_grad=True)
        y, margin = torch.randint(c, (n,)), margin or mk.ArcFace()
        with Launches() as seen:
            monkeypatch.setattr(launch.Launch, "run", lambda one: seen.written.append((aot.variant(one, "sm_90").split()[0], 0)))
            loss = mk.margin_cross_entropy(x, w, y, margin=margin, backend="triton", **options)
            forward = len(seen.written)
            loss.backward()
        names = [name for name, _ in seen.written]
        assert x.grad is not None
        assert w.grad is not None
        return names[:forward], names[forward:]

    return run


def test_a_small_step_takes_few_launches(step):
    """ArcFace's defaults, bfloat16 embeddings, float32 centers, N = 64, C = 1,000: host time is most of such a step."""
    forward, backward = step(64, 1000)
    print(len(forward), forward, len(backward), backward)
    assert len(forward) + len(backward) <= 45


def test_label_smoothing_takes_few_launches(step):
    forward, _ = step(64, 1_000_000, dim=16, label_smoothing=0.1)
    assert forward.count("center_sum_kernel") == forward.count("add_splits_kernel") == 1
    print(len(forward), forward)
