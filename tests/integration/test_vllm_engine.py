"""A real vLLM engine on the CPU: its log-probabilities, pushes into it, and versions across a push in mid-generation.

Skipped where vLLM is not installed; `make env-rollout-cpu` adds it. A start takes some 15 to 35 s on 2 cores, so one engine serves
all tests of a model.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.rollout.agent import Sampling, rollout
from rayft.rollout.engine import EngineOptions, EngineThread
from rayft.types import Group, Prompt
from rayft.weight_sync.protocol import EngineHandle, Sender

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make env-rollout-cpu"),
    pytest.mark.timeout(400),
]
CONTEXT = 512
STOP = 17
EXACT = 2e-5
"""Between vLLM and transformers, both in float32. Two different models of this size are 1 and more apart."""
PROMPT = Prompt("0-1", 1, tuple(range(20, 60)), {})


def write(kind: Any, config: Any, folder: Path, seed: int) -> Path:
    """A random model of that class, its norms moved off their initial values."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def write_model(folder: Path, seed: int, tied: bool) -> Path:
    """A random Llama that vLLM's CPU attention can run (heads of 32), with an odd vocabulary, which vLLM pads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=1021, max_position_embeddings=1024, tie_word_embeddings=tied, dtype="float32", **sizes)
    return write(LlamaForCausalLM, config, folder, seed)


def write_sparse_model(folder: Path, seed: int) -> Path:
    """A random Qwen3 with experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    config = Qwen3MoeConfig(vocab_size=1021, max_position_embeddings=1024, dtype="float32", **sizes, **experts)
    return write(Qwen3MoeForCausalLM, config, folder, seed)


@pytest.fixture(scope="module", params=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, EngineThread]]:
    """A folder with models a and b, and an engine that was started from a."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate("ab"):
        write_model(folder / name, seed, request.param == "tied")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = EngineOptions(
        folder / "a", dtype="float32", context=CONTEXT, stop_tokens=(STOP,), version="1.0", kv_cache_bytes=1 << 28, concurrency=8
    )
    thread = EngineThread(options)
    children = list(thread.engine._children)
    yield folder, thread
    thread.close()
    assert children and not any(child.is_alive() for child in children)


def test_experts_and_their_adapters_are_served(tmp_path: Path) -> None:
    """vLLM takes experts one by one, holds them fused, and is held to the sum of all."""
    from rayft.config.schema import Adapter
    from rayft.models.adapt import adapt

    for seed, name in enumerate("ab"):
        write_sparse_model(tmp_path / name, seed)
    thread = EngineThread(EngineOptions(tmp_path / "a", dtype="float32", context=CONTEXT, kv_cache_bytes=1 << 28, concurrency=8))
    try:
        a, b = load(tmp_path / "a"), load(tmp_path / "b")
        assert worst(a, draw(thread)) < EXACT < 0.1 < worst(b, draw(thread))
        push(thread, b, "1.1", "disk", tmp_path)
        assert worst(b, draw(thread)) < EXACT < 0.1 < worst(a, draw(thread))
        adapt(a, Adapter(type="lora", r=4, targets=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj")), 0)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in a.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        push(thread, a, "1.2", "gloo", tmp_path)
        assert worst(a, draw(thread)) < EXACT < 0.1 < worst(load(tmp_path / "a"), draw(thread))
    finally:
        thread.close()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def draw(thread: EngineThread, n: int = 4, **sampling: Any) -> Group:
    """A group, within a minute."""
    options = Sampling(**({"max_tokens": 48, "context": CONTEXT} | sampling))
    return thread.run(rollout(thread.engine, PROMPT, n, options)).result(60)


def gaps(model: Any, group: Group, temperature: float = 1.0) -> list[torch.Tensor]:
    """Per trajectory float32 [n]: how far the engine's log-probabilities are from the model's."""
    found = []
    for trajectory in group.trajectories:
        ids = torch.tensor([[*PROMPT.tokens, *trajectory.tokens]])
        with torch.no_grad():
            logprobs = (model(ids).logits[0, len(PROMPT.tokens) - 1 : -1] / temperature).log_softmax(-1)
        chosen = logprobs[torch.arange(len(trajectory.tokens)), torch.tensor(trajectory.tokens)]
        found.append((chosen - torch.tensor(trajectory.logprobs)).abs())
    return found


def worst(model: Any, group: Group, temperature: float = 1.0) -> float:
    return max(float(gap.max()) for gap in gaps(model, group, temperature))


def push(thread: EngineThread, model: Any, version: str, transport: str, folder: Path, **options: Any) -> None:
    """One push, verified and lossless."""
    sender = Sender(transport, dtype=torch.float32, device="cpu", deadline_s=60, folder=folder / "weights", chunk_bytes=100_000, **options)  # type: ignore[arg-type]
    report = sender.push(model, version, [EngineHandle(f"engine-{version}", thread.call)])
    sender.close()
    assert report.verified and not report.lost
    # The CPU build packs linear layers; embeddings and norms are compared as they lie.
    assert not any(part in name for name in report.unchecked for part in ("norm", "embed", "experts"))


def test_tokens_logprobs_and_ends(place: tuple[Path, EngineThread]) -> None:
    folder, thread = place
    model = load(folder / "a")
    group = draw(thread)
    assert worst(model, group) < EXACT
    assert worst(model, draw(thread, temperature=0.7), 0.7) < EXACT
    assert all(t.versions == (("1.0", 0, len(t.tokens)),) for t in group.trajectories)
    assert len({t.tokens for t in group.trajectories}) == 4 and draw(thread) == group
    for trajectory in draw(thread, 8, max_tokens=400).trajectories:
        stopped = trajectory.tokens[-1] == STOP
        assert trajectory.finish_reason == ("stop" if stopped else "length") and STOP not in trajectory.tokens[:-1]
    load_ = thread.call("load").result(5)
    assert load_["preemptions"] == 0 and 0 <= load_["kv_use"] < 1


@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_pushed_weights_are_served(place: tuple[Path, EngineThread], transport: str) -> None:
    folder, thread = place
    models = {name: load(folder / name) for name in "ab"}
    for step, name in enumerate("bab", 1):
        push(thread, models[name], f"2.{step}", transport, folder)
        group = draw(thread)
        assert worst(models[name], group) < EXACT < 0.1 < worst(models["a" if name == "b" else "b"], group)
        assert group.trajectories[0].versions[0][0] == f"2.{step}" == thread.call("version").result(5)


def test_adapters_are_merged_in_the_engine(place: tuple[Path, EngineThread]) -> None:
    from rayft.config.schema import Adapter
    from rayft.models.adapt import adapt

    folder, thread = place
    model = load(folder / "a")
    adapt(model, Adapter(type="lora", r=4, targets=("q_proj", "down_proj")), 0)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    for version, payload in (("3.1", "adapter"), ("3.2", "full")):
        push(thread, load(folder / "b"), version.replace("3.", "3.0"), "gloo", folder)
        push(thread, model, version, "gloo", folder, payload=payload)
        group = draw(thread)
        assert worst(model, group) < EXACT < 0.1 < worst(load(folder / "a"), group)


def test_a_push_in_mid_generation_marks_its_place(place: tuple[Path, EngineThread]) -> None:
    """Old tokens are the old model's, new ones the new model's on the whole text; streamed tags say the same as vLLM's spans."""
    folder, thread = place
    models = {name: load(folder / name) for name in "ab"}
    push(thread, models["a"], "4.1", "gloo", folder)
    push(thread, models["b"], "4.2", "gloo", folder)
    for version, native in (("4.3", True), ("4.4", False)):
        thread.engine._native, before = native, thread.call("version").result(5)
        drawing = thread.run(rollout(thread.engine, PROMPT, 6, Sampling(400, CONTEXT)))
        deadline = time.monotonic() + 30
        while thread.call("load").result(5)["running"] < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)
        push(thread, models["a" if version == "4.3" else "b"], version, "gloo", folder)
        group = drawing.result(60)
        crossed = [t for t in group.trajectories if len(t.versions) == 2]
        assert len(crossed) >= 3, [t.versions for t in group.trajectories]
        old, new = (models["b"], models["a"]) if version == "4.3" else (models["a"], models["b"])
        for trajectory, old_gap, new_gap in zip(group.trajectories, gaps(old, group), gaps(new, group), strict=True):
            middle = trajectory.versions[0][2]
            assert [span[0] for span in trajectory.versions] == [before, version][: len(trajectory.versions)]
            assert old_gap[:middle].max() < EXACT
            if len(trajectory.versions) == 2:
                assert trajectory.versions[1][1:] == (middle, len(trajectory.tokens)) and new_gap[middle:].max() < EXACT
    thread.engine._native = True
    assert thread.call("load").result(5)["preemptions"] == 0
