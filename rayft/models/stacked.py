"""Stacked experts in checkpoints: one parameter [E, out, in] of the model is a tensor for each expert, and for gate and up, in the files.

The names come from transformers' own conversion of such checkpoints. Parts are views of the parameter's local rows, so a rank reads and
writes the experts that it has and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Stacks = Mapping[str, Sequence[str]]
"""Ending of a parameter's name -> endings of the stored names, with * for the expert; several are halves one below the other."""

_OPERATIONS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def stacks_of(module: nn.Module) -> Stacks:
    """The stacks of a model whose conversion is understood, see `not_understood`."""
    return {step.target_patterns[0]: tuple(step.source_patterns) for step in _conversion(module) if _stacks(step)}


def not_understood(module: nn.Module) -> str | None:
    """What transformers would rewrite when loading the model's checkpoint beside stacking experts, or None."""
    other = {type(step).__name__ for step in _conversion(module) if not _stacks(step)}
    return ", ".join(sorted(other)) or None


def _conversion(module: Any) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(type(module).__name__) or get_checkpoint_conversion_mapping(module.config.model_type) or []


def _stacks(step: Any) -> bool:
    """Whether a step does nothing but stack experts along the first dimension, with their rows one below the other."""
    operations = list(getattr(step, "operations", ()))
    names = [type(operation).__name__ for operation in operations]
    return (
        names in _OPERATIONS
        and [operation.dim for operation in operations] == [0, 1][: len(names)]
        and len(step.target_patterns) == 1
        and all(pattern.count("*") == 1 for pattern in step.source_patterns)
    )


def stored_names(name: str, experts: int, stacks: Stacks) -> list[list[str]]:
    """The stored names of each expert of the stack `name`; empty where it is no stack."""
    for ending, patterns in stacks.items():
        if name.endswith("." + ending):
            prefix = name.removesuffix(ending)
            return [[prefix + pattern.replace("*", str(expert)) for pattern in patterns] for expert in range(experts)]
    return []


def by_stored_name(name: str, parameter: Tensor, stacks: Stacks) -> Iterator[tuple[str, Tensor]]:
    """(stored name, value) of a parameter: itself, or the parts of a stack that this rank has."""
    if stored_names(name, 1, stacks):
        yield from parts(name, parameter, stacks)
    else:
        yield name, parameter


def parts(name: str, parameter: Tensor, stacks: Stacks) -> Iterator[tuple[str, Tensor]]:
    """(stored name, view) of what this rank has of a stack."""
    local, first = parameter.detach(), 0
    if isinstance(local, DTensor):
        _, (first, *_) = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
        local = local.to_local()
    names = stored_names(name, parameter.shape[0], stacks)
    for expert, rows in zip(names[first : first + local.shape[0]], local, strict=True):
        yield from zip(expert, rows.chunk(len(expert)), strict=True)
