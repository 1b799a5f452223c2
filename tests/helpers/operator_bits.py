"""Hashes of what every operator returns, to show that a change of structure changed no bit.

    python tests/helpers/operator_bits.py record before.json          # in a checkout of the commit before
    python tests/helpers/operator_bits.py record after.json           # in this one
    python tests/helpers/operator_bits.py compare before.json after.json

``record`` drives the public functions over heads, backends, dtypes and options and notes each call of a ``marginkernels::`` operator
with the hashes of its outputs, then the loss, the gradients and the statistics. Empty outputs and the order of outputs do not count.
Backends: those that serve CPU tensors; ``--emulate`` adds the CUDA kernels compiled for the CPU, and under TRITON_INTERPRET=1 ``triton``
is one of them. It uses public names alone, so that it runs in an older checkout too (PYTHONPATH chooses which).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import marginkernels as mk
from marginkernels.backend import FUSED

#: Operators and backends by the names that they had before -> those of today.
RENAMED = {"rows": "prepare_inputs", "class_sum": "center_sum", "slab": "torch", "_checked_labels": "checked_labels"}
HEADS = {
    "softmax": lambda c: mk.Softmax(),
    "w-norm-softmax": lambda c: mk.Softmax(normalize_weight=True),
    "normface": lambda c: mk.NormFace(scale=16.0),
    "l2-softmax": lambda c: mk.L2Softmax(num_classes=c),
    "l2-softmax-trainable": lambda c: mk.L2Softmax(alpha=16.0, trainable=True),
    "sphereface": lambda c: mk.SphereFace(annealing=True),
    "cosface": lambda c: mk.CosFace(scale=30.0),
    "arcface": lambda c: mk.ArcFace(),
    "arcface-focal": lambda c: mk.ArcFace(scale=30.0, focal_gamma=2.0),
    "arcface-detached": lambda c: mk.ArcFace(gradient="detached", beyond_pi="easy"),
    "combined": lambda c: mk.CombinedMargin(m1=1.1, m2=0.2, m3=0.1),
    "adacos": lambda c: mk.AdaCos(c),
    "mv-arc": lambda c: mk.MVSoftmax(),
    "mv-am": lambda c: mk.MVSoftmax(kind="am", margin=0.35),
    "curricularface": lambda c: mk.CurricularFace(),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def digest(v: torch.Tensor) -> str:
    v = v.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(v.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class Recorder(TorchDispatchMode):
    """Notes the operators of this package, in the order of their calls."""

    def __init__(self):
        super().__init__()
        self.calls: list[list] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "marginkernels":
            outputs = out if isinstance(out, tuple | list) else [out]
            name = name.lstrip("_")
            # Bytes are the saved weights in a backend's own layout, whose padding is not written; the class pass shows what they hold.
            hashes = [digest(v) for v in outputs if isinstance(v, torch.Tensor) and v.numel() and v.dtype != torch.uint8]
            self.calls.append([RENAMED.get(name, name), sorted(hashes)])
        return out


def step(backend: str, head: str, dtype: torch.dtype, weight_dtype: torch.dtype, shape, *, bias: bool, smoothing: float, workspace: float):
    """Two training steps, so that state moves."""
    n, d, c = shape
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, d, generator=g)
    w = torch.randn(c, d, generator=g)
    labels = torch.randint(c, (n,), generator=g)
    x[: n // 3] = w[labels[: n // 3]] + 0.3 * x[: n // 3]  # some rows near their centers
    labels[-1] = -100
    b = torch.randn(c, generator=g).requires_grad_() if bias else None
    x, w = x.to(dtype).requires_grad_(), w.to(weight_dtype).requires_grad_()
    margin = HEADS[head](c)
    recorder = Recorder()
    found = {}
    with recorder:
        for i in range(2):
            options = {"margin": margin, "bias": b, "label_smoothing": smoothing, "backend": backend, "workspace_mb": workspace}
            loss = mk.margin_cross_entropy(x, w, labels, **options)
            leaves = {"x": x, "w": w} | ({} if b is None else {"b": b}) | dict(margin.named_parameters())
            grads = torch.autograd.grad(loss, list(leaves.values()))
            found |= {f"loss {i}": digest(loss)} | {f"d{name} {i}": digest(v) for name, v in zip(leaves, grads, strict=True)}
    found |= {f"state {name}": digest(v) for name, v in margin.named_buffers()}
    return {"operators": recorder.calls, "results": found}


def other_calls() -> dict:
    """The module's own paths: sampled classes, statistics, top-k, and no gradient."""
    torch.manual_seed(0)
    found = {}
    x, y = torch.randn(9, 24), torch.randint(400, (9,))
    for name in ("arcface", "curricularface"):
        head = mk.MarginHead(24, 400, HEADS[name](400), sample_rate=0.3, log_q=True, bias=True)
        recorder = Recorder()
        with recorder:
            head(x.requires_grad_(), y).backward()
        results = {"dw": digest(head.weight.grad.coalesce().values()), "dx": digest(x.grad)}
        results |= {f"stats {k}": digest(v) for k, v in head.stats.items()}
        scores, classes = head.topk(x.detach(), k=7)
        results |= {"scores": digest(scores), "classes": digest(classes)}
        with torch.no_grad():
            results["no grad"] = digest(head.eval()(x, y))
        found[f"module {name}"] = {"operators": recorder.calls, "results": results}
        x = x.detach()
    return found


def emulate(folder: Path) -> None:
    """Put the CUDA kernels, compiled for the CPU, in the place of the two CUDA backends."""
    import pybind11

    sources = Path(mk.__file__).parents[1] / "csrc" / "cuda"
    target = folder / "emulated_cuda.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-DMK_EMULATE", "-DMK_FUSED", "-DMK_MODULE=emulated_cuda", "-U_FORTIFY_SOURCE"]
    files = [*map(str, sorted(sources.glob("*.cu"))), str(sources / "module.cpp")]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    subprocess.run(["g++", *flags, *includes, "-x", "c++", *files, "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("emulated_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("cuda", "hopper"):
        kind = type(FUSED[name])
        members = {"device_types": ("cpu",), "kernels": module, "multiprocessors": lambda self, device: 6}
        FUSED[name] = type(f"Emulated{kind.__name__}", (kind,), members)()


def record(emulated: bool, only: list[str] | None) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if emulated:
            emulate(Path(folder))
        listed = mk.backends()
        names = [name for name in FUSED if listed[name]["available"] and "cpu" in listed[name]["device_types"]]
        for backend in [name for name in names if not only or RENAMED.get(name, name) in only]:
            shape = (37, 128, 301) if backend in ("cuda", "hopper", "triton") else (37, 61, 1301)
            for head, (name, dtype) in itertools.product(HEADS, DTYPES.items()):
                if dtype not in FUSED[backend].dtypes:
                    continue
                extras = [(False, 0.0, 0.0), (True, 0.1, 0.0), (False, 0.0, 8.0)]
                for bias, smoothing, workspace in extras:
                    pairs = {dtype, torch.float32} if dtype in (torch.bfloat16, torch.float16) else {dtype}
                    for weight_dtype in sorted(pairs, key=str):
                        key = f"{RENAMED.get(backend, backend)} {head} {name} {weight_dtype} bias={bias} {smoothing} {workspace}"
                        options = {"bias": bias, "smoothing": smoothing, "workspace": workspace}
                        found[key] = step(backend, head, dtype, weight_dtype, shape, **options)
    return found if only else found | other_calls()


def same_call(before: list, after: list) -> bool:
    """Whether an operator gave the same bits; outputs that it no longer gives do not count."""
    return before[0] == after[0] and not Counter(after[1]) - Counter(before[1])


def compare(before: Path, after: Path) -> int:
    """Print what differs; 0 where nothing does."""
    a, b = (json.loads(p.read_text()) for p in (before, after))
    wrong = [f"only in one: {key}" for key in sorted(a.keys() ^ b.keys())]
    calls = dropped = 0
    for key in sorted(a.keys() & b.keys()):
        one, two = a[key]["operators"], b[key]["operators"]
        calls += len(two)
        dropped += sum(len(x[1]) - len(y[1]) for x, y in zip(one, two, strict=False))
        differing = [pair for pair in itertools.zip_longest(one, two, fillvalue=["nothing", []]) if not same_call(*pair)]
        if differing or a[key]["results"] != b[key]["results"]:
            wrong.append(f"differs: {key}")
            wrong += [f"  {x}\n  {y}" for x, y in differing[:1]]
    print("\n".join(wrong) or f"the same bits: {len(b)} cases, {calls} operator calls; {dropped} outputs are no longer given")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("path", type=Path)
    one.add_argument("--emulate", action="store_true", help="the CUDA kernels too, compiled for the CPU")
    one.add_argument("--only", action="append", metavar="BACKEND")
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    torch.set_num_threads(2)
    args.path.write_text(json.dumps(record(args.emulate, args.only), indent=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
