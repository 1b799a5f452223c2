"""The order in which Triton's interpreter runs the programs of a grid. A GPU runs them in any: results must not depend on it."""

import itertools

ORDERS = {
    "z-fastest": lambda x, y, z: list(itertools.product(range(x), range(y), range(z))),  # the interpreter's own
    "z-slowest": lambda x, y, z: [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))],
}
ORDERS |= {f"{name}-reversed": lambda *grid, order=order: order(*grid)[::-1] for name, order in ORDERS.items()}


def set_grid_order(monkeypatch, order):
    """Run every grid of the interpreter in ``order``, a key of ``ORDERS``."""
    from triton.runtime import interpreter

    builder, turns = interpreter.interpreter_builder, []

    def set_grid_idx(x, y, z):
        """The interpreter counts x, y, z; each count stands for the next program of the order."""
        if (x, y, z) == (0, 0, 0):
            turns[:] = ORDERS[order](*builder.grid_dim)
        builder.grid_idx = turns.pop(0)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
