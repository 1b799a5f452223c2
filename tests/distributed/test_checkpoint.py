"""Checkpoints: any number of ranks (five Gloo ranks; see helpers/on_ranks_checkpoint.py), half-written ones, layouts of other libraries."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import on_ranks_checkpoint, ranks
from torch import nn

import marginkernels as mk
from marginkernels.distributed import checkpoint, export_centers, full_state_dict, import_centers, latest, load, save

D, C = 8, 23


@pytest.fixture(scope="module")
def reports():
    return ranks.start(on_ranks_checkpoint.CHECKS, 5)


@pytest.mark.parametrize("check", [c.__name__ for c in on_ranks_checkpoint.CHECKS])
def test_five_ranks(reports, check):
    assert reports[check] is None, reports[check]


def head(c: int = C, **options) -> mk.MarginHead:
    return mk.MarginHead(D, c, mk.ArcFace(), **options)


def test_half_written_checkpoints_are_ignored(tmp_path, monkeypatch):
    a = head()
    save(tmp_path / "step-9", a)
    save(tmp_path / "step-10", a)
    assert latest(tmp_path) == tmp_path / "step-10"

    def killed(*_, **__):
        raise KeyboardInterrupt

    for place in ("dcp.save", "_sync"):  # within the tensors; all written, but not yet renamed
        with monkeypatch.context() as m:
            m.setattr(f"marginkernels.distributed.checkpoint.{place}", killed)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path / "step-11", a)
        assert latest(tmp_path) == tmp_path / "step-10"
        assert not (tmp_path / "step-11").exists()
    with pytest.raises(ValueError, match="path: expected a complete checkpoint"):
        load(tmp_path / "step-11", a)
    save(tmp_path / "step-11", a)  # the half-written folder does no harm
    assert latest(tmp_path) == tmp_path / "step-11"
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-11" / checkpoint.MARKER).rename(tmp_path / "elsewhere")
    assert latest(tmp_path) == tmp_path / "step-10"


def test_nothing_there(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


def trained(optimizer_of):
    a = head()
    optimizer = optimizer_of(a.parameters())
    a(torch.randn(4, D), torch.arange(4)).backward()
    optimizer.step()
    return a, optimizer


def as_format_1(monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    monkeypatch.setattr(checkpoint, "_pack", pickle.dumps)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "lr", [0.5, np.float64(0.5), torch.tensor(0.5), nn.Parameter(torch.tensor(0.5))], ids=["float", "numpy", "tensor", "parameter"]
)
def test_param_groups(tmp_path, monkeypatch, lr, old):
    """Saved and loaded as they are, in the format of now and the one before."""

    def make(parameters):
        return torch.optim.AdamW([{"params": list(parameters), "tags": ("a", None, True, torch.bfloat16)}], lr=lr, betas=(0.5, 0.75))

    a, optimizer = trained(make)
    with monkeypatch.context() as m:
        if old:
            as_format_1(m)
        save(tmp_path / "a", a, optimizer)
    b = head()
    other = torch.optim.AdamW(b.parameters(), lr=0.1)
    load(tmp_path / "a", b, other)
    want, got = optimizer.param_groups[0], other.param_groups[0]
    assert {k: v for k, v in got.items() if k != "params"} == {k: v for k, v in want.items() if k != "params"}
    assert isinstance(got["betas"], tuple)
    assert torch.equal(a.weight, b.weight)
    for name, v in optimizer.state[a.weight].items():
        assert torch.equal(other.state[b.weight][name], v)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["param_groups", "state"])
def test_loading_the_optimizer_runs_no_code(tmp_path, monkeypatch, place):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "plain pickle")))
    assert (tmp_path / "plain pickle").exists()
    a, optimizer = trained(torch.optim.AdamW)
    if place == "state":
        optimizer.state[a.weight]["bomb"] = Bomb(tmp_path / "exploded")
    else:
        optimizer.param_groups[0]["bomb"] = Bomb(tmp_path / "exploded")
        with pytest.raises(TypeError, match="optimizer: expected param_groups of numbers"):
            save(tmp_path / "a", a, optimizer)
    as_format_1(monkeypatch)
    save(tmp_path / "a", a, optimizer)
    with pytest.raises((pickle.UnpicklingError, checkpoint.dcp.CheckpointException), match=r"pathlib|weights_only"):
        load(tmp_path / "a", a, optimizer)
    assert not (tmp_path / "exploded").exists()


def test_a_later_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    save(tmp_path / "a", head())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="path: expected a checkpoint of format 2 or older, got format 9"):
        load(tmp_path / "a", head())


def test_what_does_not_fit_raises(tmp_path):
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
        import_centers(a, source)
        assert torch.equal(a.weight, w)
        nn.init.zeros_(a.weight)
        torch.save(source, tmp_path / "file.pt")
        import_centers(a, tmp_path / "file.pt")
        assert torch.equal(a.weight, w)
        torch.save(source, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        nn.init.zeros_(a.weight)
        import_centers(a, str(tmp_path / "old.pt"))
        assert torch.equal(a.weight, w)


def test_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.ArcFaceLoss(num_classes=C, embedding_size=D, margin=28.6, scale=64)
    a = head()
    import_centers(a, theirs.state_dict())
    assert torch.equal(a.weight, theirs.W.T)


def test_backbone_beside_the_head():
    w = torch.randn(C, D)
    model = {"fc.weight": torch.randn(C, D), "conv.weight": torch.randn(3, 4), "head.kernel": w.T}
    a = head()
    import_centers(a, model)
    assert torch.equal(a.weight, w)
    with pytest.raises(ValueError, match="source: expected one matrix named"):
        import_centers(a, {"a.weight": w, "b.weight": w})
    import_centers(a, {"a.weight": torch.zeros(C, D), "b.weight": w}, key="b.weight")
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
        import_centers(head(), source)


def test_import_grows():
    a, w = head(), torch.randn(C - 5, D)
    before = a.weight.detach().clone()
    import_centers(a, [w[:4], w[4:]], grow=True)
    assert torch.equal(a.weight[: C - 5], w)
    assert torch.equal(a.weight[C - 5 :], before[C - 5 :])


def test_one_device(tmp_path):
    a, b = head(bias=True), head(bias=True)
    export_centers(a, tmp_path / "centers.npy")
    import_centers(b, tmp_path / "centers.npy")
    assert torch.equal(a.weight, b.weight)
    b.load_state_dict(full_state_dict(a))
    assert torch.equal(a.bias, b.bias)
    half = mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.bfloat16)
    export_centers(half, tmp_path / "half.npy")
    import_centers(b, tmp_path / "half.npy")
    assert torch.equal(half.weight.float(), b.weight)
