"""The one visible order in which a model on the meta device becomes a distributed one."""

from __future__ import annotations

from typing import Any

import torch

from rayft.config.schema import Parallel
from rayft.models.load import layers_of
from rayft.parallel import activation, fsdp
from rayft.parallel.mesh import Mesh
from rayft.types import ModelSpec


def parallelize(module: Any, spec: ModelSpec, parallel: Parallel, mesh: Mesh, compute: torch.dtype, reduce: torch.dtype) -> None:
    """Checkpointing, then compile, then FSDP2. Tensor and pipeline parallelism would come first.

    Args:
        module: on the meta device, adapted and patched, with `head_terms` attached.
        spec: names the decoder layers.
        parallel: the section.
        mesh: from `build_mesh`.
        compute, reduce: precisions.
    """
    layers = layers_of(module, spec.layers)
    if parallel.activation_checkpointing:
        activation.checkpoint_layers(module)
    if parallel.compile:
        for layer in layers:
            layer.compile()  # in place: a wrapper would put _orig_mod into every parameter name
    fsdp.shard(module, layers, mesh, compute, reduce)
