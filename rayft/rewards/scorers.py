"""Every kind of reward under one form of call: a group in, a number for each of its answers out."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from rayft.config.schema import RewardFunction
from rayft.data.prompts import ASKED
from rayft.errors import ConfigError
from rayft.rewards.http_judge import Judge

Message: TypeAlias = Mapping[str, Any]
Chat: TypeAlias = list[Message]


@dataclass(frozen=True)
class Answers:
    """What rewards see of a group.

    Attributes:
        prompt: its text.
        texts: of the n answers, without special tokens.
        tokens: that the policy wrote, of each answer.
        row: columns of the prompt.
    """

    prompt: str
    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]
    row: Mapping[str, Any]

    def asked(self) -> Chat:
        """The messages of the prompt; one of the user where it was no chat."""
        return list(self.row.get(ASKED) or [{"role": "user", "content": self.prompt}])


Scorer = Callable[[Answers], Awaitable[Sequence[Any]]]
"""Gives n values."""


def of_function(function: Callable[..., Any], wanted: RewardFunction) -> Scorer:
    """A user's function: an async one is awaited, a plain one runs in a thread, so that several groups are scored at once."""
    bound = partial(function, **wanted.arguments)

    def start(*given: Any, **named: Any) -> Awaitable[Any]:
        if inspect.iscoroutinefunction(function):
            return bound(*given, **named)  # type: ignore[no-any-return]
        return asyncio.to_thread(bound, *given, **named)

    async def score(answers: Answers) -> Sequence[Any]:
        if wanted.trl:
            return list(await start(**trl_arguments(answers)))
        if wanted.batch:
            return list(await start(answers.prompt, list(answers.texts), answers.row))
        return await asyncio.gather(*(start(answers.prompt, text, answers.row) for text in answers.texts))

    return score


def of_judge(judge: Judge) -> Scorer:
    """A judge, asked about all answers at once."""

    async def score(answers: Answers) -> Sequence[Any]:
        return await asyncio.gather(*(judge.reward(answers.prompt, text, answers.row) for text in answers.texts))

    return score


def of_model(model: Callable[[list[Chat]], Awaitable[Sequence[float]]]) -> Scorer:
    """A model that scores chats."""

    async def score(answers: Answers) -> Sequence[Any]:
        return await model([[*answers.asked(), {"role": "assistant", "content": text}] for text in answers.texts])

    return score


def trl_arguments(answers: Answers) -> dict[str, Any]:
    """What trl's trainer calls a reward function with, for a data set of chats: every column once for each answer."""
    count, own = len(answers.texts), ("prompts", "completions", "completion_ids", ASKED)
    return {name: [value] * count for name, value in answers.row.items() if name not in own} | {
        "prompts": [answers.asked()] * count,
        "completions": [[{"role": "assistant", "content": text}] for text in answers.texts],
        "completion_ids": [list(tokens) for tokens in answers.tokens],
    }


def check_arguments(field: str, function: Callable[..., Any], wanted: RewardFunction) -> None:
    """Refuse arguments that the function does not take.

    Raises:
        ConfigError: telling which.
    """
    given: tuple[Any, ...] = () if wanted.trl else ("", [] if wanted.batch else "", {})
    try:
        signature = inspect.signature(function)
        (signature.bind_partial if wanted.trl else signature.bind)(*given, **wanted.arguments)
    except TypeError as problem:
        takes = "(completions, **columns)" if wanted.trl else f"(prompt, {'completions' if wanted.batch else 'completion'}, row)"
        rule = f"cannot be called with {takes} and arguments {dict(wanted.arguments)}: {problem}"
        raise ConfigError(f"{field}.function", wanted.function, rule, "Correct the arguments, or the function") from problem
