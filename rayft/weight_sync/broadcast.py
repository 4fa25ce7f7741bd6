"""Weights by broadcast from rank 0 of the trainer to every worker of every engine, over a group made for just these members."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rayft.weight_sync.wire import Entry, view


class Group(Protocol):
    """A set of processes that rank 0 broadcasts to."""

    def broadcast(self, buffer: Tensor) -> None:
        """Send (rank 0) or fill (others) the buffer; returns when that is done. Raises RuntimeError or TimeoutError."""

    def close(self) -> None:
        """Leave; whoever still waits in a broadcast gets an error."""


Connect = Callable[[str, int, int, int, torch.device, float], Group]
"""(host, port, rank, world size, device, deadline in seconds) -> group; returns when all members are there."""


class BroadcastOutlet:
    """The trainer's end. Another attempt or another set of engines gets a new group, never the old one.

    Args:
        connect: what the group is made of.
        host: address of this process that engines reach.
        device: where buffers lie.
        deadline_s: for joining and for each broadcast.
    """

    every_rank = False
    independent = False

    def __init__(self, connect: Connect, host: str, device: torch.device, deadline_s: float) -> None:
        self._connect, self._host, self._device, self._deadline_s = connect, host, device, deadline_s
        self._members: tuple[Any, ...] = ()
        self._port = 0
        self._world = 1
        self._group: Group | None = None

    def start(self, version: str, buffer: Tensor | None, members: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """What each engine needs to join: address, its first rank, the size."""
        if buffer is None:
            return [{} for _ in members]
        key = (version.split(".")[0], *members)
        if self._group is None or key != self._members:
            self.close()
            self._members, self._port, self._world = key, _free_port(), 1 + sum(workers for _, workers in members)
        ranks = [1 + sum(workers for _, workers in members[:index]) for index in range(len(members))]
        place = {"host": self._host, "port": self._port, "world": self._world, "deadline_s": self._deadline_s}
        return [{**place, "rank": rank} for rank in ranks]

    def join(self) -> None:
        """Make the group, while engines do."""
        if self._group is None and self._world > 1:
            self._group = self._connect(self._host, self._port, 0, self._world, self._device, self._deadline_s)

    def offer(self, buffer: Tensor, entries: Sequence[Entry]) -> dict[str, Any]:
        """How many bytes will come."""
        return {"bytes": entries[-1].end}

    def transmit(self, buffer: Tensor) -> None:
        """Broadcast the chunk, while engines receive it."""
        if self._group is not None:
            self._group.broadcast(buffer)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None


class BroadcastInlet:
    """An engine worker's end.

    Args:
        connect: as the trainer's.
        push: the start message.
        device: of the worker.
        worker: rank of the worker in its engine.
    """

    def __init__(self, connect: Connect, push: Mapping[str, Any], device: torch.device, worker: int) -> None:
        self._device = device
        self._group = connect(push["host"], push["port"], push["rank"] + worker, push["world"], device, push["deadline_s"])

    def receive(self, push: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The chunk's tensors by name, views of a fresh buffer."""
        buffer = torch.empty(push["bytes"], dtype=torch.uint8, device=self._device)
        self._group.broadcast(buffer)
        return {entry.name: view(buffer, entry) for entry in entries}

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
