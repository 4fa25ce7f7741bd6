"""One optimizer step. The loss is a sum over micro-batches and ranks, divided once by the global count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayft.parallel import fsdp, reduce
from rayft.parallel.mesh import Mesh
from rayft.types import Batch, LossFn, Metrics, Need


def forward_backward(
    parts: Sequence[Any], batches: Sequence[Batch], loss_fn: LossFn, need: Need, mesh: Mesh, known: float | None = None
) -> tuple[Metrics, Tensor]:
    """Accumulate the gradient of (sum of losses) / (sum of loss weights), both over all micro-batches of all ranks.

    Every rank must bring the same number of micro-batches; one with nothing to train on has weights 0.

    Args:
        parts: model parts; one today, a pipeline's stages later. The last one computes the loss.
        batches: this rank's micro-batches, on its device.
        loss_fn: pure loss, a sum.
        need: which terms the loss reads.
        mesh: reductions run over its loss axis.
        known: what to divide by in place of the sum of loss weights, the same on every rank, where the host knows it.

    Returns:
        (sums over all ranks by metric name: "train/loss" and what `loss_fn` reported; the divisor), all on the device.
    """
    divisor = _sum_of_weights(batches, mesh) if known is None else torch.full((), known, device=batches[0].tokens.device)
    sums: Metrics = {}
    for index, batch in enumerate(batches):
        fsdp.set_gradient_sync(parts[-1], last=index == len(batches) - 1)
        terms = parts[-1].score(batch, need)
        loss, metrics = loss_fn(terms, batch)
        (loss / divisor).backward()
        for name, value in {"train/loss": loss.detach(), **metrics}.items():
            sums[name] = sums[name] + value if name in sums else value
    names = list(sums)
    reduced = reduce.sum_over(torch.stack([sums[name].float() for name in names]), mesh.loss)
    return dict(zip(names, reduced.unbind(), strict=True)), divisor


def _sum_of_weights(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """Over all micro-batches and ranks; 1 when there is none."""
    weights = torch.stack([batch.loss_weights.sum() for batch in batches]).sum()
    total = reduce.sum_over(weights, mesh.loss)
    return torch.where(total > 0, total, torch.ones_like(total))


def update(parts: Sequence[Any], optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Clip the accumulated gradient by its global norm, step the optimizer and clear the gradient.

    Returns:
        The gradient norm before clipping, a scalar on the device.
    """
    parameters = [p for part in parts for p in part.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
