"""Loss on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from rayft.parallel import fsdp, reduce
from rayft.types import Batch, LossFn, Need


def evaluate(model: Any, batches: Iterable[Batch], loss_fn: LossFn, need: Need, mesh: DeviceMesh) -> tuple[float, float]:
    """Mean loss over the trained tokens of all ranks.

    Args:
        model: has `score`; put into evaluation mode and back.
        batches: this rank's micro-batches on its device; every rank brings the same number.
        loss_fn, need: as in training.
        mesh: reductions run over its "loss" axis.

    Returns:
        (loss per unit of weight, sum of weights).
    """
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            loss, _ = loss_fn(model.score(batch, need), batch)
            sums += torch.stack([loss.double(), batch.loss_weights.sum().double()])
    fsdp.reshard_root(model)
    model.train()
    loss_sum, weights = reduce.sum_over(sums, mesh, "loss").tolist()
    return (loss_sum / weights if weights else float("nan")), weights
