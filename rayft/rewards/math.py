r"""1 for an answer whose final expression, behind `####` or in \boxed{}, equals that of the row's column `answer`; else 0.

A reference that is a number is compared exactly, and only with numbers, whatever is installed. Any other one needs math-verify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.errors import ConfigError, DataError
from rayft.rewards.answers import ANSWER, final, number, reference


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Whether the final expressions are equal, 0 or 1; an answer without one has 0. The reference may be the bare expression.

    Raises:
        DataError: the row has no reference answer, or one that is no mathematics.
        ConfigError: the reference is not a number, and math-verify is not installed.
    """
    text = reference(row)
    expected = final(text) or text
    given = final(completion)
    value = number(expected)
    if value is not None:
        return float(given is not None and number(given) == value)
    return _same(expected, given)


def _same(expected: str, given: str | None) -> float:
    try:
        from math_verify import parse, verify
    except ImportError as problem:
        rule = "is not a number, and math-verify, which compares expressions, is not installed"
        raise ConfigError(ANSWER, expected, rule, "Install rayft[rewards] on every machine, or take such rows out") from problem

    # Its own time limits are signals, which only a main thread may set; reward.deadline_s limits this reward too.
    wanted = parse(f"\\boxed{{{expected}}}", parsing_timeout=None)
    if not wanted:
        rule = "is neither a number nor an expression that math-verify can read"
        raise DataError(ANSWER, expected, rule, "Correct the row, or take it out")
    if given is None:
        return 0.0
    return float(verify(wanted, parse(f"\\boxed{{{given}}}", parsing_timeout=None), timeout_seconds=None))
