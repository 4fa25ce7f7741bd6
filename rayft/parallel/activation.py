"""Activation checkpointing of decoder layers."""

from __future__ import annotations

from typing import Any


def checkpoint_layers(module: Any) -> None:
    """Keep each decoder layer's input only and recompute the layer in the backward.

    Uses transformers' own checkpointing layers, which keep parameter names (a wrapper module would change them). Always
    non-reentrant: reentrant checkpointing loses the gradient of tensors that layers share (keys and values in Gemma 4).
    Nothing is drawn from a random state inside a layer, so none is saved.
    """
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})
