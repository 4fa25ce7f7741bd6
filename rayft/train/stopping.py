"""When a run has learned what it will: the best evaluation so far and how many have passed since, as a function of the log.

Nothing of it is saved: metrics.jsonl is cut back to the restored step, and what is left gives the same counters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Best:
    """The lowest eval/loss so far.

    Attributes:
        loss: its value; infinite before the first evaluation.
        step: optimizer steps taken then.
        since: evaluations since the last one that counted as an improvement.
        reference: the loss that the next improvement must be below by min_delta.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0
    reference: float = math.inf

    def after(self, step: int, loss: float, min_delta: float) -> Best:
        """With one more evaluation; a loss that is not a number is no improvement."""
        improved = loss < self.reference - min_delta
        lower = loss < self.loss
        return Best(
            loss if lower else self.loss,
            step if lower else self.step,
            0 if improved else self.since + 1,
            loss if improved else self.reference,
        )


def best_of(records: Iterable[Mapping[str, Any]], min_delta: float) -> Best:
    """The state after all evaluations in the records of metrics.jsonl."""
    best = Best()
    for record in records:
        if "eval/loss" in record:
            best = best.after(record["step"], record["eval/loss"], min_delta)
    return best
