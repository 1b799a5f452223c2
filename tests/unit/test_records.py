"""Records of ``verify``: written, read, refused with a reason, and followed by ``auto``, on a GPU that is pretended."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import marginkernels as mk
from marginkernels import NonTarget, loss, retrieval
from marginkernels.backend import FUSED, agreement, cpu, offer, records, registry, resolve
from marginkernels.backend.base import Backend
from marginkernels.backend.chunked import ChunkedBackend
from marginkernels.backend.records import BAD, RIGHT, UNFINISHED, Machine, Record, Time, Verdict
from marginkernels.backend.triton import heuristics
from marginkernels.backend.triton.heuristics import Key, Tile
from marginkernels.core.types import Reduction

GPU = Machine("cuda", "NVIDIA Pretended 9000", "3.7", "0123456789ab", "2.13.0", "580.65.06")
PAIRS = ("bfloat16/float32", "float32/float32")
SMALL, LARGE = "small, wide", "large, wide"
#: N and C of a problem in each.
SIZES = {SMALL: (64, 1000), LARGE: (1024, 1_000_000)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry.forget()
    yield tmp_path / "cache" / "marginkernels" / "verified"
    registry.forget()


def verdict(word=RIGHT, pairs=PAIRS):
    return Verdict(word, "" if word == RIGHT else "as planted", pairs, {"values": 3}, {"float32/float32": {"loss": 1e-7}}, 1.5)


def record(machine=GPU, verdicts=None, ratios=None, made="2026-01-02T03:04:05+00:00", tiles=()):
    """A record in which all are right but for ``verdicts``; ``ratios``: size -> backend -> its time by that of torch."""
    usual = {SMALL: {"triton": 0.5, "cuda": 0.9, "hopper": 2.0}, LARGE: {"triton": 0.6, "cuda": 0.7, "hopper": 0.3}}
    backends = {name: verdict() for name in ("hopper", "cuda", "triton", "torch")} | (verdicts or {})
    times = {
        size: {dtype: {name: Time(10 * r, 10.0) for name, r in of.items()} for dtype in ("bfloat16", "float32")}
        for size, of in (usual if ratios is None else ratios).items()
    }
    return Record(machine, made, backends, times, tiles, {"threads": 2})


class Pretended(ChunkedBackend):
    """Serves what the backend in whose place it stands serves, on any machine."""

    tested_on = ()

    def __init__(self, name, dims=None):
        self.name, self.dims, self.device_types, self.dtypes = name, dims, ("cuda",), ChunkedBackend.dtypes[:3]

    def unsupported_reason(self, device_type, dtype, weight_dtype, dim):
        reason = super().unsupported_reason(device_type, dtype, weight_dtype, dim)
        return reason or (f"has no D of {dim}" if self.dims and dim not in self.dims else None)


@pytest.fixture
def gpu(monkeypatch):
    for name, dims in (("hopper", (128, 512)), ("cuda", None), ("triton", None)):
        monkeypatch.setitem(FUSED, name, Pretended(name, dims))
    monkeypatch.setattr(registry, "machine", lambda device: GPU if device.startswith("cuda") else records.here(torch.device(device)))
    monkeypatch.setattr(registry, "gpu_is_here", lambda: True)


def chosen(size=LARGE, dtype=torch.bfloat16, weight_dtype=torch.float32, dim=512, name="auto", **options):
    return resolve(name, "cuda:0", dtype, weight_dtype, dim, *SIZES[size], **options)


# -- files -------------------------------------------------------------------------------------------------------------------------


def test_a_record_comes_back(cache):
    written = record(tiles=({"kernel": "row"},))
    path = records.write(written)
    assert path == cache / GPU.file_name
    found = records.read(GPU)
    assert found.record == written
    assert (found.path, found.ignored) == (path, ())
    assert found.record.digest() == written.digest() != record().digest()
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_the_key_is_in_the_name():
    names = {replace(GPU, **{key: "9.9"}).file_name for key in ("name", "triton", "kernels")} | {GPU.file_name}
    assert len(names) == 4
    assert replace(GPU, torch="9.9", driver="1").file_name == GPU.file_name == "cuda-nvidia-pretended-9000-triton-3.7-0123456789ab.json"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"torch": "2.14.1+cu130", "driver": "590.1"}, None),
        ({"torch": "2.13.0+cu129"}, None),
        ({"name": "NVIDIA Other"}, "foreign: of device 'NVIDIA Pretended 9000', here is 'NVIDIA Other'"),
        ({"device_type": "cpu"}, "foreign: of device type"),
        ({"triton": "3.8"}, "foreign: of Triton '3.7'"),
        ({"kernels": "ba9876543210"}, "stale: of other kernels (0123456789ab, here ba9876543210)"),
        ({"torch": "2.9.1"}, "stale: of torch 2.13.0, here is the older 2.9.1"),
        ({"driver": "580.9"}, "stale: of driver 580.65.06, here is the older 580.9"),
        ({"driver": ""}, "stale: of driver 580.65.06, here is an unknown one"),
    ],
)
def test_what_makes_a_record_stale_or_foreign(change, reason):
    records.write(record())
    ours = replace(GPU, **change)
    found = records.read(ours)
    if reason is None:
        assert found.record == record()
    else:
        assert found.record is None
        assert str(records.why_not(GPU, ours)).startswith(reason)
        if ours.device_type == "cuda":
            assert found.ignored == ((records.folder() / GPU.file_name, records.why_not(GPU, ours)),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"schema": "marginkernels.verified/0"}',
        '{"schema": "marginkernels.verified/1", "machine": {}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_file_is_ignored_and_named(cache, text):
    cache.mkdir(parents=True)
    (cache / "some.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = records.read(GPU)
    assert found.record is None
    assert [(path.name, reason[:15]) for path, reason in found.ignored] == [("some.json", "cannot be read:")]
    records.write(record())
    assert records.read(GPU).record == record()


@pytest.mark.parametrize("key", ["machine", "made", "backends", "times", "tiles", "about"])
def test_a_record_that_lacks_something_is_none(key):
    whole = json.loads(record().as_json())
    del whole[key]
    with pytest.raises(ValueError, match=key):
        Record.of_json(json.dumps(whole))


def test_the_users_before_the_packages_and_then_the_newest(tmp_path):
    old, new, shipped = (record(made=f"202{n}-01-01T00:00:00+00:00") for n in (4, 5, 6))
    for folder, name, one in (("own", "b", old), ("own", "a", new), ("shipped", "c", shipped)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(one.as_json())
    both = (tmp_path / "own", tmp_path / "shipped")
    assert records.read(GPU, both).record == new
    assert len(records.read(GPU, both).ignored) == 2
    assert records.read(GPU, both[1:]).record == shipped
    assert records.read(GPU, (None, tmp_path / "nowhere")).record is None


def test_what_is_shipped():
    """Nothing that has not been measured: a README that says so, and records that can be read."""
    assert (records.SHIPPED / "README.md").exists()
    for path in records.SHIPPED.glob("*.json"):
        Record.of_json(path.read_text())


def test_a_record_is_replaced_in_one_step(cache, monkeypatch):
    """Where writing fails, the old one is there, whole, and nothing else."""
    path = records.write(record())

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            records.write(record(made="2030-01-01T00:00:00+00:00"))
    assert list(cache.iterdir()) == [path]
    assert records.read(GPU).record == record()


def test_where_records_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the XDG specification says to ignore
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert records.folder().is_relative_to(tmp_path)

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert records.folder() is None
    with pytest.raises(OSError, match="no home directory"):
        records.write(record())
    assert records.read(GPU).record is None


def test_this_machine():
    here = records.here(torch.device("cpu"))
    assert here.torch == torch.__version__
    assert here.name.endswith((cpu.levels() or ["no C++ kernels"])[-1])
    assert here == records.here(torch.device("cpu"))
    assert here.kernels != records.kernels_hash("cuda")


def test_the_hash_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "backend" / "triton").mkdir(parents=True)
    (tmp_path / "core").mkdir()
    files = [tmp_path / name for name in ("backend/base.py", "backend/triton/row_kernel.py", "core/types.py", "_cpu.abc.so", "_cpu.sha256")]
    for path in files:
        path.write_text("one")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "backend" / "records.py"))
    before = records.kernels_hash("cpu")
    seen = {before}
    for path in (*files[:3], files[4]):
        path.write_text("two")
        seen.add(records.kernels_hash("cpu"))
    assert len(seen) == 5
    files[3].write_text("two")  # the same sources built by another compiler
    (tmp_path / "backend" / "registry.py").write_text("two")
    assert records.kernels_hash("cpu") in seen
    files[4].unlink()  # nothing is known of its sources: the build itself stands for them
    assert records.kernels_hash("cpu") not in seen


# -- sizes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "dim", "name"),
    [
        (64, 65_536, 256, "small, narrow"),
        (64, 65_536, 257, "small, wide"),
        (64, 65_537, 256, "medium, narrow"),
        (1024, 131_072, 512, "medium, wide"),
        (1024, 131_073, 512, "large, wide"),
        (1024, 131_073, 64, "large, narrow"),
        (None, 10, 64, "large, narrow"),
        (10, None, 512, "large, wide"),
    ],
)
def test_size_classes(n, c, dim, name):
    assert records.size_class(n, c, dim) == name


def test_what_stands_for_a_size_class_is_in_it():
    for one in records.SIZE_CLASSES:
        assert "cuda" in one.timed
        for n, d, c in one.timed.values():
            assert records.size_class(n, c, d) == one.name
    assert math.isinf(records.SIZE_CLASSES[-1].most_logits)
    assert math.isinf(records.SIZE_CLASSES[-1].most_dim)


# -- the choice on a GPU -----------------------------------------------------------------------------------------------------------


def test_without_a_record_torch_and_one_warning(gpu):
    with pytest.warns(UserWarning, match="python -m marginkernels verify --device cuda") as seen:
        assert [chosen(), chosen(SMALL), chosen()] == ["torch"] * 3
    assert len(seen) == 1
    assert not any(about["verified"] for name, about in mk.backends().items() if name in ("hopper", "cuda", "triton"))


def test_no_warning_where_nothing_is_to_be_had(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(dtype=torch.float64, weight_dtype=torch.float64) == "torch"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, "hopper"),
        ({"size": SMALL}, "triton"),
        ({"dim": 384}, "triton"),  # the fastest has no kernel for it
        ({"dtype": torch.float32}, "hopper"),
        ({"dtype": torch.float16}, "torch"),  # not verified
        ({"weight_dtype": torch.bfloat16}, "torch"),
        ({"dtype": torch.float64, "weight_dtype": torch.float64}, "torch"),
        ({"dim": 128}, "torch"),  # narrow ones were not timed
        ({"name": "cuda"}, "cuda"),
        ({"agreed": (False, ())}, "torch"),  # the ranks have read different records
        ({"agreed": (True, ("hopper",))}, "triton"),
    ],
)
def test_the_fastest_that_is_verified(gpu, options, want):
    records.write(record())
    assert chosen(**options) == want


PLAIN = ("identity", "log-sum-exp")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        (records.features(NonTarget.IDENTITY, Reduction.LOG_SUM_EXP, 3), "sub-centers"),
        (records.features(NonTarget.LIFTED_ANGLE, Reduction.LOG_SUM_EXP, 1), "lifted-angle"),
        (records.features(NonTarget.POWER_DETACHED, Reduction.SOFTPLUS_SUM, 1), "softplus-sum"),
        ((records.SEARCH[True],), "search of sub-centers"),
    ],
)
def test_what_a_record_has_not_tried_it_does_not_unlock(gpu, asked, lacking):
    """Nor does one that was made before records named it."""
    every = {*PLAIN, *records.SEARCH, *asked}
    for features, want in ((every, "hopper"), (every - {lacking}, "torch"), ((), "torch")):
        tried = replace(verdict(), features=tuple(sorted(features)))
        records.write(record(verdicts={"hopper": tried}, ratios={LARGE: {"hopper": 0.3}}))
        registry.forget()
        assert chosen(features=asked) == want, features
        assert chosen(features=PLAIN) == ("hopper" if features else "torch")
    whole = json.loads(record().as_json())
    for v in whole["backends"].values():
        del v["features"]
    records.write(Record.of_json(json.dumps(whole)))
    registry.forget()
    assert chosen(features=asked) == "torch"
    assert chosen() == "hopper"


def test_a_call_asks_for_what_its_head_takes(monkeypatch):
    asked = []

    def resolve(*given):
        asked.append(given[-1])
        return "torch"

    monkeypatch.setattr(loss.backends, "resolve", resolve)
    monkeypatch.setattr(retrieval, "resolve", resolve)
    x, w, labels = torch.randn(4, 8), torch.randn(18, 8), torch.arange(4)
    for margin, k in ((mk.ArcFace(), 1), (mk.InterTopK(), 2), (mk.SphereFace2(18), 1), (mk.UniFace(9), 2)):
        mk.margin_cross_entropy(x, w, labels, margin=margin, sub_centers=k)
        mk.topk(x, w, 2, sub_centers=k)
    lifted, binary = ("lifted-angle", "log-sum-exp"), ("power-detached", "softplus-sum")
    assert asked[::2] == [PLAIN, (*lifted, "sub-centers"), binary, ("identity", "softplus-sum", "sub-centers")]
    assert asked[1::2] == [("search",), ("search of sub-centers",)] * 2


def test_times_of_the_same_dtype_decide(gpu):
    times = {
        "bfloat16": {"hopper": Time(3.0, 10.0), "cuda": Time(9.0, 10.0)},
        "float32": {"hopper": Time(9.0, 10.0), "cuda": Time(3.0, 10.0)},
    }
    records.write(replace(record(), times={LARGE: times}))
    assert [chosen(dtype=dtype) for dtype in (torch.bfloat16, torch.float32)] == ["hopper", "cuda"]


def test_size_that_is_not_known_is_large(gpu):
    records.write(record())
    assert resolve("auto", "cuda", torch.bfloat16, torch.float32, 512) == "hopper"


@pytest.mark.parametrize("word", [*BAD, UNFINISHED, "unavailable"])
def test_no_other_verdict_is_chosen(gpu, word):
    records.write(record(verdicts={"hopper": verdict(word)}))
    assert chosen() == "triton"
    assert not mk.backends()["hopper"]["verified"]
    assert mk.backends()["triton"]["verified"]
    assert chosen(name="hopper") == "hopper"  # at one's own risk


def test_none_slower_than_torch(gpu):
    records.write(record(ratios={LARGE: {"hopper": 1.01, "cuda": 1.5}}))
    assert chosen() == "torch"


def test_torch_is_not_exempt(gpu):
    records.write(record(verdicts={"torch": verdict("wrong value")}))
    assert chosen() == "hopper"
    with pytest.raises(ValueError, match="torch: wrong value: as planted"):
        chosen(dtype=torch.float64, weight_dtype=torch.float64)


def test_a_stale_record_is_not_followed_and_said(gpu):
    path = records.write(record(replace(GPU, torch="3.0.0")))
    with pytest.warns(UserWarning, match=rf"{path.name} is stale: of torch 3.0.0, here is the older 2.13.0"):
        assert chosen() == "torch"


def test_records_are_read_once(gpu, monkeypatch):
    records.write(record())
    reads = []
    right = records.read
    monkeypatch.setattr(records, "read", lambda machine: reads.append(machine) or right(machine))
    assert [chosen(), chosen(SMALL), chosen()] == ["hopper", "triton", "hopper"]
    assert len(reads) == 1


def test_recorded_tiles_are_taken_with_triton(gpu, monkeypatch):
    key, tile = Key("row", 512, "bfloat16", "sm_90"), Tile(64, 64, 512, 512, stages=1)
    monkeypatch.setattr(heuristics, "CHOSEN", {})
    monkeypatch.setattr(heuristics, "_asked", False)
    records.write(record(tiles=({**key._asdict(), **vars(tile)},)))
    assert chosen() == "hopper"
    assert not heuristics.CHOSEN
    assert chosen(SMALL) == "triton"
    assert heuristics.tile(key) == tile
    heuristics.use_tiles(None)  # whoever asks for the defaults keeps them
    assert chosen(SMALL) == "triton"
    assert not heuristics.CHOSEN


def test_recorded_tiles_that_cannot_serve_are_left(monkeypatch):
    monkeypatch.setattr(heuristics, "CHOSEN", {})
    monkeypatch.setattr(heuristics, "_asked", False)
    for tiles in ([{"kernel": "row"}], [{**Key("row", 512, "bfloat16", "sm_90")._asdict(), **vars(Tile(3, 64, 512, 512))}]):
        heuristics.take_recorded(tiles)
        assert not heuristics.CHOSEN


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiled_calls_take_the_traced_sizes(gpu, dynamic):
    """And no guard on them: one graph for all batches where the batch is dynamic."""
    records.write(record())
    torch._dynamo.reset()
    graphs, took = [], []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x):
        name = resolve("auto", "cuda", torch.bfloat16, torch.float32, 512, x.shape[0], 1_000_000)
        return x * {"hopper": 2.0, "triton": 3.0}[name]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n in (200, 3, 5):
        took.append(float(compiled(torch.ones(n, 1))[0]))
    torch._dynamo.reset()
    if dynamic:
        assert (len(graphs), took) == (1, [2.0] * 3)
    else:
        assert (len(graphs), took) == (2, [2.0, 3.0, 3.0])


# -- the choice on a CPU -----------------------------------------------------------------------------------------------------------


def on_cpu(dtype=torch.float32):
    return resolve("auto", "cpu", dtype, dtype, 64, 8, 100)


@pytest.mark.filterwarnings("error")
def test_a_record_of_a_cpu_only_takes_away():
    usual = on_cpu()
    here = records.here(torch.device("cpu"))
    records.write(record(here, {"cpu": verdict(), "torch": verdict()}, {}))
    registry.forget()
    assert on_cpu() == usual  # also where torch was faster
    for word in (UNFINISHED, "unavailable"):
        records.write(record(here, {"cpu": verdict(word)}, {}))
        registry.forget()
        assert on_cpu() == usual
    for word in BAD:
        records.write(record(here, {"cpu": verdict(word)}, {}))
        registry.forget()
        assert on_cpu() == "torch"
        assert not mk.backends()["cpu"]["verified"]
    records.write(record(here, {"cpu": verdict("crash"), "torch": verdict("hang")}, {}))
    registry.forget()
    with pytest.raises(ValueError, match="cpu: crash: as planted; torch: hang: as planted"):
        on_cpu()


def test_only_an_instruction_set_found_wrong_takes_nothing_away():
    """``cpu`` has a verdict of its own, on what it would take."""
    usual = on_cpu()
    records.write(record(records.here(torch.device("cpu")), {"cpu:avx2": verdict("crash"), "cpu": verdict(), "torch": verdict()}, {}))
    assert on_cpu() == usual


def test_without_records_nothing_is_hashed(monkeypatch):
    monkeypatch.setattr(records, "kernels_hash", lambda device_type: pytest.fail("hashed"))
    assert on_cpu() in ("cpu", "torch")


# -- ranks -------------------------------------------------------------------------------------------------------------------------


def test_ranks_agree_or_take_torch(gpu):
    records.write(record())
    mine = offer("cuda")
    assert agreement([mine, mine]) == (True, ())
    registry.forget()
    records.write(record(verdicts={"triton": verdict("hang")}))
    other = offer("cuda")
    assert agreement([mine, other]) == agreement([other, mine]) == (False, ("triton",))
    assert agreement([other, other]) == (True, ("triton",))
    assert chosen(agreed=agreement([mine, other])) == "torch"


def test_ranks_compare_once_for_each_kind_of_device(monkeypatch):
    class Shard:
        def __init__(self):
            self.agreed, self.calls = {}, 0

        def of_all_ranks(self, mine):
            self.calls += 1
            return [mine, (mine[0], ("cpu",))]

    shard = Shard()
    assert loss.agreed_by(shard, "cpu") == (True, ("cpu",))
    assert loss.agreed_by(shard, "cpu") == (True, ("cpu",))
    assert shard.calls == 1
    assert resolve("auto", "cpu", torch.float32, torch.float32, 8, 4, 4, shard.agreed["cpu"]) == "torch"


def test_every_backend_says_where_it_is_tested():
    for name, b in FUSED.items():
        assert isinstance(b, Backend)
        assert set(b.tested_on) <= {"cpu"}
        assert bool(b.tested_on) == (name in ("cpu", "torch"))
