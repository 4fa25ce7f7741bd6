"""Reward models on Ray actors of their own, and the way to them from the processes of rewards.

The driver makes the actors, so that none dies with another. Ray restarts one that died, and it loads its model again, for which it has
rollout.start_s; what it was asked is asked of another one, or of itself once it is back, within the deadline of a group's rewards.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rayft.actors import placement
from rayft.config.environment import Credentials
from rayft.config.schema import GrpoRun, RewardModel
from rayft.errors import InfrastructureError, RayftError, ResourceError
from rayft.models.scoring import ChatScorer
from rayft.rewards.scorers import Chat

log = logging.getLogger("rayft")

SHARE = 0.9
"""Of reward.deadline_s that a group's scores may take; at its end the process that waits for them is replaced."""
AGAIN_S = 0.5
"""From one try to bring a replica back to the next."""
Names = Mapping[str, tuple[str, ...]]
"""Name of a reward -> names of its actors."""


class RewardModelActor:
    """A replica of a reward model. Small to construct; `start` does the work, and is called again after a restart.

    Args:
        wanted: the model.
        secrets: of the driver, for models on a hub or store.
    """

    def __init__(self, wanted: RewardModel, secrets: Credentials) -> None:
        secrets.adopt()
        self._wanted = wanted
        self._scorer: ChatScorer | None = None
        self._starting, self._busy = asyncio.Lock(), asyncio.Lock()

    async def start(self) -> None:
        """Load the model unless it is there."""
        async with self._starting:
            if self._scorer is None:
                self._scorer = await asyncio.to_thread(ChatScorer, self._wanted, "cuda" if self._wanted.gpus else "cpu")

    async def score(self, chats: list[Chat]) -> list[float] | None:
        """See `ChatScorer.score`; one request at a time. None at once while the model is not loaded."""
        if self._scorer is None:
            return None
        async with self._busy:
            return await asyncio.to_thread(self._scorer.score, chats)


class Replicas:
    """The replicas of one model, as a process of rewards sees them; calling it scores chats.

    Args:
        names: of the actors.
        deadline_s: reward.deadline_s.
        start_s: rollout.start_s; a replica that has not loaded its model by then is restarted.
    """

    def __init__(self, names: Sequence[str], deadline_s: float, start_s: float) -> None:
        self._actors = {name: ray.get_actor(name) for name in names}
        self._open = dict.fromkeys(names, 0)
        self._away: dict[str, asyncio.Task[None]] = {}  # replicas that are to load their model again -> the task that sees to it
        self._deadline_s, self._start_s = SHARE * deadline_s, start_s

    async def loaded(self) -> None:
        """Wait until one is loaded, as far as is known here."""
        while len(self._away) == len(self._actors):
            await asyncio.wait(self._away.values(), return_when=asyncio.FIRST_COMPLETED)

    async def __call__(self, chats: list[Chat]) -> list[float]:
        """The score of each chat, from the loaded replica with the fewest questions; from another one when that dies.

        Raises:
            InfrastructureError: none has answered in time. One that is loaded and was asked last is replaced.
            RayftError: what the model itself raised.
        """
        until = time.monotonic() + self._deadline_s
        while (left_s := until - time.monotonic()) > 0:
            if not (there := [name for name in self._open if name not in self._away]):
                await asyncio.wait(self._away.values(), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                continue
            name = min(there, key=self._open.__getitem__)
            self._open[name] += 1
            try:
                async with asyncio.timeout(left_s):
                    scores = await self._actors[name].score.remote(chats)
                if scores is not None:
                    return list(scores)
                self._bring_back(name)
            except RayTaskError as problem:
                raise (problem.cause if isinstance(problem.cause, RayftError) else problem) from problem
            except TimeoutError:
                ray.kill(self._actors[name], no_restart=False)
                self._bring_back(name)
            except RayError as problem:
                log.warning("%s died (%s); its chats are scored again", name, type(problem).__name__)
                self._bring_back(name)
            finally:
                self._open[name] -= 1
        rule = f"has not scored {len(chats)} chats within {self._deadline_s:g} s"
        raise InfrastructureError("reward model", ", ".join(self._open), rule, "Raise reward.deadline_s, or add replicas")

    def _bring_back(self, name: str) -> None:
        """Ask nothing of a replica until it has loaded its model."""
        if name not in self._away:
            self._away[name] = asyncio.create_task(self._load(name))

    async def _load(self, name: str) -> None:
        """Have a replica load its model, however often it takes; it is ended only when that takes longer than rollout.start_s."""
        while True:
            try:
                async with asyncio.timeout(self._start_s):
                    await self._actors[name].start.remote()
                del self._away[name]
                return
            except RayTaskError as problem:
                log.warning("%s has not loaded its model: %s", name, problem.cause)
            except TimeoutError:
                log.warning("%s has not loaded its model within %g s and is restarted", name, self._start_s)
                ray.kill(self._actors[name], no_restart=False)
            except RayError:
                log.debug("%s is not back yet", name)
            await asyncio.sleep(AGAIN_S)


@contextmanager
def open_models(cfg: GrpoRun, driver: str, device_type: str, options: Mapping[str, Any], secrets: Credentials) -> Iterator[Names]:
    """Make the actors of every reward model of the run, wait until the models are loaded, and end them with the block.

    Args:
        cfg: the run.
        driver: names the command.
        device_type: "cpu" or "cuda", of the trainer and its engines.
        options: of every actor.
        secrets: of the driver.

    Raises:
        ResourceError: the cluster has no room for them beside the rest of the run, one died, or they take longer than rollout.start_s.
        RayftError: a model cannot be loaded.
    """
    wanted = {name: one.model for name, one in cfg.reward.functions.items() if one.model is not None}
    if not cfg.parallel.autoscaling:
        check_room(cfg, device_type, ray.cluster_resources())
    names = {name: tuple(f"{driver}-reward-{name}-{number}" for number in range(model.replicas)) for name, model in wanted.items()}
    with ExitStack() as made:
        starting = []
        for name, model in wanted.items():
            for actor in names[name]:
                chosen = {"name": actor, "num_gpus": model.gpus, "num_cpus": 0 if model.gpus else 1, **options}
                handle = ray.remote(RewardModelActor).options(**chosen).remote(_absolute(model), secrets)
                made.callback(ray.kill, handle)
                starting.append(handle.start.remote())
        try:
            ray.get(starting, timeout=cfg.rollout.start_s)
        except RayTaskError as problem:
            raise (problem.cause if isinstance(problem.cause, RayftError) else problem) from problem
        except GetTimeoutError as problem:
            rule = f"reward models were not loaded within {cfg.rollout.start_s:g} s"
            raise ResourceError(
                "rollout.start_s", cfg.rollout.start_s, rule, "Raise it, or look for the room that they wait for"
            ) from problem
        except RayError as problem:
            rule = f"died while it was loaded ({type(problem).__name__})"
            remedy = "Look into its lines above; often its machine has too little memory"
            raise ResourceError("reward model", ", ".join(wanted), rule, remedy) from problem
        yield names


def check_room(cfg: GrpoRun, device_type: str, resources: Mapping[str, float]) -> None:
    """Refuse models that the cluster can never place beside trainer and engines.

    Args:
        cfg: the run.
        device_type: "cpu" or "cuda".
        resources: totals as `ray.cluster_resources()` gives them.

    Raises:
        ResourceError: telling what is missing.
    """
    taken, gpu = {"GPU": 0.0, "CPU": 0.0}, device_type == "cuda"
    for kind, amount in placement.worker_resources(cfg.parallel, device_type).items():
        taken[kind] += cfg.parallel.workers * amount
    if not gpu or cfg.placement.mode == "separate":
        taken["GPU" if gpu else "CPU"] += cfg.rollout.engines * (cfg.rollout.tensor_parallel if gpu else 1)
    for name, one in cfg.reward.functions.items():
        if one.model is None:
            continue
        kind = "GPU" if one.model.gpus else "CPU"
        taken[kind] += one.model.replicas * (one.model.gpus or 1)
        if taken[kind] > resources.get(kind, 0):
            rule = f"brings the run to {taken[kind]:g} {kind}s, the cluster has {resources.get(kind, 0):g}"
            field = f"reward.functions.{name}.model.{'gpus' if one.model.gpus else 'replicas'}"
            value = one.model.gpus or one.model.replicas
            raise ResourceError(field, value, rule, f"Use a smaller share or fewer replicas{', or 0 for CPUs' if one.model.gpus else ''}")


def _absolute(model: RewardModel) -> RewardModel:
    """Actors start in another folder."""
    path = Path(model.path).expanduser()
    return model.model_copy(update={"path": str(path.absolute())}) if path.is_dir() else model
