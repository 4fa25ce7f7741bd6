"""Asks engines for groups and judges for scores; whatever can go wrong comes out as one of three kinds.

InfrastructureError: a process died, was late or could not be reached, and another try may succeed. EnvironmentFailed: the engine is well,
and another try may succeed. DataError: the row, or a reward on it, is at fault.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from rayft.actors.members import AGAIN_S, Member, within
from rayft.actors.pool import Pool
from rayft.config.schema import GrpoRun
from rayft.errors import DataError, InfrastructureError, RayftError
from rayft.rollout.agent import Sampling
from rayft.rollout.env import EnvironmentFailed
from rayft.types import Prompt, Scored


class Dispatch:
    """See the module.

    Args:
        cfg: the run.
        pool: of engines.
        judges: names of the actors that score.
    """

    def __init__(self, cfg: GrpoRun, pool: Pool, judges: Sequence[str]) -> None:
        self._cfg, self._pool = cfg, pool
        self._judges = itertools.cycle([ray.get_actor(name) for name in judges])
        self._models = any(function.model is not None for function in cfg.reward.functions.values())

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        """Have a serving engine answer a prompt n times; the engine's name, and a reference to the group.

        Raises:
            DataError: the row is at fault.
            EnvironmentFailed: its environment is.
            InfrastructureError: the engine is, or it was too slow.
        """
        cfg = self._cfg.rollout
        sampling = Sampling(cfg.max_tokens, cfg.max_prompt_tokens + cfg.max_tokens, temperature, seed=self._cfg.run.seed)
        async with self._pool.take(n * (len(prompt.tokens) + cfg.max_tokens)) as member:
            life = member.life
            done, group = member.actor.rollout.options(num_returns=2).remote(prompt, n, sampling)
            try:
                await within(done, cfg.deadline_s)
            except TimeoutError as problem:
                ray.cancel(done)
                raise _passing(member.name, f"has not answered within {cfg.deadline_s:g} s") from problem
            except RayTaskError as problem:
                if isinstance(problem.cause, InfrastructureError):
                    await self._examine(member, life)
                raise _own(problem, DataError, EnvironmentFailed) or _passing(member.name, f"failed ({problem.cause!r})") from problem
            except RayError as problem:
                if member.life == life:
                    member.life = member.version = ""  # no prompts until it has been looked at
                raise _passing(member.name, f"died ({type(problem).__name__})") from problem
        return member.name, group

    async def _examine(self, member: Member, life: str) -> None:
        """Look at an engine of which a request failed, and end it only if it is broken itself."""
        limit = self._cfg.rollout.health_s
        try:
            await within(member.actor.state.remote(), limit)
        except RayTaskError as problem:
            self._pool.end(life, str(problem.cause))
        except TimeoutError:
            self._pool.end(life, f"it has not said how it is within {limit:g} s")
        except RayError:
            if member.life == life:
                member.life = member.version = ""  # Ray restarts it

    async def score(self, group: Any) -> Scored:
        """Have a process score a group.

        Raises:
            DataError: a reward raised, gave no number, or took too long.
            InfrastructureError: the group is lost, with the process or node that held it; or a judge or a reward model could not be asked.
        """
        judge, limit = next(self._judges), self._cfg.reward.deadline_s
        try:
            if self._models:
                await self._models_loaded(judge)
            return await within(judge.score.remote(group), limit)
        except TimeoutError as problem:
            ray.kill(judge, no_restart=False)
            await _until_back(judge, limit)
            rule = f"the rewards of a group took longer than {limit:g} s"
            raise DataError("reward.deadline_s", limit, rule, "Raise it, or make the rewards faster") from problem
        except ObjectLostError as problem:
            raise _lost(problem) from problem
        except RayTaskError as problem:
            if isinstance(problem.cause, ObjectLostError):
                raise _lost(problem.cause) from problem
            other = DataError("reward", None, f"scoring failed ({problem.cause!r})", "Look into the reward functions")
            raise _own(problem, DataError, InfrastructureError) or other from problem
        except RayError as problem:
            await _until_back(judge, limit)
            rule = f"the process that rewards run in died ({type(problem).__name__})"
            raise DataError("reward", None, rule, "Look into the reward functions") from problem

    async def _models_loaded(self, judge: Any) -> None:
        """Wait until every reward model has a replica that is loaded: no group's deadline begins before."""
        limit = self._cfg.rollout.start_s
        try:
            await within(judge.models_loaded.remote(), limit)
        except TimeoutError as problem:
            rule = f"a reward model was not loaded again within {limit:g} s"
            raise InfrastructureError("rollout.start_s", limit, rule, "Raise it, or look into its lines above") from problem


async def _until_back(judge: Any, seconds: float) -> None:
    """Wait for a judge that Ray restarts, at most so long: further tries would be over before it is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            await within(judge.__ray_ready__.remote(), seconds)
            return
        except (RayError, TimeoutError):
            await asyncio.sleep(AGAIN_S)


def _own(problem: RayTaskError, *kinds: type[RayftError]) -> RayftError | None:
    """What the actor itself raised, when it is of one of these kinds."""
    return problem.cause if isinstance(problem.cause, kinds) else None


def _lost(problem: ObjectLostError) -> InfrastructureError:
    return InfrastructureError("a group", None, f"was lost before it was scored ({type(problem).__name__})", "It is asked for again")


def _passing(name: str, what: str) -> InfrastructureError:
    return InfrastructureError(name, None, what, "The prompt is given to another engine")
