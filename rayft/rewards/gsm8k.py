r"""1 for an answer whose final number, behind `####` or in \boxed{}, equals that of the row's column `answer` exactly; else 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.errors import DataError
from rayft.rewards.answers import ANSWER, final, number, reference


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Whether the final numbers are equal, 0 or 1; an answer without one has 0. The reference may be the bare number.

    Raises:
        DataError: the row has no reference answer, or one without a final number.
    """
    text = reference(row)
    marked = final(text)
    expected = number(text if marked is None else marked)
    if expected is None:
        rule = "has no final number, which stands behind #### or in \\boxed{}, or alone"
        raise DataError(ANSWER, text[-80:], rule, "Correct the row, take it out, or use the reward math for expressions")
    given = final(completion)
    return float(given is not None and number(given) == expected)
