"""Adafactor (arXiv 1804.04235) without momentum, on sharded parameters: what torch.optim.Adafactor computes, which refuses them.

A matrix's second moment is kept as the mean of each row and of each column. Rows lie on one rank, columns are summed over ranks:
two small sums over ranks in a step, for all parameters together, and no value is read from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from rayft.models.select import local
from rayft.optim.groups import Group

BETA2_DECAY, CLIP, SMALLEST_SCALE = -0.8, 1.0, 1e-3
"""The decay of the second moment at step t is 1 - t ** BETA2_DECAY; updates are clipped to this root mean square; the learning rate is
relative to a tensor's root mean square, or to this where that is smaller."""


class Adafactor(torch.optim.Optimizer):
    """The states of a matrix are row_var and col_var, of a vector variance, and the count step.

    Args:
        groups: from `parameter_groups`.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and use the gradients up."""
        chosen = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        parameters = [parameter for _, parameter in chosen]
        for parameter in parameters:
            self._allocate(parameter)
        sums = _over_shards([self._local_sums(parameter) for parameter in parameters], parameters)
        # A gradient becomes its update in place, so that no second copy of all gradients is held.
        for parameter, total in zip(parameters, sums, strict=True):
            self._make_update(parameter, total)
        squares = _over_shards([local(cast(Tensor, p.grad)).float().square().sum()[None] for p in parameters], parameters)
        for (group, parameter), total, square in zip(chosen, sums, squares, strict=True):
            size = (total[-1] / parameter.numel()).sqrt().clamp(min=SMALLEST_SCALE)
            clip = ((square[0] / parameter.numel()).sqrt() / CLIP).clamp(min=1.0)
            rate = min(group["lr"], float(self.state[parameter]["step"]) ** -0.5)  # the count is on the host
            values, update = local(parameter), local(cast(Tensor, parameter.grad))
            values.mul_(1 - group["lr"] * group["weight_decay"]).sub_((update * (rate * size / clip)).to(values.dtype))

    def _allocate(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            if parameter.ndim < 2:
                state["variance"] = torch.zeros_like(parameter)
            else:
                state["row_var"] = torch.zeros_like(parameter[..., :1])
                whole = parameter.ndim == 2  # the columns of a matrix go over all ranks, those of a stack of matrices do not
                state["col_var"] = local(parameter).new_zeros(1, parameter.shape[1]) if whole else torch.zeros_like(parameter[..., :1, :])
        state["step"] += 1

    def _local_sums(self, parameter: Tensor) -> Tensor:
        """Take the gradient into what is local of the second moment; float32 sums over this rank's rows.

        For a matrix: squares by column, the row means, squares of the weights. For anything else the last of these.
        """
        state, gradient = self.state[parameter], local(cast(Tensor, parameter.grad))
        share = float(state["step"]) ** BETA2_DECAY
        weights = local(parameter).float().square().sum()[None]
        squared = gradient.square()
        if parameter.ndim < 2:
            local(state["variance"]).lerp_(squared, share)
            return weights
        rows = local(state["row_var"]).lerp_(squared.mean(-1, keepdim=True), share)
        if parameter.ndim == 2:
            return torch.cat([squared.sum(0).float(), rows.sum()[None].float(), weights])
        local(state["col_var"]).lerp_(squared.mean(-2, keepdim=True), share)
        return weights

    def _make_update(self, parameter: Tensor, sums: Tensor) -> None:
        state, gradient = self.state[parameter], local(cast(Tensor, parameter.grad))
        smallest = torch.finfo(parameter.dtype).eps
        if parameter.ndim < 2:
            estimate = local(state["variance"]).clone()
        else:
            rows = local(state["row_var"])
            if parameter.ndim == 2:
                state["col_var"].lerp_((sums[:-2] / parameter.shape[0])[None], float(state["step"]) ** BETA2_DECAY)
                mean = sums[-2] / parameter.shape[0]
            else:
                mean = rows.mean(-2, keepdim=True)
            estimate = rows @ local(state["col_var"]) / mean.clamp(min=smallest)
        gradient.mul_(estimate.clamp_(min=smallest * smallest).rsqrt_())


def _over_shards(sums: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The sums of every rank's vectors, in one message, over the ranks that share the rows of the parameters."""
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if sharded is None:
        return sums
    placements = [Partial() if isinstance(place, Shard) else Replicate() for place in sharded.placements]
    flat: Any = DTensor.from_local(torch.cat(sums), sharded.device_mesh, placements, run_check=False).full_tensor()
    return list(flat.split([len(part) for part in sums]))
