"""The memory plan of QLoRA, and what a run may not combine it with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rayft.config.load import load
from rayft.config.schema import Adapter, Model, Parallel
from rayft.errors import ConfigError
from rayft.parallel import memory
from unit.test_memory_plan import run, shape

SFT = ["method=sft", "run.name=x", "model.path=m", "data.train.a.path=x", "model.quantize=nf4"]
GRPO = ["method=grpo", "run.name=x", "model.path=m", "data.train.a.path=x", "reward.functions.a.function=exact", "model.quantize=nf4"]


@pytest.mark.parametrize("shards", [True, False])
def test_4_bits_hold_linear_layers_in_a_quarter_and_make_an_mlp_dense(shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """down_proj stays as it is here: its rows of 352 values do not divide into blocks of 64."""
    monkeypatch.setattr(memory, "SHARDS_BYTES", shards)
    small = replace(shape(), vocab=16)  # so that the highest moment lies in a layer's backward
    settings = (("none", 1), ("nf4", 1), ("nf4", 4))
    whole, packed, sharded = (
        memory.estimate(
            small, run(adapter=Adapter(type="lora"), model=Model(path="m", quantize=kind), parallel=Parallel(workers=workers)), "cuda"
        )
        for kind, workers in settings
    )
    held = 3 * (128 * 128 * 2 + 128 * 64 * 2 + 2 * 128 * 352)
    assert whole.parts["parameters"] - packed.parts["parameters"] == pytest.approx(held * (2 - 4.127 / 8), rel=2e-3)
    assert packed.moment.startswith("backward")
    assert packed.parts["gathered weights"] - whole.parts["gathered weights"] == 2 * (2 * 128 * 352)
    whole_on_each = 0 if shards else held * 4.127 / 8
    assert sharded.parts["parameters"] == pytest.approx((packed.parts["parameters"] - whole_on_each) / 4 + whole_on_each, rel=2e-3)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (SFT, "cannot be trained in full"),
        ([*SFT, "adapter.type=lora", "model.init=random"], "weights that mean nothing"),
        ([*GRPO, "adapter.type=lora", "weight_sync.payload=adapter"], "merge adapters into weights that are not in 4 bits"),
    ],
)
def test_what_4_bits_cannot_be_combined_with_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load([], overrides)


def test_qlora_is_accepted() -> None:
    cfg: Any = load([], [*SFT, "adapter.type=lora"])
    assert cfg.model.quantize == "nf4"
