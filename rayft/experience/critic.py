"""A user's critic: the value of every token that the policy wrote in a group, and the advantages that follow from them."""

from __future__ import annotations

import asyncio
import inspect
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from rayft.config.functions import UserFunction, load_function, resolve
from rayft.config.schema import Algorithm
from rayft.errors import ConfigError, DataError, InfrastructureError
from rayft.experience.advantages import gae
from rayft.types import Group

CRITIC = "algorithm.values"
"""Its field, and its name among the run's functions: no reward can be named like that."""

Critic = Callable[..., Any]
"""(prompt, answers, by_policy, row) -> values, or an awaitable of them."""


def critic_function(spec: str) -> UserFunction:
    """The critic, after a look at whether it can be called.

    Raises:
        ConfigError: it does not exist, cannot be loaded, or does not take its arguments.
    """
    found = resolve(spec)
    try:
        inspect.signature(load_function(found)).bind([], [], [], {})
    except TypeError as problem:
        rule = f"cannot be called with (prompt, answers, by_policy, row): {problem}"
        raise ConfigError(CRITIC, spec, rule, "Let it take these four, in this order") from problem
    return found


async def advantages_of(critic: Critic, group: Group, total: Sequence[float], algorithm: Algorithm) -> tuple[array[float], ...]:
    """For each answer, the advantage of every token that the policy wrote, before whitening. The reward is that of the last one.

    Args:
        critic: called once, in a thread unless it is async.
        group: n answers.
        total: n rewards.
        algorithm: with gamma and lam.

    Raises:
        DataError: it raised, or gave anything but a finite number for each of these tokens.
        InfrastructureError: it raised one.
    """
    found = zip(total, await _values(critic, group), strict=True)
    return tuple(array("f", gae([0.0] * (len(values) - 1) + [reward], values, algorithm.gamma, algorithm.lam)) for reward, values in found)


async def _values(critic: Critic, group: Group) -> list[list[float]]:
    row, lengths = group.prompt.row, [sum(trajectory.by_policy) for trajectory in group.trajectories]
    arguments = (
        list(group.prompt.tokens),
        [list(trajectory.tokens) for trajectory in group.trajectories],
        [list(trajectory.by_policy) for trajectory in group.trajectories],
        row,
    )
    try:
        given = await (critic(*arguments) if inspect.iscoroutinefunction(critic) else asyncio.to_thread(critic, *arguments))
        values = [[float(value) for value in answer] for answer in given]
    except InfrastructureError:
        raise
    except Exception as problem:  # the user's code may raise anything, and return what holds no numbers
        rule = f"raised {type(problem).__name__} on row {dict(row)!r:.200}: {problem}"
        raise DataError(CRITIC, None, rule, "Mend it, or take such rows out") from problem
    if [len(answer) for answer in values] != lengths or not all(math.isfinite(value) for answer in values for value in answer):
        told = [len(answer) for answer in values]
        rule = f"must give finite numbers, {lengths} of them for the {len(lengths)} answers, and gave {told}: {values!r:.100}"
        raise DataError(CRITIC, None, rule, "Return a value for each token of each answer where by_policy is true, and for no other")
    return values
