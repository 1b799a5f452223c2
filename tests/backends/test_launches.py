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

            def note(one):
                if "SMOOTH" in one.constants:  # the loss kernels read the sum of the logits for label smoothing alone
                    assert one.constants["SMOOTH"] == ("label_smoothing" in options) == (one.args["logit_sum"] is not None)
                seen.written.append((aot.variant(one, "sm_90").split()[0], 0))

            monkeypatch.setattr(launch.Launch, "run", note)
            loss = mk.margin_cross_entropy(x, w, y, margin=margin, backend="triton", **options)
            forward = len(seen.written)
            loss.backward()
        names = [name for name, _ in seen.written]
        assert x.grad is not None
        assert w.grad is not None
        return names[:forward], names[forward:]

    return run


#: The package's own kernels in their order; PyTorch code are the margin, its scale, the rows that count, fills, and the gradient's seed.
SMALL = [
    "labels_kernel",
    "replace_rows_kernel",
    "prepare_rows_kernel",
    "prepare_kernel",
    "reach_kernel",
    "row_pass_kernel",
    "row_pass_kernel",
]
SMALL += ["combine_kernel", "loss_kernel", "loss_backward_kernel", "upstream_kernel", "row_gradient_kernel", "class_pass_kernel"]
SMALL += ["replace_rows_kernel"]


def test_a_small_step_takes_few_launches(step):
    """ArcFace's defaults, bfloat16 embeddings, float32 centers, N = 64, C = 1,000: host time is most of such a step."""
    forward, backward = step(64, 1000)
    assert [name for name in forward + backward if name.endswith("_kernel")] == SMALL
    assert len(forward) + len(backward) <= 45


def test_label_smoothing_adds_the_centers_up_in_two_launches(step):
    few, many = (step(64, c, dim=16, label_smoothing=0.1)[0] for c in (1000, 100_000))
    assert many.count("center_sum_kernel") == many.count("add_splits_kernel") == 1
    assert few == many


def test_a_second_step_and_a_ragged_batch_compile_no_row_kernel_anew(step, monkeypatch):
    """By Triton's own binder; a scale for each row or one for all is no variant."""
    from marginkernels.backend.triton import aot

    seen = []
    variant = aot.variant
    monkeypatch.setattr(aot, "variant", lambda one, arch: seen.append(variant(one, arch)) or seen[-1])
    for n, c in ((64, 1000), (1, 1000), (63, 1003)):
        step(n, c)
        if n == 64:
            usual = set(seen)
    assert set(seen) == usual


def test_the_counter_sees_into_operators():
    """Those of the package, and those of PyTorch that are made of others."""
    x, w, y = torch.randn(4, 8), torch.randn(5, 8), torch.arange(4)
    from marginkernels import ops
    from marginkernels.core.types import HeadInputs

    with Launches() as seen, torch.no_grad():
        ops.prepare_inputs(HeadInputs(x, w, y, True, True), "torch")
    names = [name for name, _ in seen.written]
    assert "_to_copy" in names
    assert "index_select" in names
    assert "prepare_inputs" not in names
