"""Log-probabilities that a step needs beside its own: under the reference, and under the policy before the step's first update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayft.config.schema import GrpoRun
from rayft.models.adapt import without_adapters
from rayft.models.load import compute_dtype
from rayft.parallel import fsdp
from rayft.parallel.mesh import Mesh
from rayft.train.build import build_model
from rayft.types import Batch, Session


class Reference:
    """The policy that the run started from: the policy itself without its adapters, or else a second, frozen, sharded copy.

    Args:
        cfg: the run.
        session: of this rank.
        mesh: of all ranks.
        policy: the model in training.
    """

    def __init__(self, cfg: GrpoRun, session: Session, mesh: Mesh, policy: Any) -> None:
        self._policy = policy
        self._copy: Any = None
        if cfg.adapter.type == "none":
            dtype = str(compute_dtype(cfg.model, session.device.split(":")[0])).removeprefix("torch.")
            frozen = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dtype": dtype, "unfrozen": ()})})
            self._copy = build_model(frozen, session, mesh).requires_grad_(False)
            self._copy.temperature = policy.temperature

    def columns(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Log-probabilities of the trained tokens of each micro-batch under the reference, float32 [T]."""
        if self._copy is not None:
            return columns(self._copy, batches)
        with without_adapters(self._policy):
            return columns(self._policy, batches)


def columns(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """Log-probabilities of the trained tokens of each micro-batch, float32 [T], zero elsewhere; without gradient or dropout."""
    model.eval()
    found = []
    with torch.no_grad():
        for batch in batches:
            logprobs = model.score(batch, "logprobs").logprobs
            found.append(torch.zeros_like(batch.loss_weights).index_copy(0, batch.trained, logprobs.float()))
    fsdp.reshard_root(model)
    model.train()
    return found
