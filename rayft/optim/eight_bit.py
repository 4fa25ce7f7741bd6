"""torchao's 8-bit optimizer states as plain float32 ones and back, for checkpoints that any number of ranks can read.

A block of 256 values is stored as codes, which a map turns into [-1, 1], and a scale, its largest magnitude. The map has 1 but not
-1: a block whose largest value is negative would come back smaller each time. So the code that stands for about -1 is written as
exactly -1, which is what was coded, and coding the written values again gives the same codes and scale, to the bit. Where another
number of ranks cuts the blocks otherwise, they are coded anew.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rayft.models.select import local


def as_float(state: Tensor) -> Tensor:
    """A state as a float32 tensor on the host, sharded as it is, when it is in 8 bits; any other as it is."""
    part: Any = local(state)
    if not hasattr(part, "codes"):
        return state
    values = part.qmap.clone()
    if part.signed:
        values[0] = -1.0
    plain: Tensor = (values[part.codes.int()].view(part.scale.shape[0], -1) * part.scale[:, None]).view(part.codes.shape)
    if isinstance(state, DTensor):
        mesh, places = state.device_mesh, state.placements
        plain = DTensor.from_local(plain, mesh, places, run_check=False, shape=state.shape, stride=state.stride())
    return plain.cpu()


def take_float(state: Tensor, plain: Tensor) -> None:
    """Code what `as_float` gave, or a checkpoint filled, into a state in 8 bits; nothing to do for any other."""
    if plain is not state:
        part = local(state)
        part.copy_(local(plain).to(part.device))
