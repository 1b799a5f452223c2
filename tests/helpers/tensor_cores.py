"""Products of float32 matrices as tensor cores take them, emulated for Triton's interpreter.

An operand has TF32's 10 bits of mantissa. Eight exact products and the accumulator are aligned to the largest of them, cut one bit below
float32's last place, added, and cut to float32: towards zero, so that errors add up over a long sum (Fasi, Higham, Mikaitis and Pranesh,
Numerical behavior of NVIDIA tensor cores, 2021). ``tf32x3`` splits each operand into two and leaves out the product of the small parts.
"""

import numpy as np

STEP = 8


def nearest_tf32(a):
    """Rounded to nearest, ties away from zero, as cvt.rna.tf32.f32 does."""
    return ((a.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)


def cut_tf32(a):
    """What the instruction sees of a float32 operand."""
    return (a.view(np.int32) & ~0x1FFF).view(np.float32)


def towards_zero(a):
    """float64 to float32."""
    near = a.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(a), np.nextafter(near, np.float32(0)), near)


def accumulate(a, b, acc):
    """acc + a b of TF32 numbers."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], STEP):
        terms = np.concatenate([acc.astype(np.float64)[None], a[:, k : k + STEP].T[:, :, None] * b[k : k + STEP, None, :]])
        unit = np.ldexp(1.0, np.frexp(np.abs(terms).max(0))[1] - 25)
        acc = towards_zero(np.trunc(terms / unit).sum(0) * unit)
    return acc


def product(a, b, acc, precision):
    """acc + a b at ``precision``, ``"tf32"`` or ``"tf32x3"``; as Triton lowers the latter, acc is added in float32 at the end."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if precision == "tf32":
        return accumulate(cut_tf32(a), cut_tf32(b), acc)
    large_a, large_b = nearest_tf32(a), nearest_tf32(b)
    small = accumulate(cut_tf32(a - large_a), large_b, np.zeros_like(acc))
    small = accumulate(large_a, cut_tf32(b - large_b), small)
    return accumulate(large_a, large_b, small) + acc


def emulate(monkeypatch):
    """Let Triton's interpreter take products so, where kernels ask for such a precision; gives the list of those that were asked for."""
    from triton.runtime import interpreter

    usual, seen = interpreter.InterpreterBuilder.create_dot, []

    def create_dot(self, a, b, acc, precision, *rest):
        name = str(precision).rpartition(".")[2].lower()
        if name not in ("tf32", "tf32x3"):
            return usual(self, a, b, acc, precision, *rest)
        seen.append(name)
        return interpreter.TensorHandle(product(a.data, b.data, acc.data, name), acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return seen
