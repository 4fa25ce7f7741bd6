"""What reasoning-gym gives an answer to one of its own questions, 0 to 1; for rows of the source reasoning-gym://TASK."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayft.data import tasks
from rayft.errors import ConfigError
from rayft.rewards.answers import last_number

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged(text: str) -> str | None:
    """What stands between the last <answer> and </answer>, without space around it; None without them."""
    found = _TAGS.findall(text)
    return found[-1].strip() if found else None


READINGS = {"tags": tagged, "number": last_number}
"""How the final answer is found: between tags, or it is the last number."""


def reward(prompt: str, completion: str, row: Mapping[str, Any], read: str = "tags") -> float:
    """The score of the final answer; 0 for a text without one.

    Args:
        prompt, completion, row: as every reward has them.
        read: tags or number. number suits small models, which do not write tags because they are asked to.

    Raises:
        DataError: the row is not one of reasoning-gym's, or its library differs from the one that made the row.
        ConfigError: the library is not installed, or there is no such way to read.
    """
    if read not in READINGS:
        raise ConfigError("arguments.read", read, "is no way to read an answer", f"Use {' or '.join(READINGS)}")
    found = READINGS[read](completion)
    score = tasks.score(row, found or "")
    return 0.0 if found is None else score
