"""Model FLOPs of a step, from the configuration's numbers and the documents' lengths, and the share of the device's peak.

Counted are the multiplications and additions that the mathematics needs: matrix products of decoder layers and head, and the
causal half of attention inside each document. Not counted are recomputation, embedding look-up, norms, activations, padding.
A product of an [n, k] by a [k, m] matrix is 2 n k m FLOPs, and as many again for each of its two gradients
(arXiv 2001.08361 sec. 2.1, arXiv 2204.02311 app. B).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2
"""FLOPs per weight and token."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer.

    Attributes:
        heads, kv_heads, head_dim: of attention.
        window: positions that a position sees, itself included; None when it sees all before it.
        norms: norms over the hidden size.
        qk_norm: queries and keys are normalised.
        mlp: width of the dense MLP, or of the shared experts together; 0 without.
        gated: the MLP has a gate, so three matrices instead of two.
        experts, active, expert_width: routed experts, those that a token visits, and the width of one; 0 in a dense layer.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    norms: int
    qk_norm: bool
    mlp: int
    gated: bool
    experts: int = 0
    active: int = 0
    expert_width: int = 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model.

    Attributes:
        hidden, vocab: sizes of the embedding.
        tied: the head is the embedding.
        softcap: logits go through a tanh.
        layers: the decoder layers in order.
    """

    hidden: int
    vocab: int
    tied: bool
    softcap: bool
    layers: tuple[LayerShape, ...]

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and the head."""
        return self.hidden * self.vocab * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them, but for norms and biases (below 0.2%)."""
        return self.embedding_parameters + sum(layer_parameters(layer, self.hidden) for layer in self.layers)


_UNGATED = {"apertus", "arcee", "gpt_neox", "jais2", "nemotron", "persimmon", "phi", "starcoder2"}
_QK_NORM = {"apertus", "dots1", "exaone4", "flex_olmo", "gemma3_text", "nanochat", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe"}
_FOUR_NORMS = {"gemma2", "gemma3_text", "glm4"}
_NEEDED = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Parts that these formulas lack: latent attention, state spaces, shared K/V, per-layer embeddings, other interleavings.
_UNCOUNTED = (
    "kv_lora_rank",
    "mamba_d_state",
    "mamba_state_dim",
    "ssm_state_size",
    "state_size",
    "attn_layer_period",
    "global_head_dim",
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "interleave_moe_layer_step",
    "is_encoder_decoder",
)


def shape_of(config: Any) -> ModelShape | None:
    """The sizes that a transformers configuration (its text part) describes; None for architectures that are not counted."""
    config = getattr(config, "text_config", None) or config
    if any(getattr(config, name, None) is None for name in _NEEDED) or any(getattr(config, name, None) for name in _UNCOUNTED):
        return None
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return ModelShape(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        layers=tuple(_layer(config, index, window if kind == "sliding_attention" else None) for index, kind in enumerate(kinds)),
    )


def _layer(config: Any, index: int, window: int | None) -> LayerShape:
    experts = next((n for name in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, name, None))), 0)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    sparse = bool(experts) and _is_sparse(config, index)
    shared = getattr(config, "shared_expert_intermediate_size", None) or (getattr(config, "n_shared_experts", None) or 0) * width
    return LayerShape(
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        window=window,
        norms=4 if config.model_type in _FOUR_NORMS else 2,
        qk_norm=config.model_type in _QK_NORM or bool(getattr(config, "use_qk_norm", False)),
        mlp=shared if sparse else config.intermediate_size,
        gated=config.model_type not in _UNGATED,
        experts=experts if sparse else 0,
        active=config.num_experts_per_tok if sparse else 0,
        expert_width=width if sparse else 0,
    )


def _is_sparse(config: Any, index: int) -> bool:
    """Whether layer `index` of a mixture of experts has routed experts: some families keep a few dense layers."""
    first = getattr(config, "first_k_dense_replace", None) or 0
    every = getattr(config, "decoder_sparse_step", None) or 1
    return index >= first and (index + 1) % every == 0 and index not in (getattr(config, "mlp_only_layers", None) or ())


def linears(layer: LayerShape, hidden: int) -> dict[str, tuple[int, int]]:
    """The dense linear layers: name inside the decoder layer -> (inputs, outputs)."""
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    found = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
    }
    if layer.mlp:
        found |= {"mlp.gate_proj": (hidden, layer.mlp)} if layer.gated else {}
        found |= {"mlp.up_proj": (hidden, layer.mlp), "mlp.down_proj": (layer.mlp, hidden)}
    return found


def stacks(layer: LayerShape, hidden: int) -> dict[str, tuple[int, int]]:
    """The stacks of routed experts: name inside the decoder layer -> (inputs, outputs) of one expert."""
    if not layer.experts:
        return {}
    return {
        "mlp.experts.gate_up_proj": (hidden, (2 if layer.gated else 1) * layer.expert_width),
        "mlp.experts.down_proj": (layer.expert_width, hidden),
    }


def layer_parameters(layer: LayerShape, hidden: int, *, active_only: bool = False) -> int:
    """Weights of a decoder layer's matrices; with `active_only`, of the experts only those that one token visits."""
    dense = sum(inputs * outputs for inputs, outputs in linears(layer, hidden).values())
    visited = layer.active if active_only else layer.experts
    return dense + layer.experts * hidden + visited * layer.expert_width * hidden * (3 if layer.gated else 2)


def attention_pairs(length: int, window: int | None) -> float:
    """Query-key pairs of one causal document, counted as half the square; a window cuts a band out of it."""
    seen = length if window is None else min(length, window)
    return seen * length - seen * seen / 2


def flops_per_step(shape: ModelShape, document_lengths: Iterable[int], head_tokens: int, *, adapter_parameters: int | None = None) -> float:
    """FLOPs of forward and backward of the documents, each run once.

    Args:
        shape: of the model.
        document_lengths: without padding.
        head_tokens: positions whose logits are computed: the trained ones.
        adapter_parameters: weights of the low-rank adapters over a frozen base that a token meets, so of experts those of the ones
            that it visits; None when every weight is trained. A frozen
            weight has no weight gradient; a head that is trained beside adapters is counted as frozen.
    """
    lengths, trained, frozen = list(document_lengths), FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT, FORWARD + INPUT_GRADIENT
    base = trained if adapter_parameters is None else frozen
    body = base * sum(layer_parameters(layer, shape.hidden, active_only=True) for layer in shape.layers)
    adapters = trained * (adapter_parameters or 0)
    head = base * shape.hidden * shape.vocab
    # Scores and their product with the values: two products of 2 head_dim FLOPs a pair, thrice with their two gradients.
    attention = sum(
        12 * layer.heads * layer.head_dim * sum(attention_pairs(length, layer.window) for length in lengths) for layer in shape.layers
    )
    return (body + adapters) * sum(lengths) + head * head_tokens + attention


_PEAKS = (
    # Dense bfloat16 with float32 accumulation, from the vendors' data sheets (half of what they state with sparsity).
    (r"H100( SXM\d?)?( 80GB)?( HBM3)?|H200|GH200 \d+GB", 989.4e12),
    (r"H100 NVL|H200 NVL", 835.5e12),
    (r"H100 PCIe", 756.5e12),
    (r"A100([- ](SXM4|PCIE|PCIe))?([- ]\d+GB)?( PCIe)?", 312e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"B200", 2250e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"RTX 3090", 71e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 5090", 209.5e12),
    (r"MI300X( VF)?", 1307.4e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by the name that torch gives; None when it is not in the table, as for parts of a card."""
    name = re.sub(r"^(NVIDIA |AMD )?(GeForce |Instinct )?", "", device_name)
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)
