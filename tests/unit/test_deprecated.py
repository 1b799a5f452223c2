"""Names that moved still work, warn, and lead to the new ones."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import marginkernels as mk
from marginkernels import _deprecated


def test_attributes_of_the_package():
    for old, new in _deprecated.ATTRIBUTES.items():
        with pytest.warns(DeprecationWarning, match=f"marginkernels.{old} is deprecated .* use marginkernels.{new}"):
            assert getattr(mk, old) is getattr(mk, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mk.nothing


@pytest.mark.parametrize("module", _deprecated.MODULES)
def test_modules(module):
    old = importlib.import_module(module)
    assert getattr(mk, module.rpartition(".")[2]) is old
    for name, target in _deprecated.MODULES[module].items():
        with pytest.warns(DeprecationWarning, match=f"{module}.{name} is deprecated"):
            found = getattr(old, name)
        where, _, path = target.partition(":")
        want = importlib.import_module(where)
        for part in path.split("."):
            want = getattr(want, part)
        assert found is want
    with pytest.raises(AttributeError, match="no attribute"):
        _ = old.nothing


def test_distributed_names():
    for old, new in _deprecated.DISTRIBUTED.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is deprecated .* use marginkernels.distributed.{new}"):
            assert getattr(mk.distributed, old) is getattr(mk.distributed, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mk.distributed.nothing


def test_backend_names_and_keys():
    x, w, y = torch.randn(3, 8), torch.randn(5, 8), torch.arange(3)
    for old, new in _deprecated.BACKENDS.items():
        with pytest.warns(DeprecationWarning, match=f"backend='{old}' is deprecated .* use backend='{new}'"):
            found = mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), backend=old)
        assert torch.equal(found, mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), backend=new))
        with pytest.warns(DeprecationWarning, match=f"the key '{old}'"):
            assert mk.backends()[old] == mk.backends()[new]
    listed = mk.backends()["reference"]
    with pytest.warns(DeprecationWarning, match="'proven' is deprecated .* use 'verified'"):
        assert listed["proven"] is True
    with pytest.warns(DeprecationWarning, match="'proven'"):
        assert listed.get("proven") is True
    assert listed.get("nothing", 3) == 3
    with pytest.raises(KeyError, match="nothing"):
        _ = listed["nothing"]


def test_a_margin_that_names_its_form():
    with pytest.warns(DeprecationWarning, match="Old.form is deprecated .* use Old.non_target"):

        class Old(mk.Margin):
            form = 2
            t = 0.1

            def target(self, cos, rows):
                return cos, torch.ones_like(cos)

            def threshold(self, cos, rows):
                return cos

    assert Old.non_target is mk.NonTarget.HARD_QUADRATIC
    x, w, y = torch.randn(3, 8), torch.randn(5, 8), torch.arange(3)
    a, b = (mk.margin_cross_entropy(x, w, y, margin=Old(), backend=name) for name in ("torch", "reference"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_commands():
    for old, new in _deprecated.COMMANDS.items():
        done = subprocess.run([sys.executable, "-m", "marginkernels", old, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert f"the command {old} is deprecated and goes with the next release; use {new}" in done.stderr
        assert f"python -m marginkernels {new}" in done.stdout
