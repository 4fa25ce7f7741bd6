"""When a run has learned what it will: the best evaluation so far and how many have passed since, as a function of the log.

Nothing of it is saved: metrics.jsonl is cut back to the restored step, and what is left gives the same counters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What evaluations are compared by.

    Attributes:
        metric: its name.
        sign: 1 when the lowest value is the best, -1 when the highest is.
    """

    metric: str
    sign: int

    def cost(self, values: Mapping[str, float]) -> float:
        """The metric, such that less is better."""
        return self.sign * values[self.metric]


GOALS = {"sft": Goal("eval/loss", 1), "grpo": Goal("eval/reward", -1)}
"""By method."""


@dataclass(frozen=True)
class Best:
    """The evaluation of the lowest cost so far.

    Attributes:
        cost: its value; infinite before the first evaluation.
        step: optimizer steps taken then.
        since: evaluations since the last one that counted as an improvement.
        reference: the cost that the next improvement must be below by min_delta.
    """

    cost: float = math.inf
    step: int = 0
    since: int = 0
    reference: float = math.inf

    def after(self, step: int, cost: float, min_delta: float) -> Best:
        """With one more evaluation; a cost that is not a number is no improvement."""
        improved = cost < self.reference - min_delta
        lower = cost < self.cost
        return Best(
            cost if lower else self.cost,
            step if lower else self.step,
            0 if improved else self.since + 1,
            cost if improved else self.reference,
        )


def best_of(records: Iterable[Mapping[str, Any]], goal: Goal, min_delta: float) -> Best:
    """The state after all evaluations in the records of metrics.jsonl."""
    best = Best()
    for record in records:
        if goal.metric in record:
            best = best.after(record["step"], goal.cost(record), min_delta)
    return best
