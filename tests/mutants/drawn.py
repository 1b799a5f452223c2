"""Mistakes that nobody thought of: drawn among all that cosmic-ray makes of the pure Python of margins, loss, optimizers and sampling."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .planted import ROOT, Mistake

_MARGINS = (
    "tests/unit/test_margins.py -k 'not compile'",
    "tests/unit/test_margin_contract.py -k 'not compile and not break_the_graph'",
    "tests/unit/test_inputs.py -k 'ends_of_ranges or negative or too'",
    "tests/backends/test_backends.py -k 'test_every_head and torch'",
)
_ON_RANKS = "every_head or options or sampling or topk or statistics or weights or large"
#: The files, and the quick tests that ought to notice a mistake in them; of a margin with tests of its own, those first.
FILES = {
    **{f"marginkernels/margins/{name}.py": _MARGINS for name in ("adaptive", "angles", "angular", "base", "hard_negative", "softmax")},
    "marginkernels/margins/quality.py": ("tests/unit/test_norm_margins.py", *_MARGINS),
    "marginkernels/margins/elastic.py": ("tests/unit/test_elastic.py -k 'not compile'", *_MARGINS),
    "marginkernels/margins/per_class.py": ("tests/unit/test_class_margins.py", *_MARGINS),
    **{
        f"marginkernels/margins/{name}.py": ("tests/unit/test_transform_heads.py", *_MARGINS)
        for name in ("circle", "filtered", "sphereface_r")
    },
    "marginkernels/loss.py": (
        "tests/unit/test_targets.py -k 'not compile'",
        "tests/unit/test_inputs.py",
        "tests/unit/test_margins.py -k 'not compile'",
        "tests/unit/test_properties.py",
        "tests/unit/test_torch.py -k 'not compile and not opcheck'",
        "tests/backends/test_launches.py",
        "tests/unit/test_sampling.py -k log_q",
        f"tests/distributed/test_distributed.py -k '3-check and ({_ON_RANKS})'",
    ),
    "marginkernels/optim/rows.py": ("tests/unit/test_optim.py", "tests/unit/test_sampling.py -k 'rows or optimizers or accumulated'"),
    "marginkernels/sampling.py": ("tests/unit/test_sampling.py",),
}


@dataclass(frozen=True)
class Drawn(Mistake):
    """``after`` is the whole file, ``before`` its text now."""

    def mutated(self, root: Path) -> str:
        return self.after


def drawn(count: int, seed: int) -> list[Mistake]:
    """``count`` of them at random, none that changes an annotation or a docstring only.

    Raises:
        ImportError: cosmic-ray is not installed.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    every = [(file, *which) for file in FILES for which in _positions((ROOT / file).read_text())]
    random.Random(seed).shuffle(every)
    found: dict[str, Mistake] = {}
    for file, operator, occurrence, line in every:
        if len(found) == count:
            break
        before = (ROOT / file).read_text()
        after = mutate_code(before, get_operator(operator)(), occurrence)
        if after is None or _meaning(after) in (None, _meaning(before)):
            continue
        changed = next((b.strip() for a, b in zip(before.splitlines(), after.splitlines(), strict=False) if a != b), "a line is gone")
        name = f"{Path(file).stem}:{line}:{operator.rpartition('/')[2]}:{occurrence}"
        found[name] = Drawn("drawn", name, file, before, after, changed, FILES[file])
    return sorted(found.values(), key=lambda m: (m.file, m.id))


def _positions(text: str) -> Iterator[tuple[str, int, int]]:
    """(operator, occurrence, line) of every change that an operator without arguments can make."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    tree = get_ast(text)
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            continue
        places = [start[0] for node in ast_nodes(tree) for start, _ in kind().mutation_positions(node)]
        yield from ((name, occurrence, line) for occurrence, line in enumerate(places))


class _Bare(ast.NodeTransformer):
    """Without annotations and docstrings."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else node


def _meaning(text: str) -> str | None:
    """What is left without annotations, docstrings and comments; None where it is not Python."""
    try:
        return ast.dump(_Bare().visit(ast.parse(text)))
    except SyntaxError:
        return None
