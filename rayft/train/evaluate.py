"""Loss on held-out rows, over all of them and by source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rayft.config.schema import SftRun
from rayft.data.reader import Reader, micro_batches, prefetch
from rayft.observe.metrics import finish
from rayft.parallel import fsdp, reduce
from rayft.parallel.mesh import Mesh
from rayft.types import Batch, Launch, LossFn, Need, Session


def evaluate(model: Any, batches: Iterable[Batch], loss_fn: LossFn, need: Need, mesh: Mesh) -> dict[str, float]:
    """Mean loss over the trained tokens of all ranks.

    Args:
        model: has `score`; put into evaluation mode and back.
        batches: this rank's micro-batches on its device; every rank brings the same number, at least one.
        loss_fn, need: over the evaluation's sources.
        mesh: reductions run over its loss axis.

    Returns:
        Values of eval/loss, eval/perplexity, eval/num_tokens, and of eval/loss/<source> when the loss tells sources apart.
    """
    model.eval()
    names: list[str] = []
    sums = torch.zeros((), dtype=torch.float64, device=mesh.loss.device_type)
    with torch.no_grad():
        for batch in batches:
            value, metrics = loss_fn(model.score(batch, need), batch)
            parts = {"loss": value, "weights": batch.loss_weights.sum()}
            parts |= {name: part for name, part in metrics.items() if name.count("/") == 2}  # those of one source
            names = list(parts)
            sums = sums + torch.stack([part.double() for part in parts.values()])
    fsdp.reshard_root(model)
    model.train()
    total = dict(zip(names, reduce.sum_over(sums, mesh.loss).tolist(), strict=True))
    weights = total.pop("weights")
    loss: float = total.pop("loss") / weights if weights else math.nan
    by_source = {name.replace("train/", "eval/"): value for name, value in finish(total, weights).items() if "/loss/" in name}
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/num_tokens": weights, **by_source}


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


class Evaluations:
    """When a run evaluates, and on what.

    Args:
        launch: the run; without eval_shards no evaluation is due.
        session: of this rank.
        loss_fn, need: over the evaluation's sources.
        mesh: reductions run over its loss axis.
        micro_rows: packed rows that a rank runs at once.
    """

    def __init__(self, launch: Launch[SftRun], session: Session, loss_fn: LossFn, need: Need, mesh: Mesh, micro_rows: int) -> None:
        self.launch, self.session, self.loss_fn, self.need, self.mesh, self.micro_rows = launch, session, loss_fn, need, mesh, micro_rows
        self.reader = Reader(launch.eval_shards, seed=0, shuffle=False, window=1) if launch.eval_shards else None

    def due(self, step: int) -> bool:
        """Whether the configuration asks for one after this step."""
        section = self.launch.cfg.eval
        at_edge = step == self.launch.last_step or (step == 0 and section.at_start)
        return self.reader is not None and (at_edge or (step > 0 and section.every is not None and step % section.every == 0))

    def run(self, model: Any) -> dict[str, float]:
        """Evaluate; every rank calls it."""
        assert self.reader is not None
        batches = eval_batches(self.reader, self.session, self.micro_rows, self.launch.cfg.eval.max_rows)
        return evaluate(model, batches, self.loss_fn, self.need, self.mesh)
