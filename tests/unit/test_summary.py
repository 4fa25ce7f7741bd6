"""Numbers about batches and evaluations, worked out by hand."""

from __future__ import annotations

import pytest

from rayft.experience.summary import of_batch, of_evaluation
from rayft.observe.metrics import check_names
from rayft.types import Scored


def scored(total: tuple[float, ...], oldest: int = 3, truncated: bool = False) -> Scored:
    n = len(total)
    return Scored("0-0", {"right": total}, total, (4,) * n, (6,) * n, (truncated,) * n, oldest, 5)


def test_a_batch() -> None:
    values = of_batch([scored((1.0, 0.0)), scored((1.0, 1.0), oldest=5, truncated=True)], step=5)
    check_names(values)
    assert values["reward/mean"] == 0.75 and values["reward/part/right"] == 0.75
    assert values["reward/zero_variance"] == 0.5 and values["reward/group_std"] == 0.25
    assert values["staleness/max"] == 2 and values["rollout/truncated"] == 0.5 and values["rollout/length"] == 4


def test_an_evaluation() -> None:
    values = of_evaluation([(scored((1.0, 0.0)), scored((1.0,))), (scored((0.0, 0.0)), scored((0.5,)))], correct_from=1.0)
    check_names(values)
    assert (values["eval/reward"], values["eval/reward_greedy"]) == (0.25, 0.75)
    assert (values["eval/pass_at_1"], values["eval/pass_at_k"], values["eval/num_prompts"]) == (0.25, 0.5, 2)
    assert values["eval/reward_ci"] == pytest.approx(1.96 * 0.125**0.5 / 2**0.5)
