"""Which parts of which layers run fused: choices with reasons, per layer and per part, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, SIZES
from rayft.config.load import load
from rayft.config.schema import Adapter, Kernels
from rayft.errors import ConfigError
from rayft.models import adapt, fused
from rayft.models.spec import PLAIN
from rayft.types import ModelSpec

LORA = Adapter(type="lora", r=2)
ON = Kernels(lora="on", norm_rope="auto", glu="auto")


def model(family: str, adapter: Adapter) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SIZES | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | options))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    adapt.adapt(module, adapter, 0)
    return module


def kernels(choices: list[fused.Choice], layer: int) -> list[str]:
    return [choice.kernel for choice in choices if choice.layer == layer]


def test_auto_takes_lora_on_gpus_only_and_says_why_not() -> None:
    for device, adapter, expected in (
        ("cuda", LORA, ["lora_qkv", "norm_rope", "lora_o", "lora_mlp"]),
        ("cuda", Adapter(), ["plain", "norm_rope", "plain", "glu"]),
        ("cpu", LORA, ["plain"] * 4),
    ):
        choices = fused.fuse(model("qwen3", adapter), PLAIN, adapter, device, Kernels())
        assert [kernels(choices, layer) for layer in range(3)] == [expected] * 3
        assert all((choice.kernel == "plain") == bool(choice.reason) for choice in choices)
    assert fused.report(choices)[0] == "plain qkv on layers 0-2: auto takes it on GPUs only, and this is cpu"


def test_a_family_that_fails_parity_is_left_out_with_its_reason() -> None:
    spec = ModelSpec(model_types=("llama",), unsupported={"kernels.lora": "differs from the plain layers"})
    choices = fused.fuse(model("llama", LORA), spec, LORA, "cuda", Kernels())
    assert {choice.reason for choice in choices if choice.part == "qkv"} == {"differs from the plain layers"}
    assert kernels(choices, 0)[-1] == "glu"


def test_an_unsupported_part_stays_plain_for_its_layer_alone() -> None:
    """Each layer gets another obstacle; parts without one are fused all the same."""
    module = model("llama", LORA)
    layers = module.model.layers
    layers[0].self_attn.k_proj.base_layer.weight.requires_grad_()
    layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    layers[1].mlp.act_fn = nn.Tanh()
    layers[2].mlp.forward = lambda x: x
    layers[2].self_attn.q_proj.lora_dropout["default"] = nn.AlphaDropout(0.1)
    choices = fused.fuse(module, PLAIN, LORA, "cpu", ON)
    found = {(choice.layer, choice.part): (choice.kernel, choice.reason) for choice in choices}
    assert found[0, "qkv"] == ("plain", "a projection's own weight is trained")
    assert found[0, "o"] == ("lora_o", "") and found[0, "mlp"] == ("lora_mlp", "")
    assert found[1, "qkv"] == ("lora_qkv", "")
    assert found[1, "o"] == ("plain", "a projection has hooks, which would not run")
    assert found[1, "mlp"] == ("plain", "no kernel has the activation Tanh")
    assert found[2, "qkv"] == ("plain", "a projection has a dropout of the kind AlphaDropout")
    assert found[2, "mlp"] == ("plain", "LlamaMLP.forward is replaced already")


def test_projections_may_have_no_adapter() -> None:
    some = Adapter(type="lora", r=2, targets=("v_proj", "down_proj"))
    assert kernels(fused.fuse(model("llama", some), PLAIN, some, "cpu", ON), 0) == ["lora_qkv", "plain", "plain", "lora_mlp"]
    other = Adapter(type="lora", r=2, targets=("o_proj",))
    assert kernels(fused.fuse(model("llama", other), PLAIN, other, "cpu", ON), 0) == ["plain", "plain", "lora_o", "plain"]


def test_a_missing_projection_is_no_llama() -> None:
    module = model("llama", LORA)
    module.model.layers[0].self_attn.v_proj = None
    choices = fused.fuse(module, PLAIN, LORA, "cpu", ON)
    assert choices[0].reason == "LlamaAttention has the projections q_proj, k_proj here, which was not compared"
    assert [kernels(choices, layer)[0] for layer in range(3)] == ["plain", "lora_qkv", "lora_qkv"]


def test_what_was_asked_for_by_name_and_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels.lora = 'on': no layer can have it \(Phi3Attention is not among"):
        fused.fuse(model("phi3", LORA), PLAIN, LORA, "cuda", ON)
    with pytest.raises(ConfigError, match=r"kernels.norm_rope = 'on': .*no norm by heads"):
        fused.fuse(model("llama", Adapter()), PLAIN, Adapter(), "cpu", Kernels(norm_rope="on"))
    with pytest.raises(ConfigError, match=r"kernels.lora = 'on': there is no LoRA adapter"):
        load([], ["method=sft", "run.name=x", "model.path=x", "data.train.a.path=x", "kernels.lora=on"])


def test_unfuse_takes_everything_off_and_names_stay() -> None:
    module = model("qwen3", LORA)
    names = [name for name, _ in module.named_parameters()]
    fused.fuse(module, PLAIN, LORA, "cuda", Kernels())
    assert [name for name, _ in module.named_parameters()] == names
    assert all("forward" in vars(layer.self_attn) and "forward" in vars(layer.mlp) for layer in module.model.layers)
    fused.unfuse(module, PLAIN)
    for part in module.modules():
        assert not {"forward", "rayft_plan"} & set(vars(part))
