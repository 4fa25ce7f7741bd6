"""What an online run may not combine, beside the rules that it shares with every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rayft.config.functions import FORM, SPEC
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError

Refusals = Iterator[ConfigError]

READY_REWARDS = ("code", "exact", "format", "gsm8k", "length", "math", "reasoning_gym")
"""Rewards of rayft/rewards that a configuration names without a colon; that room lies above this one."""


def groups_can_differ(cfg: GrpoRun) -> Refusals:
    """Every baseline but a critic's is made of the group's other answers, and so is the difference that a filter looks for."""
    if cfg.rollout.group_size < 2 and (cfg.algorithm.advantage != "gae" or _filters(cfg)):
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
    if kind == "disk" and "://" in cfg.run.dir:
        rule = f"hands files to engines in the run's directory, and run.dir = {cfg.run.dir} is no path"
        yield ConfigError("weight_sync.type", kind, rule, "Use auto, which takes another way, or a run.dir that every node sees")
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


def engines_merge_what_is_sent(cfg: GrpoRun) -> Refusals:
    """From the model's files as they are, linear layers only."""
    if cfg.weight_sync.payload != "adapter":
        return
    if cfg.model.quantize != "none":
        rule = f"lets engines merge adapters into weights that are not in 4 bits, and model.quantize is {cfg.model.quantize}"
        yield ConfigError("weight_sync.payload", "adapter", rule, "Use auto, which sends all weights then")
    if cfg.adapter.target_parameters:
        rule = "lets engines merge adapters of linear layers only, and adapter.target_parameters names others"
        yield ConfigError("weight_sync.payload", "adapter", rule, "Use auto, which sends all weights then")


def a_critic_is_for_gae(cfg: GrpoRun) -> Refusals:
    """One needs the other."""
    algorithm = cfg.algorithm
    if algorithm.values is not None and not SPEC.fullmatch(algorithm.values):
        yield ConfigError("algorithm.values", algorithm.values, FORM, "Name one function, such as ./critic.py:values")
    if algorithm.advantage == "gae":
        if algorithm.values is None:
            rule = "needs a value for each token, and algorithm.values is null"
            yield ConfigError("algorithm.advantage", "gae", rule, "Name a critic, such as algorithm.values=./critic.py:values")
        return
    given = {"values": None, "gamma": 1.0, "lam": 1.0}
    for name in [name for name, default in given.items() if getattr(algorithm, name) != default]:
        rule = f"is read by algorithm.advantage gae alone, and that is {algorithm.advantage or 'null'}"
        yield ConfigError(f"algorithm.{name}", getattr(algorithm, name), rule, "Set algorithm.advantage to gae, or remove the key")


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
        if function.function is None:
            continue
        if ":" in function.function and not SPEC.fullmatch(function.function):
            yield ConfigError(f"{field}.function", function.function, FORM, "Name one function, such as ./rewards.py:exact")
        if ":" not in function.function and function.function not in READY_REWARDS:
            remedy = f"Use one of {', '.join(READY_REWARDS)}, or name a function of your own, such as ./rewards.py:exact"
            yield ConfigError(f"{field}.function", function.function, "is not the name of a ready reward", remedy)
        for form in ("batch", "trl") if function.function in READY_REWARDS else ():
            if getattr(function, form):
                rule = f"gives all answers of a group at once, and the ready reward {function.function} takes one"
                yield ConfigError(f"{field}.{form}", True, rule, "Leave it out")
        if function.batch and function.trl:
            yield ConfigError(f"{field}.batch", True, "is another form of call than trl", "Keep one of them")


def rewards_come_from_one_place(cfg: GrpoRun) -> Refusals:
    """A function, an endpoint or a model."""
    for name, one in cfg.reward.functions.items():
        field = f"reward.functions.{name}"
        named = [kind for kind in ("function", "judge", "model") if getattr(one, kind) is not None]
        if len(named) != 1:
            rule = f"has {' and '.join(named) or 'none'} of function, judge and model, and needs exactly one"
            yield ConfigError(field, None, rule, "Keep one of them" if named else "Add one, such as function: exact")
        for form in ("batch", "trl", "arguments"):
            if one.function is None and getattr(one, form):
                yield ConfigError(f"{field}.{form}", getattr(one, form), "is for a function, and there is none", "Leave it out")


def judges_can_be_asked(cfg: GrpoRun) -> Refusals:
    """Their address is one, and their key gets to where it is used."""
    for name, one in cfg.reward.functions.items():
        if (judge := one.judge) is None:
            continue
        field = f"reward.functions.{name}.judge"
        if not judge.url.startswith(("http://", "https://")):
            yield ConfigError(f"{field}.url", judge.url, "is no HTTP address", "Write it like http://host:8000/v1")
        if judge.api_key_env is not None and judge.api_key_env not in cfg.env.forward:
            rule = "is not in env.forward, so processes of rewards would not have it"
            yield ConfigError(f"{field}.api_key_env", judge.api_key_env, rule, "Add it there")
        if judge.json_field is not None and judge.score != type(judge).model_fields["score"].default:
            yield ConfigError(f"{field}.score", judge.score, "is not read, as json_field is set", "Keep one of them")


READY_ENVIRONMENTS = ("openenv", "tools")
"""Environments of rayft/rollout/environments that a configuration names without a colon; that room lies above this one."""


def environment_is_there(cfg: GrpoRun) -> Refusals:
    """It can be found, and nothing is said of one that is not."""
    section, field = cfg.environment, "environment.function"
    name = section.function
    if name is None and (section.arguments or section.tools):
        rule = "is null, and environment has " + " and ".join(key for key in ("arguments", "tools") if getattr(section, key))
        yield ConfigError(field, None, rule, f"Name one, such as {READY_ENVIRONMENTS[-1]}")
    if name is not None and name not in READY_ENVIRONMENTS and not SPEC.fullmatch(name):
        remedy = f"Use one of {', '.join(READY_ENVIRONMENTS)}, or name a class of your own, such as ./game.py:Game"
        yield ConfigError(field, name, "is not the name of a ready environment", remedy)
    if name == "tools" and not section.tools:
        yield ConfigError("environment.tools", [], "is empty, and environment.function is tools", "Name functions, such as ./tools.py:look")
    if name == "openenv" and "url" not in section.arguments:
        rule = "is missing, and environment.function is openenv"
        yield ConfigError("environment.arguments.url", None, rule, "Give the server's address, such as http://localhost:8000")
    for spec in section.tools:
        if not SPEC.fullmatch(spec):
            yield ConfigError("environment.tools", spec, FORM, "Name a function, such as ./tools.py:look")


def answers_are_rewarded(cfg: GrpoRun) -> Refusals:
    """Something says what an answer is worth."""
    if not cfg.reward.functions and cfg.environment.function in (None, "tools"):
        rule = "is empty, and there is no environment that gives rewards"
        yield ConfigError("reward.functions", {}, rule, "Name one, such as reward.functions.exact.function=exact")
    if cfg.environment.function is not None and "environment" in cfg.reward.functions:
        rule = "is the name of the environment's own reward"
        yield ConfigError("reward.functions.environment", None, rule, "Rename the reward")


def rerolls_have_a_filter(cfg: GrpoRun) -> Refusals:
    """Only what was filtered is rolled again."""
    if cfg.algorithm.rerolls and not _filters(cfg):
        rule = "has no filtered groups to roll again"
        yield ConfigError("algorithm.rerolls", cfg.algorithm.rerolls, rule, "Set algorithm.filter to zero_variance, or remove the key")


def replay_has_its_places(cfg: GrpoRun) -> Refusals:
    """Places of filtered groups, for groups that are older than the weights in training."""
    algorithm, field = cfg.algorithm, "algorithm.replay"
    if not algorithm.replay:
        return
    if not _filters(cfg):
        rule = "has no filtered groups whose places it could fill"
        yield ConfigError(field, algorithm.replay, rule, "Set algorithm.filter to zero_variance, or remove the key")
    if cfg.rollout.max_staleness == 0:
        rule = "trains on answers to older weights, and rollout.max_staleness is 0"
        yield ConfigError(field, algorithm.replay, rule, "Set rollout.max_staleness to 1 or more, or remove the key")
    if algorithm.importance == "none":
        rule = "trains on answers to older weights, and algorithm.importance none does not make up for that"
        yield ConfigError(field, algorithm.replay, rule, "Set algorithm.importance to token or sequence, or remove the key")
    if algorithm.replay >= cfg.rollout.prompts_per_step:
        rule = f"leaves no place for new groups among rollout.prompts_per_step = {cfg.rollout.prompts_per_step}"
        yield ConfigError(field, algorithm.replay, rule, "Use a part of them, such as a quarter")


def _filters(cfg: GrpoRun) -> bool:
    """Whether groups can be filtered."""
    return cfg.algorithm.filter == "zero_variance" or (cfg.algorithm.filter is None and cfg.algorithm.type == "dapo")


def the_best_can_be_kept(cfg: GrpoRun) -> Refusals:
    """What a checkpoint is worth is known a step after it was saved, when the next one may be there."""
    if cfg.checkpoint.keep_best and cfg.checkpoint.keep < 2:
        rule = "deletes a checkpoint before its reward is known, and checkpoint.keep_best is true"
        yield ConfigError("checkpoint.keep", cfg.checkpoint.keep, rule, "Use 2 or more")


ONLINE_RULES: tuple[Callable[[GrpoRun], Refusals], ...] = (
    groups_can_differ,
    updates_divide_the_step,
    answers_fit_a_micro_batch,
    overlong_buffer_is_a_part,
    local_engines_are_plain,
    colocated_engines_pair_with_workers,
    transports_reach,
    adapters_do_not_drop,
    engines_merge_what_is_sent,
    a_critic_is_for_gae,
    gdpo_has_its_rewards,
    reward_names_are_plain,
    rewards_come_from_one_place,
    judges_can_be_asked,
    environment_is_there,
    answers_are_rewarded,
    rerolls_have_a_filter,
    replay_has_its_places,
    the_best_can_be_kept,
)
"""Applied after the shared ones."""
