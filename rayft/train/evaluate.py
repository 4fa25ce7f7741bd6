"""Loss on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rayft.data.reader import Reader, micro_batches, prefetch
from rayft.parallel import fsdp, reduce
from rayft.parallel.mesh import Mesh
from rayft.types import Batch, LossFn, Need, Session


def evaluate(model: Any, batches: Iterable[Batch], loss_fn: LossFn, need: Need, mesh: Mesh) -> tuple[float, float]:
    """Mean loss over the trained tokens of all ranks.

    Args:
        model: has `score`; put into evaluation mode and back.
        batches: this rank's micro-batches on its device; every rank brings the same number.
        loss_fn, need: as in training.
        mesh: reductions run over its loss axis.

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
    loss_sum, weights = reduce.sum_over(sums, mesh.loss).tolist()
    return (loss_sum / weights if weights else float("nan")), weights


def eval_batches(reader: Reader, session: Session, micro_rows: int, max_rows: int | None) -> Iterator[Batch]:
    """This rank's micro-batches of the evaluation rows in order, on its device; every rank gets the same number.

    Args:
        reader: over the evaluation shards, not shuffled.
        session: of this rank.
        micro_rows: packed rows in a micro-batch.
        max_rows: rows to evaluate on; None takes all.
    """
    limit = min(reader.num_rows, max_rows or reader.num_rows)
    together = micro_rows * session.world_size

    def build(index: int) -> list[Batch]:
        return micro_batches(reader, index, rows=together, micro_rows=micro_rows, rank=session.rank, world=session.world_size, limit=limit)

    for batches, _ in prefetch(build, range(-(-limit // together))):
        yield from (batch.to(session.device) for batch in batches)
