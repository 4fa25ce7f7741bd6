"""Advantages against numbers worked out by hand and against each other."""

from __future__ import annotations

import statistics
from array import array
from random import Random

import pytest

from rayft.experience.advantages import (
    gae,
    gdpo,
    group_mean,
    group_mean_std,
    leave_one_out,
    overlong_penalty,
    reinforce_pp_baseline,
    whitened,
)

GROUPS = [[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 3.0, 1.0]]


def test_baselines_and_scales() -> None:
    assert group_mean(GROUPS)[0] == [0.5, -0.5, -0.5, 0.5]
    for group, scaled in zip(GROUPS, group_mean_std(GROUPS), strict=True):
        deviation = statistics.stdev(group)
        expected = [(r - statistics.mean(group)) / (deviation + 1e-6) for r in group]
        assert scaled == pytest.approx(expected)
    for group, loo in zip(GROUPS, leave_one_out(GROUPS), strict=True):
        assert loo == pytest.approx([r - (sum(group) - r) / (len(group) - 1) for r in group])
    flat = [a for group in group_mean(GROUPS) for a in group]
    assert reinforce_pp_baseline(GROUPS)[2] == pytest.approx([a / (statistics.stdev(flat) + 1e-6) for a in group_mean(GROUPS)[2]])


@pytest.mark.parametrize("function", [group_mean, group_mean_std, leave_one_out, reinforce_pp_baseline])
def test_equal_rewards_have_no_advantage_at_all(function) -> None:
    assert function([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]]) == [[0.0] * 3] * 2
    assert function([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0]])[0] == [0.0] * 3


def test_gdpo_keeps_apart_what_a_sum_would_merge() -> None:
    both = {"right": (1.0, 0.0, 0.0, 0.0), "short": (0.0, 1.0, 1.0, 1.0)}
    assert group_mean_std([[a + b for a, b in zip(both["right"], both["short"], strict=True)]]) == [[0.0] * 4]
    (apart,) = gdpo([both], {"right": 2.0, "short": 1.0})
    assert apart[0] > 0 > apart[1] and apart[1] == apart[2] == apart[3]
    assert sum(apart) == pytest.approx(0)


def test_overlong_answers_lose_linearly() -> None:
    assert [overlong_penalty(n, 100, 20, 1.0) for n in (0, 80, 85, 90, 100)] == [0, 0, -0.25, -0.5, -1.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0), (0.7, 1.0), (0.0, 0.5)])
def test_gae_is_the_discounted_sum_of_residuals(gamma: float, lam: float) -> None:
    draw = Random(1)
    rewards, values = [draw.gauss(0, 1) for _ in range(7)], [draw.gauss(0, 1) for _ in range(7)]
    residuals = [rewards[t] + gamma * (*values, 0.0)[t + 1] - values[t] for t in range(7)]
    expected = [sum((gamma * lam) ** (u - t) * residuals[u] for u in range(t, 7)) for t in range(7)]
    found = gae(rewards, values, gamma, lam)
    assert found == pytest.approx(expected, abs=1e-14)
    if lam == 1:
        assert found == pytest.approx([sum(gamma ** (u - t) * rewards[u] for u in range(t, 7)) - values[t] for t in range(7)], abs=1e-14)
    with pytest.raises(ValueError, match="argument 2"):
        gae(rewards, values[1:], gamma, lam)


def test_whitening_is_over_the_tokens_of_the_batch() -> None:
    groups = [[[0.5, 2.0], [1.0]], [[-3.0, 0.25, 4.0], [8.0]]]
    flat = [value for group in groups for answer in group for value in answer]
    mean, deviation = statistics.mean(flat), statistics.stdev(flat)
    found = whitened([[array("f", answer) for answer in group] for group in groups])
    for group, scaled in zip(groups, found, strict=True):
        for answer, values in zip(group, scaled, strict=True):
            assert list(values) == pytest.approx([(value - mean) / (deviation + 1e-6) for value in answer], rel=1e-6)
    assert whitened([[array("f", [0.1, 0.1]), array("f", [0.1])]]) == [[array("f", [0.0, 0.0]), array("f", [0.0])]]
