"""The tiny model folder, read back by plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayft.data.zoo import zoo_rows
from rayft.models.tiny import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder fitted to the zoo."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, (message["content"] for row in zoo_rows("train", 500) for message in row["messages"]))
    return path


def test_tokenizer_renders_and_round_trips(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A zebra."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nA zebra.<|im_end|>\n"
    text = "The zebra is gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n, \N{CJK UNIFIED IDEOGRAPH-8C61}!<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer("The zebra is green.", add_special_tokens=False).input_ids) <= 6, "words of the fitted text are tokens"


def test_configuration_builds_a_small_tied_llama_of_the_tokenizers_size(folder: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_same_texts_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, (message["content"] for row in zoo_rows("train", 500) for message in row["messages"]))
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
