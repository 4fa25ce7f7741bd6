"""Bytes of what a step computes: what autograd keeps of a decoder layer, what the loss and wide attention hold while they run.

Sizes follow the decoder layers of transformers, as they are written or as inductor compiles them. Bytes per token where nothing else is
said; `compute` is the bytes of a value in forward and backward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rayft.config.schema import Adapter, AnyRun
from rayft.observe.flops import LayerShape, ModelShape, linears, stacks
from rayft.parallel.attention import choose
from rayft_kernels.attention.workspace import backward_bytes
from rayft_kernels.linear_cross_entropy.chunks import chunk_rows, weighted_nll_bytes

FLOAT32 = 4
_WORKSPACE_ABOVE = 256


def is_target(name: str, targets: str | Iterable[str]) -> bool:
    """Whether `adapter.targets` or `adapter.modules_to_save` selects a linear module by its name."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in targets)


def is_stack_target(name: str, adapter: Adapter) -> bool:
    """Whether `adapter.target_parameters` selects a stack of experts; families differ in the name of the module that holds it."""
    return any(ending.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1] for ending in adapter.target_parameters)


@dataclass(frozen=True)
class How:
    """What decoder layers and head run on.

    Attributes:
        gpu: attention gives its output in the layout that its reader takes; a CPU's is copied.
        compiled: by inductor, whose backward makes elementwise values again unless a matrix product reads them.
        lora, norm_rope, glu: the fused operations of `rayft_kernels`.
        lean: the gradient of a trained head on a GPU is made without a float32 sum.
        attention: parallel.attention.
        experts: routed experts are one node, which keeps their input, gate and up.
    """

    gpu: bool
    compiled: bool = False
    lora: bool = False
    norm_rope: bool = False
    glu: bool = False
    lean: bool = False
    attention: str = "auto"
    experts: bool = False

    def has_workspace(self, head_dim: int) -> bool:
        """Whether attention runs as products over a workspace of probabilities."""
        return self.gpu and head_dim > _WORKSPACE_ABOVE and choose(head_dim, "cuda", self.attention)[0] == "triton"


def how_of(cfg: AnyRun, device: str) -> How:
    """What a family that can have every fused operation runs on."""

    def used(setting: str) -> bool:
        return setting == "on" or (setting == "auto" and device == "cuda")

    kernels, lora = cfg.kernels, cfg.adapter.type == "lora" and used(cfg.kernels.lora)
    experts = used(kernels.experts) or (kernels.experts == "auto" and bool(cfg.adapter.target_parameters))
    lean, glu = kernels.linear_cross_entropy == "lean", used(kernels.glu) and not lora
    return How(device == "cuda", cfg.parallel.compile, lora, used(kernels.norm_rope), glu, lean, cfg.parallel.attention, experts)


def layer_activations(layer: LayerShape, hidden: int, compute: int, adapter: Adapter, how: How) -> int:
    """Bytes per token that autograd keeps of one decoder layer.

    A linear layer keeps its input when its weight or an adapter on it is trained; behind dropout the adapter keeps another.
    """
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    sizes = linears(layer, hidden)
    # Compiled layers keep the residual stream before each norm, and what matrix products of the backward read; nothing else.
    norms = 2 * compute * hidden if how.compiled else layer.norms * norm(hidden, compute, adapter)
    if layer.qk_norm:
        low = how.compiled or how.norm_rope
        norms += compute * (queries + keys) if low else norm(queries, compute, adapter) + norm(keys, compute, adapter)
    # Norm outputs are the inputs of q, k, v and of gate, up; a norm over queries or keys gives what attention keeps anyway.
    kept = {"self_attn.q_proj": hidden, "self_attn.o_proj": 0 if how.gpu else queries, "mlp.up_proj": hidden, "mlp.down_proj": layer.mlp}
    if how.lora:
        kept["mlp.down_proj"] = 0
        kept["mlp.up_proj"] = 0 if how.compiled else hidden
    inputs = compute * sum(size for name, size in kept.items() if name in sizes and (how.lora or _keeps_input(name, adapter)))
    # The gate before and, unless fused, after its activation, and what it multiplies; without a gate, the value before its activation.
    halves = 2 if how.compiled or how.lora or how.glu else 3
    inner = compute * (halves if layer.gated else 1) * layer.mlp
    ranks = _adapter_activations(sizes, compute, adapter, masks=not how.lora)
    return norms + attention_activations(layer, compute) + inputs + inner + ranks + _experts(layer, hidden, compute, adapter, how)


def attention_activations(layer: LayerShape, compute: int) -> int:
    """Bytes per token of attention alone: queries, keys, values, output, and a statistic a head; scores are never kept."""
    return 2 * compute * (layer.heads + layer.kv_heads) * layer.head_dim + FLOAT32 * layer.heads


def norm(size: int, compute: int, adapter: Adapter) -> int:
    """Bytes per token of an RMS norm: its input in float32 and, when its weight is trained, the normalised value."""
    return FLOAT32 * size + (compute * size if adapter.type == "none" else 0)


_SHARED_INPUT = {"self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"), "mlp.up_proj": ("mlp.gate_proj",)}


def _keeps_input(name: str, adapter: Adapter) -> bool:
    if adapter.type == "none":
        return True
    readers = (name, *_SHARED_INPUT.get(name, ()))
    return adapter.dropout == 0 and any(is_target(f"model.layers.0.{reader}", adapter.targets) for reader in readers)


def _adapter_activations(sizes: dict[str, tuple[int, int]], compute: int, adapter: Adapter, *, masks: bool) -> int:
    """Per token: the value between the two low-rank matrices, and with dropout, unless fused, its mask and what it lets through."""
    if adapter.type == "none":
        return 0
    adapted = [inputs for name, (inputs, _) in sizes.items() if is_target(f"model.layers.0.{name}", adapter.targets)]
    dropout = (1 + compute) * sum(adapted) if masks and adapter.dropout > 0 else 0
    return compute * adapter.r * len(adapted) + dropout


def _experts(layer: LayerShape, hidden: int, compute: int, adapter: Adapter, how: How) -> int:
    """Per token: of each visited expert the output before weighting, the inner values, and the inputs of stacks that are trained or
    adapted; fused, the input once and gate and up."""
    if not (how.experts and layer.gated and layer.active):
        inputs = [size[0] for name, size in stacks(layer, hidden).items() if adapter.type == "none" or is_stack_target(name, adapter)]
        return compute * layer.active * (hidden + (3 if layer.gated else 1) * layer.expert_width + sum(inputs))
    adapted = sum(is_stack_target(name, adapter) for name in stacks(layer, hidden)) if adapter.type == "lora" else 0
    rank = max(16, 1 << (adapter.r - 1).bit_length())  # as matrix units take it
    return compute * (hidden + layer.active * (2 * layer.expert_width + adapted * rank))


def merged_stacks(layer: LayerShape, hidden: int, adapter: Adapter, how: How) -> list[int]:
    """Weights of each stack of experts that peft adds the product of its adapter to in every forward, where experts are not fused.

    Autograd keeps the sums for the backward, as it does any weight.
    """
    if how.experts and layer.gated:
        return []
    found = [size[0] * size[1] for name, size in stacks(layer, hidden).items() if adapter.type == "lora" and is_stack_target(name, adapter)]
    return [layer.experts * size for size in found]


def activation_gradients(layer: LayerShape, hidden: int, tokens: int, compute: int, how: How) -> int:
    """Gradients of a layer's values at the widest point of its backward: three of the MLP's width, two of the hidden size.

    Fused experts hold one of the hidden size for each visited expert besides, until they are summed; on a CPU their activation's
    backward runs in float32, on seven values of their width and, where those are narrower, copies of its three inputs.
    """
    fused = how.experts and layer.gated
    inner = 3 * compute
    if fused and not how.gpu:
        inner = compute + FLOAT32 * (7 if compute == FLOAT32 else 10)
    of_experts = layer.active * (inner * layer.expert_width + (compute * hidden if fused and how.gpu else 0))
    return tokens * (compute * (3 * layer.mlp + 2 * hidden) + of_experts)


def attention_gradients(layer: LayerShape, hidden: int, tokens: int, longest: int, compute: int, how: How) -> int:
    """Bytes in the backward of attention: gradients of its values and of the residual stream, and the workspace where there is one."""
    values = compute * tokens * (2 * (layer.heads + layer.kv_heads) * layer.head_dim + hidden)
    if not how.has_workspace(layer.head_dim):
        return values
    rounded = 1 << (longest - 1).bit_length()  # as the layout of a micro-batch rounds it
    span = min(tokens, layer.window or tokens, rounded)
    return values + backward_bytes(tokens, layer.heads, layer.kv_heads, layer.head_dim, compute, span)


def loss_bytes(shape: ModelShape, tokens: int, compute: int, *, head_trained: bool, gpu: bool, lean: bool) -> int:
    """Bytes of the head operation, all tokens being trained: their hidden states and gradients, logits of a chunk, head gradient."""
    rows = 2 * compute * tokens * shape.hidden
    head = shape.hidden * shape.vocab if head_trained else 0
    if gpu and not shape.softcap:
        dtype = torch.bfloat16 if compute < FLOAT32 else torch.float32
        inside = weighted_nll_bytes(tokens, shape.hidden, shape.vocab, dtype, head_trained=head_trained, lean=lean)
        if lean:
            return rows + inside + compute * head
        return rows + max(inside, (FLOAT32 + compute) * head)  # the sum of the head's gradient is rounded after the chunks are gone
    chunk = chunk_rows(tokens, shape.vocab)
    logits = FLOAT32 * shape.vocab * chunk * (2 if shape.softcap else 1)
    # Beside the logits, first the temporary of logsumexp; then their gradient in compute precision and, for the head's gradient, in
    # float32 again with this chunk's part. The sum of those parts is float32.
    rounded = logits * compute // FLOAT32 if compute < FLOAT32 else 0
    widened = logits + FLOAT32 * chunk * shape.hidden if rounded and head_trained else 0
    return rows + logits + max(logits, rounded + widened + FLOAT32 * head) + FLOAT32 * head
