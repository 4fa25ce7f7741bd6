"""An engine worker's end of a push: open the transport, load chunk after chunk, sum what came and what was loaded.

Independent of the engine: it is given a function that loads named tensors. `vllm_worker` and `local_engine` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rayft.errors import InfrastructureError
from rayft.weight_sync import gloo, nccl
from rayft.weight_sync.adapter import merged_weights
from rayft.weight_sync.broadcast import BroadcastInlet, Connect
from rayft.weight_sync.disk import DiskInlet
from rayft.weight_sync.ipc import IpcInlet
from rayft.weight_sync.wire import Entry, bit_sum, from_table, read_sums

UNDEFINED = ""
"""Version of an engine from when a push begins to change its weights until it is complete."""
Load = Callable[[Iterable[tuple[str, Tensor]]], object]


def refuse_undefined(version: str) -> None:
    """Refuse to begin a push to an engine in which an earlier one broke off: such a process is ended, never used again.

    Args:
        version: of the engine.

    Raises:
        InfrastructureError: it is undefined.
    """
    if version == UNDEFINED:
        rule = "an earlier push to it broke off, so what it holds is undefined"
        raise InfrastructureError("rollout engine", None, rule, "It is restarted by itself")


class Inlet(Protocol):
    """The receiving end of a transport."""

    def receive(self, push: Mapping[str, Any], entries: tuple[Entry, ...]) -> dict[str, Tensor]: ...

    def close(self) -> None: ...


class Receiver:
    """Takes the messages of `weight_sync.protocol.Sender` in one worker of an engine.

    Args:
        load: puts named tensors into the model; it may keep them until the end of the push.
        folder: of the engine's model, which adapters are merged into.
        dtype: of the engine's weights.
        device: of the worker.
        worker: rank of the worker in its engine.
    """

    def __init__(self, load: Load, folder: Path, dtype: torch.dtype, device: torch.device, worker: int = 0) -> None:
        self._load, self._folder, self._dtype, self._device, self._worker = load, folder, dtype, device, worker
        self._inlet: Inlet | None = None
        self._place: Mapping[str, Any] = {}
        self._push: Mapping[str, Any] = {}
        self._held: dict[str, Tensor] = {}
        self._count = 0
        self._received: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}

    def start(self, push: Mapping[str, Any]) -> None:
        """Open the transport that the start message names; a group that is still the same one stays.

        Raises:
            InfrastructureError, RuntimeError, TimeoutError: the transport cannot be opened.
        """
        self._push, self._held, self._count, self._received, self._loaded = push, {}, 0, {}, {}
        keep = push["transport"] in _GROUPS and self._place == push["place"]
        if self._inlet is not None and not keep:
            self.close()
        if self._inlet is None:
            self._inlet = self._open(push["transport"], push["place"])
            self._place = push["place"]

    def chunk(self, push: Mapping[str, Any]) -> None:
        """Receive the tensors of a chunk and load them; adapters are kept until the end."""
        assert self._inlet is not None
        tensors = self._inlet.receive(push, from_table(push["table"]))
        self._count += len(tensors)
        if self._push["verify"]:
            self._received |= {name: bit_sum(tensor) for name, tensor in tensors.items()}
        if self._push["adapter"] is None:
            self._load(self._summed(tensors.items()))
        else:
            self._held |= tensors

    def finish(self) -> None:
        """Merge and load what was kept, unless it is incomplete, and let go of memory that is not ours."""
        if self._push["adapter"] is not None and self._count == self._push["tensors"]:
            merged = merged_weights(self._folder, self._held, self._push["adapter"], self._dtype, self._device)
            self._load(self._summed(merged))
        self._held = {}
        if self._push["transport"] not in _GROUPS:
            self.close()

    def answer(self, parameters: Mapping[str, Tensor], fused: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
        """What the sender compares, after `finish`.

        Args:
            parameters: the model's, by its own names; empty where they cannot be compared.
            fused: see `loaded_flaws`.

        Returns:
            tensors: how many arrived. When the push verifies also received: bit sums of what arrived, by name; and wrong and
            unchecked: names of loaded parameters, see `loaded_flaws`.
        """
        if not self._push["verify"]:
            return {"tensors": self._count}
        wrong, unchecked = loaded_flaws(read_sums(self._loaded), parameters, fused)
        return {"tensors": self._count, "received": read_sums(self._received), "wrong": wrong, "unchecked": unchecked}

    def close(self) -> None:
        """Leave the group or unmap the memory."""
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None

    def _open(self, transport: str, place: Mapping[str, Any]) -> Inlet:
        if transport in _GROUPS:
            return BroadcastInlet(_GROUPS[transport], place, self._device, self._worker)
        return IpcInlet(place, self._device) if transport == "ipc" else DiskInlet(self._device)

    def _summed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if self._push["verify"]:
                self._loaded[name] = bit_sum(tensor)
            yield name, tensor


_GROUPS: dict[str, Connect] = {"gloo": gloo.connect, "nccl": nccl.connect}


def loaded_flaws(
    given: Mapping[str, int], parameters: Mapping[str, Tensor], fused: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[list[str], list[str]]:
    """Hold a model's parameters to the tensors that it was given.

    A fused parameter must sum to its parts, because bit sums add up, in whatever order the engine holds them; rows that pad a vocabulary
    are zero and add nothing.

    Args:
        given: name -> bit sum of the tensor that was given.
        parameters: the model's, by its own names.
        fused: last part of a fused module's name -> those of its parts in the files, as vLLM's `packed_modules_mapping`.

    Returns:
        Names of parameters that are not what was given; names of parameters that could not be checked, because nothing was
        given under their name or the engine keeps them in another layout.
    """
    sums = read_sums({name: bit_sum(parameter) for name, parameter in parameters.items() if parameter.numel()})
    wrong, unchecked = [], [name for name, parameter in parameters.items() if not parameter.numel()]
    for name, value in sums.items():
        parts = [name] if name in given else _parts(name, fused or {}) or _parts_of_experts(name, given)
        if not parts or any(part not in given for part in parts):
            unchecked.append(name)
        elif all((expected - value) % 2**64 for expected in _as_held(sum(given[part] for part in parts), parameters[name].dtype)):
            wrong.append(name)
    return wrong, unchecked


def _as_held(total: int, dtype: torch.dtype) -> tuple[int, ...]:
    """What bits that sum to `total` may sum to in a parameter of that type: as they are; or, of bfloat16 in a router that the engine keeps
    in float32, above 16 bits of zeros."""
    return (total, total << 16) if dtype == torch.float32 else (total,)


def _parts(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    path = name.split(".")
    if len(path) < 2 or path[-2] not in fused:
        return []
    return [".".join([*path[:-2], part, path[-1]]) for part in fused[path[-2]]]


_OF_EXPERTS = {"w13_weight": ("gate_proj", "up_proj", "w1", "w3"), "w2_weight": ("down_proj", "w2")}
"""vLLM's name of all experts' weights in a layer -> how files name the parts of one expert."""


def _parts_of_experts(name: str, given: Mapping[str, int]) -> list[str]:
    """Weights of all experts of the layer, `<layer>.experts.<number>.<part>.weight`."""
    layer, found, rest = name.rpartition(".experts.")
    endings = _OF_EXPERTS.get(rest.rpartition(".")[2], ())
    prefix = f"{layer}.experts."
    return [one for one in given if found and one.startswith(prefix) and one.split(".")[-2] in endings]
