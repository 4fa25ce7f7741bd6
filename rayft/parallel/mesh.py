"""The device mesh: six axes, of which today only dp_shard may be larger than one, and the flattened
axes that reductions run over."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


@dataclass(frozen=True)
class Mesh:
    """All ranks, arranged.

    Attributes:
        axes: the mesh of AXES.
        batch: dp_replicate x dp_shard flattened: ranks that read different rows.
        loss: batch x cp flattened: ranks over which loss sums, token counts and gradient norms are reduced.
    """

    axes: DeviceMesh
    batch: DeviceMesh
    loss: DeviceMesh


def build_mesh(device_type: str, world_size: int) -> Mesh:
    """The mesh over all ranks, everything on dp_shard.

    Args:
        device_type: "cpu" or "cuda".
        world_size: number of ranks.
    """
    sizes = tuple(world_size if axis == "dp_shard" else 1 for axis in AXES)
    axes = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    return Mesh(axes, axes["dp_replicate", "dp_shard"]._flatten("batch"), axes["dp_replicate", "dp_shard", "cp"]._flatten("loss"))
