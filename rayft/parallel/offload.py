"""What decoder layers save for the backward, held on the host in between.

Copies run on a stream of their own. A layer's tensors leave the device when the next layer's forward has been issued and their copies
are done; in the backward, the first one that a layer asks for brings back all of its own, if the layer after it has not done so
already, and starts those of the layer before. So the device holds the saved tensors of two layers. The last layer keeps its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

SMALL = 16
"""A tensor of less than 1/SMALL of the elements of a layer's input stays on the device: statistics of norms and of attention."""


@dataclass(eq=False)
class _Layer:
    """One forward of one layer.

    Attributes:
        stay: storages that are not copied: weights, and what all layers share.
        least: elements of the smallest tensor that is copied.
        before: the layer that ran before, while its tensors are needed.
        copies: its tensors; each lives as long as autograd holds it.
        done: the last copy to the host is made.
        back: the last copy to the device is made; None until copies were started.
    """

    stay: set[int]
    least: int
    before: weakref.ref[_Layer] | None
    copies: list[weakref.ref[_Copy]] = field(default_factory=list)
    done: torch.cuda.Event | None = None
    back: torch.cuda.Event | None = None
    fetched: bool = False


@dataclass(eq=False)
class _Copy:
    """One saved tensor; `uses` counts who will still ask for it."""

    layer: _Layer
    host: Tensor
    device: Tensor | None
    uses: int = 0


class Offload:
    """The saved tensors of one model's layers, which run one after the other."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.layer: _Layer | None = None
        self.latest: weakref.ref[_Layer] | None = None
        self.known: dict[Any, _Copy] = {}
        self.leaving: list[_Copy] = []

    def around(self, layer: nn.Module, forward: Callable[..., Any], *, copies: bool) -> Callable[..., Any]:
        """The layer's forward with what it saves going to the host; without `copies` it only lets the layer before go."""

        def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(hidden, *args, **kwargs)
            if copies:
                shared = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
                stay = {value.untyped_storage().data_ptr() for value in (*layer.parameters(), *shared)}
                self.layer = _Layer(stay, hidden.numel() // SMALL, self.latest)
                with saved_tensors_hooks(self.pack, self.unpack):
                    out = forward(hidden, *args, **kwargs)
            else:
                self.layer = None
                out = forward(hidden, *args, **kwargs)
            self._let_go()
            return out

        return call

    def pack(self, tensor: Tensor) -> Tensor | _Copy:
        """Start the copy of a tensor that the layer in progress saves, once however often it saves it."""
        layer = self.layer
        assert layer is not None
        if not _can_leave(tensor, layer):
            return tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride(), tensor._version)
        if key not in self.known:
            copy = _Copy(layer, self._to_host(tensor.detach()), tensor.detach())
            layer.copies.append(weakref.ref(copy))
            self.known[key] = copy
        self.known[key].uses += 1
        return self.known[key]

    def unpack(self, packed: Tensor | _Copy) -> Tensor:
        """The tensor on its device; the layer before starts to come back."""
        if isinstance(packed, Tensor):
            return packed
        layer = packed.layer
        self._fetch(layer)
        if layer.before is not None and (before := layer.before()) is not None:
            self._fetch(before)
        if layer.back is not None:
            torch.cuda.current_stream().wait_event(layer.back)
        assert packed.device is not None, "a saved tensor is read once for each time that it was saved"
        tensor = packed.device
        packed.uses -= 1
        packed.device = tensor if packed.uses else None
        return tensor

    def _let_go(self) -> None:
        """The layer before leaves the device, once its copies are made; this layer's are to follow it."""
        before = self.leaving[0].layer if self.leaving else None
        if before is not None and before.done is not None:
            torch.cuda.current_stream().wait_event(before.done)
        for copy in self.leaving:
            copy.device = None
        self.leaving = list(self.known.values())
        self.known.clear()
        if self.layer is None:
            self.latest = None
            return
        self.latest = weakref.ref(self.layer)
        if self.stream is not None:
            self.layer.done = self.stream.record_event()

    def _fetch(self, layer: _Layer) -> None:
        """Start to bring a layer's tensors back, unless that was done."""
        if layer.fetched:
            return
        layer.fetched = True
        for copy in (reference() for reference in layer.copies):
            if copy is not None and copy.device is None:
                copy.device = self._to_device(copy)
        if self.stream is not None:
            layer.back = self.stream.record_event()

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            return host.copy_(tensor)
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return host.copy_(tensor, non_blocking=True)

    def _to_device(self, copy: _Copy) -> Tensor:
        if self.stream is None:
            return copy.host
        tensor = torch.empty_like(copy.host, device=self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            tensor.copy_(copy.host, non_blocking=True)
        tensor.record_stream(self.stream)  # nobody may ever wait for it, when its part of the graph is not run
        return tensor


def _can_leave(tensor: Tensor, layer: _Layer) -> bool:
    """Values that are large, the layer's own, and dense, so that a copy has the same strides (compiled backwards insist)."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_floating_point()
        and tensor.numel() >= layer.least
        and tensor.untyped_storage().data_ptr() not in layer.stay
        and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )
