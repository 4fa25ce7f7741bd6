"""The memory plan against what one step of the real model allocates, part by part and in all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayft.config.schema import Adapter, BatchShape, Model, Parallel, SftRun
from rayft.losses.supervised import NEED, next_token
from rayft.models.load import named_trainable
from rayft.observe.flops import ModelShape, shape_of
from rayft.optim.build import build_optimizer
from rayft.parallel import memory
from rayft.parallel.activation_memory import How, layer_activations, loss_bytes
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.train.step import forward_backward, update
from rayft.types import Batch, Session
from rayft_kernels.linear_cross_entropy import chunks

TOKENS = 512
LORA = {"type": "lora", "r": 8}
ON = {"norm_rope": "on", "glu": "on"}
BF16 = {"compute_dtype": "bfloat16"}
NF4 = {"quantize": "nf4"}
STACKS = LORA | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PLAIN = {"experts": "off"}
MOE = {
    "head_dim": 32, "vocab_size": 1024, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128
}  # fmt: skip
MANY = MOE | {"num_experts": 128, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def real_config(model_type: str, **fields: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(SIZES | {"tie_word_embeddings": True} | fields))


def batch(lengths: list[int]) -> Batch:
    tokens = sum(lengths)
    numbers = torch.arange(tokens)
    return Batch(
        tokens=numbers % 1000,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        targets=numbers % 1000,
        loss_weights=torch.ones(tokens),
        trained=numbers,
        row_keys=numbers,
        source_ids=torch.zeros(tokens, dtype=torch.int32),
        document_lengths=tuple(lengths),
        num_tokens=tokens,
    )


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size(tensors: Iterator[Any]) -> int:
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


def measured(config: Any, cfg: SftRun, folder: Path, micro_batches: int) -> tuple[int, int, int]:
    """(parameters, optimizer states, most that the second step allocates beside them), in bytes."""
    config.save_pretrained(folder)
    session = Session(0, 1, 0, "cpu", folder, lambda metrics, directory, finish: None, 60.0)
    mesh = build_mesh("cpu", 1)
    model = build_model(cfg, session, mesh)
    optimizer = build_optimizer(named_trainable(model), cfg.optim, fused=True)

    def step() -> None:
        batches = [batch([300, TOKENS - 300]) for _ in range(micro_batches)]
        forward_backward([model], batches, next_token, NEED, mesh)
        update([model], optimizer, 1.0)

    step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    states = size(tensor for state in optimizer.state.values() for tensor in state.values())
    return size(parameter for _, parameter in model.named_parameters()), states, max(held)


@pytest.mark.parametrize(
    ("model_type", "fields", "sections", "micro_batches"),
    [
        ("llama", {}, {}, 1),
        ("llama", {"tie_word_embeddings": False}, {"model": BF16}, 3),
        ("llama", {}, {"parallel": {"activation_checkpointing": "full"}}, 1),
        ("llama", {"num_hidden_layers": 2, "intermediate_size": 1408}, {"parallel": {"activation_checkpointing": "full"}}, 1),
        ("llama", {}, {"parallel": {"activation_checkpointing": "selective"}}, 1),
        ("qwen3", {"head_dim": 64}, {"adapter": LORA, "parallel": {"activation_checkpointing": "selective"}}, 1),
        ("qwen3", {"head_dim": 64}, {"model": BF16, "kernels": ON}, 1),
        ("llama", {"num_attention_heads": 8, "head_dim": 64, "intermediate_size": 64}, {}, 1),
        ("llama", {"num_hidden_layers": 1, "vocab_size": 4096, "hidden_size": 1024}, {}, 1),
        ("llama", {"hidden_size": 512, "intermediate_size": 2048}, {}, 1),
        ("qwen3", {"head_dim": 64}, {"model": BF16}, 1),
        ("qwen3", {"head_dim": 64}, {"adapter": LORA}, 1),
        ("llama", {}, {"adapter": LORA, "model": BF16, "parallel": {"activation_checkpointing": "full"}}, 1),
        ("llama", {}, {"adapter": LORA | {"targets": ["q_proj", "v_proj"], "dropout": 0.1}, "model": BF16}, 1),
        ("qwen3", {"hidden_size": 512, "intermediate_size": 2048}, {"adapter": LORA, "model": NF4}, 1),
        ("qwen3_moe", MOE, {"kernels": PLAIN}, 1),
        ("qwen3_moe", MOE, {"adapter": LORA, "model": BF16, "kernels": PLAIN}, 1),
        ("qwen3_moe", MOE, {"adapter": STACKS, "model": BF16}, 1),
        ("qwen3_moe", MANY, {"adapter": STACKS, "model": BF16, "kernels": PLAIN}, 1),
        ("qwen3_moe", MANY, {"adapter": STACKS, "kernels": PLAIN, "parallel": {"activation_checkpointing": "full"}}, 1),
    ],
)
@pytest.mark.usefixtures("group")
def test_what_a_step_needs_is_planned_within_an_eighth(
    model_type: str, fields: dict[str, Any], sections: dict[str, Any], micro_batches: int, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "method": "sft",
        "run": {"name": "plan"},
        "data": {"train": {"a": {"path": "none"}}, "seq_len": TOKENS},
        "batch": {"rows": micro_batches},
        "parallel": {},
        **sections,
    }
    values["model"] = {"path": str(tmp_path), "init": "random", **sections.get("model", {})}
    cfg = SftRun.model_validate(values)
    config = real_config(model_type, **fields)
    parameters, states, step = measured(config, cfg, tmp_path, micro_batches)
    shape = shape_of(config)
    assert shape is not None
    plan = memory.estimate(shape, cfg, "cpu")
    parts = dict(plan.parts)
    assert parts["parameters"] == pytest.approx(parameters, rel=0.01)
    assert parts["optimizer states"] == pytest.approx(states, rel=0.01)
    assert plan.total - parts["runtime"] - parts["parameters"] - parts["optimizer states"] == pytest.approx(step, rel=0.125), plan


def shape() -> ModelShape:
    found = shape_of(real_config("llama", num_hidden_layers=3))
    assert found is not None
    return found


def run(**sections: Any) -> SftRun:
    values: dict[str, Any] = {
        "method": "sft",
        "run": {"name": "plan"},
        "model": Model(path="m"),
        "data": {"train": {"a": {"path": "none"}}, "seq_len": 256},
        "batch": BatchShape(rows=64, micro_rows=1),
    }
    return SftRun.model_validate(values | sections)


def plan(**sections: Any) -> memory.MemoryPlan:
    return memory.estimate(shape(), run(**sections), "cuda")


def test_more_workers_share_the_state_and_nothing_else() -> None:
    one, eight = plan(batch=BatchShape(rows=1)).parts, plan(batch=BatchShape(rows=8), parallel=Parallel(workers=8)).parts
    for part in ("parameters", "optimizer states"):
        assert one[part] == 8 * eight[part]
    assert one["activations"] == eight["activations"]


def test_replicas_hold_the_state_each() -> None:
    sharded, replicated = (plan(batch=BatchShape(rows=8), parallel=Parallel(workers=8, replicas=n)).parts for n in (1, 4))
    for part in ("parameters", "optimizer states"):
        assert replicated[part] == 4 * sharded[part]


def test_what_leaves_a_gpu_is_on_its_host_and_nothing_leaves_a_cpu() -> None:
    here, away = plan(), plan(parallel=Parallel(cpu_offload=True))
    assert {part: away.host[part] for part in ("parameters", "optimizer states")} == {
        part: here.parts[part] for part in ("parameters", "optimizer states")
    }
    assert away.total < here.total
    assert not {"parameters", "optimizer states"} & set(away.parts)
    for parallel in (Parallel(cpu_offload=True, activation_offload=True), Parallel()):
        found = memory.estimate(shape(), run(parallel=parallel), "cpu")
        assert (found.total, found.host) == (memory.estimate(shape(), run(), "cpu").total, {})


def test_a_lean_loss_saves_the_float32_sum_of_a_trained_head() -> None:
    """On a GPU: 4 bytes for each of its weights, and what chunks of the fast way take beyond those of the lean one."""
    found = shape()
    for tokens, trained in ((256, True), (4096, True), (4096, False)):
        fast, lean = (loss_bytes(found, tokens, 2, head_trained=trained, gpu=True, lean=on) for on in (False, True))
        sizes = (tokens, found.hidden, found.vocab, torch.bfloat16)
        inside = chunks.weighted_nll_bytes(*sizes, head_trained=trained, lean=True)
        head = found.hidden * found.vocab if trained else 0
        assert lean == 2 * 2 * tokens * found.hidden + inside + 2 * head
        assert inside <= chunks.LEAN_BYTES
        assert lean <= fast if not trained else lean < fast
    big = replace(found, hidden=2048, vocab=128256)
    fast, lean = (loss_bytes(big, 8192, 2, head_trained=True, gpu=True, lean=on) for on in (False, True))
    assert fast - lean == pytest.approx(4 * 2048 * 128256 - chunks.LEAN_BYTES, rel=0.2)


@pytest.mark.parametrize("compile_layers", [False, True])
def test_each_saving_of_activations_saves_more(compile_layers: bool) -> None:
    def activations(**fields: Any) -> int:
        return plan(batch=BatchShape(rows=256, micro_rows=256), parallel=Parallel(compile=compile_layers, **fields)).total

    savings = [
        activations(activation_checkpointing=kind, activation_offload=away)
        for away in (False, True)
        for kind in ("none", "selective", "full")
    ]
    assert savings[:3] == sorted(savings[:3], reverse=True)
    assert all(away < here for here, away in zip(savings[:3], savings[3:], strict=True))
    assert len(set(savings)) == 6


def test_what_is_offloaded_of_activations_is_all_but_the_last_layer() -> None:
    full = plan(parallel=Parallel(activation_checkpointing="full", activation_offload=True))
    assert full.host["activations"] == 256 * 2 * shape().hidden * (len(shape().layers) - 1)


def test_only_unfrozen_weights_have_gradients_and_states() -> None:
    found = shape()
    mlp = memory.weights_of(found, Adapter(), [r"model\.layers\.[12]\.mlp\.", r"model\.embed_tokens\.weight[5:9]"])
    per_layer = 3 * found.hidden * found.layers[0].mlp
    assert mlp.layers == (0, per_layer, per_layer)
    assert (mlp.root, mlp.head_trained) == (found.hidden * found.vocab, True)  # the embedding is the head, and its gradient is whole
    assert memory.weights_of(found, Adapter(), ["lm_head"]).root == 0
    states = plan(model=Model(path="m", unfrozen=(r"model\.layers\.1",))).parts["optimizer states"]
    assert states == 8 * sum(memory.weights_of(found, Adapter(), [r"model\.layers\.1"]).layers)


def test_types_of_what_is_held() -> None:
    total = shape().parameters
    full, frozen = plan(), plan(adapter=Adapter(type="lora", r=4))
    adapter = memory.weights_of(shape(), Adapter(type="lora", r=4)).adapter
    assert full.parts["parameters"] == 4 * total
    assert full.parts["optimizer states"] == 8 * total
    assert frozen.parts["parameters"] == 2 * total + 4 * adapter
    assert frozen.parts["optimizer states"] == 8 * adapter
    assert plan(model=Model(path="m", dtype="bfloat16")).parts["optimizer states"] == 4 * total


def test_the_table_adds_up_and_leaves_out_nothing() -> None:
    found = plan()
    assert sum(bytes_ for _, bytes_ in found.table()) == found.total
    assert [bytes_ for _, bytes_ in found.table()] == sorted((b for b in found.parts.values() if b), reverse=True)


@pytest.mark.parametrize(
    ("fields", "copied"),
    [
        ({}, 0),
        ({"targets": ("q_proj", "down_proj")}, 0),
        ({"targets": r"model\.layers\.[01]\.self_attn\..*_proj"}, 0),
        ({"modules_to_save": ("lm_head",)}, 2048 * 128),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(fields: dict[str, Any], copied: int) -> None:
    from transformers import AutoModelForCausalLM

    from rayft.models.adapt import adapt

    adapter = Adapter(type="lora", r=4, **fields)
    config = real_config("llama", num_hidden_layers=3, tie_word_embeddings=not copied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapt(model, adapter, seed=0)
    found = shape_of(config)
    assert found is not None
    weights = memory.weights_of(found, adapter)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert weights.adapter == sum(count for name, count in trained.items() if ".lora_" in name)
    assert weights.copied == sum(count for name, count in trained.items() if "modules_to_save" in name) == copied
    assert weights.head_trained == bool(copied)


def sparse_config() -> Any:
    return real_config(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0], num_hidden_layers=3
    )


def test_adapters_of_experts_are_counted_as_peft_makes_them() -> None:
    """With their gradients and states; and the plan of a GPU grows by what they take."""
    from transformers import AutoModelForCausalLM

    from rayft.models.adapt import adapt

    dense, found = Adapter(type="lora", r=4, targets=("q_proj",)), shape_of(sparse_config())
    assert found is not None
    for stacks, sizes in ((("experts.gate_up_proj",), 128 + 2 * 48), (("experts.gate_up_proj", "experts.down_proj"), 2 * 128 + 3 * 48)):
        adapter = dense.model_copy(update={"target_parameters": stacks})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(sparse_config())
        adapt(model, adapter, seed=0)
        weights, without = memory.weights_of(found, adapter), memory.weights_of(found, dense)
        assert weights.adapter == sum(parameter.numel() for _, parameter in named_trainable(model))
        more = 4 * 4 * sizes
        assert [a - b for a, b in zip(weights.layers, without.layers, strict=True)] == [0, more, more]
        plans = [memory.estimate(found, run(adapter=chosen), "cuda").parts for chosen in (adapter, dense)]
        assert plans[0]["parameters"] - plans[1]["parameters"] == 4 * 2 * more
        assert plans[0]["optimizer states"] - plans[1]["optimizer states"] == 8 * 2 * more


def test_experts_that_are_unfrozen_are_trained() -> None:
    found = shape_of(sparse_config())
    assert found is not None
    one = memory.weights_of(found, Adapter(), [r"model\.layers\.1\.mlp\.experts\.down_proj"])
    assert one.layers == (0, 4 * 48 * 128, 0)


def test_wide_heads_take_a_workspace_in_the_backward_of_attention() -> None:
    """Within WORKSPACE bytes of scores; none where heads are small, on a CPU, or where flex is asked for."""
    base = shape()
    wide = replace(base, vocab=16, layers=tuple(replace(layer, heads=8, kv_heads=2, head_dim=512, mlp=64) for layer in base.layers))
    wanted = {"data": {"train": {"a": {"path": "none"}}, "seq_len": 8192}, "adapter": Adapter(type="lora", r=1)}
    full = {"activation_checkpointing": "full"}
    found = memory.estimate(wide, run(**wanted, parallel=Parallel(**full)), "cuda")
    flex = memory.estimate(wide, run(**wanted, parallel=Parallel(attention="flex", **full)), "cuda")
    assert found.moment.startswith("attention in the backward")
    assert found.total - flex.total > 200 << 20
    on_cpu = memory.estimate(wide, run(**wanted, parallel=Parallel(**full)), "cpu")
    assert not on_cpu.moment.startswith("attention")


def test_fused_experts_are_planned_with_what_autograd_keeps_of_them() -> None:
    """But for what a few numbers of a row take: its weight and its places."""
    from rayft_kernels import ExpertAdapter, moe_lora

    found = shape_of(sparse_config())
    assert found is not None
    layer, tokens, kept = found.layers[1], 64, 0
    adapter = Adapter(type="lora", r=4, target_parameters=("experts.gate_up_proj", "experts.down_proj"))
    low, high = torch.ones(4 * 4, 128), torch.ones(4 * 4, 48)
    of_up, of_down = ((a.requires_grad_(), torch.ones(width, 4 * 4, requires_grad=True)) for a, width in ((low, 96), (high, 128)))
    index = torch.arange(2 * tokens).view(tokens, 2) % 4
    held = [torch.ones(4, 96, 128), torch.ones(4, 128, 48), *of_up, *of_down]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if any(tensor is other for other in held) else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_lora(
            torch.ones(tokens, 128), index, torch.ones(tokens, 2), held[0], held[1],
            gate_up_adapter=ExpertAdapter(*of_up, 1.0), down_adapter=ExpertAdapter(*of_down, 1.0),
        )  # fmt: skip
    fused, plain = (How(gpu=True, lora=True, experts=on) for on in (True, False))
    without = replace(layer, active=0)
    sizes = [layer_activations(layer, 128, 4, adapter, how) - layer_activations(without, 128, 4, adapter, how) for how in (fused, plain)]
    assert tokens * sizes[0] == pytest.approx(kept, rel=0.05)
    assert sizes[0] < sizes[1] / 2
