"""What reasoning-gym gives an answer to one of its own questions, 0 to 1; for rows of the source reasoning-gym://TASK."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayft.data import tasks

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """The score of what stands between the last <answer> and </answer>, without space around it; 0 for an answer without them.

    Raises:
        DataError: the row is not one of reasoning-gym's, or its library differs from the one that made the row.
        ConfigError: the library is not installed.
    """
    found = ANSWER.findall(completion)
    score = tasks.score(row, found[-1].strip() if found else "")
    return score if found else 0.0
