"""The README's tables and examples come from the code; `python tests/test_readme.py` writes the tables anew."""

import inspect
import re
from pathlib import Path

import torch

import marginkernels as mk
from marginkernels import backend, forms, margins, verify
from marginkernels.backend import reference

README = Path(__file__).parent.parent / "README.md"


def heads_table() -> str:
    rows = ["| Margin | Constructor | What it is | Non-target logits | State |", "|---|---|---|---|---|"]
    for cls in margins.ALL:
        signature = inspect.signature(cls)
        shown = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "focal_gamma"]
        plain = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in shown]
        call = f"{cls.__name__}{inspect.Signature(plain)}"
        first = re.split(r"\s\(\w+ et al|\n\n", inspect.getdoc(cls))[0].replace("\n", " ").rstrip(".")
        first = first.replace("``", "`").replace("|", r"\|")
        made = cls(10) if cls is mk.AdaCos else cls(annealing=True) if cls is mk.SphereFace else cls()
        state = [name for name, _ in made.named_buffers()]
        if cls is mk.L2Softmax:
            state = ["alpha, if trainable"]
        rows.append(f"| `{cls.__name__}` | `{call}` | {first} | {forms.NAMES[cls.form]} | {', '.join(state) or '-'} |")
    return "\n".join(rows)


def backends_table() -> str:
    rows = ["| Backend | What it is | Dtypes | `auto` may choose it |", "|---|---|---|---|"]
    rows.append(f"| `reference` | {reference.NOTE} | any float | no |")
    for b in backend.FUSED.values():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        rows.append(f"| `{b.name}` | {b.summary} | {dtypes} | {'yes' if b.proven else 'not before it has run on a GPU'} |")
    return "\n".join(rows)


TABLES = {"heads": heads_table, "backends": backends_table}


def section(text: str, name: str) -> tuple[int, int]:
    start = text.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
    return start, text.index(f"<!-- /{name} -->")


def test_tables_are_what_the_code_says():
    text = README.read_text()
    for name, make in TABLES.items():
        start, stop = section(text, name)
        assert text[start:stop].strip() == make(), f"the README's {name} table is stale: run python tests/test_readme.py"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_examples_run():
    """Every Python block of the README that is marked as whole, in one namespace, on a small problem."""
    ran = 0
    for code in blocks():
        if "# needs:" in code:
            continue
        code = code.replace("1_000_000", "1_000")
        embeddings, labels = torch.randn(8, 512, requires_grad=True), torch.randint(1000, (8,))
        space = {"mk": mk, "torch": torch, "embeddings": embeddings, "labels": labels}
        exec(code, space)
        ran += 1
    assert ran >= 3


def test_own_margin_of_the_readme_is_fused_everywhere():
    code = next(b for b in blocks() if "(mk.Margin)" in b)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "head", "#"))]
    assert len(lines) <= 6  # five and what uses it
    space = {"mk": mk, "torch": torch}
    exec(code, space)
    own = next(v for v in space.values() if isinstance(v, type) and issubclass(v, mk.Margin) and v is not mk.Margin)
    case = verify.Case.random(12, 40, 101)
    for name, b in backend.FUSED.items():
        if b.unavailable() is None and "cpu" in b.device_types:
            assert max(verify.errors(case, own(), name).values()) <= verify.TOLERANCE[torch.float32]


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / name).exists(), name


if __name__ == "__main__":
    text = README.read_text()
    for name, make in TABLES.items():
        start, stop = section(text, name)
        text = text[:start] + "\n" + make() + "\n" + text[stop:]
    README.write_text(text)
