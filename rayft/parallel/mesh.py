"""The device mesh: six axes, of which today dp_replicate and dp_shard may be larger than one, and the flattened
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

    @property
    def state(self) -> DeviceMesh:
        """What parameters, gradients and optimizer states are spread over: sharded by dp_shard, and held by every dp_replicate."""
        return self.axes["dp_shard"] if self.axes["dp_replicate"].size() == 1 else self.axes["dp_replicate", "dp_shard"]


def build_mesh(device_type: str, world_size: int, replicas: int = 1) -> Mesh:
    """The mesh over all ranks: neighbours shard the state, and `replicas` groups of them hold the same.

    Args:
        device_type: "cpu" or "cuda".
        world_size: number of ranks, a multiple of `replicas`.
        replicas: size of dp_replicate.
    """
    sizes = {"dp_replicate": replicas, "dp_shard": world_size // replicas}
    axes = init_device_mesh(device_type, tuple(sizes.get(axis, 1) for axis in AXES), mesh_dim_names=AXES)
    return Mesh(axes, axes["dp_replicate", "dp_shard"]._flatten("batch"), axes["dp_replicate", "dp_shard", "cp"]._flatten("loss"))
