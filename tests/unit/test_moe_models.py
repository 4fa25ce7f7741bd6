"""Experts in models: what is fused and why not, adapters of square stacks in both orientations as peft computes them, refusals, names."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from rayft.config.schema import Adapter, Kernels
from rayft.errors import ConfigError
from rayft.models import adapt, experts, fused, stacked
from rayft.models.spec import PLAIN

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
STACKS = ("experts.gate_up_proj", "experts.down_proj")


def model(kind: str = "qwen3_moe", **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | options)), dtype=torch.float32)


class _Experts(nn.Module):
    """Experts as transformers' classes hold them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, hidden, inter = 3, 16, 8
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * inter, hidden) / 4)  # square: both orientations have this shape
        down = (3, inter, hidden) if config.transposed else (3, hidden, inter)
        self.down_proj = nn.Parameter(torch.randn(down) / 4)
        self.act_fn = ACT2FN["silu"]

    def forward(self, *args: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("transposed", [False, True])
def test_square_stacks_are_adapted_as_peft_does_in_both_orientations(transposed: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    made = use_experts_implementation(type("Made", (_Experts,), {"forward": _Experts.forward}), is_transposed=transposed)
    layer = nn.Module()
    layer.experts = made(SimpleNamespace(transposed=transposed, _experts_implementation="batched_mm"))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=[], target_parameters=list(STACKS), init_lora_weights=False), layer)
    x, weights = torch.randn(7, 16), torch.rand(7, 2)
    index = torch.tensor([[0, 2]] * 7)  # expert 1 gets nothing
    expected = layer.experts(x, index, weights)
    ((outer, core),) = experts.experts_of(layer)
    assert experts.other_experts(outer, core, fused.ACTIVATIONS) is None
    experts.install(outer, core, "silu")
    torch.testing.assert_close(layer.experts(x, index, weights), expected)
    with adapt.without_adapters(layer):
        base = layer.experts(x, index, weights)
    assert (base - expected).abs().max() > 0.1
    for name, wrapper in experts.wrappers(outer).items():
        stack = getattr(core, name)
        stack.data = experts.update_of(wrapper, stack.detach())
    with adapt.without_adapters(layer):
        torch.testing.assert_close(layer.experts(x, index, weights), expected)
    experts.remove(outer, core)
    assert core.config._experts_implementation == "batched_mm" and "forward" not in vars(outer)


def test_choices_name_the_kernel_or_the_reason() -> None:
    def kernels(module: Any, adapter: Adapter, device: str, **settings: Any) -> list[tuple[str, str]]:
        choices = fused.fuse(module, PLAIN, adapter, device, Kernels(**settings))
        return [(choice.kernel, choice.reason) for choice in choices if choice.part == "experts"]

    assert kernels(model(), Adapter(), "cuda") == [("moe", "")] * 2
    assert kernels(model(), Adapter(), "cpu")[0] == ("plain", "auto takes it on GPUs only, and this is cpu")
    assert kernels(model(), Adapter(), "cuda", experts="off")[0] == ("plain", "kernels.experts is off")
    lora, module = Adapter(type="lora", target_parameters=STACKS), model()
    assert adapt.adapt(module, lora, 0)[-1] == "model.layers.1.mlp.experts.down_proj"
    assert kernels(module, lora, "cpu") == [("moe_lora", "")] * 2, "peft's own path would build the whole stack"
    assert fused.report([fused.Choice(0, "experts", "moe_lora", ""), fused.Choice(1, "experts", "moe_lora", "")]) == [
        "moe_lora on layers 0-1"
    ]
    fused.unfuse(module, PLAIN)
    assert not any("rayft_plan" in vars(part) for part in module.modules())
    with pytest.raises(ConfigError, match="interleaved"):
        kernels(model("gpt_oss", num_local_experts=3), Adapter(), "cuda", experts="on")
    with pytest.raises(ConfigError, match="there is no such part"):
        kernels(model("qwen3"), Adapter(), "cuda", experts="on")


def test_gemma_4_has_its_experts_beside_a_dense_mlp() -> None:
    module = model("gemma4_text", enable_moe_block=True, hidden_size_per_layer_input=0, global_head_dim=8, top_k_experts=2)
    choices = fused.fuse(module, PLAIN, Adapter(), "cuda", Kernels())
    assert [choice.kernel for choice in choices if choice.part in ("mlp", "experts")] == ["glu", "moe"] * 2
    ((_, core), *_) = experts.experts_of(module)
    assert core.rayft_plan.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_parameters": ("experts.up_proj",)}, "its stacks of experts end in experts.down_proj, experts.gate_up_proj"),
        ({"target_parameters": ("gate.weight",)}, "which is no stack of experts"),
        ({"targets": ("q_proj", "down_proj")}, "peft would put it on the experts"),
    ],
)
def test_targets_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt.adapt(model(mlp_only_layers=[0]), Adapter(type="lora", **changed), 0)


def test_experts_do_not_drop_and_dense_layers_of_their_names_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    module = model(mlp_only_layers=[0])
    with caplog.at_level(logging.WARNING, logger="rayft"):
        targets = adapt.adapt(module, Adapter(type="lora", dropout=0.1, target_parameters=STACKS), 0)
    assert any("0.1 holds for linear layers" in message for message in caplog.messages)
    assert any("leaves out model.layers.0.mlp.gate_proj" in message for message in caplog.messages)
    assert len(targets) == 2 * 4 + 2
    drops = {type(part.lora_dropout["default"]).__name__: experts.is_wrapper(part) for part in module.modules() if hasattr(part, "lora_A")}
    assert drops == {"RowDropout": False, "Identity": True}


def test_stored_names_are_those_that_transformers_writes() -> None:
    module = model()
    stacks = stacked.stacks_of(module)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stack = module.get_parameter(name)
    found = dict(stacked.parts(name, stack, stacks))
    assert list(found)[:2] == ["model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"]
    assert len(found) == 6 and torch.equal(found["model.layers.0.mlp.experts.2.up_proj.weight"], stack[2, 8:])
    assert stacked.not_understood(module) is None
    assert stacked.not_understood(model("mixtral", num_local_experts=3)) == "WeightRenaming"
    assert stacked.stored_names("model.norm.weight", 3, stacks) == []


def test_flops_count_the_adapters_of_the_experts_that_a_token_visits() -> None:
    """One query projection of a layer and 2 of 3 experts, of rank 2."""
    from rayft.train.meter import Meter

    module = model()
    adapt.adapt(module, Adapter(type="lora", r=2, targets=("q_proj",), target_parameters=STACKS), seed=0)
    session: Any = SimpleNamespace(device="cpu")
    an_expert = 2 * (16 + 2 * 8) + 2 * (8 + 16)
    assert Meter(module.config, session, [module]).adapter_parameters == 2 * (2 * (16 + 16) + 2 * an_expert)
    assert Meter(module.config, session, [model()]).adapter_parameters is None
