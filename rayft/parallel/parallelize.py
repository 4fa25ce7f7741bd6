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
    """Compile, then checkpointing around it, then FSDP2. Tensor and pipeline parallelism would come first.

    Args:
        module: on the meta device, adapted and patched, with `head_terms` attached.
        spec: names the decoder layers.
        parallel: the section.
        mesh: from `build_mesh`.
        compute, reduce: precisions.
    """
    layers = layers_of(module, spec.layers)
    activation.wrap_layers(layers, compile_layers=parallel.compile, recompute=parallel.activation_checkpointing)
    fsdp.shard(module, layers, mesh, compute, reduce)
