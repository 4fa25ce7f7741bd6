"""Weights through memory of the card that a trainer rank and an engine share, by CUDA IPC.

Each rank packs a chunk into one buffer, whose handle the engines on its card opened at the start of the push; an engine copies the
chunk out before the buffer is filled again. Only plain numbers and bytes travel in messages, nothing pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayft.errors import InfrastructureError
from rayft.weight_sync.wire import Entry, view

_FIXED_ARGUMENTS = 7
"""How many leading arguments of torch's rebuild_cuda_tensor say what the tensor is; the others name the memory."""


class IpcOutlet:
    """The trainer's end.

    Args:
        control: gloo group of the trainer's ranks, None when there is one rank.
    """

    every_rank = True
    independent = True

    def __init__(self, control: Any) -> None:
        self._control = control

    def start(self, version: str, buffer: Tensor | None, members: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Handles of every rank's buffer by the unique id of its card; a collective."""
        assert buffer is not None
        own = {card_of(buffer.device): export_buffer(buffer)}
        handles = [own]
        if self._control is not None:
            gathered: list[Any] = [None] * dist.get_world_size(self._control)
            dist.all_gather_object(gathered, own, group=self._control)
            handles = gathered
        merged = {card: handle for each in handles for card, handle in each.items()}
        return [{"handles": merged, "bytes": buffer.numel()} for _ in members]

    def join(self) -> None:
        """Nothing to wait for."""

    def offer(self, buffer: Tensor, entries: Sequence[Entry]) -> dict[str, Any]:
        """The buffer's bytes are complete when its stream is."""
        torch.cuda.synchronize(buffer.device)
        return {"bytes": entries[-1].end}

    def transmit(self, buffer: Tensor) -> None:
        """Engines copy by themselves."""

    def close(self) -> None:
        """Let CUDA free buffers that engines have closed."""
        torch.cuda.ipc_collect()


class IpcInlet:
    """An engine worker's end.

    Args:
        push: the start message.
        device: of the worker.

    Raises:
        InfrastructureError: no trainer rank has its buffer on the worker's card.
    """

    def __init__(self, push: Mapping[str, Any], device: torch.device) -> None:
        card = card_of(device)
        if card not in push["handles"]:
            rule = f"no trainer rank is on this engine's card; trainers are on {', '.join(sorted(push['handles']))}"
            raise InfrastructureError("weight_sync: ipc", card, rule, "Place one engine and one trainer rank on each card, or use nccl")
        self._buffer: Tensor | None = import_buffer(push["handles"][card], push["bytes"], device)

    def receive(self, push: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The chunk's tensors by name, views of a copy: loading may keep them beyond the chunk."""
        assert self._buffer is not None
        copy = self._buffer[: push["bytes"]].clone()
        torch.cuda.synchronize(copy.device)
        return {entry.name: view(copy, entry) for entry in entries}

    def close(self) -> None:
        """Unmap the trainer's buffer."""
        self._buffer = None
        torch.cuda.ipc_collect()


def card_of(device: torch.device) -> str:
    """The unique id of a CUDA device, the same in every process whatever it calls the device."""
    return str(torch.cuda.get_device_properties(device).uuid)


def export_buffer(buffer: Tensor) -> list[Any]:
    """What another process needs to map the buffer (uint8 [n], contiguous, on a CUDA device): numbers and bytes."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return [buffer.storage_offset(), *arguments[_FIXED_ARGUMENTS:]]


def import_buffer(handle: Sequence[Any], size: int, device: torch.device) -> Tensor:
    """Map a buffer of another process, as uint8 [size]."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    offset, *memory = handle
    kind = torch.storage.TypedStorage
    mapped: Tensor = rebuild_cuda_tensor(torch.Tensor, torch.Size([size]), (1,), offset, kind, torch.uint8, device.index, *memory)
    return mapped
