"""FSDP2: parameters, gradients and optimizer states sharded over ranks, one unit per decoder layer and one for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rayft.parallel.mesh import Mesh

SHARDS_BYTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
"""Whether FSDP2 takes weights of bytes (`models.nf4`). Where it does not, every rank holds them whole."""


def shard(
    module: nn.Module, layers: nn.ModuleList, mesh: Mesh, compute: torch.dtype, reduce: torch.dtype, *, cpu_offload: bool = False
) -> None:
    """Shard in place. Gradients come out as *sums* over ranks, so that the step alone divides.

    The root keeps its parameters gathered after the forward, because its backward follows at once; `reshard_root` frees
    them after an evaluation, where no backward does.

    Args:
        module: causal language model with `head_terms` attached.
        layers: its decoder layers.
        mesh: from `build_mesh`.
        compute: type of parameters in forward and backward.
        reduce: type in which gradients are summed.
        cpu_offload: parameters, gradients and optimizer states stay on the host, pinned where there is a GPU to copy to.
    """
    axis = mesh.state
    # With replicas torch 2.11 frees a gradient while it is still copied to pinned memory (pytorch PR 180665); other copies wait.
    pin = mesh.axes.device_type == "cuda" and mesh.axes["dp_replicate"].size() == 1
    offload = CPUOffloadPolicy(pin_memory=pin) if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    whole = None if SHARDS_BYTES else {parameter for parameter in module.parameters() if not parameter.is_floating_point()}
    for layer in layers:
        fully_shard(layer, mesh=axis, mp_policy=policy, offload_policy=offload, reshard_after_forward=True, ignored_params=whole)
    # The root's inputs are a batch whose loss weights must stay float32.
    root_policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    fully_shard(module, mesh=axis, mp_policy=root_policy, offload_policy=offload, reshard_after_forward=False, ignored_params=whole)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # gloo has no pre-multiplied sum, and an averaged gradient would make the divisor wrong by the world size.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(module, "head_terms")


def reshard_root(module: Any) -> None:
    """Free the root's gathered parameters; needed after forwards without a backward, or a checkpoint would miss them."""
    if isinstance(module, FSDPModule):
        module.reshard()


def set_gradient_sync(module: Any, last: bool) -> None:
    """Reduce gradients over ranks only in the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
