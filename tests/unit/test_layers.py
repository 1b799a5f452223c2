"""Who may import whom: every import of the package, inside functions too, against one table; and what ``import marginkernels`` loads.

Imports under ``if TYPE_CHECKING`` are of types alone and do not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import marginkernels

ROOT = Path(marginkernels.__file__).parent

#: Layer -> the layers that it may import, besides itself. A module belongs to the layer with the longest name that it starts with;
#: ``_deprecated`` and ``_version`` may be imported by everything.
LAYERS: dict[str, set[str]] = {
    "_deprecated": set(),
    "_version": set(),
    "core": set(),
    "margins": {"core"},
    # The step of a fused optimizer is the class pass of a head.
    "optim": {"core", "backend", "ops", "head"},
    "sampling": {"core"},
    "center_loss": {"core"},
    "sub_centers": {"core"},
    "monitor": set(),
    # Backends know neither margins nor each other.
    "backend.torch_topk": {"core"},
    "backend.base": {"core", "backend.torch_topk"},
    "backend.online_softmax": {"core"},
    "backend._extension": {"core"},
    "backend.chunked": {"core", "backend.base", "backend.online_softmax"},
    "backend.cpu": {"core", "backend.base", "backend._extension"},
    "backend.cuda": {"core", "backend.base", "backend.gpu_rows", "backend.online_softmax", "backend._extension"},
    "backend.triton": {"core", "backend.base", "backend.gpu_rows"},
    "backend.triton.rows": {"core", "backend.triton"},
    # Compiles all of a step's launches without a GPU.
    "backend.triton.aot": {"core", "backend.triton", "backend.triton.rows"},
    # The row arithmetic that all backends of a GPU share.
    "backend.gpu_rows": {"core", "backend.base", "backend.triton.rows"},
    "backend.records": {"core", "backend.cpu"},
    "backend.registry": {"core", "backend.base", "backend.records", "backend.chunked", "backend.cpu", "backend.cuda", "backend.triton"},
    "backend": {"backend.base", "backend.records", "backend.registry"},
    "ops": {"core", "backend"},
    "reference": {"core", "margins"},
    "distributed._collectives": {"core"},
    "distributed._shard": {"core", "distributed._collectives"},
    "retrieval": {"core", "margins", "backend", "ops"},
    "loss": {"core", "margins", "backend", "ops", "reference"},
    "head": {"core", "margins", "backend", "ops", "sampling", "sub_centers", "retrieval", "loss", "distributed._shard"},
    "distributed": {"core", "head", "distributed._collectives", "distributed._shard"},
    "testing": {"core", "margins", "reference", "loss", "head"},
    "cli": {
        *("", "core", "margins", "optim", "sampling", "loss", "head", "distributed", "testing"),
        *("backend", "backend.triton", "backend.triton.aot", "backend.cpu", "backend.records", "backend.registry", "backend.torch_topk"),
    },
    "compat": {"margins", "loss", "sampling", "distributed._shard"},
    "demo": {"", "core", "margins", "optim", "sampling", "backend", "loss", "head", "distributed", "testing", "cli"},
    "__main__": set(),
    "": {"core", "margins", "optim", "backend", "center_loss", "loss", "head", "retrieval", "monitor"},
}
EVERYWHERE = {"_deprecated", "_version"}
#: Packages besides torch and the standard library -> the modules that may import them.
THIRD_PARTY = {
    "triton": ("backend.triton.", "cli.tune"),
    "numpy": ("distributed.centers", "demo."),
    "tqdm": ("cli._progress",),
    "matplotlib": ("demo",),
    "PIL": ("demo",),
    "fontTools": ("demo",),
    "pytorch_metric_learning": ("compat.metric_learning",),
    "wespeaker": ("compat.wespeaker",),
    "speechbrain": ("compat.speechbrain",),
    "oml": ("compat.oml",),
    "mmpretrain": ("compat.mmpretrain",),
}


def sources() -> dict[str, str]:
    """Module name, without the package's, -> its text; a package is named like its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if types_only else ast.iter_child_nodes(node):
        yield from imports(child)


def targets(module: str, node: ast.Import | ast.ImportFrom, known: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """What an import statement names: (module, whether it is one of this package)."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            own = alias.name.partition(".")[0] == "marginkernels"
            yield (alias.name.partition(".")[2] if own else alias.name), own
        return
    if node.level == 0:
        own = (node.module or "").partition(".")[0] == "marginkernels"
        base = (node.module or "").partition(".")[2] if own else node.module or ""
        if not own:
            yield base, False
            return
    else:
        is_package = module == "" or any(name.startswith(f"{module}.") for name in known)
        parts = module.split(".") if module else []
        drop = node.level - (1 if is_package else 0)
        base = ".".join(parts[: len(parts) - drop] + (node.module.split(".") if node.module else []))
    for alias in node.names:
        inner = f"{base}.{alias.name}".lstrip(".")
        yield (inner if inner in known else base), True


def layer(module: str) -> str:
    fitting = [name for name in LAYERS if name and (module == name or module.startswith(f"{name}."))]
    return max(fitting, key=len, default="")


def violations(texts: dict[str, str]) -> list[str]:
    found = []
    for module, text in texts.items():
        for node in imports(ast.parse(text)):
            for target, own in targets(module, node, texts):
                if own:
                    here, there = layer(module), layer(target)
                    if there != here and there not in EVERYWHERE and there not in LAYERS[here]:
                        found.append(f"{module or 'marginkernels'}, line {node.lineno}: imports {target or 'marginkernels'}")
                else:
                    top = target.partition(".")[0]
                    allowed = top in ("torch", "__future__") or top in sys.stdlib_module_names
                    if not allowed and not any(module.startswith(p.rstrip(".")) for p in THIRD_PARTY.get(top, ())):
                        found.append(f"{module or 'marginkernels'}, line {node.lineno}: imports {target}")
    return found


def test_every_import_follows_the_layers():
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("core.numerics", "from ..margins import Margin", "core.numerics, line 1: imports margins"),
        ("backend.cpu", "def f():\n    from .chunked import ChunkedBackend", "backend.cpu, line 2: imports backend.chunked"),
        ("backend.triton.launch", "from ...margins import ArcFace", "backend.triton.launch, line 1: imports margins"),
        ("ops.autograd", "import marginkernels.loss", "ops.autograd, line 1: imports loss"),
        ("loss", "from .head import MarginHead", "loss, line 1: imports head"),
        ("margins.angular", "def f():\n    from .. import backend", "margins.angular, line 2: imports backend"),
        ("optim", "import numpy", "optim, line 1: imports numpy"),
        ("head", "if TYPE_CHECKING:\n    from .testing import Case\nelse:\n    from .cli import plan", "head, line 4: imports cli.plan"),
    ],
)
def test_an_arrow_against_the_layers_is_found(module, line, expected):
    planted = sources() | {module: line}
    assert expected in violations(planted)


def test_imports_of_types_do_not_count():
    assert violations(sources() | {"margins.base": "if TYPE_CHECKING:\n    from ..head import MarginHead"}) == []


def test_what_the_import_loads():
    """Neither Triton's kernels nor what is loaded on first use, nor anything for pictures."""
    code = (
        "import sys, marginkernels as mk\n"
        "mk.backends()\n"
        "lazy = ('testing', 'distributed', 'cli', 'demo', 'compat', 'backend.triton.launch', 'backend.triton.row_kernel')\n"
        "lazy += ('backend.triton.aot',)\n"
        "lazy = tuple(f'marginkernels.{name}' for name in lazy) + ('matplotlib', 'PIL', 'pytorch_metric_learning')\n"
        "loaded = [name for name in sys.modules if name in lazy or name.startswith(tuple(f'{x}.' for x in lazy))]\n"
        "assert not loaded, loaded\n"
        "mk.distributed.save, mk.testing.Case\n"
        "assert {'marginkernels.distributed', 'marginkernels.testing'} <= sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
