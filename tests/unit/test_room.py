"""A full card is explained once, with what was planned and what would fit, and is not worth another attempt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from families import SIZES
from rayft.config.load import load
from rayft.config.schema import SftRun
from rayft.errors import ResourceError
from rayft.train import room
from rayft.types import Session

GIB = 2**30


@pytest.fixture
def cfg(tmp_path: Path) -> SftRun:
    from transformers import AutoConfig

    AutoConfig.for_model("llama", **(SIZES | {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16})).save_pretrained(tmp_path)
    return load(
        [], ["method=sft", "run.name=x", f"model.path={tmp_path}", "data.train.a.path=x", "data.seq_len=8192", "batch.micro_rows=8"]
    )


def session(device: str) -> Session:
    return Session(1, 2, 1, device, Path("."), lambda *_: None, 60.0)


def test_a_full_card_is_one_sentence_with_parts_and_a_setting_that_fits(cfg: SftRun, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (GIB // 2, 16 * GIB), "max_memory_allocated": 15 * GIB, "memory_reserved": 15 * GIB}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    with pytest.raises(ResourceError) as caught, room.explained(cfg, session("cuda:1")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 16 GiB")
    said = str(pickle.loads(pickle.dumps(caught.value)))
    assert caught.value.exit_code == 4
    assert said.startswith("memory of cuda:1 on rank 1: is full (CUDA out of memory. Tried to allocate 2.00 GiB); 0.5 of 16.0 GiB are free")
    for part in ("activations", "parameters", "optimizer states", "highest in"):
        assert part in said
    assert ". Set batch.micro_rows=" in said
    assert "\n" not in said


def test_a_full_card_of_an_online_run_is_explained_in_its_own_fields(cfg: SftRun) -> None:
    base = ["method=grpo", "run.name=x", f"model.path={cfg.model.path}", "data.train.a.path=x", "reward.functions.r.function=exact"]
    online = load([], [*base, "batch.micro_tokens=65536", "algorithm.beta=0.1"])
    said = str(room.explain(online, "memory of cuda:0", "full", 40 * GIB, "CUDA out of memory"))
    assert "reference" in said and ". Set batch.micro_tokens=2048, with the same result" in said


def test_other_errors_pass(cfg: SftRun) -> None:
    with pytest.raises(RuntimeError, match=r"^not a card$"), room.explained(cfg, session("cpu")):
        raise RuntimeError("not a card")


def test_a_given_number_needs_no_model_and_no_group(cfg: SftRun) -> None:
    assert room.with_micro_rows(cfg, session("cuda:0")) is cfg
    auto: Any = cfg.batch.model_copy(update={"micro_rows": "auto"})
    assert room.with_micro_rows(cfg.model_copy(update={"batch": auto}), session("cpu")).batch.micro_rows == 1
