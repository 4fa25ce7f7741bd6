"""How much memory a worker will need, by part, before anything is placed.

These moments of a step can be the highest: the loss (all activations are held, and the logits of a chunk), the backward of the
last layer (activations are still held, and their first gradients appear), in it the backward of attention where that has a workspace,
the end of any layer's backward (activations turn into gradients), and the reduction of the root's gradients (activations are gone).
The plan is the highest of them. What a step computes, `activation_memory` measures; here is what is held, and when.

Sizes follow FSDP2 of torch 2.11 to 2.13 and the decoder layers of transformers, as they are written or as inductor compiles them.
Letters: W workers that the state is sharded over, T tokens of a micro-batch on a worker, H hidden size, V vocabulary, c bytes of
the compute type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rayft.config.schema import Adapter, AnyRun, SftRun
from rayft.models.load import base_dtype, compute_dtype
from rayft.observe.flops import LayerShape, ModelShape, layer_parameters, linears, stacks
from rayft.parallel.activation_memory import (
    FLOAT32,
    How,
    activation_gradients,
    attention_activations,
    attention_gradients,
    how_of,
    is_stack_target,
    is_target,
    layer_activations,
    loss_bytes,
    merged_stacks,
    norm,
)
from rayft.parallel.fsdp import SHARDS_BYTES
from rayft_kernels.nf4.op import BLOCK, bytes_of

RUNTIME_BYTES = {"cpu": 700 << 20, "cuda": 64 << 20}
"""Constant part. CPU: a Python process with torch, transformers and Ray (0.6 to 0.8 GB measured). GPU: workspaces of the libraries,
inside the allocator; the CUDA context, outside of it, is not counted."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker by part, at the highest moment of the step.

    Attributes:
        moment: that moment.
        parts: on the worker's device.
        host: what is offloaded from a GPU, in pinned memory of its host.
    """

    moment: str
    parts: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

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
        root: those of embedding and head that get one.
        layers: those of each decoder layer that get one.
    """

    base: int
    adapter: int
    copied: int
    head_trained: bool
    root: int
    layers: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.root + sum(self.layers)


def weights_of(shape: ModelShape, adapter: Adapter, unfrozen: Sequence[str] = ()) -> Weights:
    """What is trained. Adapters and model.unfrozen are counted on dense linear layers and experts, by the names of the Llama family."""
    count = range(len(shape.layers))
    head = {"lm_head": (shape.hidden, shape.vocab), "model.embed_tokens": (shape.hidden, shape.vocab)}
    inside = [
        {f"model.layers.{index}.{name}": size for name, size in linears(shape.layers[index], shape.hidden).items()} for index in count
    ]
    if adapter.type == "lora":
        linear = (adapter.r * sum(sum(layer[name]) for name in layer if is_target(name, adapter.targets)) for layer in inside)
        adapted = tuple(dense + _expert_adapters(layer, shape.hidden, adapter) for dense, layer in zip(linear, shape.layers, strict=True))
        copied = [name for name in (*head, *(name for layer in inside for name in layer)) if is_target(name, adapter.modules_to_save)]
        sizes = head | {name: size for layer in inside for name, size in layer.items()}
        more = sum(sizes[name][0] * sizes[name][1] for name in copied)
        return Weights(shape.parameters, sum(adapted), more, "lm_head" in copied, more, adapted)
    if unfrozen:
        patterns = [re.compile(re.sub(r"\[[\d:]+\]$", "", pattern)) for pattern in unfrozen]

        def chosen(sizes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
            found = {name for name in sizes if any(pattern.match(f"{name}.weight") for pattern in patterns)}
            return {name: sizes[name][0] * sizes[name][1] for name in found}

        def of_experts(index: int) -> int:
            layer = shape.layers[index]
            sizes = {f"model.layers.{index}.{name}": size for name, size in stacks(layer, shape.hidden).items()}
            found = [name for name in sizes if any(pattern.match(name) for pattern in patterns)]
            return layer.experts * sum(sizes[name][0] * sizes[name][1] for name in found)

        root = chosen({name: size for name, size in head.items() if not (shape.tied and name == "lm_head")})
        trains_head = ("model.embed_tokens" if shape.tied else "lm_head") in root
        layers = tuple(sum(chosen(inside[index]).values()) + of_experts(index) for index in count)
        return Weights(shape.parameters, 0, 0, trains_head, sum(root.values()), layers)
    layers = tuple(layer_parameters(layer, shape.hidden) for layer in shape.layers)
    return Weights(shape.parameters, 0, 0, True, shape.embedding_parameters, layers)


def _expert_adapters(layer: LayerShape, hidden: int, adapter: Adapter) -> int:
    """Weights of the adapters on a layer's stacks: rank r for each expert."""
    adapted = [sum(size) for name, size in stacks(layer, hidden).items() if is_stack_target(name, adapter)]
    return adapter.r * layer.experts * sum(adapted)


@dataclass(frozen=True)
class Sizes:
    """What the moments of a step are computed from.

    Attributes:
        shape, weights, adapter: the model and what is trained of it.
        shards: W.
        alone: one worker, whose weights are cast (`parallel.cast`) and neither gathered nor reduced.
        tokens: T.
        longest: tokens of the longest document that there may be.
        compute, held, trained, reduce: bytes of a value in forward and backward, of a base weight, of a trained weight with its
            gradient and optimizer states, and of a gradient while it is summed over ranks.
        optimizer: optim.type.
        recompute: parallel.activation_checkpointing.
        how: what decoder layers and head run on.
        state_away, activations_away: offloaded from a GPU.
        accumulating: a worker runs several micro-batches in a step.
        quantised: model.quantize holds the linear layers in 4 bits.
    """

    shape: ModelShape
    weights: Weights
    adapter: Adapter
    shards: int
    alone: bool
    tokens: int
    longest: int
    compute: int
    held: int
    trained: int
    reduce: int
    optimizer: str
    recompute: Literal["none", "selective", "full"]
    how: How
    state_away: bool
    activations_away: bool
    accumulating: bool
    quantised: bool

    def packed(self, layer: LayerShape) -> dict[str, int]:
        """Linear layer -> its weights, of those that are held in 4 bits."""
        kept = self.adapter.modules_to_save
        return {
            name: size[0] * size[1]
            for name, size in linears(layer, self.shape.hidden).items()
            if self.quantised and size[0] % BLOCK == 0 and not is_target(name, kept)
        }

    def whole(self, layer: LayerShape) -> int:
        """Weights of a layer that are not in 4 bits."""
        return layer_parameters(layer, self.shape.hidden) - sum(self.packed(layer).values())

    def gathered(self, layers: Sequence[LayerShape]) -> int:
        """Bytes of embedding and head, which stay gathered from forward to backward, and of some layers, gathered for compute."""
        root = self.shape.embedding_parameters + self.weights.copied
        sizes = [self.whole(layer) for layer in layers]
        if self.alone:
            adapters = self.weights.root + sum(self.weights.layers) if self.trained != self.compute else 0
            return self.compute * (adapters if self.held == self.compute else root + sum(sizes))
        arriving = self.held * max(sizes) // self.shards if self.state_away and sizes else 0
        return self.compute * (root + sum(sizes)) + (_packed_bytes(self, layers) if SHARDS_BYTES else 0) + arriving

    def above(self, index: int) -> Sequence[LayerShape]:
        """Layers whose weights are gathered or cast in the backward of layer `index`."""
        layers = self.shape.layers
        if self.alone and self.recompute == "none":
            return layers[: index + 1]
        return layers[max(index - 1, 0) : index + 1] if self.shards > 1 else layers[index : index + 1]

    def summed(self, weights: int) -> int:
        """Bytes of the buffer in which gradients are summed over ranks."""
        return 0 if self.alone else self.reduce * weights

    def reduced(self, weights: int) -> int:
        """Bytes of gradients that are summed over ranks already, and sharded."""
        return 0 if self.state_away else self.trained * weights // self.shards

    def waiting(self, weights: int) -> int:
        """Bytes of gradients of earlier micro-batches: reduced with the last one only, until then whole on every worker."""
        return (self.trained if self.alone else self.reduce) * weights if self.accumulating else 0

    def inside(self, layer: LayerShape) -> int:
        """Bytes per token that autograd keeps of a layer that is not checkpointed."""
        return layer_activations(layer, self.shape.hidden, self.compute, self.adapter, self.how)

    def kept(self, layer: LayerShape) -> int:
        """Bytes that stay of a layer from its forward to its backward."""
        if self.recompute == "none":
            return self.tokens * self.inside(layer) + sum(self.merged(layer))
        copied = 0 if self.how.gpu else self.compute * layer.heads * layer.head_dim
        attention = attention_activations(layer, self.compute) + copied if self.recompute == "selective" else 0
        return self.tokens * (self.compute * self.shape.hidden + attention)

    def recomputed(self, layer: LayerShape) -> int:
        """Bytes that come anew in the layer's backward."""
        if self.recompute == "none":
            return 0
        attention = attention_activations(layer, self.compute) if self.recompute == "selective" else 0
        return self.tokens * (self.inside(layer) - attention) + sum(self.merged(layer))

    def merged(self, layer: LayerShape) -> list[int]:
        """Bytes of each stack of a layer's experts that its adapter was added to."""
        return [self.compute * weights for weights in merged_stacks(layer, self.shape.hidden, self.adapter, self.how)]

    def here(self, index: int, *, ended: bool = False) -> int:
        """Bytes of what layers keep, on the device, in the backward of layer `index` or, when that has `ended`, after it."""
        layers = self.shape.layers
        first = 0 if not self.activations_away else index if index == len(layers) - 1 else max(index - 1, 0)
        return sum(self.kept(layer) for layer in layers[first : index if ended else index + 1])


def estimate(shape: ModelShape, cfg: AnyRun, device: str) -> MemoryPlan:
    """The plan of one worker.

    Args:
        shape: of the model, by `observe.flops.shape_of`.
        cfg: the run, its batch.micro_rows a number.
        device: "cpu" or "cuda".
    """
    tokens, longest, accumulating = _work(cfg)
    parallel, gpu, frozen = cfg.parallel, device == "cuda", cfg.adapter.type != "none"
    held = base_dtype(cfg.model, frozen=frozen, device_type=device).itemsize
    sizes = Sizes(
        shape,
        weights_of(shape, cfg.adapter, cfg.model.unfrozen),
        cfg.adapter,
        shards=parallel.workers // parallel.replicas,
        alone=parallel.workers == 1 and not (parallel.cpu_offload and gpu),
        tokens=tokens,
        longest=longest,
        compute=compute_dtype(cfg.model, device).itemsize,
        held=held,
        trained=FLOAT32 if frozen else held,
        reduce=2 if cfg.model.reduce_dtype == "bfloat16" else FLOAT32,
        optimizer=cfg.optim.type,
        recompute=parallel.activation_checkpointing,
        how=how_of(cfg, device),
        state_away=parallel.cpu_offload and gpu,
        activations_away=parallel.activation_offload and gpu,
        accumulating=accumulating,
        quantised=cfg.model.quantize != "none",
    )
    state, host = _state(sizes), _host(sizes)
    fixed = {"runtime": RUNTIME_BYTES[device]} if sizes.state_away else state | {"runtime": RUNTIME_BYTES[device]}
    plans = (MemoryPlan(moment, fixed | parts, host) for moment, parts in _moments(sizes))
    return max(plans, key=lambda plan: plan.total)


def _work(cfg: AnyRun) -> tuple[int, int, bool]:
    """Tokens of a micro-batch, of the longest document, and whether a worker may run several micro-batches in an update."""
    if not isinstance(cfg, SftRun):
        answers, longest = cfg.rollout.prompts_per_step * cfg.rollout.group_size, cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
        return cfg.micro_tokens, longest, answers * longest > cfg.micro_tokens * cfg.parallel.workers * cfg.algorithm.updates
    assert cfg.batch.micro_rows != "auto"
    several = cfg.batch.rows > cfg.batch.micro_rows * cfg.parallel.workers
    return cfg.batch.micro_rows * cfg.data.seq_len, cfg.data.seq_len, several


def _state(s: Sizes) -> dict[str, int]:
    """What is there at every moment."""
    packed = sum(sum(s.packed(layer).values()) for layer in s.shape.layers)
    base = s.held * (s.weights.base - packed) + _packed_bytes(s, s.shape.layers) * (1 if SHARDS_BYTES else s.shards)
    return {
        "parameters": (base + s.trained * (s.weights.adapter + s.weights.copied)) // s.shards,
        "optimizer states": _optimizer_states(s) // s.shards,
    }


def _optimizer_states(s: Sizes) -> int:
    """Of all shards together: AdamW has two for each weight, of 8 bits each with a float32 scale for 256 of them where it is told so;
    Muon one for those of matrices in layers; Adafactor one for a matrix's row and column."""
    weights = s.weights.trained
    match s.optimizer:
        case "adamw8bit":
            return 2 * (weights + FLOAT32 * weights // 256)
        case "muon":
            return s.trained * (sum(s.weights.layers) + 2 * s.weights.root)
        case "adafactor":
            return 2 * s.trained * weights // s.shape.hidden
        case _:
            return 2 * s.trained * weights


def _host(s: Sizes) -> dict[str, int]:
    """What is offloaded: the state with its gradients, and what all layers but the last keep."""
    state = _state(s) | {"gradients": s.trained * s.weights.trained // s.shards} if s.state_away else {}
    return state | ({"activations": sum(s.kept(layer) for layer in s.shape.layers[:-1])} if s.activations_away else {})


def _at_loss(s: Sizes) -> dict[str, int]:
    """In the head; with several shards, the buffer that the last layer was gathered in outlives its forward."""
    last = len(s.shape.layers) - 1
    return {
        "gradients": s.waiting(s.weights.trained),
        "gathered weights": s.gathered(s.shape.layers[-1:] if s.shards > 1 else s.above(last) if s.alone and s.recompute == "none" else ()),
        "activations": s.here(last) + s.tokens * norm(s.shape.hidden, s.compute, s.adapter),
        "loss": loss_bytes(s.shape, s.tokens, s.compute, head_trained=s.weights.head_trained, gpu=s.how.gpu, lean=s.how.lean),
    }


def _packed_bytes(s: Sizes, layers: Sequence[LayerShape]) -> int:
    """What is held in 4 bits of some layers."""
    return sum(bytes_of(weights) for layer in layers for weights in s.packed(layer).values())


def _made_dense(s: Sizes, layer: LayerShape) -> int:
    """Bytes of the weights that a layer's MLP makes out of 4 bits, fused LoRA all of them at once."""
    weights = [size for name, size in s.packed(layer).items() if name.startswith("mlp.")]
    return s.compute * (sum(weights) if s.how.lora else max(weights, default=0))


def _stack_gradients(s: Sizes, index: int) -> int:
    """Bytes of the gradients of layer `index`'s stacks of experts: where they are trained, or in turn where adapters were added to them.

    From the last on, the gradient of such a sum is there with the sums before it; the later ones are gone.
    """
    layer, merged = s.shape.layers[index], s.merged(s.shape.layers[index])
    if s.adapter.type == "none":
        weights = layer.experts * sum(inputs * outputs for inputs, outputs in stacks(layer, s.shape.hidden).values())
        return s.compute * min(weights, s.weights.layers[index])
    return max((sum(merged[: last + 1]) + size - sum(merged) for last, size in enumerate(merged)), default=0)


def _head_gradient(s: Sizes) -> int:
    """The head's gradient, made by the loss and kept until the root's gradients are reduced."""
    return s.compute * s.shape.hidden * s.shape.vocab if s.weights.head_trained else 0


def _at_update(s: Sizes) -> dict[str, int]:
    """In the optimizer: Adafactor holds two values for each weight of the largest tensor, Muon a gathered matrix four times."""
    layers = [inputs * outputs for layer in s.shape.layers for inputs, outputs in linears(layer, s.shape.hidden).values()]
    largest = max(layers) if not s.weights.root else max(*layers, s.shape.hidden * s.shape.vocab)
    temporary = {"adafactor": 2 * s.trained * largest // s.shards, "muon": 4 * s.compute * max(layers)}.get(s.optimizer, 0)
    return {"gradients": s.reduced(s.weights.trained), "update": 0 if s.state_away else temporary}


def _at_backward(s: Sizes, index: int) -> dict[str, int]:
    """In the MLP of layer `index`, with its weights and, with several shards, those of the one before it, which come early."""
    layers = s.shape.layers
    layer, later = layers[index], layers[index + 1 :]
    reduced = sum(s.weights.layers[index + 1 :])
    final = s.tokens * norm(s.shape.hidden, s.compute, s.adapter) if not later else 0
    return {
        "gradients": s.reduced(reduced) + s.waiting(s.weights.trained - reduced),
        "gathered weights": s.gathered(s.above(index)) + _made_dense(s, layer),
        "activations": s.here(index) + s.recomputed(layer) + final,
        # The buffer in which the gradient of the layer above is summed.
        "gradients in flight": _head_gradient(s)
        + activation_gradients(layer, s.shape.hidden, s.tokens, s.compute, s.how)
        + _stack_gradients(s, index)
        + s.summed(sum(s.weights.layers[index + 1 : index + 2])),
    }


def _at_attention(s: Sizes, index: int) -> dict[str, int]:
    """In the attention of the backward of layer `index`, whose MLP is through: its weights' gradients are there, its values are gone.

    The forward's workspace is as large, with as much held and fewer gradients.
    """
    layer = s.shape.layers[index]
    inputs = attention_activations(layer, s.compute) + norm(s.shape.hidden, s.compute, s.adapter)
    after = _at_layer_end(s, index)
    return after | {
        "activations": after["activations"] + s.tokens * inputs,
        "gradients in flight": after["gradients in flight"]
        + attention_gradients(layer, s.shape.hidden, s.tokens, s.longest, s.compute, s.how),
    }


def _at_layer_end(s: Sizes, index: int) -> dict[str, int]:
    """At the end of the backward of layer `index`: its own values are gone, and the gradients of later layers are reduced."""
    layers = s.shape.layers
    layer, later = layers[index], layers[index + 1 :]
    reduced = sum(s.weights.layers[index + 1 :])
    own = s.weights.layers[index]
    weights = s.compute * s.whole(layer) + _packed_bytes(s, [layer])
    # The buffer that the gradient of the layer above was summed in; the last layer gives up its weights before it fills its own.
    summed = s.summed(sum(s.weights.layers[index + 1 : index + 2])) if later else max(s.summed(own) - weights, 0)
    return {
        "gradients": s.reduced(reduced) + s.waiting(s.weights.trained - reduced),
        "gathered weights": s.gathered(s.above(index)),
        "activations": s.here(index, ended=True),
        "gradients in flight": _head_gradient(s) + s.compute * own + summed,
    }


def _at_root(s: Sizes) -> dict[str, int]:
    """When the root's gradient is there as computed, in the buffer that is summed, and as accumulated; layers are reduced."""
    twice = not s.alone or s.shape.tied or s.trained != s.compute  # else gradients are what the backward made
    root = (s.compute if twice else 0) * s.weights.root + s.summed(s.weights.root) * (2 if s.accumulating else 1)
    return {
        "gradients": s.reduced(s.weights.trained),
        "gathered weights": s.gathered(()),
        "gradients in flight": root + s.summed(s.weights.layers[0]) + (s.reduce * s.weights.root // s.shards if s.state_away else 0),
    }


def _moments(s: Sizes) -> Iterator[tuple[str, dict[str, int]]]:
    yield "loss", _at_loss(s)
    for index in range(len(s.shape.layers)):
        yield f"backward of layer {index}", _at_backward(s, index)
        if s.how.has_workspace(s.shape.layers[index].head_dim):
            yield f"attention in the backward of layer {index}", _at_attention(s, index)
        yield f"end of the backward of layer {index}", _at_layer_end(s, index)
    yield "reduction of the root", _at_root(s)
    yield "update", _at_update(s)
