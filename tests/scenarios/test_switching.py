"""The examples of switching train: beside the libraries or, where one is not installed, its stand-in."""

import runpy
from pathlib import Path

import pytest
from helpers import stand_ins

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(library, **options):
    with stand_ins.compat(library):
        return runpy.run_path(str(EXAMPLES / f"switch_{library}.py"))["main"](**options)


def test_oml():
    accuracies = run("oml", steps=40)
    assert accuracies[-1] > 0.8 > accuracies[0]


@pytest.mark.parametrize("kind", ["arc_margin_intertopk_subcenter", "add_margin", "sphere", "sphereface2"])
def test_wespeaker(kind):
    main = runpy.run_path(str(EXAMPLES / "switch_wespeaker.py"))["main"]
    accuracies = main(steps=50, kind=kind)
    assert accuracies[-1] > accuracies[0] + (0.02 if kind == "sphere" else 0.3)


def test_speechbrain():
    *losses, error = run("speechbrain", steps=40)
    assert losses[-1] < 0.5 * losses[0]
    assert error < 0.1


def test_mmpretrain():
    losses = run("mmpretrain", steps=40)
    assert losses[-1] < 0.5 * losses[0]
