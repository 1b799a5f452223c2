"""The class-parallel head on 1 to 4 Gloo ranks, compared with one process; see helpers/on_ranks.py for what each rank does."""

import pytest
from helpers import on_ranks, ranks


@pytest.fixture(scope="module")
def reports(request):
    """World size -> the results of the checks that are selected; the processes are started once for all of them."""
    asked = [item.callspec.params for item in request.session.items if getattr(item, "originalname", "") == "test_ranks"]
    found = {}

    def of(size: int):
        if size not in found:
            wanted = {params["check"] for params in asked if params["size"] == size}
            found[size] = ranks.start([c for c in on_ranks.CHECKS if c.__name__ in wanted], size)
        return found[size]

    return of


EVERY = [(size, c.__name__) for size in (1, 2, 3, 4) for c in on_ranks.CHECKS if size in getattr(c, "sizes", (1, 2, 3, 4))]


@pytest.mark.parametrize(("size", "check"), EVERY)
def test_ranks(reports, size, check):
    wrong = reports(size)[check]
    assert wrong is None, wrong
