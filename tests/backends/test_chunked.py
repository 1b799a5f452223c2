"""What the ``torch`` backend asks a device to do for a chunk of classes: launches over N x chunk numbers, and memory of that size."""

import pytest
import torch
from helpers.launches import Launches

from marginkernels.backend import get
from marginkernels.core.nontarget import NonTarget
from marginkernels.core.types import PassInputs, Request, Upstream

N, D, C = 96, 16, 5000


def passes(non_target, dtype, bias):
    """The launches of the row pass and of the class pass over one chunk of all classes."""
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(N, D, generator=g).to(dtype), torch.randn(C, D, generator=g), torch.randint(C, (N,), generator=g)
    ones = torch.ones(N)
    row = None if non_target == NonTarget.IDENTITY else 0.1 * ones
    p = PassInputs(x, ones, w, torch.zeros(C) if bias else None, y, 16 * ones, row, row, non_target, True)
    with Launches(N * C) as a:
        out = get("torch").row_pass(p, Request.log_sum_exp(need_center=True))
    with Launches(N * C) as b:
        get("torch").class_pass(p, Upstream(out.lse, ones, None, ones, ones if bias else None), out.class_factor, out.saved, True, bias)
    return a, b


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_passes_over_a_chunk(bias):
    """Product, logit, maximum, difference, exponential, sum; and in the class pass the weight: each in the same memory. Ten or more
    launches that write N x chunk numbers, into up to seven tensors at once, before."""
    row, class_ = passes(NonTarget.IDENTITY, torch.float32, bias)
    own = "scatter_"  # one number a row, whatever the tensor's size
    assert [name for name in row.large(N * C) if name != own] == ["mm", "addcmul" if bias else "mul_", "sub_", "exp_"]
    assert row.most == 1
    of_bias = ["mul"] if bias else []
    assert [name for name in class_.large(N * C) if name != own] == ["mm", "addcmul" if bias else "mul_", "sub_", "exp_", *of_bias, "mul"]
    assert class_.most == 1 + bias


def test_half_precision_adds_one_copy():
    """The weights in the embeddings' dtype, for the second product. A CPU also widens the operands of a product; a GPU does not."""
    row, class_ = passes(NonTarget.IDENTITY, torch.bfloat16, False)
    on_cpu = ["_to_copy"]
    assert [name for name in row.large(N * C) if name != "scatter_"] == ["mm", "mul_", "sub_", "exp_", "_to_copy", *on_cpu]
    assert [name for name in class_.large(N * C) if name != "scatter_"] == ["mm", "mul_", "sub_", "exp_", "mul", *on_cpu]


def test_the_count_counts():
    """The counter itself: a view and an empty tensor are no launch; what is freed is no longer alive."""
    with Launches(6) as launches:
        v = torch.ones(2, 3)
        v.view(6).mul_(2)
        torch.empty(7)
        w = v + 1
        del w
        u = v.exp()
    assert [name for name, _ in launches.written] == ["ones", "mul_", "add", "exp"]
    assert launches.most == 2
    assert u.shape == (2, 3)
