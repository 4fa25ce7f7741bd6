"""Memory of an online run: what is added to a supervised step, what an engine holds, and what is said when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import SIZES
from rayft.config.load import load
from rayft.config.schema import GrpoRun, SftRun
from rayft.errors import ResourceError
from rayft.models.load import read_config
from rayft.observe.flops import ModelShape, shape_of
from rayft.parallel.memory import estimate
from rayft.parallel.online_memory import GIB, TRAINER_PART, estimate_online, require_room


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("model")
    AutoConfig.for_model("llama", **(SIZES | {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8})).save_pretrained(folder)
    return folder


def run_of(model: Path, *overrides: str) -> tuple[ModelShape, GrpoRun]:
    base = ["method=grpo", "run.name=x", f"model.path={model}", "data.train.a.path=x", "reward.functions.r.function=exact"]
    cfg = load([], [*base, *overrides])
    assert isinstance(cfg, GrpoRun)
    shape = shape_of(read_config(cfg.model))
    assert shape is not None
    return shape, cfg


def test_a_worker_is_a_supervised_step_of_the_same_tokens_and_a_reference(model: Path) -> None:
    shape, cfg = run_of(model, "batch.micro_tokens=4096", "algorithm.beta=0.1")
    rows = ["method=sft", "run.name=x", f"model.path={model}", "data.train.a.path=x", "data.seq_len=1024", "batch.micro_rows=4"]
    supervised = load([], rows)
    assert isinstance(supervised, SftRun)
    expected = estimate(shape, supervised, "cuda")
    plan = estimate_online(shape, cfg, "cuda").trainer
    assert plan.parts == expected.parts | {"reference": 2 * shape.parameters}, "frozen, in bfloat16"
    _, adapted = run_of(model, "batch.micro_tokens=4096", "algorithm.beta=0.1", "adapter.type=lora")
    assert "reference" not in estimate_online(shape, adapted, "cuda").trainer.parts, "it is the policy without its adapters"
    _, sharded = run_of(model, "batch.micro_tokens=4096", "algorithm.beta=0.1", "parallel.workers=4")
    assert estimate_online(shape, sharded, "cuda").trainer.parts["reference"] == 2 * shape.parameters // 4


def test_an_engine_holds_its_part_of_the_weights_and_its_cache(model: Path) -> None:
    shape, cfg = run_of(model, "rollout.tensor_parallel=2", "rollout.kv_cache_gib=3")
    engine = estimate_online(shape, cfg, "cuda").engine
    assert engine["weights"] == shape.parameters and engine["key-value cache"] == 3 * GIB
    _, plain = run_of(model, "rollout.engine=local")
    assert estimate_online(shape, plain, "cpu").engine["weights"] == 4 * shape.parameters


@pytest.mark.parametrize(("prompts", "at_once"), [(4, 32), (32, 256), (512, 1024)])
def test_an_engine_draws_for_all_its_requests_at_once(model: Path, prompts: int, at_once: int) -> None:
    """Each in float32, before and after temperature; as many as the engine is started with."""
    shape, one = run_of(model, "rollout.prompts_per_step=1", "rollout.group_size=8", "rollout.engines=1")
    _, more = run_of(model, f"rollout.prompts_per_step={prompts}", "rollout.group_size=8", "rollout.engines=1")
    plans = [estimate_online(shape, cfg, "cuda").engine["activations"] for cfg in (one, more)]
    assert plans[1] - plans[0] == 2 * 4 * (at_once - 8) * shape.vocab


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["separate", "colocated"])
def test_what_does_not_fit_is_refused_with_a_setting_that_does(model: Path, device: str, mode: str) -> None:
    shape, cfg = run_of(model, f"placement.mode={mode}", "batch.micro_tokens=65536", "rollout.kv_cache_gib=8")
    plan = estimate_online(shape, cfg, device)
    engine, trainer = sum(plan.engine.values()), plan.trainer.total
    room = engine + trainer if device == "cpu" else max(engine, trainer)
    if device == "cuda" and mode == "colocated":
        room = int(max(trainer / TRAINER_PART, engine / (1 - TRAINER_PART))) + 1
    require_room(shape, cfg, device, room)
    with pytest.raises(ResourceError, match=r"parallel.workers = 1: each worker needs .* 0.5 too few. Set batch.micro_tokens=2048, with"):
        shared = device == "cuda" and mode == "colocated"
        require_room(shape, cfg, device, (trainer - GIB / 2) / TRAINER_PART if shared else room - GIB / 2)
    small = cfg.model_copy(update={"batch": cfg.batch.model_copy(update={"micro_tokens": 2048})})
    least = estimate_online(shape, small, device).trainer.total
    with pytest.raises(ResourceError, match=r"rollout.engines = 1: each engine needs .* too few. Set rollout.kv_cache_gib=[1-7]"):
        share = 1 - TRAINER_PART if mode == "colocated" else 1.0
        require_room(shape, small, device, engine + least - GIB if device == "cpu" else (engine - GIB) / share)
