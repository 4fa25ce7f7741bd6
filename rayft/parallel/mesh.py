"""The device mesh: six axes, of which today only dp_shard may be larger than one, and the flattened axes that reductions name."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


def build_mesh(device_type: str, world_size: int) -> DeviceMesh:
    """A mesh of AXES over all ranks, everything on dp_shard, with the flattened axes "batch" and "loss".

    "batch" = dp_replicate x dp_shard: ranks that read different rows. "loss" = batch x cp: ranks over which loss sums,
    token counts and gradient norms are reduced.

    Args:
        device_type: "cpu" or "cuda".
        world_size: number of ranks.
    """
    sizes = tuple(world_size if axis == "dp_shard" else 1 for axis in AXES)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    mesh["dp_replicate", "dp_shard"]._flatten("batch")
    mesh["dp_replicate", "dp_shard", "cp"]._flatten("loss")
    return mesh
