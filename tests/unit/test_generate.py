"""Answers from a folder: as a chat or as plain text, in the precision of the files, with code of its own only where that is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from families import write_model
from rayft import commands
from rayft.config.load import load
from rayft.errors import ConfigError, DataError
from rayft.models import generate, hub
from rayft.models.tiny import fit_tokenizer
from rayft.models.tokenizer import question

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights, and a tokenizer without chat template."""
    made = write_model("llama_tied", tmp_path_factory.mktemp("generate") / "model")
    tokenizer = fit_tokenizer(["the bear lives here"], 257)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(made)
    return made


def run_on(folder: Path | str, *overrides: str) -> Any:
    source = ["data.train.t.path=t.txt", "data.train.t.format=text"]
    return load([], ["method=sft", "run.name=r", "run.dir=/nowhere", f"model.path={folder}", *source, *overrides])


def test_a_model_without_template_goes_on_with_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = generate.load_exported(folder)
    asked = tokenizer("the bear", return_tensors="pt")["input_ids"]
    tokens = model.generate(input_ids=asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    commands.generate(run_on(folder), "the bear", str(folder), 6, 0.0)
    assert capsys.readouterr().out.strip() == expected.strip()
    commands.generate(run_on(folder, "data.train.t.format=chat"), "the bear", str(folder), 6, 0.0)
    assert capsys.readouterr().out.strip() == expected.strip(), "there is no template to render a chat by"


def test_a_question_is_a_chat_only_where_there_is_a_template_and_it_is_wanted() -> None:
    tokenizer = fit_tokenizer(["the bear lives here"], 300)
    turns = [{"role": "user", "content": "the bear"}]
    plain = list(tokenizer("the bear")["input_ids"])
    chat = question(tokenizer, turns, chat=True)
    assert question(tokenizer, turns, chat=False) == plain
    assert len(chat) > len(plain) and tokenizer.decode(chat).endswith("<|im_start|>assistant\n")


def test_a_model_of_the_hub_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    monkeypatch.setattr(hub.tempfile, "gettempdir", lambda: str(tmp_path))
    hub._on_this_node.cache_clear()
    commands.generate(run_on("none"), "the bear", "org/model", 2, 0.0)
    assert asked == ["org/model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_keep_the_precision_of_the_files(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, tokenizer = generate.load_exported(folder)
    model.to(dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in generate.load_exported(tmp_path)[0].parameters()} == {dtype}


def test_it_runs_where_there_is_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    whole = generate._whole

    def watched(*arguments: Any) -> Any:
        model = whole(*arguments)
        monkeypatch.setattr(model, "to", lambda device: moved.append(device) or model)
        return model

    monkeypatch.setattr(generate, "_whole", watched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generate.load_exported(folder)
    assert moved == ["cuda"]


def test_code_of_a_model_runs_only_where_the_run_allows_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own, "architectures": ["OwnModel"]}))
    with pytest.raises(DataError, match=r"model\.trust_remote_code=true"):
        commands.generate(run_on(folder), "the bear", str(tmp_path), 2, 0.0)
    commands.generate(run_on(folder, "model.trust_remote_code=true"), "the bear", str(tmp_path), 2, 0.0)


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(DataError, match=r"transformers cannot load it .*Name a folder with config\.json and weights"):
        generate.load_exported(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither config\.json nor adapter_config\.json"):
        generate.load_exported(tmp_path / "empty")
