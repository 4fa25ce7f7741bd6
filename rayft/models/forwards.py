"""Forwards of attention and MLP that `models.fused` puts on instances: the families' own arithmetic around fused operations.

They are functions shared by all layers, and what differs between layers is data on the layer, so torch.compile makes one graph for all.
Parameters are read at each call, from inside the layer's forward, where FSDP has gathered them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from rayft.models.adapt import RowDropout
from rayft.models.nf4 import NF4Linear
from rayft_kernels import Projection, TokenDropout, glu, lora_linear, lora_linears, lora_mlp, qkv_norm_rope

ADAPTER = "default"
"""The one adapter that rayft injects."""


class AttentionPlan(NamedTuple):
    """How one attention layer is run.

    Attributes:
        inputs: names of its projections of the hidden states, of q_proj, k_proj, v_proj those that it has.
        fused_inputs, fused_output: whether LoRA runs fused there.
        norm: "" for none, "head" for a norm of each head, "width" for one over all heads.
        fused_norm: whether norm and rotation run in one kernel.
        unit_offset: the norm's factor is 1 + weight.
        casts: where the family rounds, as `rayft_kernels.norm_rope` names it.
        rotate: the family's apply_rotary_pos_emb.
        interfaces, eager: transformers' table of attention functions, and the family's default.
        extras: further arguments of the attention function.
    """

    inputs: tuple[str, ...]
    fused_inputs: bool
    fused_output: bool
    norm: str
    fused_norm: bool
    unit_offset: bool
    casts: str
    rotate: Callable[..., Any]
    interfaces: Any
    eager: Callable[..., Any]
    extras: tuple[tuple[str, Any], ...]


class MlpPlan(NamedTuple):
    """How one MLP is run: with LoRA inside of one node, or as plain projections around one activation kernel."""

    lora: bool
    activation: str


def projection_of(linear: Any, x: Tensor) -> Projection:
    """A linear layer, or peft's wrapper of one, as the operations take it; without adapter while that is disabled or merged."""
    layer = getattr(linear, "base_layer", linear)
    weight = layer.packed if isinstance(layer, NF4Linear) else layer.weight
    if layer is linear or linear.disable_adapters or linear.merged:
        return Projection(weight, layer.bias)
    up = linear.lora_B[ADAPTER]
    magnitude = linear.lora_magnitude_vector[ADAPTER].weight if ADAPTER in linear.lora_magnitude_vector else None
    return Projection(
        weight,
        layer.bias,
        linear.lora_A[ADAPTER].weight,
        up.weight,
        linear.scaling[ADAPTER],
        magnitude,
        up.bias,
        _dropout_of(linear.lora_dropout[ADAPTER], x),
    )


def _dropout_of(layer: nn.Module, x: Tensor) -> Tensor | TokenDropout | None:
    """The mask of a dropout layer in training: the hash's arguments, or one drawn as the layer draws it."""
    if not layer.training or isinstance(layer, nn.Identity) or cast(Any, layer).p == 0:
        return None
    if isinstance(layer, RowDropout):
        keys = layer.keys.tokens
        if keys is None or keys.shape[0] != x.shape[-2]:
            raise RuntimeError("dropout needs the keys of the packed batch: run the model through score()")
        return TokenDropout(keys, layer.seed, layer.p)
    return F.dropout(x.detach().new_ones(x.shape), cast(nn.Dropout, layer).p)


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Projections, norm and rotation, attention, output projection, as the family's own forward has them.

    Args:
        hidden_states: [B, S, H].
        position_embeddings: cos and sin, [B, S, head_dim].

    Returns:
        ([B, S, H], attention weights where the attention function gives them).
    """
    assert position_embeddings is not None
    query, key, value = _rotated(self, _projected(self, hidden_states), position_embeddings)
    if (kept := cache if past_key_values is None else past_key_values) is not None:
        key, value = kept.update(key, value, self.layer_idx)
    return _attended(self, hidden_states, query, key, value, attention_mask, kwargs)


def gemma4_attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    shared_kv_states: Any,
    cache: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gemma 4: values are normed too, are the raw keys without v_proj, and layers without k_proj take keys and values of an earlier one.

    Args:
        hidden_states: [B, S, H].
        position_embeddings: cos and sin, [B, S, head_dim].
        shared_kv_states: layer type -> (key, value) of the last layer that has its own.

    Returns:
        ([B, S, H], attention weights where the attention function gives them).
    """
    projected = [x.unflatten(-1, (-1, self.head_dim)) for x in _projected(self, hidden_states)]
    query, key, value = (*projected, projected[-1])[:3] if len(projected) > 1 else (projected[0], None, None)
    query, key, value = (None if x is None else x.transpose(1, 2) for x in _gemma4_rotated(self, query, key, value, position_embeddings))
    if self.is_kv_shared_layer:
        key, value = shared_kv_states[self.layer_type]
    elif (kept := cache if past_key_values is None else past_key_values) is not None:
        key, value = kept.update(key, value, self.layer_idx)
    if self.store_full_length_kv:
        shared_kv_states[self.layer_type] = key, value
    return _attended(self, hidden_states, query, key, value, attention_mask, kwargs)


def _projected(self: Any, hidden_states: Tensor) -> Sequence[Tensor]:
    plan: AttentionPlan = self.rayft_plan
    inputs = [getattr(self, name) for name in plan.inputs]
    if plan.fused_inputs:
        return lora_linears(hidden_states, [projection_of(part, hidden_states) for part in inputs])
    return [part(hidden_states) for part in inputs]


def _attended(
    self: Any, hidden_states: Tensor, query: Any, key: Any, value: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, heads, S, head_dim] and the output projection."""
    plan: AttentionPlan = self.rayft_plan
    attend = plan.interfaces.get_interface(self.config._attn_implementation, plan.eager)
    dropout = self.attention_dropout if self.training else 0.0
    out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **dict(plan.extras), **kwargs)
    out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
    return (lora_linear(out, projection_of(self.o_proj, out)) if plan.fused_output else self.o_proj(out)), weights


def _rotated(self: Any, projected: Sequence[Tensor], angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key [B, heads, S, head_dim], normed and rotated, and value."""
    plan: AttentionPlan = self.rayft_plan
    query, key, value = projected
    if plan.norm == "width":
        query, key = self.q_norm(query), self.k_norm(key)
    query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
    if plan.fused_norm:
        query, turned, _ = _norm_rope(self, query, key, None, angles)
        assert turned is not None
        return query.transpose(1, 2), turned.transpose(1, 2), value.transpose(1, 2)
    if plan.norm == "head":
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = plan.rotate(query.transpose(1, 2), key.transpose(1, 2), *angles)
    return query, key, value.transpose(1, 2)


def _gemma4_rotated(
    self: Any, query: Tensor, key: Tensor | None, value: Tensor | None, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[B, S, heads, head_dim] each: query and key normed and rotated, value normed."""
    plan: AttentionPlan = self.rayft_plan
    if plan.fused_norm:
        return _norm_rope(self, query, key, value, angles)
    query = plan.rotate(self.q_norm(query), *angles, unsqueeze_dim=2)
    if key is None:
        return query, None, None
    return query, plan.rotate(self.k_norm(key), *angles, unsqueeze_dim=2), self.v_norm(value)


def _norm_rope(
    self: Any, query: Tensor, key: Tensor | None, value: Tensor | None, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norm and rotation in one kernel; [B, S, heads, head_dim]."""
    plan: AttentionPlan = self.rayft_plan
    q_norm, weight = self.q_norm, None if key is None else self.k_norm.weight
    eps = q_norm.eps if hasattr(q_norm, "eps") else q_norm.variance_epsilon
    return qkv_norm_rope(query, key, value, q_norm.weight, weight, *angles, eps=eps, unit_offset=plan.unit_offset, casts=plan.casts)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)): x [..., H] -> [..., H]."""
    plan: MlpPlan = self.rayft_plan
    gate, up, down = self.gate_proj, self.up_proj, self.down_proj
    if not plan.lora:
        out: Tensor = down(glu(gate(x), up(x), plan.activation))
        return out
    return lora_mlp(x, projection_of(gate, x), projection_of(up, x), projection_of(down, x), plan.activation)
