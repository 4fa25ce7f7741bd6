"""Asynchronous sharded checkpoints by torch.distributed.checkpoint, resharded on load to any number of ranks.

A checkpoint is a directory `step-<step>-a<attempt>` that counts only once `progress.json` is in it; that file is written by
rename when every rank's part is on storage. Saves run in a thread on their own gloo group: the default group must never be
used by two threads.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rayft.checkpoint.resume import COMMITTED, checkpoints_dir
from rayft.errors import DataError, InfrastructureError
from rayft.models.load import named_trainable
from rayft.types import Session

log = logging.getLogger("rayft")


class Checkpointer:
    """Saves and restores one run. At most one save is in flight; the next one waits for it.

    Args:
        session: of this rank.
        attempt: number of this start of the run; part of directory names, so that no two attempts merge into one.
        committing: called on every rank's upload thread right before a checkpoint is committed.
    """

    def __init__(self, session: Session, attempt: int, committing: Callable[[int], None]) -> None:
        self.session, self.attempt, self.committing = session, attempt, committing
        self.group = dist.new_group(backend="gloo")
        self.in_flight: Future[Any] | None = None

    def save(
        self, step: int, parts: Sequence[Any], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any], metrics: dict[str, float]
    ) -> float:
        """Start a save of everything that resuming needs.

        Args:
            step: optimizer steps taken.
            parts, optimizer: what to save: trained parameters and optimizer states, by Hugging Face name.
            progress: JSON-able facts to store beside them.
            metrics: reported with the checkpoint.

        Returns:
            Seconds that the training thread was held: waiting for the previous save, and copying to the host.
        """
        start = time.perf_counter()
        self.wait()
        directory = checkpoints_dir(self.session.run_dir) / f"step-{step:08d}-a{self.attempt}"
        if self.session.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        dist.barrier(group=self.group)
        saved = dcp.async_save(_state(parts, optimizer), checkpoint_id=str(directory), process_group=self.group)
        assert isinstance(saved, Future)
        self.in_flight = saved
        record = {**progress, "step": step, "attempt": self.attempt}

        def finish() -> None:
            self.committing(step)
            try:
                saved.result(timeout=self.session.deadline_s)
                if self.session.rank == 0:
                    _commit(directory, record)
            except (OSError, TimeoutError, dcp.CheckpointException) as problem:
                raise InfrastructureError(
                    "checkpoint",
                    str(directory),
                    f"could not be written ({type(problem).__name__}: {problem})",
                    "Make room on that storage and run the same command again",
                ) from problem

        self.session.report(metrics, directory, finish)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until this rank's save in flight is on storage; raises what went wrong."""
        if self.in_flight is not None:
            self.in_flight.result(timeout=self.session.deadline_s)
            self.in_flight = None

    def restore(self, directory: Path, parts: Sequence[Any], optimizer: torch.optim.Optimizer | None) -> None:
        """Fill parameters and, when there is an optimizer, its states from a committed checkpoint of any world size.

        Raises:
            DataError: the checkpoint cannot be read, or holds other tensors than this run trains.
        """
        if optimizer is not None:
            _initialise(optimizer)
        try:
            dcp.load(_state(parts, optimizer), checkpoint_id=str(directory), process_group=self.group)
        except (dcp.CheckpointException, OSError, RuntimeError, ValueError, KeyError) as problem:
            cause = str(problem).strip().split("\n")[0]
            raise DataError(
                "checkpoint",
                str(directory),
                f"cannot be read ({type(problem).__name__}: {cause})",
                "Delete that folder to resume from an older one, or choose a new run.name",
            ) from problem


def _state(parts: Sequence[Any], optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Tensor]]:
    """Name -> tensor, in two sections; loading fills these very tensors. Optimizer states are named <parameter>/<state>."""
    model: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in named_trainable(part):
            model[name] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
                states[f"{name}/{key}"] = value
    return {"model": model} | ({"optim": states} if optimizer is not None else {})


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its states: one step at learning rate 0 on a zero gradient changes no parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _commit(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the commit mark, last and by rename."""
    temporary = directory / f".{COMMITTED}"
    with temporary.open("w") as stream:
        json.dump(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(directory / COMMITTED)
