"""`rayft check`: the row that it tries has documents on both sides of a window, and a kernel that computes something else is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import write_model
from rayft.actors.export import local_launch
from rayft.actors.session import open_session
from rayft.commands import check
from rayft.config.load import load
from rayft.config.paths import absolute
from rayft.config.schema import SftRun
from rayft.errors import TrainingError
from rayft.models import fused
from rayft.models.tiny import fit_tokenizer
from rayft.parallel import attention
from rayft.train.check import compare_fused, document_lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral with a sliding window of 8 tokens, and its tokenizer."""
    made = write_model("mistral_window", tmp_path_factory.mktemp("check") / "model")
    fit_tokenizer(["ferry island wind"], 257).save_pretrained(made)
    return made


@given(st.integers(2, 5000), st.none() | st.integers(1, 3000), st.integers(40, 6000))
def test_a_row_is_full_and_reaches_over_the_window_where_it_can(seq_len: int, window: int | None, longest: int) -> None:
    lengths = document_lengths(seq_len, window, longest)
    assert sum(lengths) == seq_len and all(1 <= length <= longest for length in lengths)
    assert len(lengths) > 1 or seq_len <= 32
    if window and window > 1 and 2 * window + 1 <= min(seq_len, longest):
        assert min(lengths) < window < max(lengths)


def test_the_row_has_the_length_that_was_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(str(folder), None, 96)
    out = capsys.readouterr().out
    assert "a row of 96 tokens in" in out and "sliding window of" not in out
    assert "on a GPU, with adapter.type=lora: lora_qkv on layers 0-2" in out
    assert "no adapter is trained" not in out and "do not run on a CPU" in out
    check(str(folder), None, 9)
    assert "no document is longer than the sliding window of 8 tokens, use --seq-len 17 or more" in capsys.readouterr().out


def test_a_window_that_is_left_out_of_packed_rows_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a few tokens would not show it."""
    packed = attention._documents

    def without(query: Any, key: Any, value: Any, layout: Any, scaling: Any, window: Any, softcap: Any) -> Any:
        return packed(query, key, value, layout, scaling, window if len(layout.lengths) == 1 else None, softcap)

    monkeypatch.setattr(attention, "_documents", without)
    with pytest.raises(TrainingError, match="a row of 96 tokens in"):
        check(str(folder), None, 96)


def test_fused_layers_are_compared_with_plain_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["method=sft", "run.name=check", f"model.path={folder}", "data.train.none.path=none", "adapter.type=lora", "kernels.lora=on"]
    cfg = absolute(load([], settings))
    assert isinstance(cfg, SftRun)
    said: list[str] = []
    row = [[5, 9, 200, 31], list(range(3, 40))]
    with open_session(local_launch(cfg)) as session:
        compare_fused(cfg, session, row, said.append)
        assert len(said) == 1 and said[0].startswith("fused kernels against plain layers")
        own = fused.mlp_forward
        monkeypatch.setattr(fused, "mlp_forward", lambda self, x: 1.5 * own(self, x))
        with pytest.raises(TrainingError, match="fused kernels against plain layers"):
            compare_fused(cfg, session, row, said.append)
    assert torch.is_grad_enabled()
