"""Packing against a naive best fit, next fit and the true optimum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.data.packing import pack

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def naive(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing by looking at every row, ties to the older row and the lower index."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [row for row, space in enumerate(free) if space >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda row: free[row])].append(index)
        else:
            rows.append([index])
    return sorted(sorted(row) for row in rows)


def next_fit(lengths: Sequence[int], capacity: int) -> int:
    rows, free = 0, 0
    for length in lengths:
        if length > free:
            rows, free = rows + 1, capacity
        free -= length
    return rows


def optimum(lengths: Sequence[int], capacity: int) -> int:
    """Fewest rows, by the best (rows, fill of the last row) for every subset of documents."""
    best = [(0, capacity)] + [(len(lengths) + 1, 0)] * ((1 << len(lengths)) - 1)
    for subset in range(len(best)):
        rows, fill = best[subset]
        for index, length in enumerate(lengths):
            if not subset >> index & 1:
                step = (rows, fill + length) if fill + length <= capacity else (rows + 1, length)
                best[subset | 1 << index] = min(best[subset | 1 << index], step)
    return best[-1][0]


@given(LENGTHS)
def test_every_document_once_in_order_and_no_row_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= CAPACITY for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(LENGTHS)
def test_equals_best_fit_decreasing_done_naively(lengths: list[int]) -> None:
    assert pack(lengths, CAPACITY) == naive(lengths, CAPACITY)


@given(LENGTHS)
def test_never_more_rows_than_next_fit_on_the_same_order(lengths: list[int]) -> None:
    assert len(pack(lengths, CAPACITY)) <= next_fit(sorted(lengths, reverse=True), CAPACITY)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_within_the_bound_of_the_optimum(lengths: list[int]) -> None:
    assert 9 * len(pack(lengths, 12)) <= 11 * optimum(lengths, 12) + 6


def test_small_cases_exhaustively_stay_within_one_row_of_the_optimum() -> None:
    for lengths in combinations_with_replacement(range(1, 8), 6):
        assert len(pack(lengths, 7)) <= optimum(lengths, 7) + 1


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 8) == []


@pytest.mark.parametrize("lengths", [[9], [3, 0]])
def test_refuses_lengths_that_are_no_documents(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 8 tokens"):
        pack(lengths, 8)
