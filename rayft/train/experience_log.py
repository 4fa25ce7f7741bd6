"""Answers of an online run as lines of samples.jsonl: what was asked and said, what it was worth, and which weights said it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayft.experience.orders import Order
from rayft.types import Group, Trajectory

Decode = Callable[[list[int]], object]
"""A tokenizer's: ids -> text."""


def samples_of(order: Order, groups: Mapping[int, Group], count: int, decode: Decode) -> Iterator[dict[str, Any]]:
    """Answers of the first groups of a batch.

    Args:
        order: with the groups' rewards.
        groups: by their number in the batch.
        count: of answers, over all groups.
        decode: of the policy's tokenizer.
    """
    chosen = ((number, place) for number, group in groups.items() for place in range(len(group.trajectories)))
    for number, place in itertools.islice(chosen, count):
        group, scored = groups[number], order.scores[number]
        trajectory = group.trajectories[place]
        yield {
            "key": scored.key,
            "prompt": decode(list(group.prompt.tokens)),
            "answer": decode(list(trajectory.tokens)),
            "reward": scored.total[place],
            "rewards": {name: values[place] for name, values in scored.rewards.items()},
            "finish_reason": trajectory.finish_reason,
            "versions": trajectory.versions,
        } | ({} if all(trajectory.by_policy) else {"turns": turns_of(trajectory, decode)})


def turns_of(trajectory: Trajectory, decode: Decode) -> list[dict[str, str]]:
    """Who says what in a trajectory, in order: policy or environment, and the text, turn markup included."""
    tokens = zip(trajectory.by_policy, trajectory.tokens, strict=True)
    turns = itertools.groupby(tokens, key=operator.itemgetter(0))
    return [{"by": "policy" if own else "environment", "text": str(decode([token for _, token in turn]))} for own, turn in turns]
