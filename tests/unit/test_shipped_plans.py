"""Shipped configurations for GPUs fit, by the memory plan, into cards of 80 GB."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from rayft.config.load import load
from rayft.config.schema import AnyRun, GrpoRun, SftRun
from rayft.observe.flops import ModelShape, shape_of
from rayft.parallel import memory, online_memory

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
CARD = 79.0 * 2**30
"""Of an H100 of 80 GB, as CUDA counts it."""
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
}
"""Model -> family, vocabulary, width, width inside of MLPs, layers, heads, key-value heads, head_dim, tied embeddings."""
FOR_GPUS = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "tiny")


@cache
def shape(path: str) -> ModelShape:
    """Of a model by its id, without its files."""
    from transformers import AutoConfig

    family, vocabulary, width, inside, layers, heads, shared, head_dim, tied = SHAPES[path]
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary, hidden_size=width, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, head_dim=head_dim, tie_word_embeddings=tied,
    )  # fmt: skip
    found = shape_of(config)
    assert found is not None
    return found


def most_of_a_card(cfg: AnyRun) -> float:
    """Bytes of a card that is planned fullest; refuses what does not fit."""
    model = shape(cfg.model.path)
    if isinstance(cfg, SftRun):
        return memory.estimate(model, cfg, "cuda").total
    assert isinstance(cfg, GrpoRun)
    online_memory.require_room(model, cfg, "cuda", CARD)
    plan = online_memory.estimate_online(model, cfg, "cuda")
    worker, engine = plan.trainer.total, sum(plan.engine.values())
    return worker + engine if cfg.placement.mode == "colocated" else max(worker, engine)


@pytest.mark.parametrize("file", FOR_GPUS, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_shipped_configuration_fits_its_cards(file: Path) -> None:
    cfg = load([file], [])
    assert cfg.parallel.device == "auto"
    assert shape(cfg.model.path).parameters < most_of_a_card(cfg) < 0.92 * CARD, "a byte of each weight, and some room"


def test_parameters_of_the_shapes_are_those_of_the_models() -> None:
    assert [shape(path).parameters // 10**6 for path in SHAPES] == [134, 595, 8190]
