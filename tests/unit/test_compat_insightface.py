"""``marginkernels.compat.insightface`` beside what insightface's own head gave; its ranks are in helpers/on_ranks.py.

helpers/insightface.json was recorded from recognition/arcface_torch of insightface at commit 7fadd420 on a CPU, with ``Tensor.cuda`` made
the identity, on 1 and 3 Gloo ranks.
"""

import pytest
import torch
from helpers import insightface as recorded

import marginkernels as mk
from marginkernels.compat import insightface


@pytest.mark.parametrize("name", recorded.NAMES)
def test_loss_and_gradients_are_insightfaces(name):
    recorded.check(name, size=1)


@pytest.mark.parametrize("name", recorded.NAMES)
def test_their_margin_objects_are_known_by_their_attributes(name):
    class Theirs(torch.nn.Module):
        pass

    mine = recorded.margin_of(name)
    foreign = Theirs()
    vars(foreign).update({k: v for k, v in vars(mine).items() if not k.startswith("_")})
    expected, found = insightface.fused_margin(mine), insightface.fused_margin(foreign)
    assert (type(found), found.extra_repr()) == (type(expected), expected.extra_repr())


def test_margins_that_cannot_be_fused_are_refused():
    for margin in (torch.nn.Identity(), lambda logits, labels: logits, None, 3):
        with pytest.raises(TypeError, match="margin_loss"):
            insightface.PartialFC_V2(margin, 8, 10)
    with pytest.raises(ValueError, match="m1 = 2"):
        insightface.PartialFC_V2(insightface.CombinedMarginLoss(64.0, 2.0, 0.5, 0.0), 8, 10)
    with pytest.raises(TypeError, match="PartialFC_V2"):
        insightface.CosFace()(torch.zeros(1, 2), torch.zeros(1, 1))


def test_a_margin_of_this_package_keeps_its_state_there():
    head = insightface.PartialFC_V2(mk.CurricularFace(16.0), 8, 10)
    assert set(head.state_dict()) == {"weight", "margin_softmax.t"}
    head(torch.randn(4, 8), torch.arange(4))
    assert head.margin_softmax.t != 0


def test_attributes_and_state_are_insightfaces():
    torch.manual_seed(3)
    head = insightface.PartialFC_V2(insightface.CosFace(), embedding_size=8, num_classes=11, sample_rate=0.5, fp16=False)
    torch.manual_seed(3)
    assert torch.equal(head.weight, torch.normal(0, 0.01, (11, 8)))
    assert (head.rank, head.world_size, head.num_local, head.class_start, head.num_sample) == (0, 1, 11, 0, 5)
    assert (head.embedding_size, head.sample_rate, head.fp16, head._version) == (8, 0.5, False, 2)
    assert list(head.state_dict()) == ["weight"]


def test_a_margin_that_changes_while_training():
    head, x, y = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.4), 8, 10), torch.randn(4, 8), torch.arange(4)
    before = head(x, y)
    head.margin_softmax.m = 0.1
    assert head(x, y) < before
    torch.testing.assert_close(head(x, y), mk.margin_cross_entropy(x, head.weight, y, margin=mk.CosFace(16.0, 0.1)))


def test_sampled_classes_are_the_softmax_over_them_with_dense_gradients():
    head = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.2), 8, 40, sample_rate=0.25)
    x, y = torch.randn(4, 8), torch.tensor([3, 39, 3, 17])
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        head.weight.grad = None
        loss = head(x, y)
        loss.backward()
        index = head.weight_index
        draws.append(index)
        assert index.shape == (head.num_sample,)
        assert set(y.tolist()) <= set(index.tolist())
        chosen = head.weight.detach()[index].requires_grad_()
        expected = mk.margin_cross_entropy(x, chosen, torch.searchsorted(index, y), margin=mk.CosFace(16.0, 0.2))
        expected.backward()
        torch.testing.assert_close(loss, expected)
        assert not head.weight.grad.is_sparse
        torch.testing.assert_close(head.weight.grad, torch.zeros(40, 8).index_copy(0, index, chosen.grad))
    assert torch.equal(draws[0], draws[1])  # torch's seed decides
    assert not torch.equal(draws[0], draws[2])


def test_fp16_rounds_products_and_keeps_the_loss_in_float32():
    head = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.2), 32, 40)
    half = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.2), 32, 40, fp16=True)
    half.load_state_dict(head.state_dict())
    x, y = 1e4 * torch.randn(6, 32), torch.arange(6)  # beyond float16 before they are normalized
    exact, found = head(x, y), half(x, y)
    assert found.dtype == torch.float32
    assert exact != found
    torch.testing.assert_close(found, exact, rtol=3e-3, atol=0)


def test_what_differs_the_loss_of_a_row_has_no_cap():
    """insightface's is -log(max(p, 1e-30)), at most 69.08, with the gradient of the loss that has no cap."""
    found, expected = recorded.results("cos-capped", size=1)
    assert found["loss"] > expected["loss"] * 1.001


def test_what_differs_label_minus_1_and_batches_of_any_size():
    head = insightface.PartialFC_V2(insightface.CosFace(16.0, 0.2), 8, 10)
    x, y = torch.randn(4, 8), torch.tensor([[1], [-1], [5], [2]])
    kept = y[:, 0] >= 0
    loss = head(x, y)
    assert y.shape == (4, 1)  # insightface squeezes it in place
    torch.testing.assert_close(loss, head(x[kept], y[kept]))


def test_what_differs_the_means_of_the_computation():
    head = insightface.PartialFC_V2(insightface.CosFace(), embedding_size=8, num_classes=11, sample_rate=0.5)
    absent = ("sample", "is_updated", "init_weight_update", "last_batch_size", "dist_cross_entropy")
    assert not any(hasattr(head, name) for name in absent)
    head(torch.randn(2, 8), torch.tensor([3, 4]))
    assert {3, 4} <= set(head.weight_index.tolist()) < set(range(11))
