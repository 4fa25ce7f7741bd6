"""How much memory a worker will need, by part, before anything is placed.

These moments of a step can be the highest: the loss (all activations are held, and the logits of a chunk), the backward of the
last layer (activations are still held, and their first gradients appear), the end of any layer's backward (activations turn into
gradients), and the reduction of the root's gradients (activations are gone). The plan is the highest of them.

Sizes follow FSDP2 of torch 2.11 to 2.13 and the decoder layers of transformers as they are written, uncompiled. Letters:
W workers, T tokens of a micro-batch on a worker, H hidden size, V vocabulary, c bytes of the compute type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rayft.config.schema import Adapter, BatchShape, Model, Parallel
from rayft.models.load import base_dtype, compute_dtype
from rayft.observe.flops import LayerShape, ModelShape, layer_parameters, linears
from rayft_kernels.linear_cross_entropy.op import chunk_rows

FLOAT32 = 4
MOMENTS = 2
"""AdamW holds two states for each trained parameter."""

RUNTIME_BYTES = {"cpu": 700 << 20, "cuda": 64 << 20}
"""Constant part. CPU: a Python process with torch, transformers and Ray (0.6 to 0.8 GB measured). GPU: workspaces of the libraries,
inside the allocator; the CUDA context, outside of it, is not counted."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker by part, at the highest moment of the step."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def table(self) -> list[tuple[str, int]]:
        """(part, bytes), largest first, without empty ones."""
        return sorted(((part, size) for part, size in self.parts.items() if size), key=lambda row: -row[1])


@dataclass(frozen=True)
class Weights:
    """Parameter counts of a run.

    Attributes:
        base: of the model itself.
        adapter: low-rank matrices.
        copied: modules that are trained in full beside the frozen original.
        head_trained: the head gets a gradient.
        frozen_base: the model's own weights get none.
    """

    base: int
    adapter: int
    copied: int
    head_trained: bool
    frozen_base: bool

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.adapter + self.copied if self.frozen_base else self.base


def weights_of(shape: ModelShape, adapter: Adapter) -> Weights:
    """What is trained. Adapters are counted on the dense linear layers, by the module names of the Llama family."""
    if adapter.type == "none":
        return Weights(shape.parameters, 0, 0, head_trained=True, frozen_base=False)
    head = {"lm_head": (shape.hidden, shape.vocab), "model.embed_tokens": (shape.hidden, shape.vocab)}
    modules = head | {
        f"model.layers.{index}.{name}": size
        for index, layer in enumerate(shape.layers)
        for name, size in linears(layer, shape.hidden).items()
    }
    adapted = sum(adapter.r * sum(modules[name]) for name in modules if name not in head and is_target(name, adapter.targets))
    copied = [name for name in modules if is_target(name, adapter.modules_to_save)]
    size = sum(modules[name][0] * modules[name][1] for name in copied)
    return Weights(shape.parameters, adapted, size, head_trained="lm_head" in copied, frozen_base=True)


def is_target(name: str, targets: str | Iterable[str]) -> bool:
    """Whether `adapter.targets` or `adapter.modules_to_save` selects a linear module by its name."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in targets)


@dataclass(frozen=True)
class Sizes:
    """What the moments of a step are computed from.

    Attributes:
        shape, weights, adapter: the model and what is trained of it.
        workers: W.
        tokens: T.
        compute, held, trained, reduce: bytes of a value in forward and backward, of a base weight, of a trained weight with its
            gradient and optimizer states, and of a gradient while it is summed over ranks.
        checkpointing: decoder layers are recomputed in the backward.
        accumulating: a worker runs several micro-batches in a step.
    """

    shape: ModelShape
    weights: Weights
    adapter: Adapter
    workers: int
    tokens: int
    compute: int
    held: int
    trained: int
    reduce: int
    checkpointing: bool
    accumulating: bool

    @property
    def largest(self) -> LayerShape:
        """The decoder layer with the most weights."""
        return max(self.shape.layers, key=lambda layer: layer_parameters(layer, self.shape.hidden))

    @property
    def gathered_layer(self) -> int:
        """Bytes of that layer's weights, gathered for compute."""
        return self.compute * layer_parameters(self.largest, self.shape.hidden)

    @property
    def gathered_root(self) -> int:
        """Bytes of embedding and head, gathered for compute; they stay so from forward to backward."""
        return self.compute * (self.shape.embedding_parameters + self.weights.copied)

    def trained_in(self, layer: LayerShape) -> int:
        """Trained weights of a decoder layer."""
        if self.weights.frozen_base:
            return self.weights.adapter // len(self.shape.layers)
        return layer_parameters(layer, self.shape.hidden)

    @property
    def trained_root(self) -> int:
        """Trained weights of embedding and head."""
        return self.weights.copied if self.weights.frozen_base else self.shape.embedding_parameters


def estimate(
    shape: ModelShape, *, seq_len: int, batch: BatchShape, parallel: Parallel, adapter: Adapter, model: Model, device: str
) -> MemoryPlan:
    """The plan of one worker.

    Args:
        shape: of the model, by `observe.flops.shape_of`.
        seq_len: data.seq_len.
        batch, parallel, adapter, model: sections of the run.
        device: "cpu" or "cuda".
    """
    weights = weights_of(shape, adapter)
    held = base_dtype(model, frozen=weights.frozen_base, device_type=device).itemsize
    sizes = Sizes(
        shape,
        weights,
        adapter,
        workers=parallel.workers,
        tokens=batch.micro_rows * seq_len,
        compute=compute_dtype(model, device).itemsize,
        held=held,
        trained=FLOAT32 if weights.frozen_base else held,
        reduce=2 if model.reduce_dtype == "bfloat16" else FLOAT32,
        checkpointing=parallel.activation_checkpointing,
        accumulating=batch.rows > batch.micro_rows * parallel.workers,
    )
    plans = (MemoryPlan(moment, _state(sizes, device) | parts) for moment, parts in _moments(sizes))
    return max(plans, key=lambda plan: plan.total)


def _state(s: Sizes, device: str) -> dict[str, int]:
    """What is there at every moment."""
    return {
        "parameters": (s.held * s.weights.base + s.trained * (s.weights.adapter + s.weights.copied)) // s.workers,
        "optimizer states": MOMENTS * s.trained * s.weights.trained // s.workers,
        "runtime": RUNTIME_BYTES[device],
    }


def _accumulated(s: Sizes) -> int:
    """Gradients of earlier micro-batches: reduced with the last one only, until then whole on every worker."""
    return s.reduce * s.weights.trained if s.accumulating else 0


def _at_loss(s: Sizes) -> dict[str, int]:
    """In the head; with several workers, the buffer that the last layer was gathered in outlives its forward."""
    return {
        "gradients": _accumulated(s),
        "gathered weights": s.gathered_root + (s.gathered_layer if s.workers > 1 else 0),
        "activations": saved_activations(s.shape, s.tokens, s.compute, s.adapter, checkpointing=s.checkpointing),
        "loss": loss_bytes(s.shape, s.tokens, s.compute, head_trained=s.weights.head_trained),
    }


def _head_gradient(s: Sizes) -> int:
    """The head's gradient, made by the loss and kept until the root's gradients are reduced."""
    return s.compute * s.shape.hidden * s.shape.vocab if s.weights.head_trained else 0


def _at_backward(s: Sizes) -> dict[str, int]:
    """In the MLP of the last layer, with its weights and, with several workers, those of the one before it, which come early."""
    saved = saved_activations(s.shape, s.tokens, s.compute, s.adapter, checkpointing=s.checkpointing)
    recomputed = s.tokens * layer_activations(s.largest, s.shape.hidden, s.compute, s.adapter) if s.checkpointing else 0
    return {
        "gradients": _accumulated(s),
        "gathered weights": s.gathered_root + min(s.workers, 2) * s.gathered_layer,
        "activations": saved + recomputed,
        "gradients in flight": _head_gradient(s) + _activation_gradients(s.largest, s.shape.hidden, s.tokens, s.compute),
    }


def _at_layer_end(s: Sizes, index: int) -> dict[str, int]:
    """At the end of the backward of layer `index`: its own values are gone, and the gradients of later layers are reduced."""
    layer, hidden = s.shape.layers[index], s.shape.hidden
    earlier, later = s.shape.layers[:index], s.shape.layers[index + 1 :]
    values = s.compute * hidden * index if s.checkpointing else sum(layer_activations(x, hidden, s.compute, s.adapter) for x in earlier)
    reduced = sum(s.trained_in(x) for x in later)
    weights, early = (s.compute * layer_parameters(x, hidden) for x in (layer, earlier[-1] if earlier else layer))
    # The buffer that the gradient of the layer above was summed in; the last layer gives up its weights before it fills its own.
    summed = s.reduce * s.trained_in(later[0]) if later else max(s.reduce * s.trained_in(layer) - weights, 0)
    return {
        "gradients": s.trained * reduced // s.workers + (s.reduce * (s.weights.trained - reduced) if s.accumulating else 0),
        "gathered weights": s.gathered_root + weights + (early if s.workers > 1 and earlier else 0),
        "activations": s.tokens * values,
        "gradients in flight": _head_gradient(s) + s.compute * s.trained_in(layer) + summed,
    }


def _at_root(s: Sizes) -> dict[str, int]:
    """When the root's gradient is there as computed, in the buffer that is summed, and as accumulated; layers are reduced."""
    root = (s.compute + s.reduce + (s.reduce if s.accumulating else 0)) * s.trained_root
    return {
        "gradients": s.trained * s.weights.trained // s.workers,
        "gathered weights": s.gathered_root,
        "gradients in flight": root + s.reduce * s.trained_in(s.shape.layers[0]),
    }


def _moments(s: Sizes) -> Iterator[tuple[str, dict[str, int]]]:
    yield "loss", _at_loss(s)
    yield "backward of the last layer", _at_backward(s)
    for index in range(len(s.shape.layers)):
        yield f"end of the backward of layer {index}", _at_layer_end(s, index)
    yield "reduction of the root", _at_root(s)


def saved_activations(shape: ModelShape, tokens: int, compute: int, adapter: Adapter, *, checkpointing: bool) -> int:
    """Bytes that the forward keeps for the backward: decoder layers, or only their inputs, and the final norm."""
    hidden = shape.hidden
    if checkpointing:
        layers = compute * hidden * len(shape.layers)
    else:
        layers = sum(layer_activations(layer, hidden, compute, adapter) for layer in shape.layers)
    return tokens * (layers + _norm(hidden, compute, adapter))


def layer_activations(layer: LayerShape, hidden: int, compute: int, adapter: Adapter) -> int:
    """Bytes per token that autograd keeps of one decoder layer.

    Attention keeps queries, keys, values and its output, which is copied once more to [T, heads * head_dim]; its scores are never
    kept. A linear layer keeps its input when its weight or an adapter on it is trained; behind dropout the adapter keeps another.
    """
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    norms = layer.norms * _norm(hidden, compute, adapter)
    if layer.qk_norm:
        norms += _norm(queries, compute, adapter) + _norm(keys, compute, adapter)
    # Norm outputs are the inputs of q, k, v and of gate, up; a norm over queries or keys gives what attention keeps anyway.
    attention = 2 * compute * (queries + keys) + FLOAT32 * layer.heads
    kept = {"self_attn.q_proj": hidden, "self_attn.o_proj": queries, "mlp.up_proj": hidden, "mlp.down_proj": layer.mlp}
    sizes = linears(layer, hidden)
    inputs = compute * sum(size for name, size in kept.items() if name in sizes and _keeps_input(name, adapter))
    # The gate before and after its activation, and what it multiplies; without a gate, the value before its activation.
    inner = compute * (3 if layer.gated else 1) * layer.mlp
    ranks = _adapter_activations(sizes, compute, adapter)
    return norms + attention + inputs + inner + ranks + layer.active * _expert(layer, hidden, compute)


def _norm(size: int, compute: int, adapter: Adapter) -> int:
    """Bytes per token of an RMS norm: its input in float32 and, when its weight is trained, the normalised value."""
    return FLOAT32 * size + (compute * size if adapter.type == "none" else 0)


_SHARED_INPUT = {"self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"), "mlp.up_proj": ("mlp.gate_proj",)}


def _keeps_input(name: str, adapter: Adapter) -> bool:
    if adapter.type == "none":
        return True
    readers = (name, *_SHARED_INPUT.get(name, ()))
    return adapter.dropout == 0 and any(is_target(f"model.layers.0.{reader}", adapter.targets) for reader in readers)


def _adapter_activations(sizes: dict[str, tuple[int, int]], compute: int, adapter: Adapter) -> int:
    """Per token: the value between the two low-rank matrices, and with dropout its mask and what it lets through."""
    if adapter.type == "none":
        return 0
    adapted = [inputs for name, (inputs, _) in sizes.items() if is_target(f"model.layers.0.{name}", adapter.targets)]
    dropout = (1 + compute) * sum(adapted) if adapter.dropout > 0 else 0
    return compute * adapter.r * len(adapted) + dropout


def _expert(layer: LayerShape, hidden: int, compute: int) -> int:
    """Per token and visited expert: input, output before weighting, and the inner values."""
    return compute * (2 * hidden + (4 if layer.gated else 2) * layer.expert_width)


def _activation_gradients(layer: LayerShape, hidden: int, tokens: int, compute: int) -> int:
    """Gradients of a layer's values at the widest point of its backward: three of the MLP's width, two of the hidden size."""
    return compute * tokens * (3 * (layer.mlp + layer.active * layer.expert_width) + 2 * hidden)


def loss_bytes(shape: ModelShape, tokens: int, compute: int, *, head_trained: bool) -> int:
    """Bytes of the head operation, all tokens being trained: their hidden states and gradients, logits of a chunk, head gradient."""
    rows = 2 * compute * tokens * shape.hidden
    logits = FLOAT32 * shape.vocab * chunk_rows(tokens, shape.vocab) * (2 if shape.softcap else 1)
    head = shape.hidden * shape.vocab if head_trained else 0
    # Beside the logits, first the temporary of logsumexp; then their gradient in compute precision, with this chunk's part of the
    # head's gradient. The sum of those parts is float32.
    rounded = logits * compute // FLOAT32 if compute < FLOAT32 else 0
    return rows + logits + max(logits, rounded + compute * head) + FLOAT32 * head
