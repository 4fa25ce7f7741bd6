"""A broadcast group over TCP between processes without GPU, beside and independent of the trainer's own groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GlooGroup:
    """See `broadcast.Group`. Buffers lie in host memory."""

    def __init__(self, store: dist.Store, rank: int, world: int, deadline: timedelta) -> None:
        self._store = store
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world, deadline)

    def broadcast(self, buffer: Tensor) -> None:
        """Raises RuntimeError when a member is gone or late."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([buffer], options).wait()

    def close(self) -> None:
        """Leave."""
        self._group.abort()


def connect(host: str, port: int, rank: int, world: int, device: torch.device, deadline_s: float) -> GlooGroup:
    """See `broadcast.Connect`. Raises RuntimeError when not all members come in time."""
    deadline = timedelta(seconds=deadline_s)
    store = dist.TCPStore(host, port, world, rank == 0, deadline, wait_for_workers=False)
    return GlooGroup(store, rank, world, deadline)
