"""What runs around and inside each decoder layer's forward: compilation within, recomputation around it, offloading outermost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rayft.parallel.cast import in_type
from rayft.parallel.offload import Offload

Recompute = Literal["none", "selective", "full"]


def wrap_layers(
    layers: nn.ModuleList, *, compile_layers: bool, recompute: Recompute, offload: bool, cast: torch.dtype | None = None
) -> None:
    """Replace each layer's forward on the instance, which changes no parameter name and leaves FSDP's hooks outside.

    Checkpointing goes around the compiled forward: inside of it an attention that is not compiled, as on a CPU, would break
    the graph in the middle of a checkpointed region, and then nothing would be compiled. It is always non-reentrant:
    reentrant checkpointing loses the gradient of tensors that layers share (keys and values in Gemma 4). Nothing in a
    layer draws from a random state, so none is saved.

    torch's own selective checkpointing decides by operator, and sees none of a compiled region or of compiled flex
    attention; `keeping_attention` works at the one call that every backend goes through.

    Args:
        layers: decoder layers, before they are sharded.
        compile_layers: torch.compile each forward.
        recompute: "full" keeps only each layer's input and runs its forward again in the backward; "selective" keeps what
            attention reads and gives too, and runs all but attention again.
        offload: what is kept goes to the host, but for the last layer's, whose backward comes at once.
        cast: type to cast weights to, where FSDP does not.
    """
    host = Offload() if offload else None
    for layer in layers:
        forward = layer.forward
        here = host if layer is not layers[-1] else None
        if compile_layers:
            forward = torch.compile(forward)
        if cast is not None:
            forward = in_type(forward, layer.modules(), cast)
        if recompute != "none":
            forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if recompute == "selective":
            forward = functools.partial(forward, context_fn=functools.partial(_keep_attention, here))
        if host is not None:
            forward = host.around(layer, forward, copies=here is not None)
        layer.forward = forward


Attention = Callable[..., tuple[Tensor, None]]
_kept: ContextVar[Callable[[Attention], Attention] | None] = ContextVar("kept", default=None)
"""What a selectively checkpointed layer does with attention, in the thread that runs the layer, which in the backward is autograd's."""


def keeping_attention(attention: Attention) -> Attention:
    """The same attention, whose calls inside selectively checkpointed layers are not recomputed."""

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        around = _kept.get()
        return attention(*args, **kwargs) if around is None else around(attention)(*args, **kwargs)

    uncompiled: Attention = torch.compiler.disable(call)
    return uncompiled


def _keep_attention(host: Offload | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's forward, which keeps attention's tensors, and of its recomputation, which reads its output."""
    outputs: list[tuple[Any, bool]] = []
    pack, unpack = (host.pack, host.unpack) if host is not None else (torch.Tensor.detach, lambda tensor: tensor)

    def keep(attention: Attention) -> Attention:
        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            with saved_tensors_hooks(pack, unpack):
                out, _ = attention(*args, **kwargs)
            outputs.append((pack(out), out.requires_grad))
            return out, None

        return call

    @contextmanager
    def replay() -> Iterator[None]:
        remaining = iter(outputs)

        def read(attention: Attention) -> Attention:
            def call(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
                packed, requires_grad = next(remaining)
                # The graph of a recomputation is thrown away; a leaf is enough for what comes after to be recorded.
                return unpack(packed).detach().requires_grad_(requires_grad), None

            return call

        with _during(read):
            yield

    return _during(keep), replay()


@contextmanager
def _during(around: Callable[[Attention], Attention]) -> Iterator[None]:
    token = _kept.set(around)
    try:
        yield
    finally:
        _kept.reset(token)
