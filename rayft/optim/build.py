"""AdamW (arXiv 1711.05101) with weight decay on matrices only, and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rayft.config.schema import Optim
from rayft.errors import ConfigError


def build_optimizer(named_parameters: Iterable[tuple[str, Tensor]], optim: Optim, fused: bool) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the order given: matrices with weight decay, then vectors without.

    Args:
        named_parameters: of all model parts; frozen ones are left out.
        optim: the section; its lr is a start value, `set_lr` sets each step's.
        fused: one kernel for all parameters of a device.

    Raises:
        ConfigError: nothing is trainable.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ConfigError("adapter", None, "leaves no parameter to train", "Use adapter.type=none, or lora with targets that match")
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
