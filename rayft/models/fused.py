"""Which decoder layers run on fused operations: chosen for each layer and each part, put on the instance, and reported with reasons.

Parts of a layer are its input projections (qkv), norm and rotation of queries and keys (norm_rope), its output projection (o), its MLP
and its experts.
A part that cannot be fused stays as it is, whatever the other parts do. Parameters keep their names, and `unfuse` takes everything off.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from rayft.config.schema import Adapter, Kernels
from rayft.errors import ConfigError, TrainingError
from rayft.models import experts
from rayft.models.forwards import ADAPTER, AttentionPlan, MlpPlan, attention_forward, gemma4_attention_forward, mlp_forward
from rayft.models.load import layers_of
from rayft.models.nf4 import NF4Linear
from rayft.types import ModelSpec

log = logging.getLogger("rayft")

Part = Literal["qkv", "norm_rope", "o", "mlp", "experts"]
PLAIN = "plain"
SERVING = {
    "lora": ("lora_qkv", "lora_qk", "lora_q", "lora_o", "lora_mlp"),
    "norm_rope": ("norm_rope",),
    "glu": ("glu", "lora_mlp"),
    "experts": ("moe", "moe_lora"),
}
"""Setting -> the kernels that satisfy it; the fused LoRA MLP has the activation inside."""
PARTS: dict[str, tuple[Part, ...]] = {"lora": ("qkv", "o", "mlp"), "norm_rope": ("norm_rope",), "glu": ("mlp",), "experts": ("experts",)}


@dataclass(frozen=True)
class Choice:
    """What one part of one decoder layer runs on.

    Attributes:
        layer: its number.
        part: qkv, norm_rope, o, mlp or experts.
        kernel: lora_qkv, lora_qk, lora_q, norm_rope, lora_o, lora_mlp, glu, moe, moe_lora, or plain.
        reason: why it is plain, or "" for a fused one.
    """

    layer: int
    part: Part
    kernel: str
    reason: str


@dataclass(frozen=True)
class Family:
    """How a family's attention differs from Llama's.

    Attributes:
        norm: "" for none, "head" for a norm of each head, "width" for one over all heads before they are split.
        extras: argument of the attention function -> attribute of the layer.
        casts: rounding of its RMSNorm in the words of `rayft_kernels.norm_rope`; "" when the norm is none that the kernel computes.
        unit_offset: the norm's factor is 1 + weight.
        forward: what stands for the family's own forward; it takes the same arguments.
        inputs: the projections that a layer may have.
    """

    norm: str = ""
    extras: tuple[tuple[str, str], ...] = ()
    casts: str = ""
    unit_offset: bool = False
    forward: Callable[..., Any] = attention_forward
    inputs: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"),)


_WINDOW = ("sliding_window", "sliding_window")
ATTENTION: Mapping[str, Family] = {
    "LlamaAttention": Family(),
    "GraniteAttention": Family(),
    "MistralAttention": Family(extras=(("sliding_window", "config.sliding_window"),)),
    "Qwen2Attention": Family(extras=(_WINDOW,)),
    "Qwen3Attention": Family("head", (_WINDOW,), "llama"),
    "Qwen3MoeAttention": Family("head", (_WINDOW,), "llama"),
    "Gemma2Attention": Family(extras=(_WINDOW, ("softcap", "attn_logit_softcapping"))),
    "Gemma3Attention": Family("head", (_WINDOW,), "gemma", unit_offset=True),
    "Gemma4TextAttention": Family(
        "head",
        (_WINDOW,),
        "gemma",
        False,
        gemma4_attention_forward,
        (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj"), ("q_proj",)),
    ),
    "CohereAttention": Family("head"),
    "Olmo2Attention": Family("width"),
}
"""Attention classes whose forward equals one of `models.forwards`; tests/parity holds each of them to it."""

MLPS = {
    "LlamaMLP", "GraniteMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP", "Gemma2MLP", "Gemma3MLP", "Gemma4TextMLP",
    "CohereMLP", "Olmo2MLP",
}  # fmt: skip
"""MLP classes that compute down(act(gate(x)) * up(x))."""

ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


def fuse(module: Any, spec: ModelSpec, adapter: Adapter, device_type: str, wanted: Kernels) -> list[Choice]:
    """Put fused forwards on the attention and MLP of every decoder layer that can have them.

    Args:
        module: a transformers causal model with its adapters, before compile, checkpointing and sharding.
        spec: names the layers and what the family is known to fail with (kernels.lora, norm_rope, glu or experts).
        adapter: the section.
        device_type: "cpu" or "cuda".
        wanted: the section.

    Returns:
        One choice for each part of each layer, plain ones with the reason.

    Raises:
        ConfigError: a kernel was asked for by name and no layer can have it.
        TrainingError: a forward did not take effect.
    """
    closed = _closed(spec, adapter, device_type, wanted)
    choices = [choice for number, layer in enumerate(layers_of(module, spec.layers)) for choice in _fuse_layer(number, layer, closed)]
    for kernel, serving in SERVING.items():
        if getattr(wanted, kernel) == "on" and not any(choice.kernel in serving for choice in choices):
            reasons = sorted({choice.reason for choice in choices if choice.part in PARTS[kernel]})
            rule = f"no layer can have it ({'; '.join(reasons) or 'there is no such part'})"
            raise ConfigError(f"kernels.{kernel}", "on", rule, "Use auto or off")
    return choices


def unfuse(module: Any, spec: ModelSpec) -> None:
    """Take every fused forward off again."""
    for layer in layers_of(module, spec.layers):
        for part in (getattr(layer, "self_attn", None), getattr(layer, "mlp", None)):
            if part is not None and "rayft_plan" in vars(part):
                del part.rayft_plan, part.forward
        for outer, core in experts.experts_of(layer):
            experts.remove(outer, core)


def report(choices: list[Choice]) -> list[str]:
    """One line for each kernel, and for each reason of a part to stay plain, with the layers it holds for."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for choice in choices:
        lines.setdefault((choice.part, choice.kernel, choice.reason), []).append(choice.layer)
    return [
        f"{kernel} {part} on layers {_ranges(numbers)}: {reason}" if reason else f"{kernel} on layers {_ranges(numbers)}"
        for (part, kernel, reason), numbers in lines.items()
    ]


def _closed(spec: ModelSpec, adapter: Adapter, device_type: str, wanted: Kernels) -> dict[str, str]:
    """Kernel -> why no layer may have it; kernels that are open are left out."""
    closed = {}
    for kernel in SERVING:
        setting = getattr(wanted, kernel)
        if setting == "off":
            closed[kernel] = f"kernels.{kernel} is off"
        elif kernel == "lora" and adapter.type != "lora":
            closed[kernel] = "no adapter is trained"
        elif failing := spec.unsupported.get(f"kernels.{kernel}"):
            closed[kernel] = failing
        elif setting == "auto" and device_type != "cuda" and not (kernel == "experts" and adapter.target_parameters):
            closed[kernel] = f"auto takes it on GPUs only, and this is {device_type}"
    return closed


def _fuse_layer(number: int, layer: Any, closed: Mapping[str, str]) -> Iterator[Choice]:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is not None:
        yield from _fuse_attention(number, attention, closed)
    if mlp is not None and not hasattr(mlp, "experts"):
        yield _fuse_mlp(number, mlp, closed)
    for outer, core in list(experts.experts_of(layer)):
        yield _fuse_experts(number, outer, core, closed)


def _fuse_attention(number: int, attention: Any, closed: Mapping[str, str]) -> Iterator[Choice]:
    family = ATTENTION.get(type(attention).__name__)
    if reason := _other_attention(attention, family):
        for part in ("qkv", "norm_rope", "o"):
            yield Choice(number, part, PLAIN, reason)
        return
    assert family is not None
    names = _inputs(attention)
    norm = family.norm if hasattr(attention, "q_norm") else ""
    why_inputs = closed.get("lora") or _no_lora([getattr(attention, name) for name in names])
    why_output = closed.get("lora") or _no_lora([attention.o_proj])
    why_norm = closed.get("norm_rope") or _no_fused_norm(attention, family, norm)
    if not (why_inputs and why_output and why_norm):
        source = sys.modules[type(attention).__module__]
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        plan = AttentionPlan(
            names, not why_inputs, not why_output, norm, not why_norm, family.unit_offset, family.casts or "once",
            vars(source)["apply_rotary_pos_emb"], ALL_ATTENTION_FUNCTIONS, vars(source)["eager_attention_forward"],
            tuple((argument, attrgetter(path)(attention)) for argument, path in family.extras),
        )  # fmt: skip
        _install(attention, plan, family.forward)
    kernel = "lora_" + "".join(name[0] for name in names)
    yield _choice(number, "qkv", kernel, why_inputs)
    yield _choice(number, "norm_rope", "norm_rope", why_norm)
    yield _choice(number, "o", "lora_o", why_output)


def _fuse_mlp(number: int, mlp: Any, closed: Mapping[str, str]) -> Choice:
    if reason := _other_mlp(mlp):
        return Choice(number, "mlp", PLAIN, reason)
    activation = ACTIVATIONS[type(mlp.act_fn).__name__]
    why_lora = closed.get("lora") or _no_lora([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
    if not why_lora or "glu" not in closed:
        _install(mlp, MlpPlan(not why_lora, activation), mlp_forward)
    if why_lora and "glu" not in closed:
        return Choice(number, "mlp", "glu", "")
    return _choice(number, "mlp", "lora_mlp", why_lora)


def _fuse_experts(number: int, outer: Any, core: Any, closed: Mapping[str, str]) -> Choice:
    why_not = closed.get("experts") or experts.other_experts(outer, core, ACTIVATIONS)
    if not why_not:
        experts.install(outer, core, ACTIVATIONS[type(core.act_fn).__name__])
    return _choice(number, "experts", "moe" if outer is core else "moe_lora", why_not)


def _install(part: Any, plan: AttentionPlan | MlpPlan, forward: Callable[..., Any]) -> None:
    part.rayft_plan = plan
    part.forward = types.MethodType(forward, part)
    if part.forward.__func__ is not forward:
        raise TrainingError(type(part).__name__, None, "did not take its fused forward", "Set kernels.lora, norm_rope and glu to off")


def _choice(number: int, part: Part, kernel: str, why_not: str | None) -> Choice:
    return Choice(number, part, PLAIN, why_not) if why_not else Choice(number, part, kernel, "")


CACHES = {"cache", "past_key_values"}
"""What transformers calls the cache of keys and values, from 5.24 on and before."""


def _other_attention(attention: Any, family: Family | None) -> str | None:
    """Why the written-out forward may not stand for this attention, or None."""
    name = type(attention).__name__
    if family is None:
        return f"{name} is not among the attention classes that were compared"
    taken, expected = (set(inspect.signature(forward).parameters) - CACHES for forward in (type(attention).forward, family.forward))
    if taken != expected:
        return f"{name} takes other arguments in this version of transformers: {', '.join(sorted(taken ^ expected))}"
    if _inputs(attention) not in family.inputs:
        return f"{name} has the projections {', '.join(_inputs(attention)) or 'of no kind'} here, which was not compared"
    return _patched(attention)


def _inputs(attention: Any) -> tuple[str, ...]:
    """Those of its projections of the hidden states that exist."""
    return tuple(name for name in ("q_proj", "k_proj", "v_proj") if getattr(attention, name, None) is not None)


def _other_mlp(mlp: Any) -> str | None:
    name = type(mlp).__name__
    if name not in MLPS:
        return f"{name} is not among the MLP classes that were compared"
    if type(mlp.act_fn).__name__ not in ACTIVATIONS:
        return f"no kernel has the activation {type(mlp.act_fn).__name__}"
    return _patched(mlp)


def _patched(part: nn.Module) -> str | None:
    return f"{type(part).__name__}.forward is replaced already" if "forward" in vars(part) else None


def _no_fused_norm(attention: Any, family: Family, norm: str) -> str | None:
    """Why norm and rotation stay apart, or None."""
    if norm != "head":
        return "queries and keys have no norm by heads"
    if not family.casts:
        return f"{type(attention.q_norm).__name__} is no norm that the kernel computes"
    return "head_dim is odd" if attention.head_dim % 2 else None


def _no_lora(linears: list[Any]) -> str | None:
    """Why these projections cannot share a LoRA node, or None."""
    if not any(hasattr(linear, "lora_A") for linear in linears):
        return "its projections have no adapter"
    return next((reason for linear in linears if (reason := _no_projection(linear))), None)


def _no_projection(linear: Any) -> str | None:
    """Why a projection cannot be computed by the fused operations, or None."""
    layer = getattr(linear, "base_layer", linear)
    if type(layer) not in (nn.Linear, NF4Linear):
        return f"a projection is a {type(layer).__name__}"
    if layer.weight.requires_grad:
        return "a projection's own weight is trained"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in linear.modules()):
        return "a projection has hooks, which would not run"
    if layer is linear:
        return None
    if type(linear).__name__ != "Linear" or list(linear.lora_A) != [ADAPTER] or linear.active_adapters != [ADAPTER]:
        return "a projection has an adapter other than one active LoRA"
    variant = linear.lora_variant.get(ADAPTER)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return f"a projection's adapter is of the kind {type(variant).__name__}"
    dropout = type(linear.lora_dropout[ADAPTER]).__name__
    return None if dropout in ("Identity", "Dropout", "RowDropout") else f"a projection has a dropout of the kind {dropout}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and pieces[-1][-1] == number - 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ", ".join(str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}" for piece in pieces)
