"""The driver's side of an online run: prompts, engines, judges and controller, all made here, so that none dies with another."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayft.actors import placement
from rayft.actors.export import base_identity
from rayft.actors.refusals import check_context, check_pool
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
        ConfigError: a reward function or the environment cannot be loaded, or the run is to be without Ray.
        DataError: there are no prompts.
        ResourceError: the cluster is too small for the engines, or for reward models beside them.
    """
    import ray

    from rayft.actors.controller import Controller, Setup
    from rayft.actors.engine_actor import EngineActor, RewardActor
    from rayft.actors.reward_model import open_models
    from rayft.experience.judge import reward_functions
    from rayft.rollout.stage import maker_of, scene_of

    cfg = run.cfg
    if run.local:
        raise ConfigError("--local", None, "an online run needs Ray for its engines", "Leave it out; rollout.engine=local needs no vLLM")
    rewards = reward_functions(cfg)
    scene = scene_of(cfg)
    tools = maker_of(scene)[1] if scene is not None else None
    gpu = run.device_type == "cuda"
    check_context(cfg)
    check_pool(cfg, gpu, ray.cluster_resources())
    launch = _launch(run, cfg, tools)
    newest = resume.newest(run.home)
    driver, secrets, common = uuid.uuid4().hex[:8], credentials(forward=cfg.env.forward), _options(cfg)
    engines = tuple(f"engine-{number}" for number in range(cfg.rollout.engines))
    judges = tuple(f"judge-{number}" for number in range(cfg.reward.workers))
    names = {name: f"{driver}-{name}" for name in (*engines, *judges, "controller")}
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
    with ExitStack() as made:
        models = made.enter_context(open_models(cfg, driver, run.device_type, common, secrets))

        def make(actor: type, name: str, *arguments: Any, cpus: int = 0, gpus: float = 0) -> Any:
            options = {"name": names[name], "num_cpus": cpus, "num_gpus": gpus, **common}
            handle = ray.remote(actor).options(**options).remote(*arguments)
            made.callback(ray.kill, handle)
            return handle

        engine, cpus, gpus = _engine_options(cfg, run.device_type), int(not gpu), _share(cfg, gpu)
        pool = [make(EngineActor, name, engine, secrets, cfg, scene, cpus=cpus, gpus=gpus) for name in engines]
        if gpu and cfg.placement.mode == "colocated":  # an engine measures free memory while it starts
            _start(pool, cfg)
        for name in judges:
            make(RewardActor, name, cfg, rewards, secrets, models)
        make(Controller, "controller", setup)
        yield replace(launch, controller=names["controller"])


def _start(pool: Sequence[Any], cfg: GrpoRun) -> None:
    """Wait until engines have started.

    Raises:
        ResourceError: one did not.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    began = time.monotonic()
    try:
        ray.get([engine.start.remote() for engine in pool], timeout=cfg.rollout.start_s)
        log.info("engines started in %.0f s", time.monotonic() - began)
    except GetTimeoutError as problem:
        rule = "was not enough for the engines to start"
        raise ResourceError("rollout.start_s", cfg.rollout.start_s, rule, "Look into their lines above, or raise it") from problem
    except RayError as problem:
        rule = f"did not start beside the trainer ({getattr(problem, 'cause', None) or type(problem).__name__})"
        raise ResourceError("rollout.engine", cfg.rollout.engine, rule, "Look into the cause, then run the command again") from problem


def _launch(run: Run[GrpoRun], cfg: GrpoRun, tools: list[dict[str, Any]] | None) -> Launch[GrpoRun]:
    train = prepare_prompts(cfg, "train", tools)
    held_out = prepare_prompts(cfg, "eval", tools) if cfg.data.eval else None
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


def _engine_options(cfg: GrpoRun, device_type: str) -> Any:
    from rayft.actors.feed import engine_dtype
    from rayft.models.hub import model_folder
    from rayft.models.tokenizer import load_tokenizer
    from rayft.parallel.online_memory import requests_at_once
    from rayft.rollout.engine import EngineOptions

    rollout = cfg.rollout
    return EngineOptions(
        model=Path(model_folder(cfg.model)),
        kind=rollout.engine,
        dtype=engine_dtype(cfg, device_type),
        context=rollout.max_prompt_tokens + rollout.max_tokens,
        stop_tokens=(int(load_tokenizer(cfg.model).eos_token_id),),
        random_weights=cfg.model.init == "random",
        concurrency=requests_at_once(rollout, device_type),
        kv_cache_bytes=int(rollout.kv_cache_gib * 2**30),
        workers=rollout.tensor_parallel,
        eager=rollout.eager or device_type == "cpu",
        seed=cfg.run.seed,
        trust_remote_code=cfg.model.trust_remote_code,
        deadline_s=rollout.start_s,
    )
