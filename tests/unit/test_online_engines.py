"""What the driver starts engines with, on CPUs and on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from rayft.actors.online import _engine_options
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.parallel.online_memory import MOST_REQUESTS
from tiny import tiny_tokenizer


def run_of(folder: Path, *overrides: str) -> GrpoRun:
    base = ["method=grpo", "run.name=x", f"model.path={folder}", "data.train.a.path=x", "reward.functions.r.function=exact"]
    cfg = load([], [*base, *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"))
    LlamaConfig(vocab_size=700).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "device", "eager"),
    [((), "cuda", False), (("rollout.eager=true",), "cuda", True), ((), "cpu", True), (("rollout.eager=true",), "cpu", True)],
)
def test_engines_decode_in_graphs_on_gpus_alone(model: Path, overrides: tuple[str, ...], device: str, eager: bool) -> None:
    options = _engine_options(run_of(model, *overrides), device)
    assert options.eager is eager and options.dtype == {"cuda": "bfloat16", "cpu": "float32"}[device]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_takes_its_part_of_a_step_at_once_up_to_what_the_device_bears(model: Path, device: str) -> None:
    small = run_of(model, "rollout.engines=2", "rollout.prompts_per_step=5", "rollout.group_size=4", "rollout.max_tokens=7")
    options = _engine_options(small, device)
    assert options.concurrency == 3 * 4, "five prompts on two engines are three on one of them"
    assert options.context == small.rollout.max_prompt_tokens + 7 and len(options.stop_tokens) == 1
    large = run_of(model, "rollout.prompts_per_step=512", "rollout.group_size=16")
    assert _engine_options(large, device).concurrency == MOST_REQUESTS[device]
