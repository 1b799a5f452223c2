"""Checkpoints: any number of ranks (five Gloo ranks; see helpers/on_ranks_checkpoint.py), half-written ones, layouts of other libraries."""

import copy
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
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
    unchecked(monkeypatch)


def unchecked(monkeypatch):
    """Let ``save`` write objects of any kind, as a stranger might."""
    monkeypatch.setattr(checkpoint, "_SavePlanner", checkpoint.DefaultSavePlanner)


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


def test_state_keeps_its_own_dtype(tmp_path):
    """Counts of steps, which a weight's bfloat16 could not hold."""

    def half():
        return mk.MarginHead(D, C, mk.ArcFace(), dtype=torch.bfloat16, sample_rate=0.5)

    a, b = half(), half()
    optimizer, other = (mk.optim.AdamW(one.parameters(), lr=0.1) for one in (a, b))
    a(torch.randn(4, D), torch.arange(4)).backward()
    optimizer.step()
    state = optimizer.state[a.weight]
    counts = [name for name, v in state.items() if torch.is_tensor(v) and v.dtype != torch.bfloat16 and v.ndim]
    assert counts
    for name in counts:
        state[name].fill_(1001)
    save(tmp_path / "a", a, optimizer)
    load(tmp_path / "a", b, other)
    for name, v in state.items():
        got = other.state[b.weight][name]
        assert got.dtype == v.dtype
        assert torch.equal(got, v)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["param_groups", "state", "extra", "extra in a list"])
def test_loading_runs_no_code(tmp_path, monkeypatch, place, old):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "plain pickle")))
    assert (tmp_path / "plain pickle").exists()
    a, optimizer = trained(torch.optim.AdamW)
    bomb, extra = Bomb(tmp_path / "exploded"), {"step": 1}
    if place == "state":
        optimizer.state[a.weight]["bomb"] = bomb
    elif place == "param_groups":
        optimizer.param_groups[0]["bomb"] = bomb
    else:
        extra["bomb"] = bomb if place == "extra" else [torch.zeros(1), [bomb]]
    with pytest.raises(TypeError, match=f"{place[:5] if 'extra' in place else 'optimizer'}: expected .* of numbers"):
        save(tmp_path / "a", a, optimizer, extra)
    assert os.listdir(tmp_path) == ["plain pickle"]
    if old:
        as_format_1(monkeypatch)
    else:
        unchecked(monkeypatch)
        monkeypatch.setattr(checkpoint, "_pack", lambda groups: torch.frombuffer(bytearray(saved_bytes(groups)), dtype=torch.uint8))
    save(tmp_path / "a", a, optimizer, extra)
    with pytest.raises(pickle.UnpicklingError, match=r"pathlib|getattr"):
        load(tmp_path / "a", a, optimizer, extra)
    assert not (tmp_path / "exploded").exists()


def saved_bytes(v) -> bytes:
    buffer = io.BytesIO()
    torch.save(v, buffer)
    return buffer.getvalue()


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("where", ["alone", "beside", "in protocol 0", "on a class", "through builtins.getattr"])
def test_metadata_runs_no_code(tmp_path, where):
    """torch.distributed.checkpoint itself unpickles its file without restriction."""
    a = head()
    save(tmp_path / "a", a)
    file = tmp_path / "a" / ".metadata"
    honest = pickle.loads(file.read_bytes())
    bomb = Calls(os.system, f"touch {tmp_path / 'exploded'}")
    if where == "alone":
        data = pickle.dumps(bomb)
    elif where == "beside":
        honest.planner_data = bomb
        data = pickle.dumps(honest)
    elif where == "in protocol 0":
        data = b"cos\nsystem\n(S'touch " + str(tmp_path / "exploded").encode() + b"'\ntR."
    elif where == "on a class":  # (class, (None, {"__reduce__": 1})) BUILD, that is setattr(class, ...)
        data = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dS'exploded'\nI01\nstb."
    else:
        data = b"cbuiltins\ngetattr\n(ctorch.serialization\n_get_layout\nS'__globals__'\ntR."
    file.write_bytes(data)
    seal(tmp_path / "a")
    if where in ("alone", "beside", "in protocol 0"):
        dcp_reads = checkpoint.FileSystemReader(tmp_path / "a").read_metadata
        try:
            dcp_reads()
        except Exception:
            assert where != "beside"
        assert (tmp_path / "exploded").exists()
        (tmp_path / "exploded").unlink()
    before = a.weight.detach().clone()
    with pytest.raises(pickle.UnpicklingError, match="path: expected"):
        load(tmp_path / "a", a)
    assert not (tmp_path / "exploded").exists()
    assert not hasattr(checkpoint.Metadata, "exploded")
    assert torch.equal(a.weight, before)


def test_metadata_names_no_other_files(tmp_path):
    a = head()
    save(tmp_path / "a", a)
    shutil.copy(tmp_path / "a" / "__0_0.distcp", tmp_path / "secret")
    file = tmp_path / "a" / ".metadata"
    for name in ("../secret", str(tmp_path / "secret"), ".metadata"):
        metadata = pickle.loads(file.read_bytes())
        for place in metadata.storage_data.values():
            place.relative_path = name
        file.write_bytes(pickle.dumps(metadata))
        seal(tmp_path / "a")
        with pytest.raises(pickle.UnpicklingError, match="an entry in"):
            load(tmp_path / "a", a)


def seal(folder, **changes):
    """Make the checksums of a changed checkpoint right, as a stranger can."""
    about = json.loads((folder / checkpoint.MARKER).read_text()) | changes
    about.pop("crc32")
    about["files"][".metadata"] = [checkpoint._part(folder / ".metadata")]
    (folder / checkpoint.MARKER).write_text(checkpoint._sealed(about))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, and what it was made of."""
    a, optimizer = trained(torch.optim.AdamW)
    path = tmp_path_factory.mktemp("whole") / "step-1"
    save(path, a, optimizer, {"step": 1})
    return path, a


def refused(path, match):
    """Loading raises, and changes nothing."""
    b, optimizer = trained(torch.optim.AdamW)
    before = [b.weight.detach().clone(), optimizer.state[b.weight]["exp_avg"].clone()]
    with pytest.raises(ValueError, match=match):
        load(path, b, optimizer, {"step": 0})
    assert torch.equal(b.weight, before[0])
    assert torch.equal(optimizer.state[b.weight]["exp_avg"], before[1])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", checkpoint.MARKER])
def test_damage_is_noticed(tmp_path, whole, name):
    """Cut off anywhere, a byte changed anywhere, or missing."""
    path = tmp_path / "step-1"
    shutil.copytree(whole[0], path)
    data = (path / name).read_bytes()
    places = [0, 1, 7, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1]
    places += [int(p) for p in torch.randint(len(data), (20,), generator=torch.Generator().manual_seed(0))]
    for place in places:
        (path / name).write_bytes(data[:place])
        refused(path, "path: expected a whole checkpoint, got a damaged one")
        (path / name).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        refused(path, r"path: expected (a whole checkpoint, got a damaged one|a checkpoint of format)")
    (path / name).unlink()
    refused(path, "path: expected a (whole|complete) checkpoint")


def test_a_changed_byte_of_a_weight_is_noticed(tmp_path, whole):
    """torch.load alone reads it as another number."""
    path, a = whole
    shutil.copytree(path, tmp_path / "step-1")
    file = tmp_path / "step-1" / "__0_0.distcp"
    data = file.read_bytes()
    place = data.index(a.weight.detach().numpy().tobytes())
    file.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
    state = {"head.weight": torch.zeros(C, D)}
    checkpoint.dcp.load(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert 0 < (state["head.weight"] != a.weight).sum() < 3
    refused(tmp_path / "step-1", "__0_0.distcp is not as it was written, in bytes")


def test_what_is_no_checkpoint(tmp_path, whole):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        refused(tmp_path / name, "path: expected a complete checkpoint, a folder with marginkernels.json")
    checkpoint.dcp.save({"w": torch.zeros(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    refused(tmp_path / "dcp", "path: expected a complete checkpoint")
    for text in ("", "{}", "[]", "3", "null", '{"format": "two"}', '{"format": 2}', '{"format": 3}', "\0" * 40):
        (tmp_path / "dcp" / checkpoint.MARKER).write_text(text)
        refused(tmp_path / "dcp", "path: expected a whole checkpoint, got a damaged one")
    shutil.copytree(whole[0], tmp_path / "mixed")
    other, optimizer = trained(torch.optim.AdamW)
    save(tmp_path / "other", other, optimizer, {"step": 1})
    shutil.copy(tmp_path / "other" / "__0_0.distcp", tmp_path / "mixed")  # a file of another checkpoint
    refused(tmp_path / "mixed", "path: expected a whole checkpoint, got a damaged one")


def test_another_structure_raises(tmp_path):
    a = head(bias=True)
    save(tmp_path / "a", a, extra={"model": {"w": torch.zeros(3)}, "step": 3})
    for extra, text in (
        ({"model": {"w": torch.zeros(4)}}, r"extra: expected a tensor of shape \(3,\) as extra.model.w, .*, got \(4,\)"),
        ({"model": {"v": torch.zeros(3)}}, "extra: expected only what was saved in .*, got extra.model.v besides"),
        ({"model": {"w": 0}}, r"extra: expected a tensor of shape \(3,\) as extra.model.w, .*, got int"),
    ):
        with pytest.raises(ValueError, match=text):
            load(tmp_path / "a", a, extra=extra)
    assert load(tmp_path / "a", a, extra={"step": 0}) == {"step": 3}  # a part of what was saved
    with pytest.raises(ValueError, match="head: expected one with bias, as saved in"):
        load(tmp_path / "a", head())


@pytest.mark.parametrize("old", [False, True])
def test_another_margin_raises(tmp_path, monkeypatch, old):
    """By class; in the formats before, which do not name it, by its state."""
    if old:
        as_format_1(monkeypatch)
        monkeypatch.setattr(
            checkpoint, "_sealed", lambda about: json.dumps({k: v for k, v in about.items() if k not in ("margin", "files")})
        )
    margins = {"a": mk.ArcFace(), "b": mk.CosFace(), "c": mk.CurricularFace()}
    for name, margin in margins.items():
        save(tmp_path / name, mk.MarginHead(D, C, margin))
    for name in margins:
        for other, margin in margins.items():
            b = mk.MarginHead(D, C, margin)
            if name == other or (old and "c" not in (name, other)):
                load(tmp_path / name, b)
                continue
            text = "head: expected" if not old else "head: expected (one with margin.t|only what was saved)"
            with pytest.raises(ValueError, match=text):
                load(tmp_path / name, b)


def test_values_of_extra(tmp_path):
    """Plain values come back as they were, numbers of numpy as Python's; anything else raises when it is saved."""
    a, optimizer = trained(torch.optim.AdamW)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
    values = {"none": None, "text": "é", "pair": (1, 2.5), "deep": {"list": [1, [True, b"x"]]}, "dtype": torch.bfloat16, "huge": 1 << 200}
    values |= {"random": random.Random(1).getstate(), "torch": torch.get_rng_state(), "set": {1, 2}, "complex": 1j, "nan": float("inf")}
    extra = {"values": values, "schedule": schedule.state_dict(), "numpy": np.float32(0.5)}
    save(tmp_path / "a", a, optimizer, extra)
    empty = {"values": dict.fromkeys(values), "schedule": copy.deepcopy(schedule.state_dict()), "numpy": None}
    empty["values"] |= {"torch": torch.zeros_like(values["torch"]), "deep": {"list": None}}
    loaded = load(tmp_path / "a", a, optimizer, empty)
    assert torch.equal(loaded["values"].pop("torch"), values.pop("torch"))
    assert loaded == {"values": values, "schedule": schedule.state_dict(), "numpy": 0.5}
    for bad, kind in ((tmp_path, "pathlib"), (np.zeros(3), "numpy"), (lambda: 0, "function"), (open, "io.open")):
        with pytest.raises(
            TypeError, match=f"extra: expected extra.bad of numbers, strings, tensors and containers of these, got .*{kind}"
        ):
            save(tmp_path / "b", a, extra={"bad": bad})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("place", ["data", ".metadata", "marker", "folder"])
def test_a_full_disk(tmp_path, monkeypatch, place):
    """An error that says so; nothing is left, and the checkpoint before is whole."""
    a = head()
    save(tmp_path / "step-1", a)
    before = {p.name: p.read_bytes() for p in (tmp_path / "step-1").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "data":
        monkeypatch.setattr(torch, "save", full)
    elif place == ".metadata":
        monkeypatch.setattr(checkpoint.FileSystemWriter, "finish", full)
    elif place == "marker":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match=r"path: expected room and leave to write a checkpoint, got .*No space left on device") as raised:
        save(tmp_path / "step-2", a, extra={"step": 2})
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-1"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "step-1").iterdir()} == before
    load(latest(tmp_path), a)
    save(tmp_path / "step-2", a)


@pytest.mark.parametrize("kilobytes", [0.5, 2, 40, 200])
def test_a_limit_of_the_system(tmp_path, kilobytes):
    """A real write that fails, within the data, and in the files after it."""
    a = mk.MarginHead(64, 1000, mk.ArcFace())  # 256 kB
    save(tmp_path / "step-1", a)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(kilobytes * 1000), hard))
    try:
        with pytest.raises(OSError, match=r"path: expected room and leave to write a checkpoint, got .*File too large") as raised:
            save(tmp_path / "step-2", a)
        assert raised.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step-1"]
    load(latest(tmp_path), a)
    save(tmp_path / "step-2", a)


def test_ctrl_c_while_saving(tmp_path, monkeypatch):
    """torch.distributed.checkpoint makes an error of its own of it; it stays what it is."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "step-1", head(), extra={"step": 1})
    assert os.listdir(tmp_path) == []


def test_a_later_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    save(tmp_path / "a", head())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="path: expected a checkpoint of format 3 or older, got format 9"):
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
