"""The engines as the controller sees them: who lives, who has which weights, who gets the next prompt.

An engine that died, or did not answer in time, is restarted by Ray. It serves again only after a push has brought it to the current
weights.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from rayft.actors.engine_actor import EngineState
from rayft.config.schema import Rollout
from rayft.errors import InfrastructureError, ResourceError

log = logging.getLogger("rayft")

T = TypeVar("T")
LOOK_S, AGAIN_S, FREE_S = 1.0, 0.5, 0.02
ROOMY = 0.9
"""Share of a key-value cache below which it takes another group."""
START_TRIES = 3


@dataclass
class Member:
    """An engine of the pool.

    Attributes:
        name: of its actor.
        actor: its handle.
        life: of its process; empty while it is not up.
        version: of its weights.
        running, tokens: groups that it was given, and most tokens that they can come to.
        allowed: groups that it may have at once: all, until it has to take memory from one that is under way.
        looks, idle: times that it was looked at, and found with nothing to do, since the last figures.
        kv_use: most of its key-value cache that was seen in use since then.
        preemptions: since its start.
        failures: starts that went wrong in a row.
    """

    name: str
    actor: Any
    life: str = ""
    version: str = ""
    running: int = 0
    tokens: int = 0
    allowed: float = math.inf
    looks: int = 0
    idle: int = 0
    kv_use: float = 0.0
    preemptions: float = 0.0
    failures: int = 0

    def note(self, load: Mapping[str, float]) -> None:
        """Take in what an engine says of its cache: half as many groups after a preemption, one more while there is room."""
        if load["preemptions"] > self.preemptions:
            self.allowed = max(1, self.running // 2)
        elif load["kv_use"] < ROOMY:
            self.allowed += 1
        self.kv_use, self.preemptions = max(self.kv_use, load["kv_use"]), load["preemptions"]


class Pool:
    """See the module.

    Args:
        names: of the actors.
        rollout: deadlines.
        wake: called when an engine has come or gone.

    Attributes:
        current: version that an engine must have to serve.
        problem: why no engine will ever come up.
    """

    def __init__(self, names: Sequence[str], rollout: Rollout, wake: Callable[[], None]) -> None:
        self._members = [Member(name, ray.get_actor(name)) for name in names]
        self._rollout, self._wake = rollout, wake
        self._watches: list[asyncio.Task[None]] = []
        self.current = ""
        self.problem: ResourceError | None = None

    def watch(self) -> None:
        """Begin to look after the engines; to be called in the event loop."""
        if not self._watches:
            self._watches = [asyncio.create_task(self._watch(member)) for member in self._members]

    def serving(self) -> list[Member]:
        """Those that may be given prompts."""
        return [member for member in self._members if member.life and member.version == self.current]

    def behind(self, version: str) -> list[Member]:
        """Those that are up and have other weights."""
        return [member for member in self._members if member.life and member.version != version]

    @asynccontextmanager
    async def take(self, tokens: int) -> AsyncIterator[Member]:
        """The serving engine with the fewest tokens ahead of it, of those that may have another group; once there is one.

        Args:
            tokens: most that the group can come to.

        Raises:
            InfrastructureError: none serves, or none had room within rollout.deadline_s.
        """
        until, remedy = time.monotonic() + self._rollout.deadline_s, "They come back by themselves"
        while not (free := [member for member in self.serving() if member.running < member.allowed]):
            if not self.serving():
                raise InfrastructureError("rollout.engines", None, "no engine serves the current weights", remedy)
            if time.monotonic() > until:
                rule = f"no engine had room for another group within {self._rollout.deadline_s:g} s"
                raise InfrastructureError("rollout.engines", None, rule, remedy)
            await asyncio.sleep(FREE_S)
        member = min(free, key=lambda one: one.tokens)
        member.running, member.tokens = member.running + 1, member.tokens + tokens
        try:
            yield member
        finally:
            member.running, member.tokens = member.running - 1, member.tokens - tokens

    def has(self, lives: Sequence[str], version: str) -> None:
        """These engines were brought to that version, and no other one serves."""
        self.current = version
        for member in self._members:
            if member.life in lives:
                member.version = version

    def end(self, life: str, reason: str) -> None:
        """End an engine whose weights are undefined; it comes back."""
        for member in self._members:
            if member.life == life:
                log.warning("%s is restarted: %s", member.name, reason)
                member.life = member.version = ""
                ray.kill(member.actor, no_restart=False)

    def figures(self) -> dict[str, float]:
        """Metrics since the last call."""
        looks, idle = sum(member.looks for member in self._members), sum(member.idle for member in self._members)
        kv_use, preemptions = max(member.kv_use for member in self._members), sum(member.preemptions for member in self._members)
        for member in self._members:
            member.looks, member.idle, member.kv_use = 0, 0, 0.0
        return {
            "rollout/engines": float(len(self.serving())),
            "rollout/idle": idle / max(looks, 1),
            "rollout/kv_use": kv_use,
            "rollout/preemptions": preemptions,
        }

    def in_words(self) -> str:
        """How each engine is."""
        return "; ".join(
            f"{member.name} {f'has {member.version or None} and {member.running} groups' if member.life else 'is starting'}"
            for member in self._members
        )

    async def _watch(self, member: Member) -> None:
        """Start the engine, look at it again and again, and begin anew when it is gone."""
        while self.problem is None:
            try:
                await self._look_after(member)
            except TimeoutError:
                log.warning("%s did not answer in time and is restarted", member.name)
                ray.kill(member.actor, no_restart=False)
            except RayTaskError as problem:
                self._note_failure(member, problem.cause)
            except RayError as problem:
                log.warning("%s is gone (%s); Ray restarts it", member.name, type(problem).__name__)
            member.life = member.version = ""
            self._wake()
            await asyncio.sleep(AGAIN_S)

    async def _look_after(self, member: Member) -> None:
        life = await within(member.actor.start.remote(), self._rollout.start_s)
        while True:
            state: EngineState = await within(member.actor.state.remote(), self._rollout.health_s)
            if state.life != life:
                return
            if member.life != life:
                member.allowed, member.preemptions = math.inf, 0.0
            news = member.life != life or member.version != state.version
            member.life, member.version, member.failures = life, state.version, 0
            member.looks += 1
            member.idle += not state.load["running"] + state.load["waiting"]
            member.note(state.load)
            if news:
                self._wake()
            await asyncio.sleep(LOOK_S)

    def _note_failure(self, member: Member, cause: BaseException) -> None:
        member.failures += 1
        log.warning("%s failed: %s", member.name, cause)
        if member.failures >= START_TRIES:
            rule = f"{member.name} failed {START_TRIES} times in a row: {cause}"
            self.problem = ResourceError("rollout.engine", self._rollout.engine, rule, "Look into the cause, then run the command again")
        ray.kill(member.actor, no_restart=False)


async def within(answer: Awaitable[T], seconds: float) -> T:
    """The answer of an actor.

    Raises:
        TimeoutError: there was none in time.
    """

    async def wait() -> T:
        return await answer

    return await asyncio.wait_for(wait(), seconds)
