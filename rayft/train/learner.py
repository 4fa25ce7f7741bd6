"""What every trainer steps with: mesh, sharded model, optimizer, and the newest checkpoint in both."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from rayft.checkpoint import resume
from rayft.checkpoint.sharded import Checkpointer
from rayft.config.schema import AnyRun
from rayft.errors import TrainingError
from rayft.models.load import named_trainable
from rayft.optim.build import build_optimizer
from rayft.optim.groups import embeddings_of
from rayft.parallel.mesh import Mesh, build_mesh
from rayft.train.build import build_model
from rayft.train.journal import from_rank_0
from rayft.types import Launch, Session

log = logging.getLogger("rayft")


@dataclass(frozen=True)
class Learner:
    """Model and optimizer of a run on one rank.

    Attributes:
        mesh: of all ranks.
        parts: of the model; one today.
        optimizer: over what is trained of them.
    """

    mesh: Mesh
    parts: list[Any]
    optimizer: Optimizer


def build_learner(cfg: AnyRun, session: Session, replicas: int) -> Learner:
    """Build the model and, over its sharded parameters, the optimizer.

    Args:
        cfg: the run.
        session: of this rank.
        replicas: groups of ranks that each hold the whole state.
    """
    mesh = build_mesh(session.device.split(":")[0], session.world_size, replicas)
    part = build_model(cfg, session, mesh)
    named = named_trainable(part)
    optimizer = build_optimizer(named, cfg.optim, fused=True, embeddings=embeddings_of(part), partial=part.trained_rows)
    return Learner(mesh, [part], optimizer)


def restore(learner: Learner, launch: Launch[Any], session: Session, checkpointer: Checkpointer) -> int:
    """Load the newest committed checkpoint, the same one on every rank; the steps taken so far."""
    restored = from_rank_0(resume.newest(session.home) if session.rank == 0 else None)
    if restored is None:
        return 0
    resume.refuse_other_base(restored, launch.identity)
    checkpointer.restore(restored.directory, learner.parts, learner.optimizer)
    if session.rank == 0:
        log.info("resumed at step %d from %s", restored.step, restored.directory)
    return restored.step


def require_finite(step: int, loss: float, norm: float, remedy: str) -> None:
    """Refuse to go on from a step whose numbers mean nothing.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rule = f"the loss is {loss} and the gradient norm {norm}"
        raise TrainingError(f"step {step}", None, rule, f"{remedy}; the newest checkpoint is from before")
