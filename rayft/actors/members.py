"""Engines of the pool one by one: what is known of each, and the watch that starts it and sees whether it lives."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from rayft.actors.engine_actor import EngineState
from rayft.config.schema import Rollout
from rayft.errors import InfrastructureError, RayftError, ResourceError

log = logging.getLogger("rayft")

T = TypeVar("T")
LOOK_S, AGAIN_S = 1.0, 0.5
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


class Watches:
    """One task for each engine; to be used in the event loop.

    Args:
        rollout: deadlines.
        wake: called when an engine has come or gone.

    Attributes:
        problem: why the run cannot go on.
    """

    def __init__(self, rollout: Rollout, wake: Callable[[], None]) -> None:
        self._rollout, self._wake = rollout, wake
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.problem: RayftError | None = None

    def begin(self, member: Member) -> None:
        """Look after an engine, unless that is done already."""
        if member.name not in self._tasks:
            self._tasks[member.name] = task = asyncio.create_task(self._watch(member))
            task.add_done_callback(self._ended)

    def end(self, name: str) -> None:
        """Look after that engine no more, if it is looked after."""
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()

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
            # In the middle of a push it has none, and what it is asked waits. Whoever knew it before goes on with the version it had.
            version = state.version or (member.version if member.life == life else "")
            news = member.life != life or member.version != version
            member.life, member.version, member.failures = life, version, 0
            member.looks += 1
            member.idle += not state.load["running"] + state.load["waiting"]
            member.note(state.load)
            if news:
                self._wake()
            await asyncio.sleep(LOOK_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """That nobody looks after an engine any more ends the run, unless the engine leaves."""
        if not task.cancelled() and (problem := task.exception()) is not None:
            rule = f"one is looked after no more ({problem!r})"
            self.problem = InfrastructureError("rollout.engines", None, rule, "Report it; running the same command again resumes")
            self._wake()

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
