"""Sums over the ranks of a mesh axis, and reading numbers from the device without holding it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def sum_over(value: Tensor, axis: DeviceMesh) -> Tensor:
    """The elementwise sum of `value` over the ranks of a one-dimensional mesh, such as `Mesh.loss`; new on every rank."""
    total = value.detach().clone()
    dist.all_reduce(total, group=axis.get_group())
    return total


def read_later(scalars: Mapping[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Start to copy scalars to the host.

    Returns:
        A function that waits for this copy alone, not for what was queued after it, and gives the numbers by name.
    """
    values = torch.stack([value.double() for value in scalars.values()])
    if not values.is_cuda:
        return lambda: dict(zip(scalars, values.tolist(), strict=True))
    host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> dict[str, float]:
        copied.synchronize()
        return dict(zip(scalars, host.tolist(), strict=True))

    return read
