"""The class-parallel head on 1 to 4 Gloo ranks, compared with one process; see helpers/on_ranks.py for what each rank does."""

import pytest
from helpers import on_ranks, ranks


@pytest.fixture(scope="module")
def reports():
    """World size -> the results of all checks; the processes are started once for all checks."""
    found = {}

    def of(size: int):
        if size not in found:
            found[size] = ranks.start(on_ranks.CHECKS, size)
        return found[size]

    return of


@pytest.mark.parametrize("check", [c.__name__ for c in on_ranks.CHECKS])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(reports, size, check):
    wrong = reports(size)[check]
    assert wrong is None, wrong
