"""Which family a model belongs to. Families with something special have a file in `arch`; all others get the plain spec."""

from __future__ import annotations

from typing import Any

from rayft.errors import ConfigError
from rayft.types import ModelSpec

PLAIN = ModelSpec(model_types=())
"""Decoder layers at model.layers, nothing to fix: Llama, Mistral, Qwen2, Qwen3, OLMo, SmolLM and most others; see `doubt`."""

COMPARED = {
    "cohere", "gemma2", "gemma3_text", "gemma4_text", "glm4_moe", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
    "qwen3_moe",
}  # fmt: skip
"""Values of the text configuration's `model_type` whose scores are held to transformers' by tests/parity."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def doubt(config: Any) -> str | None:
    """What to know before training a family that was not compared with transformers; None for the others."""
    kind = config.get_text_config().model_type
    if kind in COMPARED:
        return None
    return f"{kind} is not among the families that were compared with transformers: run rayft check MODEL before training it"


def spec_of(config: Any) -> ModelSpec:
    """The family's spec.

    Raises:
        ConfigError: the model has layers that would mix packed documents.
    """
    from rayft.models.arch import SPECS

    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if other := sorted(kinds - _ATTENTION_LAYERS):
        raise ConfigError(
            "model.path",
            config.model_type,
            f"has layers of kind {', '.join(other)}, whose state would run across packed documents",
            "Choose a model whose layers are full or sliding attention",
        )
    for spec in SPECS:
        if config.model_type in spec.model_types:
            if reason := spec.unsupported.get("training"):
                raise ConfigError("model.path", config.model_type, reason, "Choose another model")
            return spec
    return PLAIN
