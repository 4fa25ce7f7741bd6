"""The trainer's weights as engines want them: whole tensors under Hugging Face names, adapters merged, in the engine's precision.

Gathering a shard is a collective, so every rank must ask for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rayft.models.load import hf_name, is_adapter, named_trainable

Payload = Literal["full", "adapter"]


@dataclass(frozen=True)
class Weight:
    """One tensor to send.

    Attributes:
        name: its Hugging Face name.
        dtype: what it is sent as.
        shape: its full shape.
        gather: the full tensor in that type, on every rank; a collective where it is sharded.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]


def reshard(module: nn.Module) -> None:
    """Make parameters the trained shards again, everywhere in the model.

    A forward without backward leaves the root's weights gathered: copies from before the next optimizer step, which would be sent
    in place of the trained ones, and whose sums would agree.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_weights(module: nn.Module, dtype: torch.dtype) -> list[Weight]:
    """Every weight of the model, with W + scaling B A in place of an adapted W; the model keeps its own.

    The merge starts from the frozen base each time, in float32, so nothing accumulates.

    Args:
        module: plain or sharded, with or without adapters.
        dtype: of the engine; tensors that are not floating keep theirs.
    """
    adapted = {f"{hf_name(name + '.')}weight": part for name, part in _adapted(module).items()}
    weights = []
    for own_name, parameter in module.named_parameters():
        if is_adapter(own_name) or ".original_module." in own_name:
            continue
        name, sent = hf_name(own_name), dtype if parameter.dtype.is_floating_point else parameter.dtype
        weights.append(Weight(name, sent, tuple(parameter.shape), partial(_merged, parameter, adapted.get(name), sent)))
    return weights


def adapter_weights(module: nn.Module) -> list[Weight]:
    """What is trained beside frozen weights, as it is held: adapters, and modules that are saved with them."""
    return [Weight(name, p.dtype, tuple(p.shape), partial(_merged, p, None, p.dtype)) for name, p in named_trainable(module)]


def adapter_facts(module: nn.Module) -> dict[str, Any]:
    """What an engine must know to merge adapters as the trainer does: the scaling of each, and the precision of the base.

    Returns:
        scaling: Hugging Face name of the adapted weight -> factor of B A.
        base_dtype: type that the trainer holds the frozen weights in.
    """
    parts = _adapted(module)
    scaling = {f"{hf_name(name + '.')}weight": float(part.scaling["default"]) for name, part in parts.items()}
    base = next((part.base_layer.weight.dtype for part in parts.values()), torch.float32)
    return {"scaling": scaling, "base_dtype": str(base).removeprefix("torch.")}


def merge(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """base [out, in] + scaling b [out, r] a [r, in], in float32. arXiv 2106.09685 sec. 4.1."""
    return base.float() + scaling * (b.float() @ a.float())


def _adapted(module: nn.Module) -> Mapping[str, Any]:
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A") and "default" in part.lora_A}


@torch.no_grad()
def _merged(parameter: Tensor, part: Any, dtype: torch.dtype) -> Tensor:
    full = _full(parameter)
    if part is not None:
        full = merge(full, _full(part.lora_A["default"].weight), _full(part.lora_B["default"].weight), part.scaling["default"])
    return full.to(dtype)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
