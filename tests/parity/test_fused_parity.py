"""Models with fused layers against the same models without: every family, ranks, recomputation, compile, any order of patches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
from families import make_batch, make_rows, write_model
from ranks import run_ranks
from rayft.config.load import load
from rayft.config.schema import Kernels
from rayft.data.reader import micro_batches
from rayft.losses.supervised import NEED, next_token
from rayft.models import adapt, fused, heads
from rayft.models import load as loading
from rayft.models.spec import PLAIN, spec_of
from rayft.parallel import activation, attention
from rayft.types import Session

PLAIN_KERNELS = Kernels(lora="off", norm_rope="off", glu="off")
EXTRA = {
    "cohere_norm": ("cohere", {"use_qk_norm": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
}
ALL = [*families.FAMILIES, *EXTRA]
NORMED = {"qwen3", "qwen3_moe", "gemma3", "gemma4", "gemma4_moe"}
UNFUSED = {"phi3", "glm4_moe"}
"""Families of which no layer can be fused."""


@pytest.fixture(scope="module", autouse=True)
def _more_families() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in EXTRA.items():
            patch.setitem(families.FAMILIES, name, entry)
        yield


def built(folder: str, kernels: Kernels, overrides: list[str], order: tuple[str, ...] = ("fuse", "wrap")) -> Any:
    """A model as `build_model` makes it, in one process and without FSDP, its adapters moved off zero."""
    cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", *overrides])
    loading.register_attention(attention.packed_attention)
    config = loading.read_config(cfg.model)
    module = loading.build(cfg.model, config, torch.float32)
    adapt.adapt(module, cfg.adapter, 0)
    for step in order:
        if step == "fuse":
            fused.fuse(module, spec_of(config), cfg.adapter, "cpu", kernels)
        else:
            layers = loading.layers_of(module, "model.layers")
            activation.wrap_layers(
                layers, compile_layers=cfg.parallel.compile, recompute=cfg.parallel.activation_checkpointing, offload=False
            )
    heads.attach_score(module, attention.layouts(module, "auto"), 0)
    loading.materialise(module, cfg.model, 0, "cpu")
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.train()


def loss_and_gradients(module: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = module.score(make_batch([[5, 1, 1, 20, 37], [64]]), NEED).nll_sum
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_alike(ours: tuple[float, dict[str, torch.Tensor]], plain: tuple[float, dict[str, torch.Tensor]], rtol: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert (ours[1][name] - gradient).norm() <= rtol * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("family", [name for name in ALL if name not in UNFUSED])
def test_loss_and_gradients_of_every_family_stay(family: str, tmp_path: Path) -> None:
    """LoRA with dropout on all layers, LoRA on some, and all weights with fused norm and activation."""
    folder = str(write_model(family, tmp_path))
    lora = ["adapter.type=lora", "adapter.r=4"]
    norm: Any = "on" if family in NORMED else "off"
    some = '["q_proj"]' if family == "qwen3_moe" else '["q_proj","up_proj"]'  # peft would take up_proj for experts
    for overrides, kernels in (
        ([*lora, "adapter.dropout=0.3"], Kernels(lora="on", norm_rope=norm, glu="on")),
        ([*lora, f"adapter.targets={some}"], Kernels(lora="on", norm_rope=norm, glu="off")),
        ([], Kernels(lora="off", norm_rope=norm, glu="on")),
    ):
        plain = loss_and_gradients(built(folder, PLAIN_KERNELS, overrides))
        # Six layers whose scores are not scaled down magnify float32's rounding; in float64 they are equal, see below.
        assert_alike(loss_and_gradients(built(folder, kernels, overrides)), plain, rtol=1e-4 if family == "gemma4" else 1e-5)


@pytest.mark.parametrize("family", ["qwen3"])
def test_patches_compose_in_every_order(family: str, tmp_path: Path) -> None:
    """Fused LoRA, norm, rotation and MLP with recomputation: fused before or after the layers are wrapped, taken off and put on again."""
    folder = str(write_model(family, tmp_path))
    overrides = ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.2", "parallel.activation_checkpointing=full"]
    on = Kernels(lora="on", norm_rope="on", glu="on")
    plain = loss_and_gradients(built(folder, PLAIN_KERNELS, overrides))
    for order in (("fuse", "wrap"), ("wrap", "fuse")):
        module = built(folder, on, overrides, order)
        assert_alike(loss_and_gradients(module), plain)
        module.zero_grad()
        fused.unfuse(module, PLAIN)
        assert_alike(loss_and_gradients(module), plain)


def test_disabled_adapters_leave_the_base_model(tmp_path: Path) -> None:
    folder = str(write_model("llama", tmp_path))
    module = built(folder, Kernels(lora="on"), ["adapter.type=lora", "adapter.r=4"])
    base = built(folder, PLAIN_KERNELS, [])
    for part in module.modules():
        if hasattr(part, "lora_A"):
            part.enable_adapters(False)
    batch = make_batch([[64]])
    with torch.no_grad():
        torch.testing.assert_close(module.score(batch, NEED).nll_sum, base.score(batch, NEED).nll_sum, rtol=1e-6, atol=0)


def adapted(module: Any, endings: str) -> tuple[Any, Any]:
    """A float64 model with random LoRA weights on layers with these name endings, all else frozen; the section that says so."""
    from peft import LoraConfig, inject_adapter_in_model

    adapter = load([], ["method=sft", "run.name=x", "model.path=x", "data.train.a.path=x", "adapter.type=lora"]).adapter
    inject_adapter_in_model(LoraConfig(r=4, target_modules=endings.split(), init_lora_weights=False), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return module.double(), adapter


def logits_and_gradients(module: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    out = module(input_ids=tokens, use_cache=False).logits
    return [out, *torch.autograd.grad(out.square().mean(), [p for p in module.parameters() if p.requires_grad])]


NORMS = [("off", 1e-12), ("on", 1e-4)]
"""kernels.norm_rope and the tolerance: transformers norms in float32 whatever the model's type, and these models magnify that."""


@pytest.mark.parametrize(("norm_rope", "tolerance"), NORMS)
def test_attention_of_a_mixture_of_experts_is_fused_and_its_experts_are_not(norm_rope: Any, tolerance: float) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = families.SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    torch.manual_seed(0)
    module, adapter = adapted(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), "q_proj k_proj v_proj o_proj")
    module.set_experts_implementation("eager")  # the others take no float64
    tokens = torch.randint(0, families.VOCAB, (2, 12))
    plain = logits_and_gradients(module, tokens)
    choices = fused.fuse(module, PLAIN, adapter, "cpu", Kernels(lora="on", norm_rope=norm_rope))
    norm = "norm_rope" if norm_rope == "on" else "plain"
    for layer in (0, 1):
        assert [choice.kernel for choice in choices if choice.layer == layer] == ["lora_qkv", norm, "lora_o", "plain"]
    for a, b in zip(logits_and_gradients(module, tokens), plain, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("norm_rope", "tolerance"), NORMS)
def test_gemma4_layers_share_keys_as_values_and_keys_between_layers(norm_rope: Any, tolerance: float) -> None:
    """Layers with all projections, without v_proj, and with q_proj alone, which read an earlier layer's keys and values."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    sizes = families.SIZES | {
        "num_hidden_layers": 6, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "num_kv_shared_layers": 2, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": families.VOCAB, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    module, adapter = adapted(Gemma4ForCausalLM(Gemma4TextConfig(**sizes)), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj")
    tokens = torch.randint(0, families.VOCAB, (2, 12))
    plain = logits_and_gradients(module, tokens)
    choices = fused.fuse(module, PLAIN, adapter, "cpu", Kernels(lora="on", norm_rope=norm_rope))
    kernels = [choice.kernel for choice in choices if choice.part == "qkv"]
    assert kernels == ["lora_qkv", "lora_qk", "lora_qkv", "lora_qk", "lora_q", "lora_q"]
    assert {choice.kernel for choice in choices if choice.part == "mlp"} == {"lora_mlp"}
    for a, b in zip(logits_and_gradients(module, tokens), plain, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def curves(rank: int, world: int, folder: str, cases: list[tuple[int, list[str]]]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of each step, for each (steps, overrides)."""
    from numerics.test_step_equals_plain_torch import LENGTHS, ROWS, RowsInMemory
    from rayft.models.load import named_trainable
    from rayft.optim.build import build_optimizer
    from rayft.parallel.mesh import build_mesh
    from rayft.train.build import build_model
    from rayft.train.step import forward_backward, update

    mesh, reader, results = build_mesh("cpu", world), RowsInMemory(make_rows(LENGTHS)), []
    for steps, overrides in cases:
        cfg = load([], ["method=sft", "run.name=x", f"model.path={folder}", "data.train.a.path=x", "optim.lr=0.003", *overrides])
        session = Session(
            rank=rank, world_size=world, local_rank=rank, device="cpu", run_dir=Path("."), report=lambda *_: None, deadline_s=60
        )
        model = build_model(cfg, session, mesh)
        optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)
        curve = []
        for step in range(steps):
            batches = micro_batches(reader, step, rows=ROWS, micro_rows=2, rank=rank, world=world)
            sums, divisor = forward_backward([model], batches, next_token, NEED, mesh)
            curve.append(((sums["train/loss"] / divisor).item(), update([model], optimizer, 1.0).item()))
        results.append(curve)
    return results


def test_thirty_steps_on_one_and_two_ranks_recomputed_and_compiled(tmp_path: Path) -> None:
    folder = str(write_model("qwen3", tmp_path))
    lora = ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.1"]
    on = [*lora, "kernels.lora=on", "kernels.norm_rope=on"]
    full, selective = "parallel.activation_checkpointing=full", "parallel.activation_checkpointing=selective"
    (plain,) = run_ranks(1, curves, folder, [(30, lora)])[0]
    assert plain[-1][0] < plain[0][0]
    compiled = [*on, "parallel.compile=true"]
    cases = [(30, on), (10, [*on, full]), (10, [*on, selective]), (5, compiled), (5, [*compiled, full])]
    for curve in [*run_ranks(1, curves, folder, cases)[0], *run_ranks(2, curves, folder, cases[:2])[0]]:
        np.testing.assert_allclose(np.array(curve)[:, 0], np.array(plain)[: len(curve), 0], rtol=1e-5)
        np.testing.assert_allclose(np.array(curve)[:, 1], np.array(plain)[: len(curve), 1], rtol=1e-4)


def curves_of_families(rank: int, world: int, jobs: list[tuple[str, list[tuple[int, list[str]]]]]) -> list[Any]:
    """`curves` of each (folder, cases)."""
    return [curves(rank, world, folder, cases) for folder, cases in jobs]


def test_thirty_steps_of_several_families(tmp_path: Path) -> None:
    """All weights, and LoRA on all layers: losses and gradient norms with fused operations are those without."""
    jobs, lora = [], ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.1"]
    for family in ("llama", "qwen3", "gemma3", "qwen3_moe", "gemma4"):
        steps = 30 if family in ("llama", "qwen3", "gemma3") else 4
        lr = [f"optim.lr={1e-5 if family == 'gemma4' else 3e-3}"]  # its losses magnify a change of weights a thousand times
        on = [f"kernels.norm_rope={'on' if family in NORMED else 'off'}", "kernels.glu=on"]
        folder = str(write_model(family, tmp_path / family))
        jobs.append((folder, [(steps, [*lr, *more]) for more in ([], on, lora, [*lora, *on, "kernels.lora=on"])]))
    for (folder, _), (plain, ours, adapted_plain, adapted_ours) in zip(jobs, run_ranks(1, curves_of_families, jobs)[0], strict=True):
        for fused_curve, plain_curve in ((ours, plain), (adapted_ours, adapted_plain)):
            assert plain_curve[-1][0] < plain_curve[0][0]
            np.testing.assert_allclose(np.array(fused_curve)[:, 0], np.array(plain_curve)[:, 0], rtol=2e-5, err_msg=folder)
            np.testing.assert_allclose(np.array(fused_curve)[:, 1], np.array(plain_curve)[:, 1], rtol=2e-4, err_msg=folder)


INTERPRETED = """
from unittest.mock import patch
import torch
from bench import check_lora
from rayft_kernels.lora import dropout, glu, triton
triton.SHARE_TOKENS = 512
glu._on_triton = lambda x: x.dtype != torch.float64
expected = check_lora.token_dropout
for activation in check_lora.ACTIVATIONS:
    check_lora.check_kernels(activation, torch.float32, "cpu")
check_lora.check_operators("cpu")
x, keys, seed = torch.randn(33, 300), torch.randint(0, 2**32, (33,)), torch.tensor(2**31 - 1)
torch.testing.assert_close(triton.dropout_kernel(x, keys, seed, 0.3), dropout.token_dropout(x, keys, seed, 0.3))
with patch.object(torch.cuda, "device_of", wraps=torch.cuda.device_of) as entered:
    triton.dropout_body(x, keys, seed, 0.3)
    check_lora.check_kernels("silu", torch.float32, "cpu")
assert entered.call_count == 7, entered.call_count
"""


def test_the_kernels_interpreted_on_a_cpu_equal_their_torch_bodies() -> None:
    """Triton's interpreter runs the sources of the kernels; it must be chosen before triton is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, check=True, timeout=150)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_fused_model_on_a_gpu_is_as_exact_as_the_plain_one(family: str, tmp_path: Path) -> None:
    """bfloat16 against the plain float32 model on CPU: at most twice the plain bfloat16 model's error, and 1e-3."""
    folder = str(write_model(family, tmp_path))
    overrides = ["adapter.type=lora", "adapter.r=4", "adapter.dropout=0.1"]
    on = Kernels(lora="on", norm_rope="on" if family in NORMED else "off", glu="on")
    batch = make_batch([[64], [64]])

    def loss(kernels: Kernels, device: str, dtype: torch.dtype) -> float:
        module = built(folder, kernels, overrides).to(device=device, dtype=dtype)
        return float(next_token(module.score(batch.to(device), NEED), batch)[0])

    exact = loss(PLAIN_KERNELS, "cpu", torch.float32)
    ours, plain = (abs(loss(kernels, "cuda", torch.bfloat16) - exact) / exact for kernels in (on, PLAIN_KERNELS))
    assert ours <= 2 * plain + 1e-3
