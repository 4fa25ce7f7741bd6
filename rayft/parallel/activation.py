"""What runs around and inside each decoder layer's forward: compilation within, recomputation without."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def wrap_layers(layers: nn.ModuleList, *, compile_layers: bool, recompute: bool) -> None:
    """Replace each layer's forward on the instance, which changes no parameter name and leaves FSDP's hooks outside.

    Checkpointing goes around the compiled forward: inside of it the attention, which is not compiled, would break the
    graph in the middle of a checkpointed region, and then nothing would be compiled. It is always non-reentrant:
    reentrant checkpointing loses the gradient of tensors that layers share (keys and values in Gemma 4). Nothing in a
    layer draws from a random state, so none is saved.

    Args:
        layers: decoder layers, before they are sharded.
        compile_layers: torch.compile each forward.
        recompute: keep only each layer's input and run its forward again in the backward.
    """
    for layer in layers:
        forward = layer.forward
        if compile_layers:
            forward = torch.compile(forward)
        if recompute:
            forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward
