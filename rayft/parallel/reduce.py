"""Sums over the ranks of a mesh axis."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def sum_over(value: Tensor, axis: DeviceMesh) -> Tensor:
    """The elementwise sum of `value` over the ranks of a one-dimensional mesh, such as `Mesh.loss`; new on every rank."""
    total = value.detach().clone()
    dist.all_reduce(total, group=axis.get_group())
    return total
