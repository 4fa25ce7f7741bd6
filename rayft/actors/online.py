"""The driver's side of an online run: prompts, engines, judges and controller, all made here, so that none dies with another."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayft.actors import placement
from rayft.actors.export import base_identity
from rayft.actors.mirror import carried
from rayft.actors.refusals import check_context, check_pool
from rayft.actors.run import Run
from rayft.checkpoint import resume
from rayft.config import functions
from rayft.config.environment import credentials, worker_environment
from rayft.config.schema import GrpoRun
from rayft.data import store
from rayft.data.prompts import PromptSet, prepare_prompts
from rayft.data.waiting import wait_for_room
from rayft.errors import ConfigError
from rayft.types import Launch

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
    from rayft.actors.engines import Engines
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
    if not cfg.parallel.autoscaling:
        check_pool(cfg, gpu, ray.cluster_resources())
    launch = _launch(run, cfg, tools)
    newest = resume.newest(run.home)
    driver, secrets, common = uuid.uuid4().hex[:8], credentials(forward=cfg.env.forward), _options(cfg)
    judges = tuple(f"{driver}-judge-{number}" for number in range(cfg.reward.workers))
    setup = Setup(
        cfg=cfg,
        run_dir=run.run_dir,
        train_prompts=launch.train_shards,
        eval_prompts=launch.eval_shards,
        total_steps=launch.total_steps,
        driver=driver,
        step=newest.step if newest else 0,
        engines=(),
        judges=judges,
        secrets=secrets,
    )
    options = _engine_options(cfg, run.device_type)
    with ExitStack() as made:
        models = made.enter_context(open_models(cfg, driver, run.device_type, common, secrets))

        def make(actor: type, name: str, *arguments: Any, **resources: Any) -> Any:
            return ray.remote(actor).options(**{"name": name, "num_cpus": 0, **common, **resources}).remote(*arguments)

        def engine(name: str, **resources: Any) -> Any:
            return make(EngineActor, name, options, secrets, cfg, scene, **resources)

        colocated = gpu and cfg.placement.mode == "colocated"
        kind, each = ("GPU", placement.ENGINE_SHARE) if colocated else placement.engine_resources(cfg, gpu)
        wait_for_room([{kind: each}] * cfg.rollout.engines, cfg.run.start_s, "the pool of engines")
        pool = None if colocated else Engines(cfg, gpu, driver, engine)
        names = made.enter_context(pool.open() if pool is not None else _beside_workers(cfg, driver, engine))
        for name in judges:
            made.callback(ray.kill, make(RewardActor, name, cfg, rewards, secrets, models))
        place = made.enter_context(_journal_kept(run))
        controller = make(Controller, f"{driver}-controller", replace(setup, engines=names), **place)
        made.callback(ray.kill, controller)
        if pool is not None:
            made.enter_context(pool.serve(run.home, controller))
        yield replace(launch, controller=f"{driver}-controller")


@contextmanager
def _journal_kept(run: Run[GrpoRun]) -> Iterator[dict[str, Any]]:
    """Options of Ray for the controller. With a run on a store it stays on this node, where its journal is also after it died.

    Rank 0 brings the journal to the store with every checkpoint, this process at the end.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if run.remote is None:
        yield {}
        return
    with carried(run.run_dir / "journal.jsonl", store.join(run.remote, "journal.jsonl")):
        yield {"scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)}


@contextmanager
def _beside_workers(cfg: GrpoRun, driver: str, make: Callable[..., Any]) -> Iterator[tuple[str, ...]]:
    """Engines that share the workers' GPUs: all start before any worker, because an engine measures free memory while it starts."""
    import ray

    from rayft.actors.engines import start

    names = tuple(f"{driver}-engine-{number}" for number in range(cfg.rollout.engines))
    with ExitStack() as made:
        pool = [make(name, num_gpus=placement.ENGINE_SHARE) for name in names]
        for one in pool:
            made.callback(ray.kill, one)
        start(pool, cfg)
        yield names


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
