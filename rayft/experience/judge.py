"""From a group to its rewards: the run's reward functions, plain, async or by group, and what makes a total of them."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rayft.config.functions import UserFunction, load_function, resolve
from rayft.config.schema import GrpoRun, RewardFunction
from rayft.errors import DataError
from rayft.experience.advantages import overlong_penalty
from rayft.experience.pack import step_of
from rayft.models.tokenizer import load_tokenizer
from rayft.types import Group, Scored

READY = "rayft.rewards.{0}:reward"
"""Where a reward is that is named without a colon."""


def reward_functions(cfg: GrpoRun) -> dict[str, UserFunction]:
    """The run's reward functions by name, found but not loaded.

    Raises:
        ConfigError: one does not exist.
    """
    named = {name: one.function for name, one in cfg.reward.functions.items()}
    return {name: resolve(spec if ":" in spec else READY.format(spec)) for name, spec in named.items()}


class Judge:
    """Scores groups. What a function raises, and a value that is not a finite number, is an error, never a zero.

    Args:
        cfg: the run.
        functions: of `reward_functions`.
    """

    def __init__(self, cfg: GrpoRun, functions: Mapping[str, UserFunction]) -> None:
        self._cfg, self._tokenizer = cfg, load_tokenizer(cfg.model)
        self._functions = {name: (load_function(function), cfg.reward.functions[name]) for name, function in functions.items()}

    async def score(self, group: Group) -> Scored:
        """The rewards of a group's answers.

        Raises:
            DataError: a reward could not be given.
        """
        prompt = self.text(group.prompt.tokens)
        answers = [self.text(trajectory.tokens) for trajectory in group.trajectories]
        names = list(self._functions)
        values = await asyncio.gather(*(self._values(name, prompt, answers, group.prompt.row) for name in names))
        rewards = dict(zip(names, values, strict=True))
        weights = {name: function.weight for name, function in self._cfg.reward.functions.items()}
        for name in sorted({name for trajectory in group.trajectories for name in trajectory.rewards}):
            rewards[name] = tuple(trajectory.rewards.get(name, 0.0) for trajectory in group.trajectories)
            weights[name] = 1.0
        lengths = tuple(sum(trajectory.by_policy) for trajectory in group.trajectories)
        steps = [step_of(version) for trajectory in group.trajectories for version, _, _ in trajectory.versions]
        return Scored(
            key=group.prompt.key,
            rewards=rewards,
            total=tuple(
                math.fsum(weights[name] * rewards[name][index] for name in rewards) + self._overlong(length)
                for index, length in enumerate(lengths)
            ),
            lengths=lengths,
            sizes=tuple(len(group.prompt.tokens) + len(trajectory.tokens) for trajectory in group.trajectories),
            truncated=tuple(trajectory.finish_reason == "length" for trajectory in group.trajectories),
            oldest=min(steps),
            newest=max(steps),
        )

    def text(self, tokens: Sequence[int]) -> str:
        """What the ids say, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _overlong(self, length: int) -> float:
        reward = self._cfg.reward
        if not reward.overlong_buffer:
            return 0.0
        return overlong_penalty(length, self._cfg.rollout.max_tokens, reward.overlong_buffer, reward.overlong_penalty)

    async def _values(self, name: str, prompt: str, answers: list[str], row: Mapping[str, Any]) -> tuple[float, ...]:
        function, wanted = self._functions[name]
        try:
            given = await _call(function, wanted, prompt, answers, row)
        except Exception as problem:  # the user's code may raise anything
            rule = f"raised {type(problem).__name__} on row {dict(row)!r:.200}: {problem}"
            raise DataError(f"reward.functions.{name}", None, rule, "Mend it, or take such rows out") from problem
        values = tuple(float(value) for value in given)
        if len(values) != len(answers) or not all(map(math.isfinite, values)):
            rule = f"must give {len(answers)} finite numbers for {len(answers)} answers, and gave {list(given)!r:.100}"
            raise DataError(f"reward.functions.{name}", None, rule, "Return a number for each answer, also for a wrong one")
        return values


async def _call(
    function: Callable[..., Any], wanted: RewardFunction, prompt: str, answers: list[str], row: Mapping[str, Any]
) -> Sequence[Any]:
    """The function's values: an async one is awaited, a plain one runs in a thread, so that several groups are scored at once."""

    def start(given: str | list[str]) -> Awaitable[Any]:
        if inspect.iscoroutinefunction(function):
            return function(prompt, given, row)  # type: ignore[no-any-return]
        return asyncio.to_thread(function, prompt, given, row)

    if wanted.batch:
        return list(await start(answers))
    return await asyncio.gather(*(start(answer) for answer in answers))
