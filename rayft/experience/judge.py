"""From a group to its rewards: what the run's functions, judges and models say, and what makes a total of it."""

from __future__ import annotations

import asyncio
import itertools
import math
import operator
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rayft.config.functions import UserFunction, load_function, resolve
from rayft.config.schema import GrpoRun
from rayft.errors import DataError, InfrastructureError
from rayft.experience.advantages import overlong_penalty
from rayft.experience.critic import CRITIC, advantages_of, critic_function
from rayft.experience.pack import step_of
from rayft.models.tokenizer import load_tokenizer
from rayft.rewards import http_judge, scorers
from rayft.rewards.scorers import Answers, Chat, Scorer
from rayft.types import Group, Scored, Trajectory

READY = "rayft.rewards.{0}:reward"
"""Where a reward is that is named without a colon."""
Models = Mapping[str, Callable[[list[Chat]], Awaitable[Sequence[float]]]]
"""Name of a reward -> what scores chats for it."""


def reward_functions(cfg: GrpoRun) -> dict[str, UserFunction]:
    """The run's reward functions by name, and its critic, after a look at whether they, and its judges, can be called as the run says.

    Raises:
        ConfigError: one does not exist, cannot be loaded, does not take its arguments, or cannot run on this machine.
    """
    found = {}
    for name, wanted in cfg.reward.functions.items():
        field = f"reward.functions.{name}"
        if wanted.judge is not None:
            http_judge.Judge(f"{field}.judge", wanted.judge, cfg.reward.deadline_s)
        if (spec := wanted.function) is None:
            continue
        found[name] = resolve(spec if ":" in spec else READY.format(spec))
        function = load_function(found[name])
        scorers.check_arguments(field, function, wanted)
        if ":" not in spec and (check := getattr(sys.modules[function.__module__], "check", None)) is not None:
            check(wanted.arguments)
    if cfg.algorithm.values is not None:
        found[CRITIC] = critic_function(cfg.algorithm.values)
    return found


class Judge:
    """Scores groups. What a function raises, and a value that is not a finite number, is an error, never a zero.

    Args:
        cfg: the run.
        functions: of `reward_functions`.
        models: of every reward that has one.
    """

    def __init__(self, cfg: GrpoRun, functions: Mapping[str, UserFunction], models: Models | None = None) -> None:
        self._cfg, self._tokenizer = cfg, load_tokenizer(cfg.model)
        self._critic = load_function(functions[CRITIC]) if cfg.algorithm.values is not None else None
        self._scorers: dict[str, Scorer] = {}
        for name, wanted in cfg.reward.functions.items():
            if wanted.judge is not None:
                judge = http_judge.Judge(f"reward.functions.{name}.judge", wanted.judge, cfg.reward.deadline_s)
                self._scorers[name] = scorers.of_judge(judge)
            elif wanted.model is not None:
                self._scorers[name] = scorers.of_model((models or {})[name])
            else:
                self._scorers[name] = scorers.of_function(load_function(functions[name]), wanted)

    async def score(self, group: Group) -> Scored:
        """The rewards of a group's answers, and with a critic the advantages of their tokens.

        Raises:
            DataError: a reward or a value could not be given.
            InfrastructureError: a judge or a reward model could not be asked, which is no fault of the row.
        """
        answers = Answers(
            prompt=self.text(group.prompt.tokens),
            texts=[self._answer(trajectory) for trajectory in group.trajectories],
            tokens=[list(itertools.compress(trajectory.tokens, trajectory.by_policy)) for trajectory in group.trajectories],
            row=group.prompt.row,
        )
        values = await asyncio.gather(*(self._values(name, answers) for name in self._scorers))
        rewards = dict(zip(self._scorers, values, strict=True))
        weights = {name: function.weight for name, function in self._cfg.reward.functions.items()}
        for name in sorted({name for trajectory in group.trajectories for name in trajectory.rewards}):
            rewards[name] = tuple(trajectory.rewards.get(name, 0.0) for trajectory in group.trajectories)
            weights[name] = self._cfg.environment.weight
        lengths = tuple(sum(trajectory.by_policy) for trajectory in group.trajectories)
        steps = [step_of(version) for trajectory in group.trajectories for version, _, _ in trajectory.versions]
        total = tuple(
            math.fsum(weights[name] * rewards[name][index] for name in rewards) + self._overlong(length)
            for index, length in enumerate(lengths)
        )
        critic = self._critic
        return Scored(
            key=group.prompt.key,
            rewards=rewards,
            total=total,
            lengths=lengths,
            sizes=tuple(len(group.prompt.tokens) + len(trajectory.tokens) for trajectory in group.trajectories),
            truncated=tuple(trajectory.finish_reason == "length" for trajectory in group.trajectories),
            turns=tuple(trajectory.turns for trajectory in group.trajectories),
            oldest=min(steps),
            newest=max(steps),
            advantages=await advantages_of(critic, group, total, self._cfg.algorithm) if critic is not None else (),
        )

    def text(self, tokens: Sequence[int]) -> str:
        """What the ids say, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _answer(self, trajectory: Trajectory) -> str:
        """What the policy wrote, a line for each turn; what it read is no part of its answer."""
        turns = itertools.groupby(zip(trajectory.by_policy, trajectory.tokens, strict=True), key=operator.itemgetter(0))
        return "\n".join(self.text([token for _, token in turn]) for own, turn in turns if own)

    def _overlong(self, length: int) -> float:
        reward = self._cfg.reward
        if not reward.overlong_buffer:
            return 0.0
        return overlong_penalty(length, self._cfg.rollout.max_tokens, reward.overlong_buffer, reward.overlong_penalty)

    async def _values(self, name: str, answers: Answers) -> tuple[float, ...]:
        field, count = f"reward.functions.{name}", len(answers.texts)
        try:
            given = await self._scorers[name](answers)
        except InfrastructureError:
            raise
        except Exception as problem:  # the user's code may raise anything
            rule = f"raised {type(problem).__name__} on row {dict(answers.row)!r:.200}: {problem}"
            raise DataError(field, None, rule, "Mend it, or take such rows out") from problem
        values = tuple(math.nan if value is None else float(value) for value in given)
        if len(values) != count or not all(map(math.isfinite, values)):
            rule = f"must give {count} finite numbers for {count} answers, and gave {list(given)!r:.100}"
            raise DataError(field, None, rule, "Return a number for each answer, also for a wrong one")
        return values
