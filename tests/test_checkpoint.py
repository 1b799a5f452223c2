"""Checkpoints: any number of ranks (on five Gloo ranks; see checkpoint_checks.py), half-written ones, and other libraries' layouts."""

import checkpoint_checks
import pytest
import ranks
import torch
from torch import nn

import marginkernels as mk
from marginkernels.distributed import export_centres, full_state_dict, import_centres, latest, load, save

D, C = 8, 23


@pytest.fixture(scope="module")
def reports():
    return ranks.start(checkpoint_checks.CHECKS, 5)


@pytest.mark.parametrize("check", [c.__name__ for c in checkpoint_checks.CHECKS])
def test_five_ranks(reports, check):
    assert reports[check] is None, reports[check]


def head(c: int = C, **options) -> mk.MarginHead:
    return mk.MarginHead(D, c, mk.ArcFace(), **options)


def test_half_written_checkpoints_are_not_taken(tmp_path, monkeypatch):
    a = head()
    save(tmp_path / "step-9", a)
    save(tmp_path / "step-10", a)
    assert latest(tmp_path) == tmp_path / "step-10"

    def killed(*_, **__):
        raise KeyboardInterrupt

    from marginkernels.distributed import checkpoint

    for place in ("dcp.save", "_sync"):  # within the tensors; all written, but not yet renamed
        with monkeypatch.context() as m:
            m.setattr(f"marginkernels.distributed.checkpoint.{place}", killed)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path / "step-11", a)
        assert latest(tmp_path) == tmp_path / "step-10"
        assert not (tmp_path / "step-11").exists()
    with pytest.raises(ValueError, match="path: expected a whole checkpoint"):
        load(tmp_path / "step-11", a)
    save(tmp_path / "step-11", a)  # what was left behind is in nobody's way
    assert latest(tmp_path) == tmp_path / "step-11"
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-11" / checkpoint.MARKER).rename(tmp_path / "elsewhere")
    assert latest(tmp_path) == tmp_path / "step-10"


def test_nothing_there(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def test_what_does_not_fit_is_refused(tmp_path):
    save(tmp_path / "a", head())
    for other, text in (
        (head(C - 1), "num_classes = 23"),
        (head(C + 1), "grow=True"),
        (mk.MarginHead(D + 1, C, mk.ArcFace()), "embedding_dim = 8"),
    ):
        with pytest.raises(ValueError, match=text):
            load(tmp_path / "a", other)
    other = head()
    with pytest.raises(ValueError, match="holds no optimizer state"):
        load(tmp_path / "a", other, torch.optim.SGD(other.parameters()))


@pytest.mark.parametrize("name", ["W", "kernel", "weight", "head.kernel"])
def test_other_layouts(tmp_path, name):
    w = torch.randn(C, D)
    stored = w if name.endswith("weight") else w.T.contiguous()
    a = head()
    for source in ({name: stored}, {"epoch": 3, "model": {name: stored, "t": torch.zeros(1)}}):
        import_centres(a, source)
        assert torch.equal(a.weight, w)
        nn.init.zeros_(a.weight)
        torch.save(source, tmp_path / "file.pt")
        import_centres(a, tmp_path / "file.pt")
        assert torch.equal(a.weight, w)
        torch.save(source, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        nn.init.zeros_(a.weight)
        import_centres(a, str(tmp_path / "old.pt"))
        assert torch.equal(a.weight, w)


def test_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.ArcFaceLoss(num_classes=C, embedding_size=D, margin=28.6, scale=64)
    a = head()
    import_centres(a, theirs.state_dict())
    assert torch.equal(a.weight, theirs.W.T)


def test_backbone_beside_the_head():
    w = torch.randn(C, D)
    model = {"fc.weight": torch.randn(C, D), "conv.weight": torch.randn(3, 4), "head.kernel": w.T}
    a = head()
    import_centres(a, model)
    assert torch.equal(a.weight, w)
    with pytest.raises(ValueError, match="source: expected one matrix named"):
        import_centres(a, {"a.weight": w, "b.weight": w})
    import_centres(a, {"a.weight": torch.zeros(C, D), "b.weight": w}, key="b.weight")
    assert torch.equal(a.weight, w)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (torch.zeros(C, D + 1), "D = 8"),
        (torch.zeros(C + 1, D), "23 classes, got 24"),
        ([torch.zeros(C - 2, D)], "23 classes, got 21"),
        ({"x": torch.zeros(C, D)}, "one matrix named"),
    ],
)
def test_bad_sources(source, text):
    with pytest.raises(ValueError, match=f"source: expected .*{text}"):
        import_centres(head(), source)


def test_import_grows():
    a, w = head(), torch.randn(C - 5, D)
    before = a.weight.detach().clone()
    import_centres(a, [w[:4], w[4:]], grow=True)
    assert torch.equal(a.weight[: C - 5], w)
    assert torch.equal(a.weight[C - 5 :], before[C - 5 :])


def test_one_device(tmp_path):
    a, b = head(bias=True), head(bias=True)
    export_centres(a, tmp_path / "centres.npy")
    import_centres(b, tmp_path / "centres.npy")
    assert torch.equal(a.weight, b.weight)
    b.load_state_dict(full_state_dict(a))
    assert torch.equal(a.bias, b.bias)
    half = mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.bfloat16)
    export_centres(half, tmp_path / "half.npy")
    import_centres(b, tmp_path / "half.npy")
    assert torch.equal(half.weight.float(), b.weight)
