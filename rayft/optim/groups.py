"""Which parameters share a learning rate and a weight decay: the parameter groups of every optimizer, as pure functions of names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from rayft.config.schema import Optim
from rayft.errors import ConfigError
from rayft.models.load import hf_name
from rayft.models.select import matched_names

Group = dict[str, Any]
"""What torch's optimizers take: params and hyperparameters. `lr_ratio` is ours: the group's learning rate over optim.lr."""


def embeddings_of(module: Any) -> frozenset[str]:
    """Checkpoint names of the parameters of input embeddings and output head, their trained copies included."""
    ends = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
    inside = {id(parameter) for part in ends for parameter in part.parameters()}
    return frozenset(hf_name(name) for name, parameter in module.named_parameters() if id(parameter) in inside)


def parameter_groups(
    named: Sequence[tuple[str, Tensor]], optim: Optim, embeddings: Collection[str] = (), partial: Collection[str] = ()
) -> list[Group]:
    """The parameters by learning rate, weight decay and, for muon, kind of update; in a group they keep the model's order.

    Args:
        named: (checkpoint name, parameter) of what is trained.
        optim: the section.
        embeddings: from `embeddings_of`.
        partial: names of parameters of which some rows are frozen: their weight decay is not the optimizer's.

    Returns:
        Groups with params, lr, lr_ratio, weight_decay and, for muon, orthogonal. First those at optim.lr, matrices before vectors.

    Raises:
        ConfigError: a pattern or a learning rate is for parameters that are not trained.
    """
    names = [name for name, _ in named]
    exempt = {name for pattern in optim.no_decay for name in matched_names("optim.no_decay", pattern, names)}
    _check_embeddings(optim, names, embeddings)
    found: dict[tuple[float, bool, bool], list[Tensor]] = {}
    for name, parameter in named:
        decays = parameter.ndim >= 2 and name not in exempt and name not in partial
        orthogonal = optim.type == "muon" and parameter.ndim == 2 and name not in embeddings
        found.setdefault((lr_ratio(name, optim, embeddings), decays, orthogonal), []).append(parameter)
    groups: list[Group] = []
    for ratio, decays, orthogonal in sorted(found, key=lambda key: (key[0] != 1.0, key[0], not key[1], not key[2])):
        decay = optim.weight_decay if decays else 0.0
        groups.append({"params": found[ratio, decays, orthogonal], "lr": optim.lr * ratio, "lr_ratio": ratio, "weight_decay": decay})
        if optim.type == "muon":
            groups[-1]["orthogonal"] = orthogonal
    return groups


def lr_ratio(name: str, optim: Optim, embeddings: Collection[str]) -> float:
    """A parameter's learning rate over optim.lr. LoRA+ (arXiv 2402.12354) trains B faster than A."""
    if name in embeddings and optim.embedding_lr is not None:
        return optim.embedding_lr / optim.lr
    if name in embeddings and optim.embedding_lr_ratio is not None:
        return optim.embedding_lr_ratio
    if ".lora_B." in name and optim.loraplus_lr_ratio is not None:
        return optim.loraplus_lr_ratio
    return 1.0


def _check_embeddings(optim: Optim, names: Sequence[str], embeddings: Collection[str]) -> None:
    """A learning rate of frozen parameters would be ignored."""
    for field in ("embedding_lr", "embedding_lr_ratio"):
        if getattr(optim, field) is not None and not any(name in embeddings for name in names):
            rule = "is for input embeddings and output head, and neither is trained"
            raise ConfigError(f"optim.{field}", getattr(optim, field), rule, "Remove it, or train them (adapter.modules_to_save)")
