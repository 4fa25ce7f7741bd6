"""What an environment is: a conversation partner of the policy, one object for each answer; and how it is called, within a deadline.

    class Guess:
        def __init__(self, high=10): ...
        def reset(self, row, seed): return ()
        def step(self, text): return Observation([{"role": "user", "content": "higher"}])

Methods are plain or async. Plain ones run in a thread of their own environment, so none holds up an engine or another environment. A thread
whose call never returns cannot be ended; a process that has too many of them says so and is restarted, see `refuse_stuck`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat, TypeAlias

from rayft.data.chat import Message
from rayft.errors import InfrastructureError, RayftError

REWARD = "environment"
"""Name of the reward that environments give."""
MOST_STUCK = 32
"""Threads of this process that may be kept by calls of episodes that are over: each keeps its memory, and may keep a core busy."""

Reply: TypeAlias = Sequence[Message] | str
"""Chat messages, which the chat template renders, or a text that is read as it is, turn markup included."""


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn of the policy.

    Attributes:
        reply: what the policy reads next, before it writes again; unused when done.
        done: the answer is complete.
        reward: what the turn earned; an answer's is the sum over its turns.
    """

    reply: Reply = ()
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """One episode. Whatever it raises is a failure of the rollout, which is tried again, never a reward.

    It is made on the driver once too, so making one is cheap and starts nothing. It may have `tools`, a list of JSON schemas that prompts
    show, and a method `close`.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> Reply | Awaitable[Reply]:
        """Begin with the prompt's row: what follows the prompt before the policy writes, mostly nothing.

        The seed is the same for all answers to a prompt, which are compared and so must begin alike.
        """

    def step(self, text: str) -> Observation | Awaitable[Observation]:
        """Take what the policy wrote in this turn, without the token that ended it."""


MakeEnvironment: TypeAlias = Callable[[], Environment]


class EnvironmentFailed(RayftError):
    """An environment raised, gave no observation, or was too slow. Another try may succeed."""

    exit_code = 6
    kind = "environment"


class Episode:
    """An environment of one answer, called within a deadline.

    Args:
        make: makes the environment, in its thread, when it is reset.
        deadline_s: for each call.
        key: of the prompt, for messages.
    """

    def __init__(self, make: MakeEnvironment, deadline_s: float, key: str) -> None:
        self._make, self._deadline_s, self._key = make, deadline_s, key
        self._thread = ThreadPoolExecutor(1, "environment")
        self._calls: list[Future[Any]] = []
        self._environment: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> Reply:
        """See `Environment.reset`.

        Raises:
            EnvironmentFailed: it raised, or was too slow.
        """
        self._environment = await self._call(self._make)
        reply: Reply = await self._call(self._environment.reset, row, seed)
        return reply

    async def step(self, text: str) -> Observation:
        """See `Environment.step`.

        Raises:
            EnvironmentFailed: it raised, was too slow, or gave something else than an observation with a finite reward.
        """
        seen = await self._call(self._environment.step, text)
        if not isinstance(seen, Observation) or not isinstance(seen.reward, SupportsFloat) or not math.isfinite(seen.reward):
            raise self._failed(f"must answer with an Observation whose reward is a finite number, and gave {seen!r:.200}")
        return seen

    async def close(self) -> None:
        """Let the environment end what it holds; one that is stuck or fails at it is left alone."""
        environment, self._environment = self._environment, None
        if hasattr(environment, "close"):
            with suppress(EnvironmentFailed):
                await self._call(environment.close)
        self._thread.shutdown(wait=False, cancel_futures=True)
        _stuck.update(call for call in self._calls if call.running())

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                if inspect.iscoroutinefunction(function):
                    return await function(*arguments)
                self._calls.append(self._thread.submit(function, *arguments))
                return await asyncio.wrap_future(self._calls[-1])
        except Exception as problem:  # the user's code may raise anything
            name = getattr(function, "__name__", "making it")
            if limit.expired():
                if not inspect.iscoroutinefunction(function):
                    self._environment = None  # its thread may be busy for ever, so nothing more is asked of it
                raise self._failed(f"{name} took longer than environment.deadline_s = {self._deadline_s:g}") from problem
            raise self._failed(f"{name} raised {type(problem).__name__}: {problem}") from problem

    def _failed(self, rule: str) -> EnvironmentFailed:
        return EnvironmentFailed("environment", None, f"prompt {self._key}: {rule}", "The prompt is asked again; look into the cause")


_stuck: set[Future[Any]] = set()
"""Calls of episodes that are over, past their deadline or cancelled."""


def refuse_stuck() -> None:
    """Refuse to go on in a process with too many threads that environments keep.

    Raises:
        InfrastructureError: the process is to be restarted.
    """
    _stuck.intersection_update([call for call in _stuck if call.running()])
    if len(_stuck) >= MOST_STUCK:
        rule = f"{len(_stuck)} calls of episodes that are over have not returned, and each holds a thread of the engine"
        raise InfrastructureError("environment", None, rule, "The engine is restarted; give the environment's own waits a deadline")
