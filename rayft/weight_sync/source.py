"""The trainer's weights as engines want them: whole tensors under Hugging Face names, adapters merged, in the engine's precision.

Names are those of checkpoint files, which every engine can load: a stack of experts goes as a tensor for each expert. Gathering a shard
is a collective, so every rank must ask for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rayft.models.experts import is_wrapper, update_of
from rayft.models.load import hf_name, is_adapter, kept_in_float32, named_trainable, persistent_buffers
from rayft.models.nf4 import NF4Linear, parameters_of, quantised
from rayft.models.stacked import Stacks, parts, stacks_of, stored_names

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
    """Every weight and persistent buffer of the model, with W + scaling B A in place of an adapted W; the model keeps its own.

    The merge starts from the frozen base each time, in float32, so nothing accumulates. A base that is held in 4 bits is sent as the
    numbers that training computes with.

    Args:
        module: plain or sharded, with or without adapters.
        dtype: of the engine; tensors that are not floating keep theirs, and so do buffers that engines hold in float32.
    """
    adapted = {f"{hf_name(name + '.')}weight": part for name, part in _adapted(module).items()}
    adapted |= {hf_name(f"{name}.{part.parameter_name}"): part for name, part in module.named_modules() if is_wrapper(part)}
    packed, in_4_bits = parameters_of(module), {hf_name(f"{name}.weight"): layer for name, layer in quantised(module)}
    stacks, newest = stacks_of(module), _Newest()
    weights = []
    for own_name, parameter in module.named_parameters():
        name = hf_name(own_name)
        if is_adapter(own_name) or ".original_module." in own_name or (parameter in packed and name not in in_4_bits):
            continue
        if name in in_4_bits:
            layer = in_4_bits[name]
            gather = partial(_merged_4_bits, layer, adapted.get(name), dtype)
            weights.append(Weight(name, dtype, (layer.out_features, layer.in_features), gather))
            continue
        sent = dtype if parameter.dtype.is_floating_point else parameter.dtype
        gather = partial(_merged, parameter, adapted.get(name), sent)
        if stored_names(name, 1, stacks):
            for stored, shape in _stored(name, parameter, stacks):
                weights.append(Weight(stored, sent, shape, partial(newest.part, name, stored, gather, stacks)))
        else:
            weights.append(Weight(name, sent, tuple(parameter.shape), gather))
    for own_name, buffer in persistent_buffers(module):
        if ".original_module." not in own_name:
            sent = dtype if buffer.dtype.is_floating_point and not kept_in_float32(module, own_name) else buffer.dtype
            weights.append(Weight(hf_name(own_name), sent, tuple(buffer.shape), partial(_merged, buffer, None, sent)))
    return weights


class _Newest:
    """The stack of experts that was gathered last, whose parts are asked for one after the other."""

    def __init__(self) -> None:
        self._name, self._parts = "", dict[str, Tensor]()

    def part(self, name: str, stored: str, gather: Callable[[], Tensor], stacks: Stacks) -> Tensor:
        """The tensor `stored` of the stack `name`."""
        if name != self._name:
            self._parts.clear()  # there is room for one
            self._name, self._parts = name, dict(parts(name, gather(), stacks))
        return self._parts[stored]


def _stored(name: str, stack: Tensor, stacks: Stacks) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(stored name, shape) of every part of a stack [E, rows, columns]."""
    for of_expert in stored_names(name, stack.shape[0], stacks):
        for stored in of_expert:
            yield stored, (stack.shape[1] // len(of_expert), *stack.shape[2:])


def adapter_weights(module: nn.Module) -> list[Weight]:
    """What is trained beside frozen weights, as it is held: adapters, and modules that are saved with them."""
    return [Weight(name, p.dtype, tuple(p.shape), partial(_merged, p, None, p.dtype)) for name, p in named_trainable(module)]


def adapter_facts(module: nn.Module) -> dict[str, Any]:
    """What an engine must know to merge adapters as the trainer does: the scaling of each, and the precision of the base.

    Returns:
        scaling: Hugging Face name of the adapted weight -> factor of B A.
        base_dtype: type that the trainer holds the frozen weights in.
        float32: names of buffers that engines hold in float32.
    """
    parts = _adapted(module)
    scaling = {f"{hf_name(name + '.')}weight": float(part.scaling["default"]) for name, part in parts.items()}
    base = next((part.base_layer.weight.dtype for part in parts.values()), torch.float32)
    kept = [hf_name(name) for name, _ in persistent_buffers(module) if kept_in_float32(module, name)]
    return {"scaling": scaling, "base_dtype": str(base).removeprefix("torch."), "float32": kept}


def merge(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """base [out, in] + scaling b [out, r] a [r, in], in float32. arXiv 2106.09685 sec. 4.1."""
    return base.float() + scaling * (b.float() @ a.float())


def _adapted(module: nn.Module) -> Mapping[str, Any]:
    """Name -> adapted linear layer or embedding."""
    return {
        name: part for name, part in module.named_modules() if hasattr(part, "lora_A") and "default" in part.lora_A and not is_wrapper(part)
    }


@torch.no_grad()
def _merged(parameter: Tensor, part: Any, dtype: torch.dtype) -> Tensor:
    if part is not None and is_wrapper(part):
        return _full(update_of(part, parameter.detach()).to(dtype))
    return _with_adapter(_full(parameter), part).to(dtype)


@torch.no_grad()
def _merged_4_bits(layer: NF4Linear, part: Any, dtype: torch.dtype) -> Tensor:
    return _with_adapter(_full(layer.dense(torch.float32)), part).to(dtype)


def _with_adapter(full: Tensor, part: Any) -> Tensor:
    if part is None:
        return full
    return merge(full, _full(part.lora_A["default"].weight), _full(part.lora_B["default"].weight), part.scaling["default"])


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
