"""What an installed wheel must be able to do, run by ``wheels.py check`` with the interpreter of a fresh environment.

It lies in an unpacked sdist, whose README and setup.py it reads; the package is the installed one.
"""

import importlib.metadata
import math
import re
import sys
from pathlib import Path

import torch

import marginkernels as mk
from marginkernels.backend import cpu
from marginkernels.backend.cuda.common import _cuda, _missing

SDIST = Path(__file__).resolve().parents[1]
PACKAGE = Path(mk.__file__).parent


def expect(right: bool, what: str) -> None:
    """
    Raises:
        SystemExit: it is not so.
    """
    print(f"{'yes' if right else 'NO '}  {what}", flush=True)
    if not right:
        raise SystemExit(1)


def main() -> None:
    expect(PACKAGE.is_relative_to(sys.prefix), f"the package is the installed one: {PACKAGE}")
    version = importlib.metadata.version("marginkernels")
    expect(mk.__version__ == version, f"the version is the wheel's: {version}, with torch {torch.__version__}")
    levels = re.search(r"^LEVELS = \{(.*?)^\}", (SDIST / "setup.py").read_text(), re.M | re.S)[1]
    wanted = {"plain", *re.findall(r'^    "(\w+)":', levels, re.M)}
    expect(wanted <= {*cpu.levels(here=False)}, f"the C++ kernels were built for {', '.join(sorted(wanted))}")
    expect(mk.backends()["cpu"]["available"], f"they run here: {', '.join(cpu.levels())}")
    expect(_cuda is not None, f"the CUDA kernels can be imported, with a GPU or without: {_missing or 'built with CUDA'}")
    expect(hasattr(_cuda, "fused_row"), "those of compute capability 9.0 are among them")
    for part in ("cpu", "cuda"):
        noted = (PACKAGE / f"_{part}.sha256").read_text()
        expect(re.fullmatch(r"[0-9a-f]{64}", noted) is not None, f"records of verify know the sources of _{part}: {noted[:12]}")
    readme = (SDIST / "README.md").read_text()
    quickstart = re.search(r"^## Quickstart\n+```python\n(.*?)^```", readme, re.M | re.S)[1]
    space: dict[str, torch.Tensor] = {}
    exec(quickstart.replace("1_000_000", "100_000"), space)  # with a tenth of its identities, for machines of little memory
    loss = space["loss"].item()
    expect(math.isfinite(loss), f"the README's quickstart: a loss of {loss:.2f}")
    expect(tuple(space["identities"].shape) == (64, 5), "and its search: 5 identities for each of 64 rows")


if __name__ == "__main__":
    main()
