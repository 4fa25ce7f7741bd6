"""The one visible order in which a model on the meta device becomes a distributed one."""

from __future__ import annotations

from typing import Any

import torch

from rayft.config.schema import Parallel
from rayft.models.load import layers_of
from rayft.parallel import activation, fsdp
from rayft.parallel.cast import in_type
from rayft.parallel.mesh import Mesh
from rayft.types import ModelSpec

RECOMPILE_LIMIT = 128
"""Graphs of one function: layers of different constants, kinds of masks and, in GRPO, numbers of tokens each need one."""


def parallelize(module: Any, spec: ModelSpec, parallel: Parallel, mesh: Mesh, compute: torch.dtype, reduce: torch.dtype) -> None:
    """Compile, then checkpointing and offloading around it, then FSDP2. Tensor and pipeline parallelism would come first.

    A single rank has nothing to shard: its weights are cast inside of checkpointing instead (`cast`), unless the host is to hold them.

    Args:
        module: on the meta device, adapted and patched, with `head_terms` attached.
        spec: names the decoder layers.
        parallel: the section.
        mesh: from `build_mesh`.
        compute, reduce: precisions.
    """
    # Beyond its limit, 8 by default, dynamo runs uncompiled without a word: flex attention then holds all scores at once.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT, 8 * RECOMPILE_LIMIT
    layers = layers_of(module, spec.layers)
    alone = mesh.batch.size() == 1 and not (parallel.cpu_offload and mesh.axes.device_type == "cuda")
    activation.wrap_layers(
        layers,
        compile_layers=parallel.compile,
        recompute=parallel.activation_checkpointing,
        offload=parallel.activation_offload,
        cast=compute if alone else None,
    )
    if alone:
        inner = {part for layer in layers for part in layer.modules()}
        module.head_terms = in_type(module.head_terms, (part for part in module.modules() if part not in inner), compute)
    else:
        fsdp.shard(module, layers, mesh, compute, reduce, cpu_offload=parallel.cpu_offload)
