"""Early stopping and the best evaluation, as a function of the log."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.train.stopping import GOALS, Best, best_of


def records(*losses: float) -> list[dict[str, float]]:
    """An evaluation each ten steps, between records of training."""
    pairs = [({"step": 10 * i, "train/loss": 0.0}, {"step": 10 * i, "eval/loss": loss}) for i, loss in enumerate(losses, 1)]
    return [record for pair in pairs for record in pair]


@pytest.mark.parametrize(
    ("losses", "min_delta", "best"),
    [
        ((), 0.0, Best()),
        ((3.0,), 0.0, Best(3.0, 10, 0, 3.0)),
        ((3.0, 3.0, 2.9, 3.1, 2.9), 0.0, Best(2.9, 30, 2, 2.9)),
        # Small gains are the best so far, but not what patience waits for; together they count once they reach min_delta.
        ((3.0, 2.95, 2.92), 0.1, Best(2.92, 30, 2, 3.0)),
        ((3.0, 2.95, 2.85), 0.1, Best(2.85, 30, 0, 2.85)),
        ((math.nan, math.nan), 0.0, Best(since=2)),
        ((3.0, math.nan, math.inf), 0.0, Best(3.0, 10, 2, 3.0)),
    ],
)
def test_written_out(losses: tuple[float, ...], min_delta: float, best: Best) -> None:
    assert best_of(records(*losses), GOALS["sft"], min_delta) == best
    rewards = [{"step": record["step"], "eval/reward": -record["eval/loss"]} for record in records(*losses) if "eval/loss" in record]
    assert best_of(rewards, GOALS["grpo"], min_delta) == best, "the highest reward is the best"


@given(st.lists(st.floats(0, 10) | st.just(math.nan), max_size=12), st.floats(0, 1))
def test_a_restart_changes_nothing(losses: list[float], min_delta: float) -> None:
    """The log of a run that was cut back and went on is that of one without a stop, and so is what follows from it."""
    goal = GOALS["sft"]
    whole = best_of(records(*losses), goal, min_delta)
    for cut in range(len(losses) + 1):
        again = best_of(records(*losses[:cut]), goal, min_delta)
        for number, loss in enumerate(losses[cut:], cut + 1):
            again = again.after(10 * number, loss, min_delta)
        assert again == whole
    finite = [(loss, 10 * number) for number, loss in enumerate(losses, 1) if not math.isnan(loss)]
    assert (whole.cost, whole.step) == (min(finite) if finite else (math.inf, 0))
