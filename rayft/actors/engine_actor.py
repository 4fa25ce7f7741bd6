"""An engine of the pool, and a process of rewards, as Ray actors. They hold nothing that a restart could not bring back.

Ray restarts both by itself. An engine begins without a valid version: it is given prompts only after the trainer has brought it to the
current weights. A group is a method's return value, owned by the caller, so it outlives the engine.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayft.actors.reward_model import Names, Replicas
from rayft.config.environment import Credentials
from rayft.config.functions import UserFunction
from rayft.config.schema import GrpoRun
from rayft.errors import InfrastructureError
from rayft.experience.judge import Judge
from rayft.rollout.agent import Sampling, rollout
from rayft.rollout.engine import EngineOptions, create_engine
from rayft.rollout.env import refuse_stuck
from rayft.rollout.stage import Scene, Stage, stage_of
from rayft.types import Engine, Group, Prompt, Scored


@dataclass(frozen=True)
class EngineState:
    """What an engine says of itself.

    Attributes:
        life: names this process; another one after a restart.
        version: of its weights.
        load: of `types.Engine.load`.
    """

    life: str
    version: str
    load: Mapping[str, float]


class EngineActor:
    """One engine. Small to construct; `start` does the work, and is called again after a restart.

    Args:
        options: of the engine.
        secrets: of the driver, for models on a hub or store.
        cfg, scene: the run and its environment, which answers are played in.
    """

    def __init__(self, options: EngineOptions, secrets: Credentials, cfg: GrpoRun, scene: Scene | None) -> None:
        secrets.adopt()
        self._options, self._life = options, uuid.uuid4().hex[:8]
        self._cfg, self._scene = cfg, scene
        self._stage: Stage | None = None
        self._engine: Engine | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> str:
        """Start the engine unless it runs; the name of this life."""
        async with self._starting:
            if self._engine is None:
                self._stage = stage_of(self._cfg, self._scene) if self._scene is not None else None
                self._engine = await create_engine(self._options)
        return self._life

    async def state(self) -> EngineState:
        """How it is.

        Raises:
            InfrastructureError: it is to be restarted: the engine died, or environments keep too many of its threads.
        """
        if self._engine is None:
            return EngineState(self._life, "", {})
        refuse_stuck()
        return EngineState(self._life, await self._engine.version(), await self._engine.load())

    async def rollout(self, prompt: Prompt, n: int, sampling: Sampling) -> tuple[str, Group]:
        """A group of answers; with it, small enough to be waited for, the name of this life."""
        return self._life, await rollout(self._started(), prompt, n, sampling, self._stage)

    async def pause(self) -> None:
        """See `types.Engine`."""
        await self._started().pause()

    async def resume(self) -> None:
        """See `types.Engine`."""
        await self._started().resume()

    async def receive(self, version: str, push: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """See `types.Engine`."""
        return await self._started().receive(version, push)

    def _started(self) -> Engine:
        if self._engine is None:
            raise InfrastructureError("rollout engine", self._life, "was restarted and has not started yet", "It is started by itself")
        return self._engine


class RewardActor:
    """A process that rewards run in.

    Args:
        cfg: the run.
        functions: its reward functions.
        secrets: of the driver.
        models: names of the actors of its reward models.
    """

    def __init__(self, cfg: GrpoRun, functions: Mapping[str, UserFunction], secrets: Credentials, models: Names) -> None:
        secrets.adopt()
        self._models = {name: Replicas(actors, cfg.reward.deadline_s, cfg.rollout.start_s) for name, actors in models.items()}
        self._judge = Judge(cfg, functions, self._models)

    async def models_loaded(self) -> None:
        """Wait until every reward model has a replica that is loaded."""
        await asyncio.gather(*(model.loaded() for model in self._models.values()))

    async def score(self, group: Group) -> Scored:
        """See `Judge.score`."""
        return await self._judge.score(group)
