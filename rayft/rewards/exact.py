"""1 for an answer that reads like the row's column `answer`: same characters and case, any space between words; else 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from rayft.rewards.answers import reference


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Whether the whole answer equals the reference, 0 or 1.

    Raises:
        DataError: the row has no reference answer.
    """
    return float(_plain(completion) == _plain(reference(row)))


def _plain(text: str) -> str:
    """One space between words, and one way of writing each accented letter."""
    return " ".join(unicodedata.normalize("NFC", text).split())
