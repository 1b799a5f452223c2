"""``python -m marginkernels suggest``: the bounds hold for centers and rows that reach them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from marginkernels.__main__ import main
from marginkernels.cli import suggest


def simplex(classes):
    """Centers (C, C) that all have the same cosine, -1/(C - 1)."""
    return F.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes)


@pytest.mark.parametrize(("classes", "p"), [(3, 0.5), (10, 0.9), (200, 0.99)])
def test_a_row_on_its_center_just_reaches_the_probability(classes, p):
    w = simplex(classes)
    s = suggest.cosface_scale(classes, p)
    loss = mk.margin_cross_entropy(w[:1], w, torch.tensor([0]), margin=mk.NormFace(scale=s), backend="reference")
    assert math.exp(-loss) == pytest.approx(p, rel=1e-9)
    assert loss.item() == pytest.approx(suggest.least_loss(classes, s), rel=1e-9)


def test_shares_of_the_sphere():
    for angle in (0.01, 0.5, 1.5, 3.0):
        assert suggest.cap_share(angle, 2) == pytest.approx(angle / math.pi, rel=1e-6)
        assert suggest.cap_share(angle, 3) == pytest.approx((1 - math.cos(angle)) / 2, rel=1e-6)
    assert suggest.cap_share(math.pi / 2, 512) == pytest.approx(0.5, rel=1e-6)


def test_the_widest_angle():
    assert suggest.widest_angle(2, 1) == math.pi
    assert suggest.widest_angle(3, 1) == 0
    assert suggest.widest_angle(4, 3) == pytest.approx(math.acos(-1 / 3))  # a tetrahedron
    assert suggest.widest_angle(7, 2) == pytest.approx(2 * math.pi / 7)
    assert suggest.widest_angle(6, 3) == math.pi / 2  # an octahedron
    icosahedron = math.acos(1 / math.sqrt(5))
    assert icosahedron <= suggest.widest_angle(12, 3) < 1.1 * icosahedron
    assert suggest.widest_angle(1_000_000, 512) == math.pi / 2
    torch.manual_seed(0)
    for classes, dim in ((50, 3), (300, 4), (2000, 8)):
        w = F.normalize(torch.randn(classes, dim, dtype=torch.float64))
        nearest = torch.acos((w @ w.T - 3 * torch.eye(classes)).max())
        assert nearest < suggest.widest_angle(classes, dim) < math.pi / 2


def test_the_command(capsys):
    assert main(["suggest", "--classes", "5000", "--dim", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    values = {one["name"]: one["value"] for one in found["bounds"]}
    assert values["scale of AdaCos(dynamic=False)"] == mk.AdaCos(5000, dynamic=False).s.item()
    assert values["least alpha of L2Softmax"] == mk.L2Softmax(num_classes=5000).alpha
    assert values["largest margin of CosFace"] == pytest.approx(1 - math.cos(values["largest margin of ArcFace, radians"]))
    assert main(["suggest", "--classes", "1e6"]) == 0
    assert "Advisable where" in capsys.readouterr().out
    assert main(["suggest", "--classes", "1e5"]) == 0
    assert "Not advisable" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--classes", "2"], ["--classes", "10", "--probability", "1"], ["--classes", "10", "--dim", "0"]])
def test_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["suggest", *words])
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err
