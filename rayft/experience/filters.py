"""Which groups are worth a step. What is filtered gives its place back, so that a batch is always full."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rayft.types import Scored


def keep_all(group: Scored) -> bool:
    """Every group counts."""
    return True


def has_variance(group: Scored) -> bool:
    """Whether the answers differ in total reward: without a difference every advantage is zero (DAPO, arXiv 2503.14476, section 3.2)."""
    return max(group.total) > min(group.total)


def signal(group: Scored) -> float:
    """How much there is to learn from a group: the deviation of its answers' total rewards."""
    return statistics.pstdev(group.total)


FILTERS: dict[str, Callable[[Scored], bool]] = {"none": keep_all, "zero_variance": has_variance}
"""Name -> whether a group is kept."""
