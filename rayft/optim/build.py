"""The optimizer of a run, and its learning rate. AdamW (arXiv 1711.05101) unless the run names another one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayft.config.schema import Optim
from rayft.errors import ConfigError
from rayft.models.select import Ranges, local, local_rows
from rayft.optim.adafactor import Adafactor
from rayft.optim.groups import Group, lr_ratio, parameter_groups
from rayft.optim.muon import Muon


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    optim: Optim,
    fused: bool,
    embeddings: Collection[str] = (),
    partial: Mapping[str, Ranges] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, grouped by `parameter_groups`.

    Args:
        named_parameters: of all model parts, by checkpoint name; frozen ones are left out.
        optim: the section; its lr is a start value, `set_lr` sets each step's.
        fused: one kernel for all parameters of a device, where AdamW updates them.
        embeddings: names of input embeddings and output head.
        partial: name -> the rows that are trained, of parameters whose other rows are frozen.

    Raises:
        ConfigError: nothing is trainable, torchao is missing, or a field is for parameters that are not trained.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ConfigError("adapter", None, "leaves no parameter to train", "Use adapter.type=none, or lora with targets that match")
    partial = partial or {}
    optimizer = _make(parameter_groups(trainable, optim, embeddings, partial), optim, fused)
    if partial and optim.weight_decay:
        held = [(p, local_rows(p, partial[name]), lr_ratio(name, optim, embeddings)) for name, p in trainable if name in partial]
        optimizer.register_step_pre_hook(_RowDecay(held, optim.weight_decay))
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step; each group takes its multiple of it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, for which another number would mean another compilation
            group["lr"].fill_(lr * group["lr_ratio"])
        else:
            group["lr"] = lr * group["lr_ratio"]


def _make(groups: list[Group], optim: Optim, fused: bool) -> torch.optim.Optimizer:
    betas = (optim.beta1, optim.beta2)
    match optim.type:
        case "adamw":
            return torch.optim.AdamW(groups, betas=betas, eps=optim.eps, fused=fused)
        case "adamw8bit":
            adamw8bit: Any = _import_torchao().AdamW8bit
            return adamw8bit(groups, betas=betas, eps=optim.eps)  # type: ignore[no-any-return]
        case "adafactor":
            return Adafactor(groups)
        case "muon":
            return Muon(groups, optim.momentum, betas, optim.eps, fused)


def _import_torchao() -> Any:
    try:
        import torchao.optim
    except ModuleNotFoundError as problem:
        raise ConfigError(
            "optim.type", "adamw8bit", "needs the package torchao, which is not installed here", "pip install 'rayft[optim8bit]'"
        ) from problem
    return torchao.optim


class _RowDecay:
    """Weight decay of the rows that are trained, before each step, as AdamW does it for whole parameters."""

    def __init__(self, held: list[tuple[Tensor, Tensor, float]], weight_decay: float) -> None:
        self.held, self.weight_decay = held, weight_decay

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        lr = float(group["lr"]) / group["lr_ratio"]
        for parameter, rows, ratio in self.held:
            if parameter.ndim >= 2:
                local(parameter).mul_(torch.where(rows, 1 - lr * ratio * self.weight_decay, 1.0))
