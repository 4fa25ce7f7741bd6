r"""Reference answers out of rows, final answers out of texts, and numbers as they are written in both.

A final answer is what follows `####` on its line, as in GSM8K, or what is in \boxed{}; the last one of a text counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rayft.errors import DataError

ANSWER = "answer"
"""The column that holds a row's reference answer."""

LONGEST = 200
"""Characters of the longest text that is read as a number: Python refuses very long ones, and takes quadratic time for long ones."""

_MARK = re.compile(r"#{4,}|\\boxed\s*(?P<brace>\{)")
_BRACE = re.compile(r"\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_SPELLINGS = (
    *(("\\!", ""), ("{,}", ","), ("\\,", ","), ("\N{MINUS SIGN}", "-")),
    *(("\\$", " "), ("$", " "), ("\\%", " "), ("%", " ")),
)
_UNIT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{[^{}0-9]*\}$")
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))")
_WHOLE = "(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_LAST = re.compile(rf"(?<![0-9.])-?{_WHOLE}(?:\.[0-9]+)?")
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<top>-?{_WHOLE})\s*/\s*(?P<below>-?{_WHOLE})|(?P<decimal>{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+))")


def reference(row: Mapping[str, Any]) -> str:
    """The row's reference answer as text, without space around it.

    Raises:
        DataError: there is none: no such column, nothing in it, or neither text nor a finite number.
    """
    if ANSWER not in row:
        rule = f"the row has no such column, only {', '.join(sorted(row)) or 'none'}"
        raise DataError(ANSWER, None, rule, "Rename the column of reference answers, or name a reward function of your own")
    value = row[ANSWER]
    usable = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    if not usable or isinstance(value, bool) or not (text := str(value).strip()):
        raise DataError(ANSWER, value, "is no reference answer, which is text or a finite number", "Correct the row, or take it out")
    return text


def last_number(text: str) -> str | None:
    """The text's last number as it is written, with sign, thousands and decimals; None when it has none."""
    found = _LAST.findall(text)
    return found[-1] if found else None


def final(text: str) -> str | None:
    r"""The text's last final answer as it is written; None when it has none, or its last \boxed{} does not end."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    start = marks[-1].end()
    return _braced(text, start) if marks[-1]["brace"] else text[start:].partition("\n")[0].strip()


def number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number and nothing else; None for any other text.

    A number may have a sign, thousands in groups of three and decimals, or is a fraction, a/b or \frac{a}{b}. Signs of
    dollar and per cent, a full stop and a unit in \text{} do not count: 50\% is 50.
    """
    if len(text) > LONGEST:
        return None
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    # Spaces keep the fraction apart from its neighbours: 2\frac12 is not 21/2.
    text = _FRAC.sub(lambda found: f" {found[1] or found[2]}/{found[3] or found[4]} ", text)
    match = _NUMBER.fullmatch(_UNIT.sub("", text.rstrip(" \t\n.,")).rstrip(" \t\n.,").lstrip())
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"]:
        return sign * Fraction(match["decimal"].replace(",", ""))
    top, below = (int(match[part].replace(",", "")) for part in ("top", "below"))
    return sign * Fraction(top, below) if below else None


def _braced(text: str, start: int) -> str | None:
    """From behind an opening brace to the one that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += bool(brace["open"]) - bool(brace["close"])
        if depth == 0:
            return text[start : brace.start()].strip()
    return None
