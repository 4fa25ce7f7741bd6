"""The driver's side of an online run: prompts, engines, judges and controller, all made here, so that none dies with another."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayft.actors import placement
from rayft.actors.export import base_identity
from rayft.actors.run import Run
from rayft.checkpoint import resume
from rayft.config import functions
from rayft.config.environment import credentials, worker_environment
from rayft.config.schema import GrpoRun
from rayft.data import store
from rayft.data.prompts import PromptSet, prepare_prompts
from rayft.errors import ConfigError, ResourceError
from rayft.types import Launch

log = logging.getLogger("rayft")

CONCURRENCY = 10_000
"""Calls that an asynchronous actor may have open; its own bounds are elsewhere."""


@contextmanager
def open_flow(run: Run[GrpoRun]) -> Iterator[Launch[GrpoRun]]:
    """Make the pool and its controller, and yield what the trainer's workers are started with. All of it ends with the block.

    Raises:
        ConfigError: a reward function cannot be loaded, or the run is to be without Ray.
        DataError: there are no prompts.
        ResourceError: the cluster is too small for the engines.
    """
    import ray

    from rayft.actors.controller import Controller, Setup
    from rayft.actors.engine_actor import EngineActor, RewardActor
    from rayft.experience.judge import reward_functions

    cfg = run.cfg
    if run.local:
        raise ConfigError("--local", None, "an online run needs Ray for its engines", "Leave it out; rollout.engine=local needs no vLLM")
    rewards = reward_functions(cfg)
    for function in rewards.values():
        functions.load_function(function)
    gpu = run.device_type == "cuda"
    _check_cluster(cfg, gpu, ray.cluster_resources())
    launch = _launch(run, cfg)
    newest = resume.newest(run.home)
    driver, secrets, common = uuid.uuid4().hex[:8], credentials(), _options(cfg)
    engines = tuple(f"engine-{number}" for number in range(cfg.rollout.engines))
    judges = tuple(f"judge-{number}" for number in range(cfg.reward.workers))
    names = {name: f"{driver}-{name}" for name in (*engines, *judges, "controller")}
    made = [
        ray.remote(EngineActor)
        .options(name=names[name], num_cpus=0 if gpu else 1, num_gpus=_share(cfg, gpu), **common)
        .remote(_engine_options(cfg, run.device_type), secrets)
        for name in engines
    ]
    if gpu and cfg.placement.mode == "colocated":  # an engine measures free memory while it starts
        ray.get([engine.start.remote() for engine in made], timeout=cfg.rollout.start_s)
    made += [ray.remote(RewardActor).options(name=names[name], num_cpus=0, **common).remote(cfg, rewards, secrets) for name in judges]
    setup = Setup(
        cfg=cfg,
        run_dir=run.run_dir,
        train_prompts=launch.train_shards,
        eval_prompts=launch.eval_shards,
        total_steps=launch.total_steps,
        driver=driver,
        step=newest.step if newest else 0,
        engines=tuple(names[name] for name in engines),
        judges=tuple(names[name] for name in judges),
    )
    made.append(ray.remote(Controller).options(name=names["controller"], num_cpus=0, **common).remote(setup))
    try:
        yield replace(launch, controller=names["controller"])
    finally:
        for actor in made:
            ray.kill(actor)


def _launch(run: Run[GrpoRun], cfg: GrpoRun) -> Launch[GrpoRun]:
    train = prepare_prompts(cfg, "train")
    held_out = prepare_prompts(cfg, "eval") if cfg.data.eval else None
    count = len(PromptSet(train, seed=0, shuffle=False))
    return Launch(
        cfg=cfg,
        run_dir=run.run_dir,
        train_shards=train,
        eval_shards=held_out,
        identity={"prompts": store.name_of(train), "base weights": base_identity(cfg)},
        total_steps=placement.derive_steps(count, cfg.rollout.prompts_per_step, cfg.run.epochs, cfg.run.max_steps),
        device_type=run.device_type,
        local=False,
        callbacks=tuple(functions.resolve(spec) for spec in cfg.run.callbacks),
        remote=run.remote,
    )


def _options(cfg: GrpoRun) -> dict[str, Any]:
    """Of every actor: restarted without end, and the environment of the run's processes."""
    return {"max_restarts": -1, "max_concurrency": CONCURRENCY, "runtime_env": {"env_vars": worker_environment()}}


def _share(cfg: GrpoRun, gpu: bool) -> float:
    """GPUs that Ray reserves for an engine."""
    if not gpu:
        return 0
    return placement.ENGINE_SHARE if cfg.placement.mode == "colocated" else cfg.rollout.tensor_parallel


def _check_cluster(cfg: GrpoRun, gpu: bool, resources: Mapping[str, float]) -> None:
    """Refuse a pool that the cluster can never place beside the trainer."""
    if gpu and cfg.placement.mode == "colocated":
        return
    kind, each = ("GPU", cfg.rollout.tensor_parallel) if gpu else ("CPU", 1)
    workers = cfg.parallel.workers * placement.worker_resources(cfg.parallel, "cuda" if gpu else "cpu")[kind]
    engines, have = cfg.rollout.engines * each, resources.get(kind, 0.0)
    if engines + workers > have:
        rule = f"need {engines} {kind}s beside {workers:g} of the trainer, the cluster has {have:g}"
        raise ResourceError("rollout.engines", cfg.rollout.engines, rule, f"Use fewer, or add {kind}s{', or colocate them' if gpu else ''}")


def _engine_options(cfg: GrpoRun, device_type: str) -> Any:
    from rayft.actors.feed import engine_dtype
    from rayft.models.hub import model_folder
    from rayft.models.tokenizer import load_tokenizer
    from rayft.rollout.engine import EngineOptions

    rollout = cfg.rollout
    return EngineOptions(
        model=Path(model_folder(cfg.model)),
        kind=rollout.engine,
        dtype=engine_dtype(cfg, device_type),
        context=rollout.max_prompt_tokens + rollout.max_tokens,
        stop_tokens=(int(load_tokenizer(cfg.model).eos_token_id),),
        random_weights=cfg.model.init == "random",
        kv_cache_bytes=int(rollout.kv_cache_gib * 2**30),
        workers=rollout.tensor_parallel,
        seed=cfg.run.seed,
        trust_remote_code=cfg.model.trust_remote_code,
        deadline_s=rollout.start_s,
    )
