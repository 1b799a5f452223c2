"""The README's tables and examples come from the code; `python tests/test_readme.py` writes the tables anew."""

import inspect
import json
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


RESULTS = README.parent / "benchmarks" / "results"
FULL = RESULTS / "cpu-full.json"


def measured_table() -> str:
    """The headline case of the committed record, every provider that was timed on it."""
    record = json.loads(FULL.read_text())
    found = {}
    for r in record["records"]:
        if (r["N"], r["D"], r["C"], r["head"], r["phase"]) == (256, 512, 100_000, "arcface", "step") and r["ms_p50"]:
            found.setdefault(r["provider"], {})[r["dtype"]] = r
    where = record["environment"]
    rows = [
        f"A step (forward and backward) of an ArcFace head, N = 256, D = 512, C = 100,000, float32 centres, on {where['threads']} cores of "
        f"{where['cpu']}, torch {where['torch']}; from [{FULL.name}]({FULL.relative_to(README.parent)}), "
        "written by `python -m benchmarks run --device cpu --preset full`. Memory is what is needed beyond inputs and gradients.",
        "",
        "| Provider | float32, ms | against torch.compile | bfloat16, ms | against torch.compile | memory fp32 / bf16, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, by in sorted(found.items(), key=lambda item: item[1]["fp32"]["ms_p50"] if "fp32" in item[1] else 1e9):
        cells = []
        for dtype in ("fp32", "bf16"):
            mine, base = by.get(dtype), found["torch.compile"][dtype]
            cells += [f"{mine['ms_p50']:.0f}", f"{base['ms_p50'] / mine['ms_p50']:.2f}x"] if mine else ["-", "-"]
        memory = " / ".join(f"{by[d]['peak_mb']:.0f}" if d in by else "-" for d in ("fp32", "bf16"))
        rows.append(f"| {name} | {' | '.join(cells)} | {memory} |")
    return "\n".join(rows)


def scaling_tables() -> str:
    return "\n\n".join((RESULTS / "scaling" / f"{name}.md").read_text().strip() for name in ("scaling", "sampling_glyphs"))


TABLES = {"heads": heads_table, "backends": backends_table, "measured": measured_table, "scaling": scaling_tables}


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
