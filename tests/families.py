"""Tiny random models of several families, written as Hugging Face folders, and packed batches to run them on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft.data.reader import Row, collate
from rayft.models.load import persistent_buffers
from rayft.types import Batch

VOCAB = 257  # prime, so that shards are uneven
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]}),
    "mistral_window": ("mistral", {"sliding_window": 8}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma4_moe": (
        "gemma4_text",
        {
            "global_head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
        },
    ),
}


def write_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A random model of the family, float32, its norms and buffers moved off their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SIZES | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | options))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        for _, buffer in persistent_buffers(model):
            buffer.add_(0.05 * torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return folder


def make_batch(lengths: list[list[int]], seed: int = 0, step: int = 0, positions: list[int] | None = None) -> Batch:
    """Packed rows of documents of the given lengths (each row must sum to the same), with random tokens and weights."""
    return collate(make_rows(lengths, seed), positions or list(range(len(lengths))), capacity=64, step=step)


def make_rows(lengths: list[list[int]], seed: int = 0) -> list[Row]:
    """One packed row per list of document lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, documents in enumerate(lengths):
        total = sum(documents)
        weights = rng.random(total).astype(np.float32) * (rng.random(total) < 0.7)
        rows.append(
            Row(
                index,
                rng.integers(3, VOCAB, total).astype(np.int32),
                weights.astype(np.float32),
                np.array(documents, np.int32),
                np.zeros(len(documents), np.int32),
                total,
            )
        )
    return rows


def write_in_8_bits(folder: Path, block: tuple[int, int] | None, target: Path) -> Path:
    """The linear layers of a model as codes and factors for blocks of weights, under `target`/fp8, and what they stand for, under
    `target`/dense, computed block by block."""
    from safetensors.torch import load_file, save_file

    codes, dense = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, weight in [(name, weight) for name, weight in codes.items() if name.endswith("_proj.weight")]:
        rows, columns = block or weight.shape
        grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        codes[name], factors = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                factors[i, j] = weight[part].abs().max() / 448
                codes[name][part] = (weight[part] / factors[i, j]).to(torch.float8_e4m3fn)
                dense[name][part] = codes[name][part].float() * factors[i, j]
        codes[f"{name}_scale_inv"] = factors if block else factors.reshape(())
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, "modules_to_not_convert": ["lm_head"]}
    for kind, tensors, more in (("fp8", codes, {"quantization_config": settings}), ("dense", dense, {})):
        shutil.copytree(folder, target / kind)
        save_file(tensors, target / kind / "model.safetensors", metadata={"format": "pt"})
        (target / kind / "config.json").write_text(json.dumps(config | more))
    return target
