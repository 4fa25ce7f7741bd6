r"""1 for an answer whose final number, behind `####` or in \boxed{}, equals that of the row's column `answer` exactly; else 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.errors import ConfigError, DataError
from rayft.rewards.answers import ANSWER, final, last_number, number, reference

READINGS = {"marked": final, "number": last_number}
"""How the final number of an answer is found: it is marked, or the last number that there is."""


def reward(prompt: str, completion: str, row: Mapping[str, Any], read: str = "marked") -> float:
    """Whether the final numbers are equal, 0 or 1; an answer without one has 0. The reference may be the bare number.

    Args:
        prompt, completion, row: as every reward has them.
        read: marked or number. number suits models that were not taught to mark their answers.

    Raises:
        DataError: the row has no reference answer, or one without a final number.
        ConfigError: there is no such way to read.
    """
    if read not in READINGS:
        raise ConfigError("arguments.read", read, "is no way to read an answer", f"Use {' or '.join(READINGS)}")
    text = reference(row)
    marked = final(text)
    expected = number(text if marked is None else marked)
    if expected is None:
        rule = "has no final number, which stands behind #### or in \\boxed{}, or alone"
        raise DataError(ANSWER, text[-80:], rule, "Correct the row, take it out, or use the reward math for expressions")
    given = READINGS[read](completion)
    return float(given is not None and number(given) == expected)
