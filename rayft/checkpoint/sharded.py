"""Asynchronous sharded checkpoints by torch.distributed.checkpoint, resharded on load to any number of ranks.

A checkpoint is a directory `step-<step>-a<attempt>` that counts only once `progress.json` is in it; that file appears in one piece
when every rank's part is on storage, be it a path or an object store. Saves run in a thread on their own gloo group: the default
group must never be used by two threads.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rayft.checkpoint import objects
from rayft.checkpoint.resume import COMMITTED, checkpoints_dir
from rayft.data import store
from rayft.data.store import Location
from rayft.errors import DataError, InfrastructureError, RayftError, no_room, room_for
from rayft.models.load import named_trainable
from rayft.optim.build import set_lr
from rayft.optim.eight_bit import as_float, take_float
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
        self.in_flight: tuple[Future[Any], str] | None = None

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
        directory = store.join(checkpoints_dir(self.session.home), f"step-{step:08d}-a{self.attempt}")
        if self.session.rank == 0:
            with room_for(directory):
                store.delete_tree(directory)
                store.make_folder(directory)
        dist.barrier(group=self.group)
        storage = objects.writer(directory) if store.is_url(directory) else None
        saved = dcp.async_save(_state(parts, optimizer), checkpoint_id=directory, storage_writer=storage, process_group=self.group)
        assert isinstance(saved, Future)
        self.in_flight = saved, directory
        record = {**progress, "step": step, "attempt": self.attempt}

        def finish() -> None:
            self.committing(step)
            with _written(directory):
                saved.result(timeout=self.session.deadline_s)
                if self.session.rank == 0:
                    _commit(directory, record)

        self.session.report(metrics, directory, finish)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until this rank's save in flight is on storage.

        Raises:
            RayftError: it could not be written.
        """
        if self.in_flight is not None:
            (saved, directory), self.in_flight = self.in_flight, None
            with _written(directory):
                saved.result(timeout=self.session.deadline_s)

    def restore(self, directory: Location, parts: Sequence[Any], optimizer: torch.optim.Optimizer | None) -> None:
        """Fill parameters and, when there is an optimizer, its states from a committed checkpoint of any world size.

        Raises:
            DataError: the checkpoint cannot be read, or holds other tensors than this run trains.
        """
        if optimizer is not None:
            _initialise(optimizer)
        place = os.fspath(directory)
        storage = objects.reader(place, _files(place)) if store.is_url(place) else None
        state = _state(parts, optimizer)
        try:
            dcp.load(state, checkpoint_id=place, storage_reader=storage, process_group=self.group)
        except (dcp.CheckpointException, OSError, RuntimeError, ValueError, KeyError) as problem:
            _raise_explained(problem, place)
            cause = str(problem).strip().split("\n")[0]
            raise DataError(
                "checkpoint",
                place,
                f"cannot be read ({type(problem).__name__}: {cause})",
                "Delete that folder to resume from an older one, or choose a new run.name",
            ) from problem
        for name, value in _optimizer_states(parts, optimizer):
            take_float(value, state["optim"][name])


def _state(parts: Sequence[Any], optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Tensor]]:
    """Name -> tensor, in two sections; loading fills these very tensors, but copies of states in 8 bits."""
    model = {name: parameter.detach() for part in parts for name, parameter in named_trainable(part)}
    states = {name: as_float(value) for name, value in _optimizer_states(parts, optimizer)}
    return {"model": model} | ({"optim": states} if optimizer is not None else {})


def _optimizer_states(parts: Sequence[Any], optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    """(<parameter>/<state>, value) of every state."""
    if optimizer is None:
        return
    for part in parts:
        for name, parameter in named_trainable(part):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", value


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its states: one step at learning rate 0 on a zero gradient changes no parameter.

    Whoever steps next sets the learning rate first.
    """
    set_lr(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _commit(directory: str, record: Mapping[str, Any]) -> None:
    """Write the commit mark, last and in one piece; on a store it lists every object with its size and hash."""
    files = {"files": objects.written(directory)} if store.is_url(directory) else {}
    store.write(store.join(directory, COMMITTED), json.dumps({**record, **files}).encode())


def _files(directory: str) -> dict[str, tuple[int, str]]:
    """Name -> (size, sha256) of a committed checkpoint's objects."""
    record = json.loads(store.read(store.join(directory, COMMITTED)))
    return {name: (size, digest) for name, (size, digest) in record["files"].items()}


@contextmanager
def _written(directory: str) -> Iterator[None]:
    """Say in a sentence that a checkpoint could not be written."""
    try:
        yield
    except (OSError, TimeoutError, dcp.CheckpointException) as problem:
        _raise_explained(problem, directory)
        cause = f"could not be written ({type(problem).__name__}: {problem})"
        raise InfrastructureError("checkpoint", directory, cause, "Make room on that storage and run the same command again") from problem


def _raise_explained(problem: BaseException, place: str) -> None:
    """Raise what the sentence of some rank's error is; return when none of them has one."""
    failures = problem.failures if isinstance(problem, dcp.CheckpointException) else {}
    for cause, _ in failures.values():
        if isinstance(cause, RayftError):
            raise cause
    with room_for(place):
        if no_room(problem):
            raise problem
