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

from rayft.actors.stop import beside_signals, stop_on_signals
from rayft.checkpoint import resume
from rayft.config.environment import Credentials
from rayft.config.functions import FILE_MODULE
from rayft.data import store
from rayft.data.waiting import wait_for_room
from rayft.errors import InfrastructureError, RayftError, ResourceError, Stopped
from rayft.train.requests import STOP_NOW
from rayft.types import Launch

log = logging.getLogger("rayft")

Worker = Callable[[Launch[Any]], Any]

RAY_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Every attempt starts without: Ray refuses to start when a listed one is gone, and it may be,
because a local run pruned it or the user deleted it to resume from an older one."""


def fit(worker: Worker, launch: Launch[Any]) -> None:
    """Run `worker(launch)` on every rank until it returns; SIGTERM and Ctrl-C ask it to stop with a checkpoint.

    Raises:
        Stopped: it was asked to, and did.
        RayftError: what a worker raised, unchanged.
        ResourceError: the cluster has no room for the workers within run.start_s.
        InfrastructureError: processes died more often than run.max_failures.
    """
    store.delete(store.join(launch.home, STOP_NOW))
    with stop_on_signals(launch.home):
        if launch.local:
            worker(_next_attempt(launch))
        else:
            _fit_on_ray(worker, launch)
    _raise_if_stopped(launch)


def _raise_if_stopped(launch: Launch[Any]) -> None:
    """A run that was asked to stop ends in order; that it is not at its end is for the driver to say."""
    newest = resume.newest(launch.home)
    step = newest.step if newest is not None else 0
    if store.exists(store.join(launch.home, STOP_NOW)) and step < launch.last_step:
        rule = f"stopped as asked after step {step} of {launch.last_step}, with a checkpoint"
        raise Stopped("run.name", launch.cfg.run.name, rule, "Run the same command again to resume")


def _fit_on_ray(worker: Worker, launch: Launch[Any]) -> None:
    import ray.exceptions
    from ray.train.v2.api.exceptions import TrainingFailedError

    allowed = launch.cfg.run.max_failures
    for failures in range(allowed + 1):
        if not _has_room(launch):
            return
        launch = _next_attempt(launch)
        if launch.remote is None:
            store.delete(store.join(resume.checkpoints_dir(launch.home), RAY_RECORD))
        try:
            beside_signals(_trainer(worker, launch).fit)
            return
        except TrainingFailedError as failure:
            _raise_own(failure)
            death, unplaced = _first_line(failure), _is_unplaced(failure)
        except ray.exceptions.RayActorError as failure:
            death, unplaced = f"Ray Train's controller died ({_first_line(failure)})", False
        log.warning("attempt %d died: %s", launch.attempt, death)
        if failures < allowed:
            log.warning("starting again from the newest checkpoint (restart %d of %d)", failures + 1, allowed)
    if unplaced:
        rule = "were not placed, because others took the room that there was a moment before"
        raise ResourceError("parallel.workers", launch.cfg.parallel.workers, rule, "Run the same command again when there is more")
    raise InfrastructureError(
        "run.max_failures",
        allowed,
        f"the run died once more than that; the last cause was: {death}",
        "Look into the cause, then run the same command again to resume",
    )


def _has_room(launch: Launch[Any]) -> bool:
    """Wait until the workers can be placed; False when the run was asked to stop meanwhile.

    Also a cluster that has become too small is waited for: most get a lost node back.

    Raises:
        ResourceError: that took longer than run.start_s.
    """
    import ray

    from rayft.actors.placement import check_cluster, need_of

    parallel, asked = launch.cfg.parallel, store.join(launch.home, STOP_NOW)
    try:
        return wait_for_room(_bundles(launch), launch.cfg.run.start_s, "training", lambda: store.exists(asked))
    except ResourceError:
        if not parallel.autoscaling:
            check_cluster(need_of(parallel, launch.device_type), ray.cluster_resources())
        raise


def _bundles(launch: Launch[Any]) -> list[dict[str, float]]:
    """What Ray reserves for each worker."""
    from rayft.actors.placement import gpu_share, worker_resources

    cfg = launch.cfg
    return [worker_resources(cfg.parallel, launch.device_type, gpu_share(cfg))] * cfg.parallel.workers


def _failure_config() -> Any:
    """Whatever fails comes back to `fit`, which numbers attempts: by itself, Ray would try again without end and without a word."""
    from ray.train import FailureConfig

    limits = ("max_failures", "controller_failure_limit", "max_preemption_failures")  # the last is newer than the oldest Ray that works
    known = {field.name for field in dataclasses.fields(FailureConfig)}
    return FailureConfig(**{name: 0 for name in limits if name in known})


def _trainer(worker: Worker, launch: Launch[Any]) -> Any:
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from rayft.config.environment import credentials, worker_environment

    _ship_code(worker)
    cfg, gpu = launch.cfg, launch.device_type == "cuda"
    return TorchTrainer(
        functools.partial(_work, worker, launch, credentials(forward=cfg.env.forward)),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(cfg.run.deadline_s)),
        scaling_config=ScalingConfig(
            num_workers=cfg.parallel.workers,
            use_gpu=gpu,
            resources_per_worker=_bundles(launch)[0],
        ),
        run_config=RunConfig(
            name=store.name_of(resume.checkpoints_dir(launch.home)),
            **_ray_storage(launch),
            failure_config=_failure_config(),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
    )


def _work(worker: Worker, launch: Launch[Any], secrets: Credentials) -> Any:
    """What runs on every rank."""
    secrets.adopt()
    return worker(launch)


def _ray_storage(launch: Launch[Any]) -> dict[str, Any]:
    """Where Ray Train keeps its own record of a run, which nothing here reads: beside the checkpoints, or nowhere."""
    if launch.remote is None:
        return {"storage_path": launch.home}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    # Each process has its own: no request to the store, and no credentials in Ray's controller.
    return {"storage_path": "rayft", "storage_filesystem": PyFileSystem(FSSpecHandler(store.filesystem("memory://")))}


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


def _is_unplaced(failure: BaseException) -> bool:
    """Whether Ray Train gave up waiting for the workers' places."""
    return type(getattr(failure, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


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


def _next_attempt(launch: Launch[Any]) -> Launch[Any]:
    """Note a start in attempts.jsonl and number it, from 1."""
    file = store.join(launch.home, "attempts.jsonl")
    so_far = store.read(file) if store.exists(file) else b""
    number = 1 + len(so_far.splitlines())
    record = {"attempt": number, "time": time.time(), "workers": 1 if launch.local else launch.cfg.parallel.workers, "local": launch.local}
    store.write(file, so_far + json.dumps(record).encode() + b"\n")
    return dataclasses.replace(launch, attempt=number)
