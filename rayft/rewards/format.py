"""1 for an answer that as a whole matches a regular expression, that of the column `pattern` or thinking and answer in tags; else 0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayft.errors import DataError

COLUMN = "pattern"
_INSIDE = r"(?:(?!</?(?:think|answer)>).)+"
PATTERN = rf"<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>"
"""For rows without the column: each tag once, in this order, something in both, and nothing outside."""


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Whether the answer without space around it matches, 0 or 1; a dot matches line ends too.

    Raises:
        DataError: the row's pattern is no regular expression.
    """
    pattern = row.get(COLUMN, PATTERN)
    try:
        return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)
    except (re.error, TypeError) as problem:
        raise DataError(COLUMN, pattern, f"is no regular expression: {problem}", "Correct the row") from problem
