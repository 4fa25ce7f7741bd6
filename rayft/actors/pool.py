"""The engines as the controller sees them: who lives, who has which weights, who gets the next prompt.

An engine that died, or did not answer in time, is restarted by Ray. It serves again only after a push has brought it to the current
weights. So does one that joins in the middle of a run. One that is to leave gets no more groups and no more weights, and its groups finish.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

import ray

from rayft.actors.members import Member, Watches
from rayft.config.schema import Rollout
from rayft.errors import InfrastructureError

log = logging.getLogger("rayft")

FREE_S = 0.02


class Pool:
    """See the module.

    Args:
        names: of the actors.
        rollout: deadlines.
        wake: called when an engine has come or gone.

    Attributes:
        current: version that an engine must have to serve.
        watches: that look after them.
    """

    def __init__(self, names: Sequence[str], rollout: Rollout, wake: Callable[[], None]) -> None:
        self._members = [Member(name, ray.get_actor(name)) for name in names]
        self._leaving: list[Member] = []
        self.watches = Watches(rollout, wake)
        self.current = ""

    def watch(self) -> None:
        """Begin to look after the engines that nobody looks after yet; to be called in the event loop."""
        for member in self._members:
            self.watches.begin(member)

    def idlest(self) -> tuple[str, ...]:
        """All engines, those first that the pool would miss least: with the fewest tokens ahead, not up before up, the newest first."""
        newest_first = reversed(self._members)
        return tuple(member.name for member in sorted(newest_first, key=lambda one: (one.tokens, bool(one.life))))

    def change(self, join: Sequence[str], leave: Sequence[str], pushing: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Take in engines, and give others no more groups and no more weights. May be asked again.

        Args:
            join: names of engines, of which some may be in.
            leave: likewise, of which some may be gone.
            pushing: lives of engines that a push is under way to.

        Returns:
            The names of all that are in; and of those that are to leave and cannot yet: they have groups, or are in the push.
        """
        known = {member.name for member in self._members}
        self._members += [Member(name, ray.get_actor(name)) for name in join if name not in known]
        self._leaving += [member for member in self._members if member.name in leave]
        self._leaving = [member for member in self._leaving if member.running or member.life in pushing]
        self._members = [member for member in self._members if member.name not in leave]
        for name in leave:
            self.watches.end(name)
        return tuple(member.name for member in self._members), tuple(member.name for member in self._leaving if member.name in leave)

    def serving(self) -> list[Member]:
        """Those that may be given prompts."""
        return [member for member in self._members if member.life and member.version == self.current]

    def behind(self, version: str) -> list[Member]:
        """Those that are up and have other weights."""
        return [member for member in self._members if member.life and member.version != version]

    @asynccontextmanager
    async def take(self, tokens: int) -> AsyncIterator[Member]:
        """The serving engine with the fewest tokens ahead of it, of those that may have another group; once there is one.

        Waiting for room is no failure, and it ends: every group that is in the way has a deadline.

        Args:
            tokens: most that the group can come to.

        Raises:
            InfrastructureError: none serves.
        """
        while not (free := [member for member in self.serving() if member.running < member.allowed]):
            if not self.serving():
                rule = "no engine serves the current weights"
                raise InfrastructureError("rollout.engines", None, rule, "They come back by themselves")
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
