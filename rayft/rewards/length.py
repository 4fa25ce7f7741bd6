"""1 for an answer of at most so many characters, falling linearly to 0 at twice as many; the column `max_chars` may say how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.errors import DataError

COLUMN = "max_chars"
MAX_CHARS = 2000
"""For rows without the column."""


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """1 within the budget, 2 - characters / budget beyond it, never below 0. Space around the answer counts.

    Raises:
        DataError: the row's budget is not a positive integer.
    """
    budget = row.get(COLUMN, MAX_CHARS)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise DataError(COLUMN, budget, "must be a positive integer, the characters of a short enough answer", "Correct the row")
    return min(1.0, max(0.0, 2 - len(completion) / budget))
