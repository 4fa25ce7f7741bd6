"""FLOPs against hand counts of two models, against brute force for windows, and peaks by device name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.observe.flops import attention_pairs, flops_per_step, peak_flops, shape_of

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def config(base: dict[str, Any], **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**(base | fields))


def flops(base: dict[str, Any], lengths: list[int], head_tokens: int, adapter_parameters: int | None = None, **fields: Any) -> float:
    shape = shape_of(config(base, **fields))
    assert shape is not None
    return flops_per_step(shape, lengths, head_tokens, adapter_parameters=adapter_parameters)


def test_smollm2_135m_by_hand() -> None:
    # q and o: 576 x 576 each; k and v: 576 x 3*64 each; gate, up, down: 576 x 1536 each.
    layer = 2 * 331_776 + 2 * 110_592 + 3 * 884_736
    assert layer == 3_538_944
    head = 576 * 49_152
    shape = shape_of(config(SMOLLM2_135M))
    assert shape is not None
    assert shape.parameters == 30 * layer + head == 134_479_872  # the model card's 134.5 M, of which norms are 35,136

    documents, trained = [1000, 24], 700
    weights = 6 * 30 * layer * 1024 + 6 * head * trained
    # Per layer and head: scores and values, 2 * 64 FLOPs a pair each, three times with the gradients; half the square of pairs.
    attention = 30 * 9 * 3 * 2 * (2 * 64) * (1000**2 + 24**2) / 2
    assert flops(SMOLLM2_135M, documents, trained) == weights + attention == 874_946_396_160


def test_qwen3_06b_by_hand_in_full_and_with_lora() -> None:
    # q: 1024 x 2048, o: 2048 x 1024, k and v: 1024 x 1024, gate, up, down: 1024 x 3072.
    layer = 2 * 2_097_152 + 2 * 1_048_576 + 3 * 3_145_728
    assert 28 * layer == 440_401_920
    head = 1024 * 151_936
    attention = 28 * 16 * 12 * 128 * 4096**2 / 2
    assert flops(QWEN3_06B, [4096], 4096) == 6 * (440_401_920 + head) * 4096 + attention == 20_419_348_267_008

    adapters = 28 * 16 * (2 * (1024 + 2048) + 2 * (1024 + 1024) + 3 * (1024 + 3072))
    assert adapters == 10_092_544
    expected = (4 * 440_401_920 + 6 * adapters) * 4096 + 4 * head * 4096 + attention
    assert flops(QWEN3_06B, [4096], 4096, adapters) == expected


@given(st.integers(1, 200), st.none() | st.integers(1, 250))
def test_pairs_are_the_visible_ones_but_for_half_the_diagonal(length: int, window: int | None) -> None:
    visible = sum(min(position + 1, window or length) for position in range(length))
    assert visible - attention_pairs(length, window) == min(length, window or length) / 2


def test_layers_have_their_own_window() -> None:
    kinds = ["sliding_attention", "full_attention"] * 15
    mixed = flops(SMOLLM2_135M, [1000], 0, layer_types=kinds, sliding_window=100)
    full, banded = flops(SMOLLM2_135M, [1000], 0), flops(SMOLLM2_135M, [1000], 0, sliding_window=100)
    assert banded < mixed < full
    assert mixed == (full + banded) / 2


def test_packing_counts_each_document_alone() -> None:
    assert flops(QWEN3_06B, [512] * 8, 4096) < flops(QWEN3_06B, [4096], 4096)
    assert flops(QWEN3_06B, [300, 700], 900) == flops(QWEN3_06B, [300], 400) + flops(QWEN3_06B, [700], 500)


def test_a_mixture_counts_the_experts_that_a_token_visits() -> None:
    fields: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    router = 1024 * 128
    dense = 3 * 1024 * 3072
    active, stored = 8 * 3 * 1024 * 768, 128 * 3 * 1024 * 768
    with_dense_first: dict[str, Any] = {"mlp_only_layers": [0], "decoder_sparse_step": 1}
    sparse = flops(QWEN3_06B, [64], 0, **fields, **with_dense_first)
    assert sparse - flops(QWEN3_06B, [64], 0) == 6 * 64 * 27 * (router + active - dense)
    plain, mixture = shape_of(config(QWEN3_06B)), shape_of(config(QWEN3_06B, **fields, **with_dense_first))
    assert plain is not None
    assert mixture is not None
    assert mixture.parameters - plain.parameters == 27 * (router + stored - dense)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("olmo2", {}),
        ("phi", {"num_key_value_heads": 4, "head_dim": None}),
        ("phi3", {"pad_token_id": 0, "head_dim": None}),
        ("starcoder2", {"head_dim": None}),
        ("nemotron", {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
        ("glm4_moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}),
    ],
)
def test_weights_equal_those_of_the_real_model(model_type: str, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    sizes = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    given_fields = {name: value for name, value in (sizes | fields).items() if value is not None}
    real = transformers.AutoConfig.for_model(model_type, **given_fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(real)
    shape = shape_of(real)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters() if p.ndim >= 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["linear_attention"] * 30},
        {"kv_lora_rank": 512},
        {"num_kv_shared_layers": 4},
        {"intermediate_size": None},
        {"interleave_moe_layer_step": 2},
    ],
)
def test_what_the_formulas_lack_is_not_counted(fields: dict[str, Any]) -> None:
    assert shape_of(config(SMOLLM2_135M, **fields)) is None


def test_the_text_part_of_a_multimodal_model_counts() -> None:
    assert shape_of(SimpleNamespace(model_type="vlm", text_config=config(QWEN3_06B))) == shape_of(config(QWEN3_06B))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_by_name(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None
