"""Who runs a worker: Ray Train, or this very process. Both give the same `Session`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rayft.observe.console import show_messages
from rayft.types import Launch, Session


@contextmanager
def open_session(launch: Launch) -> Iterator[Session]:
    """The session of this worker. In a local run it owns a process group of one rank while it is open."""
    show_messages()
    if launch.local:
        with _group_of_one(launch):
            yield _local_session(launch)
    else:
        yield _ray_session(launch)


def _ray_session(launch: Launch) -> Session:
    import ray.train
    import ray.train.torch
    from ray.train import Checkpoint, CheckpointUploadMode

    from rayft.checkpoint.resume import prune

    context = ray.train.get_context()
    storage = context.get_storage()

    def report(metrics: dict[str, float], directory: Path, finish: Callable[[], None]) -> None:
        def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
            finish()
            if context.get_world_rank() == 0:
                prune(launch.run_dir, launch.cfg.checkpoint.keep)
            return checkpoint

        ray.train.report(
            metrics,
            Checkpoint(str(directory), storage.storage_filesystem),
            checkpoint_dir_name=directory.name,
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
        run_dir=launch.run_dir,
        report=report,
        deadline_s=launch.cfg.run.deadline_s,
    )


def _local_session(launch: Launch) -> Session:
    from rayft.checkpoint.resume import prune

    def report(metrics: dict[str, float], directory: Path, finish: Callable[[], None]) -> None:
        finish()
        prune(launch.run_dir, launch.cfg.checkpoint.keep)

    device = "cuda:0" if launch.device_type == "cuda" else "cpu"
    return Session(
        rank=0, world_size=1, local_rank=0, device=device, run_dir=launch.run_dir, report=report, deadline_s=launch.cfg.run.deadline_s
    )


@contextmanager
def _group_of_one(launch: Launch) -> Iterator[None]:
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
