"""From the rewards of groups to one advantage per answer, or, by a critic's values, per token. Pure; a group is the answers to one prompt.

The standard deviation is the sample's (divided by n - 1). A group whose rewards are all equal has advantages of exactly zero.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Rewards = Sequence[Sequence[float]]
"""[groups][answers]"""
Advantages = list[list[float]]

STD_EPS = 1e-6
"""Added to standard deviations."""


def group_mean_std(groups: Rewards) -> Advantages:
    """Reward less the group's mean, over its standard deviation: GRPO, arXiv 2402.03300."""
    return [_scaled(centred, _deviation(centred)) for centred in group_mean(groups)]


def group_mean(groups: Rewards) -> Advantages:
    """Reward less the group's mean: Dr. GRPO, arXiv 2503.20783."""
    return [_centred(rewards) for rewards in groups]


def leave_one_out(groups: Rewards) -> Advantages:
    """Reward less the mean of the group's other rewards: RLOO, arXiv 2402.14740. Groups have two answers or more."""
    return [[advantage * len(rewards) / (len(rewards) - 1) for advantage in _centred(rewards)] for rewards in groups]


def reinforce_pp_baseline(groups: Rewards) -> Advantages:
    """Reward less the group's mean, over the standard deviation of the whole batch: REINFORCE++ with baseline, arXiv 2501.03262."""
    centred = group_mean(groups)
    deviation = _deviation(_centred([advantage for group in centred for advantage in group]))
    return [_scaled(group, deviation) for group in centred]


ADVANTAGES: dict[str, Callable[[Rewards], Advantages]] = {
    "group_mean_std": group_mean_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
"""Name -> advantages of the groups' total rewards."""


def gdpo(rewards: Sequence[Mapping[str, Sequence[float]]], weights: Mapping[str, float]) -> Advantages:
    """Each reward normalised in its group on its own, then summed by weight and normalised over the batch: GDPO, arXiv 2601.05242.

    Args:
        rewards: for each group, reward name -> value per answer.
        weights: reward name -> weight.
    """
    parts = {name: group_mean_std([group[name] for group in rewards]) for name in weights}
    summed = [
        [sum(weight * parts[name][index][answer] for name, weight in weights.items()) for answer in range(len(next(iter(group.values()))))]
        for index, group in enumerate(rewards)
    ]
    flat = _centred([advantage for group in summed for advantage in group])
    deviation, values = _deviation(flat), iter(flat)
    return [_scaled([next(values) for _ in group], deviation) for group in summed]


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Generalised advantage estimation of one trajectory: arXiv 1506.02438, equation 16, with a value of 0 after the end.

    A position is a token that the policy wrote. What an environment wrote between two turns is none: the last token of a turn is followed
    by the first one of the next turn, undiscounted for what lies between.

    Args:
        rewards: by position, for the token there.
        values: by position, of all that comes before the token.
        gamma: discount from one position to the next.
        lam: 0 trusts the values alone, 1 the rewards.

    Returns:
        One advantage per position.
    """
    advantages, advantage, following = list[float](), 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        advantages.append(advantage)
    return advantages[::-1]


def whitened(groups: Sequence[Sequence[array[float]]]) -> list[list[array[float]]]:
    """Advantages by token of [groups][answers], less their mean, over their standard deviation, both over all tokens."""
    flat = np.concatenate([np.asarray(answer, np.float64) for group in groups for answer in group])
    centred = flat - flat.mean() if flat.min() < flat.max() else np.zeros_like(flat)
    deviation = math.sqrt(float((centred * centred).sum()) / max(len(flat) - 1, 1))
    ends = itertools.accumulate((len(answer) for group in groups for answer in group), initial=0)
    scaled, edges = (centred / (deviation + STD_EPS)).astype(np.float32), itertools.pairwise(ends)
    return [[array("f", scaled[slice(*next(edges))].tobytes()) for _ in group] for group in groups]


def overlong_penalty(length: int, max_tokens: int, buffer: int, penalty: float) -> float:
    """What an answer loses for its length: nothing up to max_tokens - buffer, then linearly up to `penalty` at max_tokens.

    Source: soft overlong punishment of DAPO, arXiv 2503.14476, equation 13.
    """
    return -penalty * min(max(length - (max_tokens - buffer), 0) / buffer, 1.0)


def _centred(rewards: Sequence[float]) -> list[float]:
    mean = math.fsum(rewards) / len(rewards)
    return [0.0] * len(rewards) if min(rewards) == max(rewards) else [reward - mean for reward in rewards]


def _deviation(centred: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in centred) / max(len(centred) - 1, 1))


def _scaled(centred: Sequence[float], deviation: float) -> list[float]:
    return [value / (deviation + STD_EPS) for value in centred]
