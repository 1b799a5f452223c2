"""The class-parallel head on 1 to 4 Gloo ranks against one process; see distributed_checks.py for what each rank does."""

import distributed_checks
import pytest
import ranks


@pytest.fixture(scope="module")
def reports():
    """By world size, what each check found; the processes are started once for all of them."""
    found = {}

    def of(size: int):
        if size not in found:
            found[size] = ranks.start(distributed_checks.CHECKS, size)
        return found[size]

    return of


@pytest.mark.parametrize("check", [c.__name__ for c in distributed_checks.CHECKS])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(reports, size, check):
    wrong = reports(size)[check]
    assert wrong is None, wrong
