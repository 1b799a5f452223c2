"""``python -m marginkernels migrate``: scripts as people write them, switched, and every other byte as it was."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marginkernels.__main__ import main
from marginkernels.cli import migrate
from marginkernels.cli._libraries import LIBRARIES

#: Before and after.
SWITCHED = {
    "the import alone": (
        "from pytorch_metric_learning.losses import ArcFaceLoss  # degrees\n\nloss_fn = ArcFaceLoss(10, 4)\n",
        "from marginkernels.compat.metric_learning import ArcFaceLoss  # degrees\n\nloss_fn = ArcFaceLoss(10, 4)\n",
    ),
    "aliases, brackets, comments and trailing commas": (
        "from pytorch_metric_learning.losses import (  # all of them\n    ArcFaceLoss as Arc,  # first\n    CosFaceLoss,\n)\n",
        "from marginkernels.compat.metric_learning import (  # all of them\n    ArcFaceLoss as Arc,  # first\n    CosFaceLoss,\n)\n",
    ),
    "some of the names": (
        "if True:\n    from pytorch_metric_learning.losses import ArcFaceLoss as A, TripletMarginLoss, CosFaceLoss  # two\n    A(3, 4)\n",
        "if True:\n    from pytorch_metric_learning.losses import TripletMarginLoss  # two\n"
        "    from marginkernels.compat.metric_learning import ArcFaceLoss as A, CosFaceLoss\n    A(3, 4)\n",
    ),
    "through the module": (
        "from pytorch_metric_learning import losses, miners\nx = losses.SubCenterArcFaceLoss(num_classes=3, embedding_size=2)\n"
        "y = losses.TripletMarginLoss()\n",
        "from pytorch_metric_learning import losses, miners\nfrom marginkernels.compat import metric_learning\n"
        "x = metric_learning.SubCenterArcFaceLoss(num_classes=3, embedding_size=2)\ny = losses.TripletMarginLoss()\n",
    ),
    "through the package, the name taken": (
        "import pytorch_metric_learning as pml\n\nmetric_learning = 3\n\n\nclass Mine(pml.losses.CosFaceLoss):\n    pass\n",
        "import pytorch_metric_learning as pml\nfrom marginkernels.compat import metric_learning as fused_metric_learning\n\n"
        "metric_learning = 3\n\n\n"
        "class Mine(fused_metric_learning.CosFaceLoss):\n    pass\n",
    ),
    "by the full name, without an end of line": (
        "import pytorch_metric_learning.losses\nloss = pytorch_metric_learning.losses.ArcFaceLoss(1, 2)",
        "import pytorch_metric_learning.losses\nfrom marginkernels.compat import metric_learning\nloss = metric_learning.ArcFaceLoss(1, 2)",
    ),
    "insightface's train_v2.py": (
        "from backbones import get_model\nfrom losses import CombinedMarginLoss\nfrom lr_scheduler import PolynomialLRWarmup\n"
        "from partial_fc_v2 import PartialFC_V2\n",
        "from backbones import get_model\nfrom marginkernels.compat.insightface import CombinedMarginLoss\n"
        "from lr_scheduler import PolynomialLRWarmup\n"
        "from marginkernels.compat.insightface import PartialFC_V2\n",
    ),
    "insightface's other margins beside its head": (
        "from losses import ArcFace, CosFace\nfrom partial_fc_v2 import PartialFC_V2\n",
        "from marginkernels.compat.insightface import ArcFace, CosFace\nfrom marginkernels.compat.insightface import PartialFC_V2\n",
    ),
    "insightface's modules": (
        "import partial_fc_v2\nhead = partial_fc_v2.PartialFC_V2(m, 4, 10)\n",
        "import partial_fc_v2\nfrom marginkernels.compat import insightface\nhead = insightface.PartialFC_V2(m, 4, 10)\n",
    ),
    "wespeaker's train.py": (
        "import wespeaker.utils.schedulers as schedulers\nfrom wespeaker.models.projections import get_projection\n\n"
        "projection = get_projection(configs['projection_args'])\n",
        "import wespeaker.utils.schedulers as schedulers\nfrom marginkernels.compat.wespeaker import get_projection\n\n"
        "projection = get_projection(configs['projection_args'])\n",
    ),
    "speechbrain, Windows' ends of lines": (
        "from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier\r\n"
        "from speechbrain.nnet.losses import LogSoftmaxWrapper\r\n",
        "from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN\r\nfrom marginkernels.compat.speechbrain import Classifier\r\n"
        "from marginkernels.compat.speechbrain import LogSoftmaxWrapper\r\n",
    ),
    "OML": (
        "from oml.losses import ArcFaceLossWithMLP\nfrom oml.losses.arcface import ArcFaceLoss\n",
        "from marginkernels.compat.oml import ArcFaceLossWithMLP\nfrom marginkernels.compat.oml import ArcFaceLoss\n",
    ),
    "a config of mmpretrain": (
        "_base_ = ['../_base_/default_runtime.py']\n\nmodel = dict(\n    head=dict(type='ArcFaceClsHead', num_classes=10))\n",
        "_base_ = ['../_base_/default_runtime.py']\n\n"
        'custom_imports = dict(imports=["marginkernels.compat.mmpretrain"], allow_failed_imports=False)\n'
        "model = dict(\n    head=dict(type='ArcFaceClsHead', num_classes=10))\n",
    ),
    "a config that imports something": (
        "custom_imports = dict(imports=['mine', 'yours'])\nmodel = {'head': {'type': 'ArcFaceClsHead'}}\n",
        "custom_imports = dict(imports=['mine', 'yours', \"marginkernels.compat.mmpretrain\"])\n"
        "model = {'head': {'type': 'ArcFaceClsHead'}}\n",
    ),
    "mmpretrain's class": (
        "from mmpretrain.models.heads import ArcFaceClsHead\n",
        "from marginkernels.compat.mmpretrain import ArcFaceClsHead\n",
    ),
    "letters beyond ASCII and a mark of the order of bytes": (
        "\ufeff# größer\ns = 'é'; t = 'ü'\nfrom pytorch_metric_learning import losses\nwörter = ['ä', losses.ArcFaceLoss(1, 2)]\n",
        "\ufeff# größer\ns = 'é'; t = 'ü'\nfrom pytorch_metric_learning import losses\nfrom marginkernels.compat import metric_learning\n"
        "wörter = ['ä', metric_learning.ArcFaceLoss(1, 2)]\n",
    ),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_scripts(name):
    before, after = (text.encode() for text in SWITCHED[name])
    found = migrate.scan(before)
    assert found.by_hand == []
    assert migrate.applied(before, found.edits) == after
    ast.parse(after)
    again = migrate.scan(after)
    assert (again.heads, again.edits, again.by_hand) == ([], [], [])


#: Scripts with nothing to switch.
LEFT = [
    "x = 1\n",
    "",
    "from pytorch_metric_learning.losses import TripletMarginLoss\nfrom pytorch_metric_learning import miners\nminers.BatchHardMiner()\n",
    "from losses import ArcFace\nArcFace()\n",  # anybody's
    "from .losses import CombinedMarginLoss\n",  # of a package
    "import losses\nlosses.ArcFace()\n",
    "# from pytorch_metric_learning.losses import ArcFaceLoss\ntext = 'losses.ArcFaceLoss'\n",
    "class ArcFaceLoss:\n    pass\nloss = ArcFaceLoss()\n",
    "other.losses.ArcFaceLoss(1, 2)\n",
    "dict(type='LinearClsHead')\n",
]


@pytest.mark.parametrize("text", LEFT)
def test_scripts_without_such_a_head(text, tmp_path, capsys):
    path = tmp_path / "train.py"
    path.write_text(text)
    assert main(["migrate", str(path), "--write"]) == 0
    assert capsys.readouterr().out == f"{path}: no head that could be switched\n"
    assert path.read_text() == text


#: What cannot be told from the text, and what is said of it.
BY_HAND = {
    "from pytorch_metric_learning.losses import *\nArcFaceLoss(1, 2)\n": "name the heads",
    "import os; from pytorch_metric_learning.losses import ArcFaceLoss, TripletMarginLoss\n": "import ArcFaceLoss from marginkernels",
    "from pytorch_metric_learning.losses import (\n    ArcFaceLoss,\n    TripletMarginLoss,  # why\n)\n": "and the other names as they are",
    "from pytorch_metric_learning import losses\ndef f(losses):\n    return losses.ArcFaceLoss\n": "bound more than once",
    "import os; from pytorch_metric_learning import losses\nlosses.ArcFaceLoss\n": "take ArcFaceLoss from",
    "custom_imports = dict(imports=mine)\nhead = dict(type='ArcFaceClsHead')\n": "imports of custom_imports",
}


@pytest.mark.parametrize("text", BY_HAND)
def test_what_is_left_to_do_by_hand(text, tmp_path, capsys):
    path = tmp_path / "train.py"
    path.write_text(text)
    assert main(["migrate", str(path), "--write"]) == 0
    out = capsys.readouterr().out
    assert "By hand:\n  line " in out
    assert BY_HAND[text] in out
    assert path.read_text() == text


def test_the_file_is_changed_only_when_told(tmp_path, capsys):
    before, after = SWITCHED["some of the names"]
    path = tmp_path / "train.py"
    path.write_text(before)
    assert main(["migrate", str(path)]) == 0
    out = capsys.readouterr().out
    assert path.read_text() == before
    assert f"--- {path}\n+++ {path}\n" in out
    assert "+    from marginkernels.compat.metric_learning import ArcFaceLoss as A, CosFaceLoss\n" in out
    for text in LIBRARIES["metric_learning"].numbers:
        assert f"  - {text}\n" in out
    assert "insightface" not in out
    assert main(["migrate", str(path), "--write"]) == 0
    assert path.read_text() == after
    assert f"{path} is changed." in capsys.readouterr().out
    assert main(["migrate", str(path), "--write"]) == 0
    assert "no head that could be switched" in capsys.readouterr().out
    assert path.read_text() == after


def test_the_diff_is_what_patch_takes(tmp_path, capsys, monkeypatch):
    if shutil.which("patch") is None:
        pytest.skip("patch is not here")
    monkeypatch.chdir(tmp_path)
    for name, (before, after) in SWITCHED.items():
        Path("train.py").write_bytes(before.encode())
        assert main(["migrate", "train.py"]) == 0
        diff = migrate.difference("train.py", before.encode(), after.encode())
        assert capsys.readouterr().out.replace("\r", "").startswith(diff.replace("\r", ""))
        subprocess.run(["patch", "--binary", "-p0"], input=diff.encode(), check=True, capture_output=True)
        assert Path("train.py").read_bytes() == after.encode(), name


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "expected a Python file that exists"),
        ("folder", "expected a Python file, got the folder"),
        ("train.yaml", "expected a Python file (.py)"),
    ],
)
def test_what_is_no_file_of_python(made, said, tmp_path, capsys):
    path = tmp_path / (made or "nothing.py")
    if made == "folder":
        path.mkdir()
    elif made:
        path.write_text("x: 1\n")
    with pytest.raises(SystemExit) as raised:
        main(["migrate", str(path)])
    assert raised.value.code == 2
    assert "error: argument file: " + said in capsys.readouterr().err


@pytest.mark.parametrize("source", [b"from x import (\n", b"x = '\xff'\n", b"a\0b\n", b"def f(:\n"])
def test_what_cannot_be_parsed(source, tmp_path, capsys):
    path = tmp_path / "train.py"
    path.write_bytes(source)
    assert main(["migrate", str(path), "--write"]) == 2
    assert "file: expected Python that can be parsed, got " in capsys.readouterr().err
    assert path.read_bytes() == source


def test_the_table_names_what_the_shims_have():
    for library in LIBRARIES.values():
        text = (Path(migrate.__file__).parents[1] / "compat" / f"{library.shim}.py").read_text()
        (names,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
        )
        listed = {name for some in library.sources.values() for name in some}
        assert listed <= set(names)
        assert set(names) - listed <= {"Outputs", "Unclassified"}


def test_nothing_of_the_libraries_is_imported():
    code = "import sys; from marginkernels.cli import migrate; assert not {'pytorch_metric_learning', 'oml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
