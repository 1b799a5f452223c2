"""No step on a GPU waits for the device, as far as the sources show: a number that is copied to the device by itself, or a value that is
read back, stops the host until the device has caught up, and cannot be captured in a CUDA graph. test_gpu.py asks the GPU itself."""

import ast
from pathlib import Path

import marginkernels

ROOT = Path(marginkernels.__file__).parent
#: What runs in a step: modules and packages.
STEP = ("core", "backend", "ops", "margins", "distributed/_shard.py", "distributed/_collectives.py", "loss.py", "head.py", "retrieval.py")
STEP += ("sampling.py", "center_loss.py")
#: Functions that wait, and may: where, and why.
ALLOWED = {
    "core/labels.py::raise_pending_label_errors": "after the event that says that the copy is done",
    "backend/torch_topk.py::_candidates": "in a search, which is no training step",
    "distributed/_shard.py::_most": "ranks agree on a number of rows; a fixed batch_size spares it",
    "distributed/_collectives.py::all_gather_labels": "once for each dtype: whether all ranks have it",
    "margins/base.py::_apply": "moves a module to another device",
    "core/device.py::digest": "once, when a head is made",
    "margins/per_class.py::_checked_margins": "when a margin is made or set, before any step",
    "margins/per_class.py::margins_from_counts": "once, before training",
}
#: Functions of torch that copy a Python value to the device, where one is named; torch.full fills on the device itself.
COPIES = {"tensor", "as_tensor", "asarray", "scalar_tensor"}
#: Methods that read the device.
READS = {"item", "tolist", "cpu", "numpy", "nonzero"}


def waits(text: str) -> list[tuple[str, int, str]]:
    """(function, line, call) of what would wait."""
    found = []

    def look(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                name, named = child.func.attr, {keyword.arg for keyword in child.keywords}
                torchs = isinstance(child.func.value, ast.Name) and child.func.value.id == "torch"
                if (torchs and name in COPIES and "device" in named) or (torchs and name == "nonzero") or (not torchs and name in READS):
                    found.append((inside, child.lineno, name))
            look(child, inside)

    look(ast.parse(text), "")
    return found


def test_no_step_waits():
    seen = set()
    for part in STEP:
        for path in sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]:
            file = path.relative_to(ROOT).as_posix()
            for function, line, call in waits(path.read_text()):
                assert f"{file}::{function}" in ALLOWED, f"{file}:{line}: {call} in {function} waits for the device"
                seen.add(f"{file}::{function}")
    assert seen == set(ALLOWED), f"no longer needed: {set(ALLOWED) - seen}"


def test_what_would_wait_is_noticed():
    text = """
def step(x, scale):
    s = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    t = torch.full((), scale, device=x.device) + torch.tensor(scale)
    return torch.tensor([1.0], device="cuda") * s.item() + t.cpu()
"""
    assert waits(text) == [("step", 3, "as_tensor"), ("step", 5, "tensor"), ("step", 5, "item"), ("step", 5, "cpu")]
