"""Weights through a folder that trainer and engines see: one safetensors file per chunk, one folder per version."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayft.errors import room_for
from rayft.weight_sync.wire import Entry, view


class DiskOutlet:
    """The trainer's end. The folder of a version goes away with the next push.

    Args:
        folder: on storage that every engine reads.
    """

    every_rank = False
    independent = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: Path | None = None
        self._written = 0

    def start(self, version: str, buffer: Tensor | None, members: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        """Make the version's folder; engines need to know nothing in advance. Raises ResourceError when there is no room."""
        if buffer is not None:
            self.close()
            self._current, self._written = self._folder / f"weights-{version}", 0
            shutil.rmtree(self._current, ignore_errors=True)
            with room_for(self._folder):
                self._current.mkdir(parents=True)
        return [{} for _ in members]

    def join(self) -> None:
        """Nothing to wait for."""

    def offer(self, buffer: Tensor, entries: Sequence[Entry]) -> dict[str, Any]:
        """Write the chunk; the message names its file.

        Raises:
            ResourceError: the disk is full.
        """
        from safetensors.torch import save_file

        assert self._current is not None
        path = self._current / f"{self._written:05d}.safetensors"
        with room_for(self._current):
            save_file({entry.name: view(buffer, entry).contiguous() for entry in entries}, path)
        self._written += 1
        return {"file": str(path)}

    def transmit(self, buffer: Tensor) -> None:
        """Nothing is left to do once the file is there."""

    def close(self) -> None:
        """Delete what was pushed last."""
        if self._current is not None:
            shutil.rmtree(self._current, ignore_errors=True)
            self._current = None


class DiskInlet:
    """An engine worker's end: reads chunks onto its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def receive(self, push: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The chunk's tensors by name."""
        from safetensors.torch import load_file

        names = {entry.name for entry in entries}
        return {name: tensor for name, tensor in load_file(push["file"], device=str(self._device)).items() if name in names}

    def close(self) -> None:
        """Nothing is held."""
