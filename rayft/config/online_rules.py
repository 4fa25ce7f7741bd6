"""What an online run may not combine, beside the rules that it shares with every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rayft.config.functions import FORM, SPEC
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError

Refusals = Iterator[ConfigError]

READY_REWARDS = ("exact", "format", "gsm8k", "length", "math")
"""Rewards of rayft/rewards that a configuration names without a colon; that room lies above this one."""


def groups_can_differ(cfg: GrpoRun) -> Refusals:
    """Every baseline here is made of the group's other answers."""
    if cfg.rollout.group_size < 2:
        rule = "leaves an answer nothing to be compared with, so every advantage is zero"
        yield ConfigError("rollout.group_size", cfg.rollout.group_size, rule, "Use 2 or more; 8 is usual")


def updates_divide_the_step(cfg: GrpoRun) -> Refusals:
    """Every update has as many prompts."""
    prompts, updates = cfg.rollout.prompts_per_step, cfg.algorithm.updates
    if prompts % updates:
        divisors = [number for number in range(1, prompts + 1) if prompts % number == 0]
        rule = f"does not divide rollout.prompts_per_step = {prompts}"
        yield ConfigError("algorithm.updates", updates, rule, f"Use one of {', '.join(map(str, divisors))}")


def answers_fit_a_micro_batch(cfg: GrpoRun) -> Refusals:
    """An answer and its prompt are computed together."""
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
    if cfg.micro_tokens < longest:
        rule = f"is less than rollout.max_prompt_tokens + rollout.max_tokens = {longest}"
        yield ConfigError("batch.micro_tokens", cfg.micro_tokens, rule, f"Use {longest} or more, or allow shorter answers")


def overlong_buffer_is_a_part(cfg: GrpoRun) -> Refusals:
    """The penalty begins inside the answer."""
    if cfg.reward.overlong_buffer > cfg.rollout.max_tokens:
        rule = f"is longer than the longest answer, rollout.max_tokens = {cfg.rollout.max_tokens}"
        yield ConfigError("reward.overlong_buffer", cfg.reward.overlong_buffer, rule, "Use a part of it, such as a quarter")


def local_engines_are_plain(cfg: GrpoRun) -> Refusals:
    """The local engine is one process of transformers."""
    if cfg.rollout.engine == "local" and cfg.rollout.tensor_parallel > 1:
        rule = "cannot be had with rollout.engine local"
        yield ConfigError("rollout.tensor_parallel", cfg.rollout.tensor_parallel, rule, "Use vllm, or set it to 1")


def colocated_engines_pair_with_workers(cfg: GrpoRun) -> Refusals:
    """A process cannot hold parts of two GPUs, and weights go to the engine on the same GPU."""
    if cfg.placement.mode != "colocated":
        return
    if cfg.rollout.tensor_parallel > 1:
        rule = "needs several GPUs for an engine, and placement.mode colocated gives it a share of one"
        yield ConfigError("rollout.tensor_parallel", cfg.rollout.tensor_parallel, rule, "Set it to 1, or placement.mode to separate")
    if cfg.rollout.engines != cfg.parallel.workers:
        rule = f"differs from parallel.workers = {cfg.parallel.workers}, and with placement.mode colocated each worker has one"
        yield ConfigError("rollout.engines", cfg.rollout.engines, rule, "Make them equal, or set placement.mode to separate")


def transports_reach(cfg: GrpoRun) -> Refusals:
    """Each transport has its place."""
    kind, device = cfg.weight_sync.type, cfg.parallel.device
    if kind in ("nccl", "ipc") and device == "cpu":
        yield ConfigError("weight_sync.type", kind, "moves tensors between GPUs, and parallel.device is cpu", "Use auto or disk")
    if kind == "ipc" and cfg.placement.mode != "colocated":
        rule = "needs trainer and engine on one GPU, and placement.mode is separate"
        yield ConfigError("weight_sync.type", kind, rule, "Use nccl, or set placement.mode to colocated")
    if kind == "nccl" and cfg.placement.mode == "colocated":
        rule = "cannot join two processes on one GPU, and placement.mode is colocated"
        yield ConfigError("weight_sync.type", kind, rule, "Use ipc, or set placement.mode to separate")
    if cfg.weight_sync.payload == "adapter" and cfg.adapter.type != "lora":
        yield ConfigError("weight_sync.payload", "adapter", "there is no adapter to send", "Use auto, or set adapter.type to lora")


def adapters_do_not_drop(cfg: GrpoRun) -> Refusals:
    """Engines sample without dropout, so the trainer's log-probabilities would be another policy's."""
    if cfg.adapter.dropout:
        rule = "makes the trained policy another one than engines sample from"
        yield ConfigError("adapter.dropout", cfg.adapter.dropout, rule, "Set it to 0")


def gdpo_has_its_rewards(cfg: GrpoRun) -> Refusals:
    """It normalises rewards one by one, so a penalty outside of them would be lost."""
    if cfg.algorithm.advantage == "gdpo" and cfg.reward.overlong_buffer:
        rule = "is added to the total, which algorithm.advantage gdpo does not read"
        yield ConfigError("reward.overlong_buffer", cfg.reward.overlong_buffer, rule, "Make it a reward function, or set it to 0")


def reward_names_are_plain(cfg: GrpoRun) -> Refusals:
    """They are used in overrides and metric names, and their functions can be found."""
    for name, function in cfg.reward.functions.items():
        field = f"reward.functions.{name}"
        if not name.replace("_", "").replace("-", "").isalnum():
            yield ConfigError(field, None, "the name of a reward is made of letters, digits, - and _", "Rename the reward")
        if ":" in function.function and not SPEC.fullmatch(function.function):
            yield ConfigError(f"{field}.function", function.function, FORM, "Name one function, such as ./rewards.py:exact")
        if ":" not in function.function and function.function not in READY_REWARDS:
            remedy = f"Use one of {', '.join(READY_REWARDS)}, or name a function of your own, such as ./rewards.py:exact"
            yield ConfigError(f"{field}.function", function.function, "is not the name of a ready reward", remedy)
        if function.function in READY_REWARDS and function.batch:
            rule = f"gives all answers of a group at once, and the ready reward {function.function} takes one"
            yield ConfigError(f"{field}.batch", True, rule, "Leave it out")


ONLINE_RULES: tuple[Callable[[GrpoRun], Refusals], ...] = (
    groups_can_differ,
    updates_divide_the_step,
    answers_fit_a_micro_batch,
    overlong_buffer_is_a_part,
    local_engines_are_plain,
    colocated_engines_pair_with_workers,
    transports_reach,
    adapters_do_not_drop,
    gdpo_has_its_rewards,
    reward_names_are_plain,
)
"""Applied after the shared ones."""
