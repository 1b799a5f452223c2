"""The planted mistakes: ``*.toml`` beside this file, one table per mistake.

    [[mistake]]
    id = "arcface-slope-sign"                       # unique
    file = "marginkernels/margins/angular.py"
    before = '''...'''                              # occurs once in the file
    after = '''...'''
    why = "what a maintainer got wrong"
    tests = ["tests/unit/test_margins.py -k slope"] # pytest's words, quick tests
    equivalent = "why it changes nothing"           # only where no test can notice it

A mistake whose text is no longer found is an error: whoever changes the line moves the mistake along.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mistake:
    """``area`` is the name of the TOML file; the other fields are the table's."""

    area: str
    id: str
    file: str
    before: str
    after: str
    why: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def faults(self, root: Path = ROOT) -> list[str]:
        """What is wrong with the entry itself."""
        path = root / self.file
        if not path.is_file():
            return [f"{self.id}: no file {self.file}"]
        found = []
        count = path.read_text().count(self.before)
        if count != 1:
            found.append(f"{self.id}: expected `before` once in {self.file}, found it {count} times")
        if self.before == self.after:
            found.append(f"{self.id}: `after` is `before`")
        if not self.tests:
            found.append(f"{self.id}: names no test")
        for words in self.tests:
            named = shlex.split(words)[0].partition("::")[0] if words.strip() else ""
            if not (root / named).exists() or not named:
                found.append(f"{self.id}: no test file {named!r}")
        return found

    def mutated(self, root: Path) -> str:
        """The file's text with the mistake in it."""
        return (root / self.file).read_text().replace(self.before, self.after)

    def fingerprint(self, root: Path = ROOT) -> str:
        """Changes with the mistake, with the file that it is in, and with the files of its tests."""
        parts = [self.before, self.after, *self.tests, (root / self.file).read_text()]
        parts += [(root / shlex.split(words)[0].partition("::")[0]).read_text() for words in self.tests]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def planted(folder: Path = Path(__file__).parent) -> list[Mistake]:
    """All mistakes, in the order of the files that they are in.

    Raises:
        ValueError: an entry is malformed, or two have the same id.
    """
    found = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text()).get("mistake", []):
            try:
                found.append(Mistake(area=path.stem, **{**entry, "tests": tuple(entry["tests"])}))
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path.name}: {entry.get('id', entry)}: {error}") from None
    twice = [name for name, count in Counter(m.id for m in found).items() if count > 1]
    if twice:
        raise ValueError(f"expected every id once, got {twice} more often")
    return sorted(found, key=lambda m: (m.file, m.id))
