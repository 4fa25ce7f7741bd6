"""Which documents share a row. Pure: lengths in, lists of indices out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute documents over rows of `capacity` tokens: best fit, longest document first.

    The result depends on nothing but the arguments: equal lengths are taken by index, equally good rows by age. It takes
    asymptotically at most 11/9 of the optimal number of rows (Johnson et al. 1974), and O(n log n) comparisons.

    Args:
        lengths: tokens of each document, every one in 1..capacity.
        capacity: tokens in a row.

    Returns:
        Rows of document indices, ascending inside a row; rows ordered by their first document, so that packed rows
        follow the order of the data.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"document lengths {min(lengths)}..{max(lengths)} do not fit rows of {capacity} tokens")
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), ascending; full rows are not in it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        tightest = bisect_left(space, (length, -1))
        if tightest < len(space):
            free, row = space.pop(tightest)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        if free > length:
            insort(space, (free - length, row))
    return sorted(sorted(row) for row in rows)
