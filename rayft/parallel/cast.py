"""Mixed precision where one rank has all of the weights and nothing needs to be gathered or reduced.

FSDP2 gives the same numbers, but on a single rank it costs host time for every parameter of every layer (docs/benchmarks.md) and
copies what it need not: here weights that are held in another type than the compute type are cast by one operation a layer, and all
others are used as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Place = tuple[nn.Module, str]


def in_type(forward: Forward, modules: Iterable[nn.Module], compute: torch.dtype) -> Forward:
    """`forward` with the parameters that `modules` themselves hold in the compute type; gradients arrive in the parameters' own type.

    Goes around a compiled forward and inside of checkpointing, which then casts again instead of keeping the copies.

    Args:
        forward: of a layer, or of the root.
        modules: whose direct parameters it reads, such as `layer.modules()`.
        compute: type in forward and backward.
    """
    places: dict[nn.Parameter, list[Place]] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != compute:
                places.setdefault(parameter, []).append((module, name))
    if not places:
        return forward
    holders = list(places.values())

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        held = [module._parameters[name] for (module, name), *_ in holders]  # looked up anew: materialising replaces parameters
        for value, holder in zip(_Cast.apply(compute, *held), holders, strict=True):
            _put(value, holder)
        try:
            return forward(*args, **kwargs)
        finally:
            for parameter, holder in zip(held, holders, strict=True):
                _put(parameter, holder)

    return call


def _put(value: Any, holder: list[Place]) -> None:
    for module, name in holder:
        module._parameters[name] = value


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what is not used gets no gradient, instead of zeros
        ctx.types = [weight.dtype for weight in weights]
        cast = _cast(weights, [compute] * len(weights))
        ctx.mark_non_differentiable(*(value for value, wanted in zip(cast, ctx.needs_input_grad[1:], strict=True) if not wanted))
        return cast

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(index, grad) for index, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[1 + index]]
        cast = _cast([grad for _, grad in there], [ctx.types[index] for index, _ in there])
        found: list[Tensor | None] = [None] * len(grads)
        for (index, _), grad in zip(there, cast, strict=True):
            found[index] = grad
        return None, *found


def _cast(tensors: Iterable[Tensor], types: Iterable[torch.dtype]) -> tuple[Tensor, ...]:
    """All tensors in other types, on a GPU by few kernels."""
    tensors = list(tensors)
    made = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, types, strict=True)]
    torch._foreach_copy_(made, tensors)
    return tuple(made)
