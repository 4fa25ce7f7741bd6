"""Runs a worker function in Ray Train workers, or here, and starts it again when a process of it dies.

One retry loop covers all that can die: a worker, Ray Train's controller (which Ray's own FailureConfig does not cover) and its
synchronisation actor. Each attempt resumes from the newest committed checkpoint. What the run itself did wrong is not retried.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from rayft.checkpoint import resume
from rayft.config.functions import FILE_MODULE
from rayft.errors import InfrastructureError, RayftError
from rayft.types import Launch

log = logging.getLogger("rayft")

Worker = Callable[[Launch], Any]

RAY_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Every attempt starts without: Ray refuses to start when a listed one is gone, and it may be,
because a local run pruned it or the user deleted it to resume from an older one."""


def fit(worker: Worker, launch: Launch) -> None:
    """Run `worker(launch)` on every rank until it returns.

    Raises:
        RayftError: what a worker raised, unchanged.
        InfrastructureError: processes died more often than run.max_failures.
    """
    if launch.local:
        worker(_next_attempt(launch))
        return
    import ray.exceptions
    from ray.train.v2.api.exceptions import TrainingFailedError

    allowed = launch.cfg.run.max_failures
    for failures in range(allowed + 1):
        launch = _next_attempt(launch)
        (resume.checkpoints_dir(launch.run_dir) / RAY_RECORD).unlink(missing_ok=True)
        try:
            _trainer(worker, launch).fit()
            return
        except TrainingFailedError as failure:
            _raise_own(failure)
            death = _first_line(failure)
        except ray.exceptions.RayActorError as failure:
            death = f"Ray Train's controller died ({_first_line(failure)})"
        log.warning("attempt %d died: %s", launch.attempt, death)
        if failures < allowed:
            log.warning("starting again from the newest checkpoint (restart %d of %d)", failures + 1, allowed)
    raise InfrastructureError(
        "run.max_failures",
        allowed,
        f"the run died once more than that; the last cause was: {death}",
        "Look into the cause, then run the same command again to resume",
    )


def _trainer(worker: Worker, launch: Launch) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from rayft.actors.placement import worker_resources
    from rayft.config.environment import worker_environment

    _ship_code(worker)
    cfg, gpu = launch.cfg, launch.device_type == "cuda"
    return TorchTrainer(
        functools.partial(worker, launch),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(cfg.run.deadline_s)),
        scaling_config=ScalingConfig(
            num_workers=cfg.parallel.workers, use_gpu=gpu, resources_per_worker=worker_resources(cfg.parallel, launch.device_type)
        ),
        run_config=RunConfig(
            name=resume.checkpoints_dir(launch.run_dir).name,
            storage_path=str(launch.run_dir),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
    )


def _ship_code(worker: Worker) -> None:
    """A worker of the user's own recipe file travels with its code: no other process can import that module by name."""
    import ray.cloudpickle

    module = sys.modules[worker.__module__]
    if module.__name__.startswith(FILE_MODULE):
        ray.cloudpickle.register_pickle_by_value(module)


def _raise_own(failure: BaseException) -> None:
    """Raise what a worker did wrong by itself, because another attempt would not help; return when a process died.

    A rank whose peer is gone fails too, with gloo's or NCCL's error; that is an echo of the death, not a cause.
    """
    errors = list(_inside(failure))
    for error in errors:
        if isinstance(error, RayftError) and not isinstance(error, InfrastructureError):
            raise error
    if any(_is_death(error) for error in errors):
        return
    for error in errors:
        if not _is_echo(error):
            raise error


def _inside(failure: BaseException) -> list[BaseException]:
    """The errors of the ranks, out of Ray Train's wrapping."""
    return [getattr(error, "_base_exc", error) for error in getattr(failure, "worker_failures", {}).values()]


def _is_death(error: BaseException) -> bool:
    from ray.exceptions import RayError

    return isinstance(error, RayError | InfrastructureError) or type(error).__module__.startswith("ray.")


def _is_echo(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("onnection closed", "gloo", "Gloo", "NCCL"))
    )


def _first_line(error: BaseException) -> str:
    inner = next(iter(_inside(error)), error)
    lines = str(inner).strip().split("\n")
    return f"{type(inner).__name__}: {lines[0]}"


def _next_attempt(launch: Launch) -> Launch:
    """Note a start in attempts.jsonl and number it, from 1."""
    file = launch.run_dir / "attempts.jsonl"
    number = 1 + (len(file.read_text().splitlines()) if file.exists() else 0)
    record = {"attempt": number, "time": time.time(), "workers": 1 if launch.local else launch.cfg.parallel.workers, "local": launch.local}
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    return dataclasses.replace(launch, attempt=number)
