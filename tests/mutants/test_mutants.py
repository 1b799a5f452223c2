"""The planted mistakes fit the code as it is, and the runner tells what is caught from what is not."""

import json
import subprocess

import pytest

from mutants import __main__ as runner
from mutants.planted import Mistake, planted


def test_every_mistake_can_be_planted():
    """Its text stands once in its file, its tests exist: whoever changes the line moves the mistake along."""
    everything = planted()
    assert [fault for mistake in everything for fault in mistake.faults()] == []
    assert len(everything) >= 80
    assert all(len(m.why) > 15 for m in everything)


def mistake(tmp_path, **changes):
    return Mistake(
        **{"area": "a", "id": "m", "file": "code.py", "before": "a + b", "after": "a - b", "why": "", "tests": ("test_code.py",)} | changes
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one function, as a checkout."""
    (tmp_path / "code.py").write_text("def add(a, b):\n    return a + b  # the sum\n")
    (tmp_path / "test_code.py").write_text("from code import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner.Copy, "build", lambda self: "")
    monkeypatch.setattr(runner.Copy, "keep", lambda self: None)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file": "none.py"}, "no file none.py"),
        ({"before": "a * b"}, "expected `before` once in code.py, found it 0 times"),
        ({"before": "a"}, "found it 2 times"),
        ({"after": "a + b"}, "`after` is `before`"),
        ({"tests": ()}, "names no test"),
        ({"tests": ("test_none.py",)}, "no test file 'test_none.py'"),
    ],
)
def test_an_entry_that_does_not_fit(project, changes, said):
    (project / "code.py").write_text("add = lambda a, b: a + b\n" if changes.get("before") != "a" else "a = a\n")
    assert said in " ".join(mistake(project, **changes).faults(project))


def test_caught_survived_and_broken(project, monkeypatch, capsys):
    record = project / "record.json"
    given = [
        mistake(project, id="caught"),
        mistake(project, id="survived", after="b + a"),
        mistake(project, id="equivalent", before="the sum", after="their sum", equivalent="a comment"),
        mistake(project, id="broken", tests=("test_code.py -k nothing",)),
        mistake(project, id="failing", tests=("test_fails.py",)),
    ]
    monkeypatch.setattr(runner, "planted", lambda: given[:3])
    for m in given:
        monkeypatch.setattr(type(m), "faults", lambda self, root=project: [])
        monkeypatch.setattr(type(m), "fingerprint", lambda self, root=project: self.id)
    assert runner.main(["--record", str(record), "--jobs", "1"]) == 1
    assert "survived: survived (code.py)" in capsys.readouterr().out
    found = json.loads(record.read_text())
    assert {k: v["result"] for k, v in found["mistakes"].items()} == {"caught": "caught", "survived": "survived", "equivalent": "survived"}
    assert found["mistakes"]["caught"]["by"] == "test_code.py::test_add"
    assert found["total"] == {"planted": 3, "caught": 1, "equivalent": 1, "survived": 1}
    # What the record holds is not done again; and a test that does not pass by itself catches nothing.
    assert runner.main(["--record", str(record), "--only", "caught"]) == 0
    assert "0 to do" in capsys.readouterr().out
    monkeypatch.setattr(runner, "planted", lambda: given[3:])
    (project / "test_fails.py").write_text("def test_fails():\n    assert False\n")
    assert runner.main(["--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "broken: broken (code.py)" in out
    assert "test_fails.py does not pass without a mistake" in out
