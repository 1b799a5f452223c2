"""What the tests of :mod:`marginkernels.compat` share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import marginkernels

#: What the pages in docs/switching say: relative to the largest element.
SAME = {torch.float32: 1e-5, torch.float64: 1e-12}


def near(weight, labels, dtype, seed=3):
    """(N, D) embeddings at all angles to the ``weight`` rows (N, D) of their classes, from beyond a right angle to near."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.nn.functional.normalize(weight.detach().double()[labels], dim=1)
    pull = torch.linspace(-0.5, 3.0, len(labels), dtype=torch.float64)[:, None]
    noise = torch.randn(own.shape, generator=generator, dtype=torch.float64) / own.shape[1] ** 0.5
    return ((noise + pull * own) * 3).to(dtype)


def assert_same(found, expected, dtype, what=""):
    """Tensors in turn, by :data:`SAME`."""
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == theirs.shape, (what, i)
        error = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        assert error <= SAME[dtype], (what, i, error)


def error_without(library: str, shim: str) -> str:
    """What importing a shim says where its library is not there."""
    code = (
        "import sys\n"
        f"sys.modules[{library!r}] = None\n"
        "import marginkernels.compat\n"
        "try:\n"
        f"    import marginkernels.compat.{shim}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    root = Path(marginkernels.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    return done.stdout + done.stderr
