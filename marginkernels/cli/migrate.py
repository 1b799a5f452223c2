"""``python -m marginkernels migrate FILE.py``: switch a training script's margin heads to those of :mod:`marginkernels.compat`.

The script is read, never run. Imports of the heads are changed, and where a head is named through its module (``losses.ArcFaceLoss``) that
name; every other byte stays as it is. What cannot be told from the text alone is listed, to be done by hand.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ._libraries import LIBRARIES, Library

#: insightface is a folder of scripts: its modules have no package, and ``losses`` may be anybody's. These names are enough to know it by.
DISTINCT = {"PartialFC_V2", "CombinedMarginLoss"}
#: What a config of mmpretrain names a head by.
REGISTERED = "ArcFaceClsHead"
CUSTOM = "marginkernels.compat.mmpretrain"


@dataclass(frozen=True)
class Edit:
    """``text`` in the place of the bytes from ``start`` to ``stop``."""

    start: int
    stop: int
    text: str


@dataclass
class Found:
    """What a script has.

    Attributes:
        heads: (line, library, name) of each head, in order.
        edits: what to change; they do not overlap.
        by_hand: (line, what) that is left to do.
    """

    heads: list[tuple[int, str, str]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    by_hand: list[tuple[int, str]] = field(default_factory=list)


class Script:
    """A parsed script and where its lines lie, in bytes, as :mod:`ast` counts columns.

    Args:
        source: the file's bytes, UTF-8.

    Raises:
        SyntaxError: it is not Python.
        UnicodeDecodeError: it is not UTF-8.
    """

    def __init__(self, source: bytes):
        self.text = source.decode("utf-8-sig" if source.startswith(b"\xef\xbb\xbf") else "utf-8")
        self.mark = len(source) - len(self.text.encode())
        self.source = source
        self.tree = ast.parse(source)
        lines = source.splitlines(keepends=True)
        self.starts = [self.mark]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line) - (self.mark if len(self.starts) == 1 else 0))
        self.newline = "\r\n" if b"\r\n" in source else "\n"

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.stmt | ast.expr | ast.alias) -> tuple[int, int]:
        """The bytes of ``node``."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def alone(self, node: ast.stmt) -> bool:
        """Whether ``node`` has its lines for itself, but for a comment behind it."""
        start, stop = self.span(node)
        assert node.end_lineno is not None
        before = self.source[self.starts[node.lineno - 1] : start]
        after = self.source[stop : self.starts[node.end_lineno]].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    def indent(self, node: ast.stmt) -> str:
        return self.source[self.starts[node.lineno - 1] : self.span(node)[0]].decode()

    def after_line(self, node: ast.stmt) -> int:
        """Where the line behind ``node`` starts."""
        assert node.end_lineno is not None
        return self.starts[node.end_lineno]


def _sources(names_imported: set[str], module: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(library, module, names) of the table that an import from ``module`` may be of."""
    for key, library in LIBRARIES.items():
        for source, names in library.sources.items():
            if source == module or (key == "insightface" and module.endswith(f"arcface_torch.{source}")):
                if key == "insightface" and source == "losses" and "." not in module:
                    names = names if DISTINCT & names_imported else ()
                yield key, source, names


def _shim(library: str) -> str:
    return f"marginkernels.compat.{LIBRARIES[library].shim}"


def scan(source: bytes) -> Found:
    """The heads of a script, and what would switch them.

    Raises:
        SyntaxError, UnicodeDecodeError, ValueError: it is not a Python file.
    """
    script, found = Script(source), Found()
    walked = list(ast.walk(script.tree))
    imported = {a.name for node in walked if isinstance(node, ast.ImportFrom) for a in node.names}
    bound = Counter(_bound(walked))
    roots: dict[str, tuple[str, ast.stmt]] = {}
    for node in walked:
        if isinstance(node, ast.ImportFrom):
            _from_import(script, found, node, imported, roots)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                roots[name] = (alias.name if alias.asname else name, node)
    _accesses(script, found, walked, roots, bound)
    _registered(script, found)
    found.heads.sort()
    found.edits.sort(key=lambda e: (e.start, e.stop))
    found.by_hand.sort()
    return found


def _bound(walked: list[ast.AST]) -> Iterator[str]:
    """Each name as often as something is bound to it."""
    for node in walked:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (a.asname or a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield node.name or "_"


def _from_import(script: Script, found: Found, node: ast.ImportFrom, imported: set[str], roots: dict[str, tuple[str, ast.stmt]]) -> None:
    """``from module import names``: the heads among the names; modules among them are left for :func:`_accesses`."""
    if node.level or node.module is None:
        return
    heads: list[tuple[str, ast.alias]] = []
    for alias in node.names:
        roots[alias.asname or alias.name] = (f"{node.module}.{alias.name}", node)
        for library, _, names in _sources(imported, node.module):
            if alias.name in names:
                heads.append((library, alias))
            elif alias.name == "*" and names:
                found.by_hand.append((node.lineno, f"from {node.module} import *: name the heads that it is to give, then run this again"))
    if not heads:
        return
    library = heads[0][0]
    found.heads += [(alias.lineno, library, alias.name) for _, alias in heads]
    taken = [alias for _, alias in heads]
    start, stop = script.span(node)
    statement = script.source[start:stop]
    module_named = node.module.encode() in statement
    if len(taken) == len(node.names) and module_named:
        at = statement.index(node.module.encode(), len(b"from"))  # the module alone: names, line breaks and comments stay
        found.edits.append(Edit(start + at, start + at + len(node.module.encode()), _shim(library)))
    elif not module_named or not script.alone(node) or b"#" in statement or b"\\" in statement:
        named = ", ".join(a.name for a in taken)
        found.by_hand.append((node.lineno, f"import {named} from {_shim(library)}, and the other names as they are"))
    else:
        rest = ", ".join(_written(a) for a in node.names if a not in taken)
        ours = f"from {_shim(library)} import {', '.join(_written(a) for a in taken)}"
        found.edits.append(Edit(start, stop, f"from {node.module} import {rest}"))
        found.edits.append(_line_behind(script, node, ours))


def _written(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _line_behind(script: Script, node: ast.stmt, text: str) -> Edit:
    """``text`` as a line of its own behind the statement ``node``."""
    at = script.after_line(node)
    ended = script.source[:at].endswith((b"\n", b"\r"))
    line = f"{script.indent(node)}{text}"
    return Edit(at, at, f"{line}{script.newline}" if ended else f"{script.newline}{line}")


def _accesses(script: Script, found: Found, walked: list[ast.AST], roots: dict[str, tuple[str, ast.stmt]], bound: Counter[str]) -> None:
    """Heads that are named through a module, ``losses.ArcFaceLoss``: the shim's module in its place, imported behind the other."""
    added: dict[tuple[int, str], str] = {}
    for node in walked:
        chain = _chain(node)
        if chain is None or chain[0] not in roots:
            continue
        module, statement = roots[chain[0]]
        path = ".".join([module, *chain[1:-1]])
        for library, _, names in _sources(DISTINCT, path):
            if chain[-1] not in names or (library == "insightface" and chain[-1] not in DISTINCT):
                continue
            assert isinstance(node, ast.Attribute)
            found.heads.append((node.lineno, library, chain[-1]))
            if bound[chain[0]] > 1:
                found.by_hand.append((node.lineno, f"{chain[0]} is bound more than once: take {chain[-1]} from {_shim(library)}"))
                continue
            if not script.alone(statement):
                found.by_hand.append((node.lineno, f"take {chain[-1]} from {_shim(library)}"))
                continue
            key = (statement.lineno, library)
            if key not in added:
                name = LIBRARIES[library].shim
                added[key] = f"fused_{name}" if bound[name] else name
                as_name = "" if added[key] == name else f" as {added[key]}"
                found.edits.append(_line_behind(script, statement, f"from marginkernels.compat import {name}{as_name}"))
            start, stop = script.span(node)
            found.edits.append(Edit(start, stop, f"{added[key]}.{chain[-1]}"))


def _chain(node: ast.AST) -> list[str] | None:
    """``["a", "b", "c"]`` of ``a.b.c``, or None."""
    names: list[str] = []
    if not isinstance(node, ast.Attribute):
        return None
    at: ast.expr = node
    while isinstance(at, ast.Attribute):
        names.append(at.attr)
        at = at.value
    return [at.id, *names[::-1]] if isinstance(at, ast.Name) else None


def _registered(script: Script, found: Found) -> None:
    """A config of mmpretrain, ``head=dict(type="ArcFaceClsHead")``: the module that registers the head among its ``custom_imports``."""
    named: list[tuple[int, ast.stmt]] = []
    custom: list[ast.stmt] = []
    for statement in script.tree.body:
        if isinstance(statement, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "custom_imports" for t in statement.targets):
            custom.append(statement)
            continue
        named += [(node.lineno, statement) for node in ast.walk(statement) if isinstance(node, ast.expr) and _names_the_head(node)]
    if not named:
        return
    found.heads += [(line, "mmpretrain", REGISTERED) for line, _ in named]
    if not custom:
        statement = min((s for _, s in named), key=lambda s: s.lineno)
        start = script.starts[statement.lineno - 1]
        line = f'custom_imports = dict(imports=["{CUSTOM}"], allow_failed_imports=False)'
        found.edits.append(Edit(start, start, f"{line}{script.newline}"))
        return
    lists = [node for node in ast.walk(custom[-1]) if isinstance(node, ast.List)]
    strings = [node.value for node in ast.walk(custom[-1]) if isinstance(node, ast.Constant)]
    if CUSTOM in strings:
        found.heads = [head for head in found.heads if head[1] != "mmpretrain"]
    elif len(lists) == 1 and lists[0].elts:
        stop = script.span(lists[0].elts[-1])[1]
        found.edits.append(Edit(stop, stop, f', "{CUSTOM}"'))
    else:
        found.by_hand.append((custom[-1].lineno, f'add "{CUSTOM}" to the imports of custom_imports'))


def _names_the_head(node: ast.expr) -> bool:
    pairs: list[tuple[object, ast.expr]] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        pairs = [(k.arg, k.value) for k in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
    return any(key == "type" and isinstance(v, ast.Constant) and v.value in (REGISTERED, f"mmpretrain.{REGISTERED}") for key, v in pairs)


def applied(source: bytes, edits: list[Edit]) -> bytes:
    """``source`` with ``edits``, sorted by where they start."""
    parts, at = [], 0
    for edit in edits:
        parts += [source[at : edit.start], edit.text.encode()]
        at = edit.stop
    return b"".join([*parts, source[at:]])


def difference(name: str, before: bytes, after: bytes) -> str:
    """A unified diff, as ``patch -p0`` takes it."""
    old, new = (text.decode().splitlines(keepends=True) for text in (before, after))
    parts = []
    for line in difflib.unified_diff(old, new, name, name):
        parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)


def report(found: Found) -> list[str]:
    """What is left to do, and what would differ in numbers, in lines of text."""
    lines = [f"line {line}: {what}" for line, what in found.by_hand]
    if lines:
        lines = ["By hand:", *(f"  {line}" for line in lines), ""]
    for key in dict.fromkeys(library for _, library, _ in found.heads):
        library: Library = LIBRARIES[key]
        names = ", ".join(dict.fromkeys(name for _, of, name in found.heads if of == key))
        lines += [f"{library.title}: {names}. What differs in numbers:", *(f"  - {text}" for text in library.numbers)]
        if library.by_hand:
            lines.append(f"  {library.by_hand}.")
        lines.append(f"  What is the same, and the rest: docs/switching-{key.replace('_', '-')}.md")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=_python_file, help="a training script, or a config of mmpretrain, in Python")
    parser.add_argument("--write", action="store_true", help="change the file; without it the diff is printed alone")


def _python_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a Python file, got the folder {text!r}")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a Python file that exists, got {text!r}")
    if path.suffix != ".py":
        raise argparse.ArgumentTypeError(
            f"expected a Python file (.py), got {text!r}; for speechbrain's YAML see docs/switching-speechbrain.md"
        )
    return path


def run(args: argparse.Namespace) -> int:
    """Print the diff and the list, and with ``--write`` change the file. Status 2 where the file cannot be read as Python."""
    path: Path = args.file
    try:
        source = path.read_bytes()
        found = scan(source)
    except (OSError, SyntaxError, ValueError) as error:
        print(f"file: expected Python that can be parsed, got {str(path)!r}: {error}", file=sys.stderr)
        return 2
    if not found.heads and not found.by_hand:
        print(f"{path}: no head that could be switched")
        return 0
    changed = applied(source, found.edits)
    if found.edits:
        print(difference(str(path), source, changed))
    print("\n".join(report(found)))
    if args.write and found.edits:
        try:
            path.write_bytes(changed)
        except OSError as error:
            print(f"--write: expected a file that can be written, got {str(path)!r}: {error}", file=sys.stderr)
            return 2
        print(f"\n{path} is changed.")
    return 0
