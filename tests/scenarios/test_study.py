"""The study of all heads: what counts as an identity, its intervals against a count by hand, and all of it at a tiny size."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("fontTools")
pytest.importorskip("tqdm")
pytest.importorskip("psutil")

from examples.study import __main__ as command
from examples.study import features, glyphs, heads, metrics, report
from marginkernels.demo import evaluate
from marginkernels.demo import heads as demo


def blots(*kinds):
    """Images that are equal where their kinds are."""
    return np.stack([np.random.default_rng(kind).integers(0, 256, (glyphs.SIZE, glyphs.SIZE), dtype=np.uint8) for kind in kinds])


def test_shared_drawings_and_boxes():
    """Of two equal images the lower code point keeps its own; an image of many characters is a box, and says nothing about them."""
    codes = np.array([10, 20, 30, 40, 50, 60, 70, 80], dtype=np.int32)
    shows, same = glyphs.own_images(codes, blots(1, 2, 1, 9, 9, 9, 9, 1))
    assert shows.tolist() == [True, True, True, False, False, False, False, True]
    assert same == {30, 80}
    assert glyphs.own_images(codes[:0], blots(1)[:0])[1] == set()


def test_near_copies_count_once():
    images = blots(1, 2, 3, 1)
    images[3, 0, 0] ^= 1
    assert glyphs.distinct(images, np.array([3, 1, 0, 2]), 9) == [1, 2, 3]
    assert glyphs.distinct(images, np.array([0, 1, 2, 3]), 9) == [0, 1, 2]
    assert glyphs.distinct(images, np.array([3, 1, 0, 2]), 2) == [1, 3]


def test_scripts():
    assert [c for c in "\u4e00\uac00A\U00020000\u2f00\uf900" if glyphs.SCRIPTS["han"](c)] == ["\u4e00", "\U00020000"]


def test_no_identity_has_two_parts():
    network = features.Network(share=0.3, unseen=0.2)
    part = features.parts(1000, network)
    assert np.bincount(part).tolist() == [300, 500, 200]
    assert np.array_equal(part, features.parts(1000, network))
    assert not np.array_equal(part, features.parts(1000, features.Network(share=0.3, unseen=0.2, seed=1)))


def people(identities=30, images=3, noise=1.0):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(identities).repeat_interleave(images)
    return torch.randn(identities, 16, generator=g)[labels] + noise * torch.randn(len(labels), 16, generator=g), labels


def test_a_draw_of_the_bootstrap_is_the_set_with_identities_repeated():
    """Weights on pairs give the histograms of the set in which a drawn identity's images are there as often as it was drawn."""
    x, labels = people()
    unit = torch.nn.functional.normalize(x)
    tail = metrics.tail_of(unit, labels, 0, block=7)
    times = torch.bincount(torch.randint(30, (30,), generator=torch.Generator().manual_seed(1)), minlength=30)
    found = metrics.drawn_again(tail, torch.bincount(labels).double(), times.double())
    genuine, impostor = torch.zeros(evaluate.BINS, dtype=torch.float64), torch.zeros(evaluate.BINS, dtype=torch.float64)
    bins = evaluate.bins_of(unit @ unit.T)
    for i in range(len(x)):
        for j in range(i):
            a, b = labels[i], labels[j]
            if a == b:
                genuine[bins[i, j]] += times[a]
            else:
                impostor[bins[i, j]] += times[a] * times[b]
    assert torch.equal(found.genuine, genuine)
    assert torch.equal(found.impostor, impostor)


def test_a_tail_is_enough():
    """Pairs below the tail count towards the false accept rate, and the rates are those of all pairs."""
    x, labels = people(200)
    unit = torch.nn.functional.normalize(x)
    every = evaluate.verify_pairs(x, labels)
    once, counts = torch.ones(200, dtype=torch.float64), torch.bincount(labels).double()
    cut = metrics.tail_of(unit, labels, int(0.7 * evaluate.BINS))
    assert len(cut.first) < 0.3 * len(metrics.tail_of(unit, labels, 0).first)
    for far in (1e-2, 1e-3):
        assert metrics.drawn_again(cut, counts, once).tar(far) == every.tar(far) > 0


def test_intervals_hold_the_figure_and_narrow_with_identities():
    widths = []
    for identities in (40, 640):
        found = metrics.verification(*people(identities))["tar"]["0.01"]
        assert found[1] <= found[0] <= found[2]
        widths.append(found[2] - found[1])
    assert 0 < widths[1] < 0.6 * widths[0]


def test_an_interval_leaves_out_a_fortieth_at_each_end():
    assert metrics.interval(torch.arange(1001.0)) == pytest.approx([25, 975])


def test_a_figure_of_several_seeds():
    """The mean of the seeds, from the lowest lower end to the highest upper one."""
    seeds = [{"tar": {"0.1": [0.5, 0.2, 0.9]}}, {"tar": {"0.1": [0.7, 0.6, 0.8]}}, {"tar": {"0.1": [0.6, 0.5, 0.7]}}]
    assert report.figure(seeds, "tar", "0.1") == pytest.approx((0.6, 0.2, 0.9))
    assert report.figure([{"closed": 0.5}, {"closed": 0.7}], "closed") == pytest.approx((0.6, 0.5, 0.7))


def test_heads_that_have_not_started_are_named():
    runs = {name: [{"closed": {"rank1": share}}] for name, share in (("arcface", 0.9), ("sphereface", 0.0), ("lsoftmax", 0.009))}
    (said,) = report._stalled(runs | {"features": [{}]})
    assert "`sphereface`, `lsoftmax`." in said
    assert "arcface" not in said
    assert not [*report._stalled({"arcface": runs["arcface"]})]


def test_identification_by_hand():
    """Two identities found, the third's probe nearer to the first's entry; a distractor is nearest to the second's probe."""
    e = torch.eye(4)
    x = torch.stack([e[0], e[0], e[1], e[1] + 0.6 * e[3], e[2], 0.9 * e[2] + e[0]])
    found = metrics.identification(x, torch.tensor([0, 0, 1, 1, 2, 2]), torch.stack([e[3] + e[1], -e[0]]))
    assert (found["gallery"], found["probes"]) == (3, 3)
    assert found["cmc"]["3"] == 1
    assert found["cmc"]["1"] in (round(2 / 3, 5), 1.0)  # by which image of the third is in the gallery
    assert found["rank1"]["2"][0] == pytest.approx(found["rank1"]["0"][0] - 1 / 3, abs=1e-5)


def test_runs_of_the_study():
    every = heads.runs(3)
    assert {run.head for run in every} == set(demo.names())
    assert len({run.file for run in every}) == len(every)
    seeds = {name: sorted(run.seed for run in every if run.name == name) for name in {run.name for run in every}}
    assert {name for name, found in seeds.items() if found == [0, 1, 2]} == {*heads.MAIN, *heads.VARIANTS}
    assert all(found in ([0], [0, 1, 2]) for found in seeds.values())


def test_steps_that_a_budget_affords():
    todo = heads.runs(3)
    steps = heads.affordable(todo, 3000, 0.05, 5)
    assert steps % 50 == 0
    assert heads.estimate(todo, steps, 0.05, 5) <= 3000 < heads.estimate(todo, steps + 50, 0.05, 5)
    assert heads.affordable(todo, 1, 0.05, 5) == 2


def test_the_committed_page_is_what_the_records_say():
    found = report.Records.read(report.RECORDS)
    assert report.PAGE.read_text() == report.render(found), "docs/study.md is stale: run python -m examples.study report"


def test_committed_records_are_small():
    assert all(path.stat().st_size < 50_000 for path in report.RECORDS.glob("*-*.json"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole study of a few steps, and where it is."""
    folder = tmp_path_factory.mktemp("study")
    words = [
        "all",
        "--quick",
        "--cache",
        str(folder / "cache"),
        "--out",
        str(folder / "records"),
        "--only",
        "arcface",
        "bf16-centers-nearest",
    ]
    assert command.main([*words, "adacos", "sampled-0.3", "--steps", "4", "--seeds", "2"]) == 0
    return folder


def test_a_whole_study(study):
    names = {path.name for path in (study / "records").iterdir()}
    runs = {f"{name}-{seed}.json" for name in ("arcface", "bf16-centers-nearest", "sampled-0.3") for seed in (0, 1)}
    pictures = {f"{name}.png" for name in report.PICTURES}
    assert names == {*runs, *pictures, "adacos-0.json", "features-0.json", "plan.json", "study.md"}
    one = json.loads((study / "records" / "arcface-0.json").read_text())
    assert len(one["loss"]) == 4
    assert {side: sum(about["counts"]) for side, about in one["angles"]["end"].items()}.keys() == {"target", "other"}
    assert sum(one["angles"]["end"]["target"]["counts"]) == sum(one["angles"]["start"]["other"]["counts"]) > 100
    results = json.loads((study / "results.json").read_text())
    assert len(results["runs"]) == len(runs) + 2
    assert results["plan"]["command"].startswith("python -m examples.study all --quick")
    text = (study / "records" / "study.md").read_text()
    assert text == report.render(report.Records.read(study / "records"), study / "records" / "study.md")
    assert all(f"`{name}`" in text for name in ("arcface", "adacos", "sampled-0.3"))


def test_images_of_the_study(study):
    data, about = glyphs.load(study / "cache")
    assert len(data.images) == about["images"] == len(data.identities) == len(data.faces)
    assert np.bincount(data.identities).min() >= about["choice"]["least"]
    assert np.bincount(data.identities).max() <= about["choice"]["most"]
    assert (np.diff(data.identities) >= 0).all()
    at = np.flatnonzero(data.identities == 0)
    assert len(set(data.faces[at].tolist())) == len(at), "a typeface has two images of a character"


def test_a_run_repeats_to_the_bit_and_its_parts_are_apart(study):
    data = heads.Data.load(study / "cache", 1000, 2)
    plan = heads.Plan(steps=3, identities=1000, batch=32, dim=16, hidden=32)
    first, second = (heads.train(heads.Run("arcface", "arcface", 0), plan, data) for _ in range(2))
    assert first.losses == second.losses
    every, identities, part, _ = features.load(study / "cache")
    rows = {row.tobytes(): k for row, k in zip(np.asarray(every), identities, strict=True)}
    seen = {name: {rows[row.numpy().tobytes()] for row in getattr(data, name)} for name in ("train", "closed", "unseen", "others")}
    assert seen["closed"] <= seen["train"]
    assert not seen["unseen"] & (seen["train"] | seen["others"])
    assert {int(part[k]) for k in seen["train"]} == {features.HEADS}
    assert not {row.numpy().tobytes() for row in data.closed} & {row.numpy().tobytes() for row in data.train}
    assert torch.bincount(data.identities).max() == 2


def test_a_study_goes_on(study, capsys):
    """Records that are there are not made again, the missing one is; another size in the same folder is refused."""
    kept, lost = study / "records" / "arcface-0.json", study / "records" / "sampled-0.3-1.json"
    before, text = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    words = ["heads", "--quick", "--cache", str(study / "cache"), "--out", str(study / "records"), "--only", "arcface", "sampled-0.3"]
    assert command.main([*words, "--steps", "5"]) == 2
    assert "was begun with" in capsys.readouterr().err
    assert command.main([*words, "--seeds", "2", "--steps", "4"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["loss"] == text["loss"]
    # One that another process has written since the list was made is left alone.
    assert not [*heads.complete([heads.Run("arcface", "arcface", 0)], kept.parent, heads.Plan(steps=1, identities=10), None)]
    assert kept.stat().st_mtime_ns == before


def test_a_cache_of_other_images_is_refused(study):
    with pytest.raises(ValueError, match=r"cache: .* was rendered with"):
        glyphs.render(study / "cache", glyphs.Choice(None), 1)


def test_steps_of_the_study_in_the_wrong_order(tmp_path, capsys):
    for words, said in (
        (["train-features", "--cache"], "render them first"),
        (["heads", "--cache"], "make them first"),
        (["report", "--records"], "expected a folder with records"),
    ):
        assert command.main([*words, str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_network_that_another_cache_has(study, capsys):
    assert command.main(["train-features", "--quick", "--cache", str(study / "cache"), "--feature-steps", "13"]) == 2
    assert "is asked for" in capsys.readouterr().err


def test_a_page_without_records(tmp_path):
    text = report.render(report.Records.read(tmp_path), tmp_path / "page.md")
    assert "none yet" in text
    assert report.draw(report.Records.read(tmp_path), tmp_path) == []
