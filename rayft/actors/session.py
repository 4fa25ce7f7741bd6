"""Who runs a worker: Ray Train, or this very process. Both give the same `Session`."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rayft.actors.mirror import mirrored
from rayft.observe.console import show_messages
from rayft.types import Launch, Session


@contextmanager
def open_session(launch: Launch[Any]) -> Iterator[Session]:
    """The session of this worker. In a local run it owns a process group of one rank while it is open.

    For a run on an object store the session has a folder of its own, whose files go to the store.

    Raises:
        ResourceError: the block ran out of a GPU's memory.
    """
    from rayft.train.room import explained

    show_messages()
    if launch.local:
        with _group_of_one(launch), mirrored(launch.run_dir, launch.remote, pull=True) as flush:
            session = _local_session(launch, flush)
            with explained(launch.cfg, session):
                yield session
        return
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    with _worker_folder(launch) as folder, mirrored(folder, launch.remote, pull=rank == 0) as flush:
        session = _ray_session(launch, folder, flush)
        with explained(launch.cfg, session):
            yield session


@contextmanager
def _worker_folder(launch: Launch[Any]) -> Iterator[Path]:
    if launch.remote is None:
        yield launch.run_dir
        return
    with tempfile.TemporaryDirectory(prefix="rayft-run-") as folder:
        yield Path(folder)


def _ray_session(launch: Launch[Any], folder: Path, flush: Callable[[], None]) -> Session:
    import ray.train
    import ray.train.torch
    from ray.train import Checkpoint, CheckpointUploadMode

    from rayft.checkpoint.resume import prune

    context = ray.train.get_context()
    storage = context.get_storage()

    def report(metrics: dict[str, float], directory: str, finish: Callable[[], None]) -> None:
        def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
            flush()  # the log covers what a checkpoint covers
            finish()
            if context.get_world_rank() == 0:
                prune(launch.home, launch.cfg.checkpoint.keep)
            return checkpoint

        name = directory.rpartition("/")[2]
        ray.train.report(
            metrics,
            Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=upload,
        )

    device = ray.train.torch.get_device() if launch.device_type == "cuda" else "cpu"
    return Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device=str(device),
        run_dir=folder,
        report=report,
        deadline_s=launch.cfg.run.deadline_s,
        remote=launch.remote,
    )


def _local_session(launch: Launch[Any], flush: Callable[[], None]) -> Session:
    from rayft.checkpoint.resume import prune

    def report(metrics: dict[str, float], directory: str, finish: Callable[[], None]) -> None:
        flush()
        finish()
        prune(launch.home, launch.cfg.checkpoint.keep)

    return Session(
        rank=0,
        world_size=1,
        local_rank=0,
        device="cuda:0" if launch.device_type == "cuda" else "cpu",
        run_dir=launch.run_dir,
        report=report,
        deadline_s=launch.cfg.run.deadline_s,
        remote=launch.remote,
    )


@contextmanager
def _group_of_one(launch: Launch[Any]) -> Iterator[None]:
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if launch.device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=launch.cfg.run.deadline_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def owner_name() -> str:
    """How this process signs a lease."""
    return f"rayft on {socket.gethostname()}, process {os.getpid()}"
