"""An optimizer's step of rows: the C++ kernels against plain PyTorch, and the random numbers of stochastic rounding."""

import itertools

import pytest
import torch

from marginkernels.backend import cpu as cpu_backend
from marginkernels.backend import get
from marginkernels.backend.cpu import CpuBackend
from marginkernels.core.update import HALVES, MOMENTS, Rule, Update, key_of, random_bits, rounded, row_keys

CPU = get("cpu")
needs_cpu = pytest.mark.skipif(CPU.unavailable_reason() is not None, reason="the C++ kernels are not built")
RULES = {
    "sgd": (Rule.SGD, {}),
    "decay": (Rule.SGD, {"weight_decay": 0.1}),
    "momentum": (Rule.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (Rule.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (Rule.ADAMW, {"weight_decay": 0.1, "eps": 1e-5}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of(rule: Rule, count: int, dim: int, dtype: torch.dtype, state_dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(count, dim, generator=g).mul(1e-2).to(dtype)
    state = {name: torch.rand(count, dim, generator=g).to(state_dtype) for name in MOMENTS[rule]}
    if rule == Rule.ADAMW:
        state["step"] = torch.arange(count, dtype=torch.float32)[:, None] % 4
    return p, torch.randn(count, dim, generator=g), state


def copied(p, state):
    return p.clone(), {name: v.clone() for name, v in state.items()}


@needs_cpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "state_dtype"), itertools.product(DTYPES, DTYPES[:2]))
def test_the_kernels_do_what_pytorch_does(rule, dtype, state_dtype):
    kind, options = RULES[rule]
    for dim, rows, stochastic, grad in ((40, 3, False, torch.float32), (37, 1 << 33, True, torch.float32), (16, 0, True, torch.bfloat16)):
        p, g, state = rows_of(kind, 29, dim, dtype, state_dtype)
        update = Update(kind, 0.02, **{"weight_decay": 0.0, **options}, stochastic=stochastic, key=key_of(7, 3))
        (a, mine), (b, theirs) = copied(p, state), copied(p, state)
        update.apply(a, g.to(grad), mine, rows)
        CPU.update(update, b, g.to(grad), theirs, rows)
        assert not torch.equal(a, p)
        for want, got in [(a, b), *((mine[name], theirs[name]) for name in state)]:
            if got.dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-8)
            else:
                assert float((got != want).float().mean()) < 0.01  # where the number before rounding was another
                torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("rule", RULES)
def test_every_instruction_set_has_the_same_bits(rule):
    """Whether products are fused with sums elsewhere or not."""
    kind, options = RULES[rule]
    found = {}
    for level in cpu_backend.levels():
        results = []
        for dtype in DTYPES:
            p, g, state = rows_of(kind, 64, 70, dtype, dtype)
            update = Update(kind, 0.02, **{"weight_decay": 0.0, **options}, stochastic=True, key=99)
            CpuBackend(level).update(update, p, g, state, 5)
            results += [p, *state.values()]
        found[level] = results
    first = next(iter(found.values()))
    assert len(found) > 1
    for level, results in found.items():
        for a, b in zip(first, results, strict=True):
            assert torch.equal(a, b), level


@needs_cpu
def test_threads_and_tiles_do_not_show():
    """The number of threads, rows by parts and drawn rows: one row gets the same numbers however it comes."""
    update = Update(Rule.SGD, 0.02, 0.1, 0.9, stochastic=True, key=key_of(1, 2))
    p, g, state = rows_of(Rule.SGD, 5000, 40, torch.bfloat16, torch.bfloat16)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        a, s = copied(p, state)
        CPU.update(update, a, g, s, 1000)
        results.append((a, *s.values()))
    torch.set_num_threads(before)
    a, s = copied(p, state)
    for start in range(0, 5000, 700):
        part = slice(start, start + 700)
        CPU.update(update, a[part], g[part], {name: v[part] for name, v in s.items()}, 1000 + start)
    results.append((a, *s.values()))
    order = torch.randperm(5000)
    a, s = copied(p[order], {name: v[order] for name, v in state.items()})
    CPU.update(update, a, g[order], s, order + 1000)
    back = order.argsort()
    results.append((a[back], *(v[back] for v in s.values())))
    for one in results[1:]:
        for got, want in zip(one, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_exact_in_the_mean(dtype):
    """Of normal and subnormal numbers of both signs, and leaves alone what the dtype holds."""
    values = torch.tensor([1.0 + 2**-9, -3.1415926, 1e-3, -2e-6, 7e-8, 0.0, 65000.0, -1.7e-5])
    draws = 1 << 14
    bits = random_bits(key_of(0, 0), 0, torch.arange(draws), len(values))
    out = rounded(values.expand(draws, -1).contiguous(), dtype, bits).double()
    unit = (torch.nextafter(out.float(), torch.tensor(torch.inf)) - out.float()).abs()
    assert unit.max() >= 0
    for i, v in enumerate(values.tolist()):
        found = out[:, i].unique()
        near = torch.tensor(v).to(dtype).double()
        assert len(found) <= 2
        assert found.min() <= v <= found.max()
        if near == torch.tensor(v).double():
            assert found.tolist() == [float(near)]
        else:
            gap = float(found.max() - found.min())
            assert out[:, i].mean() == pytest.approx(v, abs=4 * gap * 0.5 / draws**0.5)
    held = torch.tensor([1.5, -0.25, 0.0, 2.0**-20, torch.inf, -torch.inf])
    got = rounded(held.expand(64, -1).contiguous(), dtype, random_bits(5, 1, torch.arange(64), len(held)))
    assert torch.equal(got.float(), held.to(dtype).float().expand(64, -1))
    nan = rounded(torch.full((8, 3), torch.nan), dtype, random_bits(5, 1, torch.arange(8), 3))
    assert nan.isnan().all()


def test_the_bits_are_uniform_and_independent():
    """Over rows, columns, tensors, steps and seeds; each changes them."""
    rows = torch.arange(2048)
    one = random_bits(key_of(0, 0), 0, rows, 64)
    assert one.min() >= 0
    assert one.max() < 1 << 16
    counts = torch.bincount((one.flatten() >> 8).long(), minlength=256).double()
    expected = one.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 256 + 6 * (2 * 256) ** 0.5
    others = [
        random_bits(key_of(0, 1), 0, rows, 64),
        random_bits(key_of(1, 0), 0, rows, 64),
        random_bits(key_of(0, 0), 1, rows, 64),
        random_bits(key_of(0, 0), 0, rows + 1, 64),
        one.roll(1, 1),
        one.roll(1, 0),
    ]
    for other in others:
        pair = torch.stack([one.flatten().double(), other.flatten().double()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / one.numel() ** 0.5
    assert torch.equal(random_bits(key_of(0, 0), 0, rows[5:6], 64), one[5:6])
    low, high = row_keys(key_of(0, 0), torch.tensor([0, 1, 1 << 40]))
    assert len({*zip(low.tolist(), high.tolist(), strict=True)}) == 3
    assert (high >= 0).all()


def test_what_nearest_rounding_loses():
    """bfloat16 to nearest never feels a decay of half a last place; at random the norm falls as in float32."""
    start = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    norms = {}
    for name, dtype, stochastic in (("float32", torch.float32, False), ("nearest", HALVES[0], False), ("stochastic", HALVES[0], True)):
        p = start.to(dtype, copy=True)
        for step in range(400):
            Update(Rule.SGD, 0.1, 5e-3, stochastic=stochastic, key=key_of(0, step)).apply(p, torch.zeros(64, 32), {})
        norms[name] = float(p.float().norm() / start.norm())
    assert norms["float32"] == pytest.approx((1 - 5e-4) ** 400, rel=1e-4)
    assert norms["nearest"] == pytest.approx(1.0, abs=1e-3)
    assert norms["stochastic"] == pytest.approx(norms["float32"], rel=5e-3)
