"""Where class centers lie in a tile; needs no Triton.

A tile is cut into groups of 16 *slots*. A group has whole classes, each with as many slots as the power of two that holds its centers, 16
over that number apart: in a tile that tensor cores made, one thread has two of them, and a few neighbors the rest. Slots that are left over
are empty. With one center a class a slot is a center.
"""

from __future__ import annotations

#: Slots of a group: every tile of centers is a multiple of it.
GROUP = 16
#: The most centers that a class may have.
MOST = GROUP


def of_class(sub_centers: int) -> int:
    """Slots of one class."""
    return 1 << (sub_centers - 1).bit_length()


def slots(centers: int, sub_centers: int) -> int:
    """Slots of so many centers, those of whole classes: whole groups where a class has several."""
    if sub_centers == 1:
        return centers
    return -(-centers // (GROUP // of_class(sub_centers) * sub_centers)) * GROUP


def centers_before(slot: int, sub_centers: int) -> int:
    """The centers that lie before ``slot``, the first of a group."""
    return slot // of_class(sub_centers) * sub_centers
