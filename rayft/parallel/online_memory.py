"""How much memory the processes of an online run will need: its training workers, and the engines that sample for them.

A colocated engine shares a card with one worker at fixed shares, so each must fit into its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rayft.config.schema import GrpoRun
from rayft.config.schema.online import Rollout
from rayft.errors import ResourceError
from rayft.models.load import compute_dtype
from rayft.observe.flops import ModelShape
from rayft.parallel.fitting import FILLED, SAVINGS
from rayft.parallel.memory import RUNTIME_BYTES, MemoryPlan, estimate

GIB = 2**30
TRAINER_PART = 0.49
"""Most of a card's memory that a worker takes when an engine is on it too; the engine has the rest."""
ENGINE_TOKENS = 8192
"""Tokens that vLLM computes at once on a large card."""
MOST_REQUESTS = {"cpu": 64, "cuda": 1024}
"""Most requests that an engine computes at once, on GPUs as vLLM has it on large cards; what a step has beyond waits in the engine."""


@dataclass(frozen=True)
class OnlinePlan:
    """Bytes of the two kinds of processes.

    Attributes:
        trainer: one worker.
        engine: one engine by part, on each of its devices.
    """

    trainer: MemoryPlan
    engine: dict[str, int]


def requests_at_once(rollout: Rollout, device: str) -> int:
    """Requests that an engine computes at once: its part of a step, since a batch waits for its last answer."""
    return min(-(-rollout.prompts_per_step // rollout.engines) * rollout.group_size, MOST_REQUESTS[device])


def estimate_online(shape: ModelShape, cfg: GrpoRun, device: str) -> OnlinePlan:
    """The plan of one worker and of one engine.

    The worker's is that of a supervised step of batch.micro_tokens tokens with, where there is a divergence from it and no adapter, a
    frozen sharded copy of the model. Chunks of weights on their way to engines are not counted: the step's activations are gone then.

    Args:
        shape: of the model, by `observe.flops.shape_of`.
        cfg: the run.
        device: "cpu" or "cuda".
    """
    compute = compute_dtype(cfg.model, device).itemsize
    trainer = estimate(shape, cfg, device)
    if cfg.algorithm.beta and cfg.adapter.type == "none":
        shards = cfg.parallel.workers // cfg.parallel.replicas
        trainer = replace(trainer, parts=trainer.parts | {"reference": compute * shape.parameters // shards})
    widest = max(2 * (layer.mlp + layer.active * layer.expert_width) + layer.heads * layer.head_dim for layer in shape.layers)
    engine = {
        "weights": compute * shape.parameters // cfg.rollout.tensor_parallel,
        "key-value cache": int(cfg.rollout.kv_cache_gib * GIB) if cfg.rollout.engine == "vllm" else 0,
        "activations": compute * ENGINE_TOKENS * (widest + 3 * shape.hidden) + 2 * 4 * requests_at_once(cfg.rollout, device) * shape.vocab,
        "runtime": RUNTIME_BYTES[device],
    }
    return OnlinePlan(trainer, engine)


def require_room(shape: ModelShape, cfg: GrpoRun, device: str, room: float) -> None:
    """Refuse a run that cannot fit.

    Args:
        shape, cfg, device: see `estimate_online`.
        room: bytes of one card, or on CPUs of the cluster, which workers and engines share.

    Raises:
        ResourceError: with the shortfall, and a setting that fits by the plan.
    """
    plan, trainer_room, engine_room = estimate_online(shape, cfg, device), room, room
    engine = sum(plan.engine.values())
    if device == "cpu":
        engines, workers = cfg.rollout.engines * engine, cfg.parallel.workers * plan.trainer.total
        trainer_room, engine_room = (room - engines) / cfg.parallel.workers, (room - workers) / cfg.rollout.engines
    elif cfg.placement.mode == "colocated":
        trainer_room, engine_room = room * TRAINER_PART, room * (1 - TRAINER_PART)
    if engine > engine_room and (device == "cuda" or engine > plan.trainer.total):
        raise _refusal("rollout.engines", cfg.rollout.engines, "engine", engine, engine_room, _smaller_cache(cfg, engine, engine_room))
    if plan.trainer.total > trainer_room:
        remedy = smaller_step(shape, cfg, device, trainer_room)
        raise _refusal("parallel.workers", cfg.parallel.workers, "worker", plan.trainer.total, trainer_room, remedy)


def _refusal(field: str, value: int, what: str, need: float, room: float, remedy: str) -> ResourceError:
    left = f"there are {max(room, 0) / GIB:.1f} for it, {(need - max(room, 0)) / GIB:.1f} too few"
    return ResourceError(field, value, f"each {what} needs {need / GIB:.1f} GiB, and {left}", remedy)


def _smaller_cache(cfg: GrpoRun, engine: int, room: float) -> str:
    cache = cfg.rollout.kv_cache_gib - (engine - FILLED * room) / GIB
    if cfg.rollout.engine == "vllm" and cache >= 0.1:
        return f"Set rollout.kv_cache_gib={int(10 * cache) / 10:g}; answers wait for room in it when it is full"
    split = "" if cfg.placement.mode == "colocated" else ", raise rollout.tensor_parallel"
    return f"Take a smaller model{split}, or give it more memory"


def smaller_step(shape: ModelShape, cfg: GrpoRun, device: str, room: float) -> str:
    """The smallest change of a run whose worker does not fit into `room` bytes, as a sentence without its point."""
    for other, settings in _savings(cfg, device):
        plan = estimate_online(shape, other, device).trainer
        if plan.total <= FILLED * room:
            return f"Set {' and '.join(settings)}, with the same result: the plan is then {plan.total / GIB:.1f} GiB a worker"
    return "Take a smaller model, shorter answers, an adapter or more workers; no other setting makes it fit"


def _savings(cfg: GrpoRun, device: str) -> Iterator[tuple[GrpoRun, list[str]]]:
    """The run with less and less need of memory, and what was set: small micro-batches first, then each saving added to those before."""
    settings: dict[str, str] = {}
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
    if cfg.micro_tokens > longest:
        cfg = cfg.model_copy(update={"batch": cfg.batch.model_copy(update={"micro_tokens": longest})})
        settings["batch.micro_tokens"] = str(longest)
        yield cfg, [f"{name}={value}" for name, value in settings.items()]
    for name, value in SAVINGS:
        helps = name == "activation_checkpointing" or device == "cuda"
        if not helps or getattr(cfg.parallel, name) in (value, "full") or (name == "cpu_offload" and cfg.optim.type != "adamw"):
            continue
        cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={name: value})})
        settings[f"parallel.{name}"] = str(value).lower()
        yield cfg, [f"{name}={value}" for name, value in settings.items()]
