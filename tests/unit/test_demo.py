"""The demo: its images, its verification, and that heads train and agree with eager ones."""

import base64
import json
import math
import re
import unicodedata
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from marginkernels import margin_cross_entropy, testing
from marginkernels.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("fontTools")

from marginkernels.demo import data, evaluate, heads, report, train


@pytest.fixture(scope="module")
def glyphs():
    return data.load(min_typefaces=4)


@pytest.fixture(scope="module")
def few(glyphs):
    """Training and unseen identities, 120 and 30 of those with many typefaces."""
    many = np.bincount(glyphs.identities) >= 10
    many[np.flatnonzero(many)[150:]] = False
    return glyphs.subset(many).split(0.2, seed=0)


def test_a_few_thousand_identities(glyphs):
    assert len(glyphs.characters) > 3000
    assert len(glyphs.typefaces) > 30
    assert "A" in glyphs.characters


def test_images_and_identities_belong_together(glyphs):
    counts = np.bincount(glyphs.identities, minlength=len(glyphs.characters))
    assert glyphs.images.shape == (len(glyphs.identities), data.SIZE, data.SIZE)
    assert counts.min() >= 4
    assert (np.diff(glyphs.identities) >= 0).all()
    assert glyphs.images.reshape(len(glyphs.images), -1).max(1).min() >= 64, "a blank image"


def test_no_image_twice_in_an_identity(glyphs):
    seen = {(k, image.tobytes()) for k, image in zip(glyphs.identities, glyphs.images, strict=True)}
    assert len(seen) == len(glyphs.images)


def test_no_typeface_draws_two_identities_alike(glyphs):
    seen = {(face, image.tobytes()) for face, image in zip(glyphs.faces, glyphs.images, strict=True)}
    assert len(seen) == len(glyphs.images)


def test_characters_have_a_drawing_of_their_own(glyphs):
    assert all(unicodedata.category(c)[0] in "LNPS" for c in glyphs.characters)
    assert not {"\u0391", "\u0410", " "} & set(glyphs.characters), "Alpha and the Cyrillic A are drawn as A; a space is not drawn"


def test_split_shares_no_identity(glyphs):
    train_part, unseen = glyphs.split(0.2, seed=3)
    assert not set(train_part.characters) & set(unseen.characters)
    assert set(train_part.characters) | set(unseen.characters) == set(glyphs.characters)
    assert len(unseen.characters) == round(0.2 * len(glyphs.characters))
    for part in (train_part, unseen):
        assert set(part.identities) == set(range(len(part.characters)))
        k = len(part.characters) // 2
        original = glyphs.characters.index(part.characters[k])
        np.testing.assert_array_equal(part.images[part.identities == k], glyphs.images[glyphs.identities == original])
    assert glyphs.split(0.2, seed=3)[1].characters == unseen.characters
    assert glyphs.split(0.2, seed=4)[1].characters != unseen.characters


def test_fonts_of_ones_own(tmp_path, capsys, glyphs):
    with pytest.raises(ValueError, match="fonts: expected a folder"):
        data.load(tmp_path)
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    own = next(p for p in data.font_files() if p.stem == "DejaVuSerif")
    (tmp_path / "again.otf").write_bytes(own.read_bytes())
    found = data.load(tmp_path, min_typefaces=4)
    assert "skipped broken.ttf" in capsys.readouterr().out
    assert found.typefaces == [*glyphs.typefaces, "again"]
    np.testing.assert_array_equal(found.images, glyphs.images)  # the same drawings again add nothing


def test_too_much_asked_of_the_fonts():
    with pytest.raises(ValueError, match="min_typefaces"):
        data.load(min_typefaces=1000)


def by_hand(embeddings, identities, far):
    """TAR at FAR and rank-1 from a full matrix, threshold by threshold."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cos = unit @ unit.T
    np.fill_diagonal(cos, -2)
    same = identities[:, None] == identities
    off = ~np.eye(len(cos), dtype=bool)
    genuine, impostor = np.sort(cos[same & off]), np.sort(cos[~same])
    allowed = int(far * len(impostor))
    threshold = impostor[len(impostor) - allowed - 1]
    return (genuine > threshold).mean(), (identities[cos.argmax(1)] == identities).mean()


def test_verification_against_a_full_matrix():
    rng = np.random.default_rng(0)
    identities = rng.integers(0, 40, 300)
    centers = rng.standard_normal((40, 16))
    embeddings = (centers[identities] + 0.9 * rng.standard_normal((300, 16))) * rng.uniform(0.1, 10, (300, 1))
    found = evaluate.verify_pairs(torch.from_numpy(embeddings).float(), torch.from_numpy(identities), block=77)
    assert found.genuine.sum() + found.impostor.sum() == 300 * 299
    for far in (1e-1, 1e-2, 1e-3):
        tar, rank1 = by_hand(embeddings, identities, far)
        assert found.tar(far) == pytest.approx(tar, abs=2e-3)
        assert found.rank1 == pytest.approx(rank1)


def test_verification_of_sure_things():
    identities = torch.arange(50).repeat_interleave(3)
    perfect = evaluate.verify_pairs(torch.eye(50)[identities], identities)
    assert perfect.rank1 == 1
    assert all(perfect.tar(far) == 1 for far in evaluate.FARS)
    same = evaluate.verify_pairs(torch.ones(150, 8), identities)
    assert all(same.tar(far) == 0 for far in evaluate.FARS)


def histogram(counts):
    """Cosines by bin: (BINS,) float64."""
    found = torch.zeros(evaluate.BINS, dtype=torch.float64)
    for place, count in counts.items():
        found[place] = count
    return found


def test_rates_of_histograms_made_by_hand():
    """Ten impostor pairs in bins 10 to 13, eight genuine ones in bins 9 to 14: the rates at each false accept rate, ends included."""
    v = evaluate.Verification(histogram({9: 1, 11: 2, 13: 1, 14: 4}), histogram({10: 5, 11: 2, 12: 2, 13: 1}), 1.0)
    for far, tar in ((0.0, 4), (0.05, 4), (0.1, 5), (0.29, 5), (0.3, 5), (0.31, 5), (0.5, 7), (0.99, 7), (1.0, 8)):
        assert v.tar(far) == tar / 8, far
    false, true = v.roc()
    assert len(false) == len(true) == evaluate.BINS
    last = evaluate.BINS - 1
    assert [float(false[last - b]) for b in (15, 14, 13, 12, 11, 10, 9)] == pytest.approx([0, 0, 0.1, 0.3, 0.5, 1, 1])
    assert [float(true[last - b]) for b in (15, 14, 13, 12, 11, 10, 9)] == pytest.approx([0, 0.5, 0.625, 0.625, 0.875, 0.875, 1])
    nothing = evaluate.Verification(histogram({}), histogram({}), 0.0)
    assert nothing.tar(0.5) == 0
    first = evaluate.Verification(histogram({last: 3}), histogram({last: 1}), 0.0)  # even the highest threshold accepts an impostor
    assert first.tar(0.5) == 0
    assert first.tar(1.0) == 1


def test_bins_of_cosines():
    """Each ordered pair once, in the bin of its cosine: 1 in the last, -1 in the first, 0 in the middle."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [0.0, 0.5]])
    for block in (1, 2, 5, 1024):
        found = evaluate.verify_pairs(x, torch.tensor([7, 7, 7, 8, 8]), block=block)
        middle, last = evaluate.BINS // 2, evaluate.BINS - 1
        assert {int(b): float(found.genuine[b]) for b in found.genuine.nonzero()} == {last: 2, middle: 6}
        assert {int(b): float(found.impostor[b]) for b in found.impostor.nonzero()} == {0: 4, middle: 6, last: 2}
        # The nearest others: of the same identity for the first two, not for the last three.
        assert found.rank1 == pytest.approx(2 / 5)


def test_unusual_settings_are_told():
    assert heads.unusual("arcface", 100) == (
        "arcface has scale 32 (usually 64, for far more identities), margin 0.3 (usually 0.5, for far more identities)."
    )
    assert "norm_range (1.0, 30.0) (usually (10.0, 110.0), for longer embeddings)" in heads.unusual("magface", 100)
    assert (
        heads.unusual("sphereface-r", 100) == "sphereface-r has scale 32 (usually 30), margin 1.2 (usually 1.5, for far more identities)."
    )
    assert heads.unusual("softmax", 100) is None
    assert [name for name in heads.TRAINING if not heads.unusual(name, 100)] == ["inter-topk-cos"]


@pytest.mark.parametrize("name", heads.names())
def test_what_is_timed_as_eager_is_the_same_loss(name):
    case = testing.Case.random(32, 16, 300, ignored=False)
    found = []
    for loss_of in (heads.eager_loss, lambda x, w, y, m: margin_cross_entropy(x, w, y, margin=m, backend="reference")):
        margin = heads.make(name, 300)
        margin.bind(300)
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        loss = loss_of(x, w, case.labels, margin)
        loss.backward()
        found.append((loss.detach(), x.grad, w.grad))
    for got, want in zip(*found, strict=True):
        assert testing.relative_error(got, want) < 2e-5


@pytest.mark.parametrize("name", heads.names())
def test_every_head_trains_and_agrees(name, few):
    run = train.fit(name, *few, train.Settings(steps=12, batch_size=64, dim=32, width=8))
    assert all(np.isfinite(run.losses))
    assert list(run.differences) == list(range(12))
    assert max(run.differences.values()) < 1e-5


def test_the_check_of_many_logits_is_thinned(few, monkeypatch):
    """Where it would take longer than the training: some steps, the first and the last among them; the losses are the same."""
    settings = train.Settings(steps=12, batch_size=64, dim=32, width=8)
    every = train.fit("curricularface", *few, settings)
    classes = len(few[0].characters)
    monkeypatch.setattr(train, "CHECKED_LOGITS", 64 * classes // 5 + 1)
    some = train.fit("curricularface", *few, settings)
    assert some.losses == every.losses
    assert some.differences == {step: every.differences[step] for step in (0, 5, 10, 11)}
    monkeypatch.undo()
    assert train.checked_every(256, 100) == 1
    assert train.checked_every(256, 1_000_000) > 50


def test_learns_unseen_identities_and_repeats_to_the_bit(few):
    runs = [train.fit("arcface", *few, train.Settings(steps=60, batch_size=64, dim=32, width=8)) for _ in range(2)]
    first = runs[0]
    assert np.mean(first.losses[-5:]) < 0.7 * np.mean(first.losses[:5])
    assert first.verification.tar(1e-2) > 0.3
    assert np.median(first.target_angles["end"]) < np.median(first.target_angles["middle"]) < np.median(first.target_angles["start"]) - 5
    assert first.losses == runs[1].losses
    assert torch.equal(first.verification.genuine, runs[1].verification.genuine)


def test_steps_of_a_run():
    assert train.Settings(epochs=3, batch_size=10).total_steps(25) == 8
    assert train.Settings(epochs=3, batch_size=10).total_steps(1) == 1
    assert train.Settings(epochs=3, steps=4, batch_size=10).total_steps(25) == 4


def test_embeddings_are_those_of_eval_mode(few):
    """One image alone has the embedding that it has among others, and the model is left in the mode that it was in."""
    torch.manual_seed(0)
    model = train.GlyphNet(8, 4)
    images = torch.from_numpy(few[0].images[:30].copy())
    for training in (True, False):
        model.train(training)
        found = train.embed(model, images)
        torch.testing.assert_close(train.embed(model, images[3:4])[0], found[3], rtol=1e-4, atol=1e-5)
        assert model.training is training
    w = torch.randn(5, 8)
    head = type("Head", (), {"weight": w})
    labels = torch.arange(30) % 5
    want = [math.degrees(math.acos(float(e @ c / e.norm() / c.norm()))) for e, c in zip(found, w[labels], strict=True)]
    assert train.target_angles(model, head, images, labels).tolist() == pytest.approx(want, abs=1e-2)


def test_shares_of_a_split_are_rounded(few):
    k = len(few[0].characters)
    for share in (0.1, 0.496 / k, 0.504 / k, 0.5, 1.7 / k):
        assert len(few[0].split(share, 0)[1].characters) == round(share * k)


def test_unknown_head():
    with pytest.raises(ValueError, match="head: expected one of"):
        heads.make("nonsense", 10)


def test_faults_that_only_this_machine_shows(tmp_path, capsys, monkeypatch):
    """Refused before an image is rendered: a folder without fonts, and a backend that cannot serve here."""
    monkeypatch.setattr(data, "load", lambda *a, **k: pytest.fail("rendering began"))
    assert main(["demo", "--fonts", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--fonts: expected a folder with" in capsys.readouterr().err
    assert main(["demo", "--device", "cpu", "--backend", "hopper", "--out", str(tmp_path)]) == 2
    assert "--backend: no fused backend serves 'hopper'" in capsys.readouterr().err


def test_too_few_typefaces(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "font_files", lambda extra=None: [])
    assert main(["demo", "--device", "cpu", "--min-typefaces", "1000", "--out", str(tmp_path)]) == 2
    assert "--min-typefaces: " in capsys.readouterr().err


def test_the_whole_command(tmp_path, capsys):
    status = main(["demo", "--quick", "--steps", "8", "--compare", "arcface", "adacos", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["head"] for r in results["heads"]] == ["arcface", "adacos"]
    assert all(len(r["losses"]) == 8 for r in results["heads"])
    assert {(c["kind"], c["c"]) for c in results["costs"]} == {(k, c) for k in ("fused", "eager") for c in (320, 5000)}
    for name in ("samples", "losses", "roc", "angles-arcface", "angles-adacos", "target-logits"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "arcface" in out
    assert "adacos" in out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for r in results["heads"]:
        assert f"{r['tar']['0.01']:.1%}" in page
        assert f"<td>{r['loss']:.3f}</td>" in page
    alone = ElementTree.fromstring(page)
    assert {picture.get("alt") for picture in alone.iter("img")} == {path.stem for path in (tmp_path / "out").glob("*.png")}


COSTS = ({"kind": "fused", "peak_bytes": None}, {"kind": "eager", "peak_bytes": 2**20})


def report_of(name="arcface", unusual=None):
    """What a run would leave, with numbers that are easy to find."""
    head = {"head": name, "tar": {"0.1": 0.5, "0.01": 0.25}, "rank1": 0.75, "top1": 1.0, "loss": 1.25, "largest_difference": 1e-7}
    return {
        "versions": {"torch": "2.13"},
        "device": "a CPU",
        "backend": "cpu",
        "settings": {"steps": 8, "fused_step": None},
        "data": {"typefaces": 3, "train": {"identities": 1234, "images": 5678}, "unseen": {"identities": 10, "images": 20}},
        "heads": [{**head, "seconds": 2.0, "checked_steps": 8, "unusual": unusual}],
        "costs": [
            {"kind": kind, "n": 2, "c": 5000, "seconds": 0.001, "peak_bytes": peak} for kind, peak in (("fused", None), ("eager", 2**20))
        ],
    }


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path):
    pictures = [tmp_path / "roc.png", tmp_path / "losses.png"]
    for path in pictures:
        path.write_bytes(b"\x89PNG " + path.stem.encode())
    page = report.as_page(report_of("<a & b>", 'scale 32 (usually "64")'), [0.1, 0.01], pictures)
    root = ElementTree.fromstring(page)
    found = [picture.get("src").split(",") for picture in root.iter("img")]
    assert [(kind, base64.b64decode(data)) for kind, data in found] == [("data:image/png;base64", p.read_bytes()) for p in pictures]
    assert not {"script", "link", "iframe", "object"} & {part.tag for part in root.iter()}
    assert not re.search(r"https?:|url\(|@import", page)
    cells = [[cell.text for cell in row] for row in root.iter("tr")]
    assert ["<a & b>", "50.0%", "25.0%", "75.0%", "100.0%", "1.250", "1.0e-07", "2 s"] in cells
    assert ["2", "5,000", "fused", "1.0 ms", "-"] in cells
    assert ["2", "5,000", "eager", "1.0 ms", "1.0 MiB"] in cells
    assert ["steps", "8"] in cells
    assert not any(row[0] == "fused_step" for row in cells)
    assert 'scale 32 (usually "64")' in [p.text for p in root.iter("p")]
    assert {meta.get("name") for meta in root.iter("meta")} >= {"viewport"}
    assert "prefers-color-scheme: dark" in next(root.iter("style")).text


def test_the_text_has_the_same_tables():
    text = report.as_text(report_of(unusual="arcface has scale 32."), [0.1, 0.01])
    assert re.search(r"^arcface +50.0% +25.0% +75.0% +100.0% +1.250 +1.0e-07 +2 s$", text, re.M)
    assert re.search(r"^ +2 +5,000 +eager +1.0 ms +1.0 MiB$", text, re.M)
    assert text.index("rank-1:") < text.index("arcface has scale 32.") < text.index("Loss and gradients of the arcface head")
    assert "\n\n\n" not in report.as_text(report_of(), [0.1, 0.01])
