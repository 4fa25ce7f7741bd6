"""Models whose attention and MLP call the fused ops, against plain transformers: which forward is replaced, and by what.

The forwards below are what stands in for those of the classes named in FAMILIES, bound to each instance. They differ from transformers
in two lines: norms and rotation in one call, on [B, S, H, D] before the transpose; the activation and its product in one call.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayft_kernels import glu, qkv_norm_rope

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8}
K_IS_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
GEMMA3, GEMMA4 = {"casts": "gemma", "unit_offset": True}, {"casts": "gemma"}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen3": ("qwen3", {}, {"casts": "llama"}),
    "Gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, **WINDOWED}, GEMMA3),
    "Gemma4Text": ("gemma4_text", {"global_head_dim": 32, **PER_LAYER, **WINDOWED}, GEMMA4),
    "Gemma4Text k_eq_v": ("gemma4_text", {**K_IS_V, **WINDOWED}, GEMMA4),
    "Gemma4Text shared": ("gemma4_text", {"num_kv_shared_layers": 2, **PER_LAYER, **WINDOWED}, GEMMA4),
}
"""Beginning of the class names -> model_type, its configuration, options of `qkv_norm_rope` that round as transformers does."""
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""config.hidden_act or config.hidden_activation -> activation of `glu`."""


def projections(self: Any, hidden_states: Tensor, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries, keys and values [B, H, S, D] as attention takes them; keys and values are None where a layer shares another's."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    shared = getattr(self, "is_kv_shared_layer", False)
    q = self.q_proj(hidden_states).view(shape)
    k = None if shared else self.k_proj(hidden_states).view(shape)
    v = None if k is None else k if self.v_proj is None else self.v_proj(hidden_states).view(shape)
    eps = self.q_norm.eps if hasattr(self.q_norm, "eps") else self.q_norm.variance_epsilon
    normed_v = v if hasattr(self, "v_norm") else None
    weight = None if k is None else self.k_norm.weight
    q, k, normed_v = qkv_norm_rope(q, k, normed_v, self.q_norm.weight, weight, *options.pop("position_embeddings"), eps=eps, **options)
    v = v if normed_v is None else normed_v
    return q.transpose(1, 2), None if k is None else k.transpose(1, 2), None if v is None else v.transpose(1, 2)


def attention_forward(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`forward` of the attention classes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shared_kv, cache = kwargs.pop("shared_kv_states", None), kwargs.pop("past_key_values", None)
    assert cache is None
    q, k, v = projections(self, hidden_states, position_embeddings=position_embeddings, **self.norm_options)
    if k is None:
        k, v = shared_kv[self.layer_type]
    if getattr(self, "store_full_length_kv", False):
        shared_kv[self.layer_type] = k, v
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    options = {"dropout": 0.0, "scaling": self.scaling, "sliding_window": self.sliding_window}
    out, weights = attend(self, q, k, v, attention_mask, **options, **kwargs)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of the MLP classes."""
    name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
    return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), ACTIVATIONS[name]))


def build(family: str, dtype: torch.dtype) -> nn.Module:
    """A tiny random model whose norms are off their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | extra), attn_implementation="sdpa").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def replace(model: nn.Module, family: str, *, mlp: bool) -> int:
    """Bind the fused forwards to the instances; how many attentions there were."""
    count, name = 0, family.split()[0]
    for module in model.modules():
        if type(module).__name__ == f"{name}Attention":
            module.norm_options = FAMILIES[family][2]
            module.forward = MethodType(attention_forward, module)
            count += 1
        elif mlp and type(module).__name__ == f"{name}MLP":
            module.forward = MethodType(mlp_forward, module)
    return count


def logits_and_gradients(model: nn.Module, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a batch of two rows, with the gradient of a fixed direction."""
    tokens = torch.randint(0, 257, (2, 21), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return logits.detach(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_rounds_where_transformers_rounds(family: str) -> None:
    """bfloat16 logits are equal to the bit."""
    model = build(family, torch.bfloat16)
    plain, _ = logits_and_gradients(model)
    assert replace(model, family, mlp=False) == 4
    fused, _ = logits_and_gradients(model)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str) -> None:
    model = build(family, torch.float32)
    plain, expected = logits_and_gradients(model)
    replace(model, family, mlp=True)
    fused, got = logits_and_gradients(model)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}")
