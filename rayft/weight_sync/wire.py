"""How tensors travel: packed end to end into byte buffers of bounded size, each with a table; and sums of their bit patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

ALIGNMENT = 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its buffer.

    Attributes:
        name: its Hugging Face name.
        dtype: name of its type, such as "bfloat16".
        shape: its full shape.
        offset: its first byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + torch.Size(self.shape).numel() * self.torch_dtype.itemsize


def plan_chunks(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], limit: int) -> list[tuple[Entry, ...]]:
    """Split tensors, in their order, into chunks of at most `limit` bytes; a larger tensor gets a chunk of its own."""
    chunks: list[list[Entry]] = [[]]
    for name, dtype, shape in tensors:
        offset = _aligned(chunks[-1][-1].end) if chunks[-1] else 0
        entry = Entry(name, str(dtype).removeprefix("torch."), tuple(shape), offset)
        if chunks[-1] and entry.end > limit:
            chunks.append([])
            entry = Entry(name, entry.dtype, entry.shape, 0)
        chunks[-1].append(entry)
    return [tuple(chunk) for chunk in chunks if chunk]


def to_table(entries: Sequence[Entry]) -> list[list[Any]]:
    """Entries as plain lists, for a message."""
    return [[entry.name, entry.dtype, list(entry.shape), entry.offset] for entry in entries]


def from_table(table: Sequence[Sequence[Any]]) -> tuple[Entry, ...]:
    """Entries from a message."""
    return tuple(Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in table)


def view(buffer: Tensor, entry: Entry) -> Tensor:
    """The entry's tensor in the buffer (uint8), without a copy."""
    return buffer[entry.offset : entry.end].view(entry.torch_dtype).view(entry.shape)


def bit_sum(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum of the tensor's bit patterns read as integers of its width, modulo 2^64.

    It is additive: the sum over a fused weight is the sum over its parts, so a loaded weight can be held to what was received.
    """
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def read_sums(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> sum as a number, with one copy from the device."""
    if not sums:
        return {}
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def differences(sent: Mapping[str, int], received: Mapping[str, int]) -> list[str]:
    """What is wrong with the tensors that arrived, one phrase for each; empty when all are as sent."""
    missing = [f"{name} did not arrive" for name in sent if name not in received]
    unknown = [f"{name} was never sent" for name in received if name not in sent]
    return missing + unknown + [f"{name} differs" for name in sent if name in received and sent[name] != received[name]]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
