"""Muon (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982) for hidden matrices and AdamW for the rest, in one optimizer.

On sharded matrices every rank gathers the update once and orthogonalises the whole of it. So a step sends each hidden matrix over
the network once more, in bfloat16 on GPUs, and every rank repeats the iteration; in exchange it is the same on any number of ranks,
which an iteration on shards, with sums in bfloat16 over ranks at every turn, is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from rayft.optim.groups import Group

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """One optimizer over both kinds of groups, its states named as torch's Muon and AdamW name them.

    The update of a matrix [A, B] is scaled by 0.2 sqrt(max(A, B)), which gives it the size of AdamW's, so both share a learning rate.

    Args:
        groups: from `parameter_groups`; `orthogonal` ones hold matrices.
        momentum: of the matrices, Nesterov's.
        betas, eps, fused: of AdamW.
    """

    def __init__(self, groups: list[Group], momentum: float, betas: tuple[float, float], eps: float, fused: bool) -> None:
        self.momentum = momentum
        rest = [group for group in groups if not group["orthogonal"]]
        self.adamw = torch.optim.AdamW(rest, betas=betas, eps=eps, fused=fused) if rest else None
        super().__init__([group for group in groups if group["orthogonal"]] + (self.adamw.param_groups if self.adamw else []), {})
        if self.adamw is not None:
            self.adamw.state = self.state  # one owner of the states; the groups are shared as well

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])
        if self.adamw is not None:
            self.adamw.step()

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], cast(Tensor, parameter.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(momentum, self.momentum)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(_whole(update, orthogonalise), alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalise(matrix: Tensor) -> Tensor:
    """[A, B] -> about U V^T of its singular value decomposition, by Newton-Schulz iterations in the matrix's type."""
    a, b, c = COEFFICIENTS
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def _whole(update: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of a whole matrix, sharded and typed as the matrix was; computed in bfloat16 on GPUs."""
    low = update.bfloat16() if update.device.type == "cuda" else update
    if not isinstance(low, DTensor):
        return function(low).to(update.dtype)
    full = function(low.full_tensor())
    mesh: Any = low.device_mesh
    whole = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=low.placements).to(update.dtype)
