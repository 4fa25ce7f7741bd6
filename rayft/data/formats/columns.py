"""Reading a row's columns, with sentences for what is missing or has the wrong type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.errors import DataError


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column.

    Raises:
        DataError: the row has no such column.
    """
    if name not in row:
        rule = f"the row has no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}"
        raise DataError(where, None, rule, "Name the column in the dataset's configuration, or choose another format")
    return row[name]


def text_column(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text of a column.

    Raises:
        DataError: the row has no such column, or it holds something else.
    """
    return as_text(column(row, name, where), f"column {name!r}", where)


def as_text(value: Any, what: str, where: str) -> str:
    """The value, which must be text.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise DataError(where, None, f"{what} must be text, but is {type(value).__name__}", "Correct the row")
    return value


def encodable(text: str, where: str) -> str:
    """The text, which must have a UTF-8 form: JSON can write half of a surrogate pair, tokenizers cannot read it.

    Raises:
        DataError: it has none.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            rule = f"the text holds half of a surrogate pair (\\u{ord(text[problem.start]):04x}), which has no UTF-8 form"
            raise DataError(where, None, rule, "Remove it from the row") from problem
    return text
