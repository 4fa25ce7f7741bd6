"""Families: which were compared with transformers, and what is said of the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from families import FAMILIES, SIZES, write_in_8_bits, write_model
from parity.test_model_parity import configuration, session
from rayft.config.load import load
from rayft.errors import ConfigError
from rayft.models.spec import COMPARED
from rayft.train.build import build_model, planned_lines


def test_the_compared_families_are_those_of_the_parity_tests() -> None:
    assert {model_type for model_type, _ in FAMILIES.values()} == COMPARED


@pytest.fixture
def helium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of a family that no test compares."""
    monkeypatch.setitem(FAMILIES, "helium", ("helium", {}))
    return str(write_model("helium", tmp_path / "helium"))


def test_a_family_that_was_not_compared_is_named_in_plan_and_log(
    helium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llama = str(write_model("llama", tmp_path / "llama"))
    warning = "helium is not among the families that were compared with transformers: run rayft check"
    planned, of_llama = (planned_lines(configuration(folder), "cpu") for folder in (helium, llama))
    assert [line for line in planned if "warning" in line] == [line for line in planned if warning in line] != []
    assert not any("warning" in line for line in of_llama)
    monkeypatch.setattr("rayft.train.build.parallelize", lambda *_: None)
    for rank, folder, said in ((0, helium, 1), (1, helium, 0), (0, llama, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rayft"):
            build_model(configuration(folder), session(rank), None)  # type: ignore[arg-type]
        assert sum(warning in record.getMessage() for record in caplog.records) == said


def test_engines_never_start_from_weights_in_8_bits(tmp_path: Path) -> None:
    folder = write_in_8_bits(write_model("llama", tmp_path / "llama"), (16, 16), tmp_path) / "fp8"
    words = ["method=grpo", "run.name=x", f"model.path={folder}", "data.train.a.path=x", "reward.functions.a.function=exact"]
    with pytest.raises(ConfigError, match="engines that start from it"):
        planned_lines(load([], words), "cpu")


def test_a_model_of_text_and_images_is_refused_with_a_sentence(tmp_path: Path) -> None:
    from transformers import Gemma4Config

    text = SIZES | FAMILIES["gemma4_moe"][1]
    Gemma4Config(text_config=text, vision_config=None, audio_config=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gemma4'?: has no decoder layers at model\.layers"):
        planned_lines(configuration(str(tmp_path)), "cpu")
