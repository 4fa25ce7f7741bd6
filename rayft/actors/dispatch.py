"""Asks engines for groups and judges for scores; whatever can go wrong comes out as one of two kinds.

InfrastructureError: a process died or was late, and another one may succeed. DataError: the row, or a reward on it, is at fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayft.actors.pool import Pool, within
from rayft.config.schema import GrpoRun
from rayft.errors import DataError, InfrastructureError
from rayft.rollout.agent import Sampling
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

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> Any:
        """Have a serving engine answer a prompt n times; a reference to the group.

        Raises:
            DataError: the row is at fault.
            InfrastructureError: the engine is, or it was too slow.
        """
        cfg = self._cfg.rollout
        sampling = Sampling(cfg.max_tokens, cfg.max_prompt_tokens + cfg.max_tokens, temperature, seed=self._cfg.run.seed)
        with self._pool.take() as member:
            life = member.life
            done, group = member.actor.rollout.options(num_returns=2).remote(prompt, n, sampling)
            try:
                await within(done, cfg.deadline_s)
            except TimeoutError as problem:
                ray.cancel(done)
                raise _passing(member.name, f"has not answered within {cfg.deadline_s:g} s") from problem
            except RayTaskError as problem:
                if isinstance(problem.cause, InfrastructureError):
                    self._pool.end(life, str(problem.cause))
                raise _own(problem, DataError) or _passing(member.name, f"failed ({problem.cause!r})") from problem
            except RayError as problem:
                member.life = member.version = ""  # no prompts until it has been looked at
                raise _passing(member.name, f"died ({type(problem).__name__})") from problem
        return group

    async def score(self, group: Any) -> Scored:
        """Have a process score a group.

        Raises:
            DataError: a reward raised, gave no number, or took too long.
        """
        judge, limit = next(self._judges), self._cfg.reward.deadline_s
        try:
            return await within(judge.score.remote(group), limit)
        except TimeoutError as problem:
            ray.kill(judge, no_restart=False)
            rule = f"the rewards of a group took longer than {limit:g} s"
            raise DataError("reward.deadline_s", limit, rule, "Raise it, or make the rewards faster") from problem
        except RayTaskError as problem:
            rule = f"scoring failed ({problem.cause!r})"
            raise _own(problem, DataError) or DataError("reward", None, rule, "Look into the reward functions") from problem
        except RayError as problem:
            rule = f"the process that rewards run in died ({type(problem).__name__})"
            raise DataError("reward", None, rule, "Look into the reward functions") from problem


def _own(problem: RayTaskError, kind: type[DataError]) -> DataError | None:
    """What the actor itself raised, when it is of that kind."""
    return problem.cause if isinstance(problem.cause, kind) else None


def _passing(name: str, what: str) -> InfrastructureError:
    return InfrastructureError(name, None, what, "The prompt is given to another engine")
