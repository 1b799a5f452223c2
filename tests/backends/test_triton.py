"""The Triton backend without a GPU: under the interpreter, in processes of its own, and compiled for GPUs that are not there."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import marginkernels as mk
from benchmarks import gpu_small, resources, resources_triton
from marginkernels import testing
from marginkernels.backend import FUSED

pytest.importorskip("triton")
from benchmarks import gpu_kernels

CHECKS = Path(__file__).with_name("interpreted_triton.py")


PARTS = ("test_heads", "test_workspace_heads", "test_options or test_passes")


def _interpret(file, words):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(file), "-k", words]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # tiles are too small to share
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("part", [*PARTS, " and ".join(f"not ({part})" for part in PARTS)])
def test_under_the_interpreter(part):
    """In parts, so that parallel workers share them."""
    _interpret(CHECKS, part)


def test_sub_centers_under_the_interpreter():
    """Heads of each kind, and the search; every transform meets sub-centers in the passes' own tests."""
    heads = "inter or uniface or sphereface2 or lsoftmax or filtered or curricular or trainable"
    words = f"triton and (equal_sub and ({heads}) or first_of or topk_is)"
    _interpret(CHECKS.parents[1] / "unit" / "test_sub_centers.py", words)


def _compiled(arch, dim, dtype, weight_dtype, saved=0.0, sub_centers=1):
    """Kernel name -> compiled kernel, of the launches that do the work of a step."""
    from marginkernels.backend.triton import aot

    p = aot.meta_inputs(1024, dim, 1_000_000, dtype, weight_dtype, sub_centers=sub_centers)
    wanted = [
        one for one in aot.distinct(aot.launches(p, arch, saved=saved)) if "pass" in one.kernel.__name__ and not one.constants.get("ONLINE")
    ]
    return {one.kernel.__name__: aot.compile(one, arch) for one in wanted}


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_the_million_class_kernels_on_hopper(sub_centers):
    """What the heuristics promise for D = 512: no stack, Hopper's tensor cores, keys loaded by TMA, two products a step, between which
    no tile changes its layout, be a class's highest product looked for or not."""
    from marginkernels.backend.triton import aot, heuristics

    found = _compiled("sm_90", 512, torch.bfloat16, torch.bfloat16, sub_centers=sub_centers)
    assert set(found) == {"row_pass_kernel", "class_pass_kernel"}
    for kernel in found.values():
        used = aot.resources(kernel)
        assert used.stack_bytes == 0
        assert used.shared_bytes <= heuristics.SHARED["sm_90"]
        assert kernel.asm["ttgir"].count("= ttng.warp_group_dot ") == 2
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
        assert "ttg.convert_layout" not in kernel.asm["ttgir"].split("= ttng.warp_group_dot ")[1]  # between the products


@pytest.mark.parametrize(("arch", "dim"), [("sm_80", 128), ("sm_89", 512)])
def test_keys_are_fetched_ahead(arch, dim):
    """One copy of a key block in shared memory feeds both products, and the next is on its way there meanwhile: 16 bytes at a time, which
    of all that a step loads only the key block is."""
    from marginkernels.backend.triton import aot, heuristics

    for name, kernel in _compiled(arch, dim, torch.bfloat16, torch.bfloat16).items():
        used = aot.resources(kernel)
        assert not used.stack_bytes or resources_triton.explanation(f"{name}<D={dim}>", arch, used.stack_bytes), name
        copies = kernel.asm["ptx"].count("cp.async.cg.shared.global")
        key_block = 32 * dim * 2 // (256 * 16)  # copies of 16 bytes that one of 256 threads makes
        tile = heuristics.default(heuristics.Key.of(name.split("_")[0], dim, torch.bfloat16, arch))
        assert copies >= key_block * tile.stages, name  # ahead of the loop and in it
        assert used.shared_bytes <= heuristics.shared_limit(arch), name


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_rows_that_begin_anywhere_are_loaded_as_wide(arch):
    """D = 500 in 16 bits: rows of 1,000 bytes, which are padded in the copies that loops read."""
    from marginkernels.backend.triton import aot

    p = aot.meta_inputs(1024, 500, 1_000_000, torch.bfloat16, torch.bfloat16)
    row, padded = (
        next(one for one in aot.launches(replace(p, x=x, w=w), arch) if one.kernel.__name__ == "row_pass_kernel")
        for x, w in ((p.x, p.w), (p.x.new_empty(1024, 512)[:, :500], p.w.new_empty(1_000_000, 512)[:, :500]))
    )
    assert row.args["w"].stride(0) % 8 == row.args["stride_xn"] % 8 == 0
    assert (row.args["w_box"] is None) == (arch == "sm_89")
    assert row.args["class_factor"] is None
    assert padded.constants["PADDED"] == row.constants["PADDED"] == (512 if arch == "sm_89" else 504)


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "sub_centers"),
    [
        ("sm_80", 64, torch.float16, 1),
        ("sm_80", 512, torch.float32, 16),
        ("sm_86", 512, torch.bfloat16, 1),
        ("sm_90", 64, torch.float32, 1),
        ("sm_100", 64, torch.bfloat16, 1),
        ("sm_100", 128, torch.bfloat16, 2),
        ("sm_120", 512, torch.bfloat16, 1),
        ("sm_120", 500, torch.float16, 5),
    ],
)
def test_compiles_ahead_of_time(arch, dim, dtype, sub_centers):
    from marginkernels.backend.triton import aot, heuristics

    for name, kernel in _compiled(arch, dim, dtype, torch.float32, saved=0.5, sub_centers=sub_centers).items():
        assert aot.resources(kernel).shared_bytes <= heuristics.shared_limit(arch), name


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "k", "sub_centers"),
    [
        ("sm_80", 512, torch.float32, 5, 1),
        ("sm_90", 512, torch.bfloat16, 64, 1),
        ("sm_90", 512, torch.bfloat16, 5, 3),
        ("sm_100", 512, torch.float16, 5, 16),
        ("sm_120", 500, torch.float16, 64, 1),
    ],
)
def test_topk_compiles_ahead_of_time(arch, dim, dtype, k, sub_centers):
    from marginkernels.backend.triton import aot, heuristics

    one = aot.topk_launch(1024, dim, 1_000_000, dtype, torch.float32, k, arch, sub_centers=sub_centers)
    used = aot.resources(aot.compile(one, arch))
    assert used.shared_bytes <= heuristics.shared_limit(arch)
    assert not used.stack_bytes


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_a_ragged_batch_compiles_nothing_new(dtype, weight_dtype):
    """By Triton's own binder: sizes of 1 and multiples of 16 are no variants of their own; several chunks of classes or one are none."""
    from marginkernels.backend.triton import aot

    def variants(n, c, saved):
        inputs = aot.meta_inputs(n, 512, c, dtype, weight_dtype, bias=True)
        first = {aot.variant(one) for one in aot.launches(inputs, "sm_90", saved=saved, processors=7)}
        return first | {aot.variant(aot.topk_launch(n, 512, c, dtype, weight_dtype, 5, "sm_90"))}

    for saved, number in ((0.0, 7 if dtype == torch.bfloat16 else 5), (0.5, None)):
        usual = variants(1024, 1_000_000, saved)
        assert number in (None, len(usual))
        for n, c in ((1000, 1_000_000), (1, 1_000_000), (1024, 1_000_003), (17, 999_999)):
            assert variants(n, c, saved) == usual, (n, c)


class _StubGpu:
    """A driver that launches nothing: what Triton asks of one, on the way to a launch on a GPU of capability 8.6."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.launched = GPUTarget("cuda", 86, 32), []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 101376},
            load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
        )
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0
        self.get_current_target = lambda: self.target
        self.launcher_cls = lambda src, metadata: lambda *args: self.launched.append(src.fn.__name__)


def test_launches_find_what_was_compiled_ahead(tmp_path, monkeypatch):
    """In Triton's cache on the disk, by the very path that a launch takes; and once loaded, whatever the batch."""
    import triton

    from marginkernels.backend.triton import aot, launch
    from marginkernels.core.types import Request

    seen, gpu, device = [], _StubGpu(), launch.Device("sm_86", 84)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: seen.append(cache_hit))
    for one in aot.distinct(aot.launches(aot.meta_inputs(1024, 64, 5000, torch.bfloat16, torch.float32), "sm_86", need_weight=False)):
        aot.compile(one, "sm_86")
    compiled = len(seen)
    assert seen == [False] * compiled
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    for n, c in ((1000, 5000), (1, 4999)):
        p = aot.meta_inputs(n, 64, c, torch.bfloat16, torch.float32)
        p = replace(p, **{k: torch.zeros(v.shape, dtype=v.dtype) for k, v in vars(p).items() if isinstance(v, torch.Tensor)})
        launch.row_pass(p, Request.log_sum_exp(need_center=True), device, launch.Launch.run)
        assert seen == [False] * compiled + [True] * compiled, (n, c)
    assert set(gpu.launched) == {"prepare_kernel", "reach_kernel", "row_pass_kernel", "combine_kernel"}


@pytest.mark.parametrize("small", [True, False])
def test_the_kernels_of_the_report_are_compiled_before(small):
    """What a step of the small cases or of the tests takes, at its real size, is listed by the step that fills the cache."""
    if small:
        asked = [case for case in gpu_small.cases("triton") if case[0][1] < 512 and case[1] != torch.float32]
        steps = [(shape, dtype, dtype, head, {"workspace_mb": mb}) for shape, dtype, head, mb in asked]
    else:
        x, w = gpu_kernels.DTYPES[2]
        options = ({}, {"label_smoothing": 0.1}, {"workspace_mb": 1.0})
        steps = [((33, 128, 517), x, w, head, one) for head in ("mv-arc", "l2-softmax-trainable", "adacos") for one in options[:2]]
        steps += [((129, 512, 1300), x, w, head, options[2]) for head in ("curricularface", "softmax")]
    wanted = [p for p in gpu_kernels.problems() if any(p[:3] == (shape[1], x, w) for shape, x, w, *_ in steps)]
    listed = {aot_variant(one) for one in gpu_kernels.launches("sm_90", wanted)}
    for shape, x, w, head, options in steps:
        with gpu_kernels.collecting("sm_90") as found:
            bias = not small and shape[1] == 128  # as of that number in the list of dtypes
            case = testing.Case.random(*shape, x, weight_dtype=w, bias=bias)
            testing.run(case, testing.HEADS[head](shape[2]), "triton", **options)
        assert {aot_variant(one) for one in found} <= listed, (shape, x, w, head, options)


def aot_variant(one):
    from marginkernels.backend.triton import aot

    return aot.variant(one, "sm_90")


def test_the_cache_is_filled_in_parallel(tmp_path):
    """By processes of their own, and what does not compile is counted; a second time all of it is there."""
    code = (
        "import sys, torch, triton; from dataclasses import replace; from benchmarks import gpu_kernels as g\n"
        "found = g.launches('sm_90', [g.Problem(64, torch.bfloat16, torch.float32, 'arcface')])\n"
        "found = [one for one in found if one.kernel.__name__ in ('prepare_kernel', 'combine_kernel')]\n"
        "wrong = replace(found[0], constants=found[0].constants | {'BLOCK_C': 3, 'BLOCK_N': 3})\n"
        "print(len(found), g.fill('sm_90', [*found, wrong], 2))\n"
        "hits = []; triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)\n"
        "from marginkernels.backend.triton import aot; [aot.compile(one, 'sm_90') for one in found]; print(all(hits), len(hits))"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-2] == "2 1"
    assert lines[-1] == "True 2"


def _every_key():
    from marginkernels.backend.triton.heuristics import MAX_DIM, SHARED, Key

    switches = [dict(zip(("accumulates", "online", "busy"), on, strict=True)) for on in itertools.product((True, False), repeat=3)]
    for arch, dim, dtype in itertools.product(
        (*SHARED, "sm_120"), range(1, MAX_DIM + 1, 7), (torch.float16, torch.bfloat16, torch.float32)
    ):
        yield dim, dtype, Key.of("saved", dim, dtype, arch)
        yield from ((dim, dtype, Key.of(kernel, dim, dtype, arch, **on)) for kernel in ("row", "class") for on in switches)


def test_every_tile_fits_its_architecture():
    """Blocks of queries and keys alone, whatever else the compiler keeps in shared memory."""
    from marginkernels.backend.triton.heuristics import default, fault, shared_limit

    for dim, dtype, key in _every_key():
        t = default(key)
        whole = t.depth >= dim
        saved = key.kernel == "saved"
        held = 0 if saved else t.queries * t.depth * (1 if whole else t.stages)
        held += t.keys * (t.width if saved else t.depth) * t.stages
        assert held * dtype.itemsize <= shared_limit(key.arch), (key, t)
        assert t.width >= dim or t.width % t.depth == 0
        assert fault(key, t) is None, (key, t)


def test_tiles_by_file(tmp_path):
    """What tuning writes is taken by this process alone and until told otherwise; what cannot serve raises."""
    from marginkernels.backend.triton import heuristics, use_tiles

    path = tmp_path / "tiles.json"
    key = heuristics.Key.of("saved", 500, torch.bfloat16, "sm_90")
    one = heuristics.Tile(32, 64, 512, 512)
    heuristics.save_tiles(path, [(key, one, {"ms": 1.0})], gpu="some")
    try:
        assert use_tiles(path) == [key]
        assert heuristics.tile(heuristics.Key.of("saved", 512, torch.bfloat16, "sm_90")) == one
        assert heuristics.tile(key._replace(arch="sm_80")) == heuristics.default(key._replace(arch="sm_80"))
        for wrong in (replace(one, queries=48), replace(one, queries=128), replace(one, width=256), replace(one, stages=0)):
            heuristics.save_tiles(path, [(key, wrong, {})])
            with pytest.raises(ValueError, match="the tile for Key"):
                use_tiles(path)
            assert heuristics.tile(key) == one
    finally:
        assert use_tiles(None) == []
    assert heuristics.tile(key) == heuristics.default(key)
    path.write_text('{"schema": "something/1"}')
    with pytest.raises(ValueError, match="expected a file of"):
        use_tiles(path)


def test_a_tuned_row_tile_with_a_workspace(monkeypatch):
    """A tile that was tuned without a workspace serves with one; not wider than registers allow."""
    from marginkernels.backend.triton import heuristics

    for dim, queries, expected in ((512, 32, 32), (512, 128, 128), (128, 128, 64), (128, 16, 16)):
        key = heuristics.Key.of("row", dim, torch.bfloat16, "sm_90")
        saves = key._replace(saves=True)
        chosen = {key: replace(heuristics.default(key), queries=queries, stages=5)}
        monkeypatch.setattr(heuristics, "CHOSEN", chosen)
        assert heuristics.tile(saves) == replace(chosen[key], queries=expected)
        assert heuristics.tile(saves._replace(busy=True)) == heuristics.default(saves._replace(busy=True))
        chosen[saves] = replace(chosen[key], stages=1)
        assert heuristics.tile(saves) == chosen[saves]
        assert heuristics.tile(key) == chosen[key]


def test_tuning_without_a_gpu(capsys, monkeypatch):
    from marginkernels.__main__ import main
    from marginkernels.backend.triton import aot, heuristics
    from marginkernels.cli import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--dim", "64"]) == 1
    assert "no GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--compile-only", "hopper"])
    assert "such as sm_90" in capsys.readouterr().err
    shape = tune.Shape(64, 64, 1000, torch.bfloat16, torch.float32)
    rows = tune.compiled(shape, "sm_90", saved=True, look=lambda *_: aot.Resources(255, 0, heuristics.SHARED["sm_90"] + 1))
    assert {row["key"].kernel for row in rows} == {"row", "class", "saved"}
    assert all("shared memory" in row["why"] for row in rows)
    monkeypatch.setattr(tune, "CHANGES", ({},))
    assert main(["tune", "--compile-only", "sm_90", "--dim", "64", "--classes", "1e5", "--workspace-mb", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("default") == 5


@pytest.fixture
def matmul_switches():
    matmul = torch.backends.cuda.matmul
    yield matmul
    matmul.allow_tf32 = False
    matmul.fp32_precision = torch.backends.fp32_precision = "none"
    assert not matmul.allow_tf32


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("matmul.fp32_precision = 'tf32'", "tf32"),
        ("matmul.fp32_precision = 'ieee'", "ieee"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("matmul.allow_tf32 = True", "tf32"),
        ("matmul.fp32_precision = 'none'", "tf32x3"),
        ("matmul.allow_tf32 = False", "ieee"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
    ],
)
def test_pytorchs_switch_for_tf32(matmul_switches, setting, wanted):
    """Both the older and the newer switch: reading the older one once raised where the newer was set."""
    from marginkernels.backend.triton import launch

    assert launch.precision(torch.float32) == "tf32x3"
    exec(setting, {"torch": torch, "matmul": matmul_switches})
    assert launch.precision(torch.float32) == wanted
    assert launch.precision(torch.bfloat16) == "ieee"


def test_never_chosen_by_auto_before_it_is_verified():
    assert not FUSED["triton"].tested_on
    assert "never run on a GPU" in FUSED["triton"].note


def test_refusals_say_why():
    x, w, y = torch.randn(3, 8), torch.randn(4, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="only under Triton's interpreter"):
        mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(), backend="triton")
    assert "1024" in FUSED["triton"].unsupported_reason("cuda", torch.float32, torch.float32, 1032)
    assert "float64" in FUSED["triton"].unsupported_reason("cuda", torch.float64, torch.float32, 64)
    assert FUSED["triton"].unsupported_reason("cuda", torch.bfloat16, torch.float32, 512) is None


def test_the_package_does_not_import_the_kernels():
    code = (
        "import sys, marginkernels; marginkernels.backends()\n"
        "plain = ('.backend', '.heuristics', '.saved_layout', '.slots')\n"
        "kernels = [n for n in sys.modules if 'backend.triton.' in n and not n.endswith(plain)]\n"
        "assert not kernels, kernels"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKS.parents[2])


def test_kernels_over_rows_compile_beyond_one_step_of_columns():
    """float32 rows of more than 512 columns: Triton's compiler ended at a sum of one row in the loop over its columns."""
    from marginkernels.backend.triton import aot

    launches = aot.distinct(aot.row_launches(1024, 520, 1_000_000, torch.float32, torch.float32, "sm_90"))
    over_columns = [one for one in launches if one.constants.get("WIDTH") == 512]
    assert {one.kernel.__name__ for one in over_columns} >= {"replace_rows_kernel", "prepare_rows_kernel", "row_gradient_kernel"}
    assert not any(aot.resources(aot.compile(one, "sm_90")).stack_bytes for one in over_columns)


def test_a_kernel_that_does_not_compile_is_a_fault():
    refused = {"kernel": "k", "backend": "triton", "arch": "sm_90", "failed": "RuntimeError: PassManager::run failed"}
    fine = {"kernel": "l", "backend": "triton", "arch": "sm_90", "registers": 9, "stack_bytes": 0, "shared_bytes": 0}
    assert resources.faults([refused, fine]) == ["triton sm_90 k: RuntimeError: PassManager::run failed"]
    assert "k" not in resources.table([refused, fine]).split("\n", 1)[1].split()


def test_stack_is_explained_up_to_what_is_known():
    for known in resources_triton.EXPLAINED:
        name = ", ".join(known.words)
        assert resources_triton.explanation(name, known.arch, known.most) == known.why
        assert resources_triton.explanation(name, known.arch, known.most + 8) is None
        assert resources_triton.explanation(name, known.arch, 0) is None
        assert resources_triton.explanation("class_pass_kernel<D=64>", known.arch, known.most) is None


def test_the_committed_report_has_no_fault():
    """Every kernel on every architecture at every dimension, and a reason for each that uses the stack: the one of today."""
    record = json.loads((Path(resources.__file__).parent / "results" / "resources-triton.json").read_text())["records"]
    assert resources.faults(record) == []
    assert {r["arch"] for r in record} == {*resources_triton.ARCHS}
    dims = {int(found) for r in record for found in re.findall(r"D=(\d+)", r["kernel"])}
    assert dims == {*resources_triton.DIMS}
    for r in record:
        assert r.get("explained") == resources_triton.explanation(r["kernel"], r["arch"], r["stack_bytes"])


def test_the_report_compiles_each_kernel_once():
    from marginkernels.backend.triton import aot

    found = resources_triton.kernels("sm_90", (64, 72))
    variants = {aot.variant(one, "sm_90") for one in found.values()}
    assert len(variants) == len(found)
    p = aot.meta_inputs(1024, 72, 1_000_000, torch.bfloat16, torch.float32, non_target=mk.NonTarget.HARD_LINEAR, bias=True)
    assert {aot.variant(one, "sm_90") for one in aot.launches(p, "sm_90")} <= variants


def test_the_report_lists_every_kernel():
    from marginkernels.backend import triton

    sources = [path.read_text() for path in Path(triton.__file__).parent.glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert {"row_pass_kernel", "topk_kernel", "loss_kernel"} <= kernels
    assert {name.split("<")[0] for name in resources_triton.kernels("sm_90", (64,))} == kernels


def test_the_report_can_be_read_again():
    records = [{"kernel": "k", "arch": "sm_90", "stack_bytes": number} for number in range(2)]
    read = json.loads(resources.document(records))
    assert read["records"] == records
    assert read["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_resource_faults():
    good = {"kernel": "k", "backend": "b", "arch": "sm_90", "registers": 9, "stack_bytes": 0, "shared_bytes": 5, "shared_limit": 5}
    assert resources.faults([good, good | {"stack_bytes": 8, "explained": "why"}]) == []
    assert "8 bytes of stack" in resources.faults([good | {"stack_bytes": 8}])[0]
    assert "6 bytes of shared" in resources.faults([good | {"shared_bytes": 6}])[0]
