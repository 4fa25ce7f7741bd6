"""Sums over ranks that name a mesh axis."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def sum_over(value: Tensor, mesh: DeviceMesh, axis: str) -> Tensor:
    """The elementwise sum of `value` over the ranks of a (flattened) axis; a new tensor on every rank."""
    total = value.detach().clone()
    dist.all_reduce(total, group=mesh[axis].get_group())
    return total
