"""Loading a tokenizer: its template, the rule for end and padding tokens, and what makes shards stale."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rayft.config.schema import Model
from rayft.errors import ConfigError, DataError
from rayft.models.tokenizer import exact_backend, fingerprint, leading_tokens, load_tokenizer, special_tokens, template_text
from tiny import CHATML, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def without_tokens(folder: Path, new: Path, *names: str) -> Path:
    """A copy whose configuration lacks the named special tokens."""
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (new / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in names}))
    return new


def test_own_template_and_tokens_are_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(Model(path=str(folder)))
    assert (tokenizer.eos_token, tokenizer.pad_token, template_text(tokenizer)) == ("<|im_end|>", "<|endoftext|>", CHATML)
    assert not [record for record in caplog.records if record.name == "rayft"]


def test_the_template_is_text_a_file_or_a_name(folder: Path, tmp_path: Path) -> None:
    def rendered(template: str) -> str | None:
        return template_text(load_tokenizer(Model(path=str(folder), chat_template=template)))

    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert rendered("{{ 1 }}") == "{{ 1 }}"
    assert rendered(str(tmp_path / "own.jinja")) == "{{ messages }}"
    assert "<|im_start|>" in str(rendered("chatml"))
    for wrong in ("no such", "missing.jinja"):
        with pytest.raises(DataError, match=r"model\.chat_template = .*use one of: chatml"):
            rendered(wrong)


def test_the_tokenizer_folder_may_differ_from_the_model(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(Model(path=str(tmp_path), tokenizer=str(folder))).eos_token == "<|im_end|>"
    with pytest.raises(DataError, match=r"^model\.tokenizer = .*no tokenizer can be read"):
        load_tokenizer(Model(path=str(folder), tokenizer=str(tmp_path)))


@pytest.mark.parametrize(
    ("model_type", "rule"), [("llama", "no tokenizer can be read"), ("qwen2", "empty vocabulary"), ("gemma", "empty vocabulary")]
)
def test_a_model_folder_without_tokenizer_is_refused(tmp_path: Path, model_type: str, rule: str) -> None:
    """Transformers answers some of them with a tokenizer of no words."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(DataError, match=rf"^model\.path = .*{rule}"):
        load_tokenizer(Model(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^model\.path = 'nobody/nothing': must be a Hugging Face model folder, or an id"):
        load_tokenizer(Model(path="nobody/nothing"))


def test_padding_explicit_then_own_then_end_token_then_refused(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = without_tokens(folder, tmp_path / "bare", "pad_token")
    assert load_tokenizer(Model(path=str(bare), pad_token="<s>")).pad_token == "<s>"
    assert caplog.records == []
    tokenizer = load_tokenizer(Model(path=str(bare), eos_token="</s>"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.backend_tokenizer.token_to_id("</s>")
    assert [(record.levelno, "</s>" in record.getMessage()) for record in caplog.records] == [(logging.WARNING, True)]
    none = without_tokens(folder, tmp_path / "none", "pad_token", "eos_token")
    with pytest.raises(DataError, match=r"^model\.pad_token: .*neither a padding token nor an end token"):
        load_tokenizer(Model(path=str(none)))
    assert load_tokenizer(Model(path=str(none), pad_token="<s>")).eos_token is None


@pytest.mark.parametrize("field", ["pad_token", "eos_token"])
def test_a_token_of_several_ids_is_refused(folder: Path, field: str) -> None:
    ids = load_tokenizer(Model(path=str(folder))).encode("<|stop|>")
    assert len(ids) > 1
    with pytest.raises(DataError) as caught:
        load_tokenizer(Model.model_validate({"path": str(folder), field: "<|stop|>"}))
    assert str(caught.value).startswith(f"model.{field} = '<|stop|>': ")
    assert f"encodes to {len(ids)}: {ids}" in str(caught.value)


def test_the_fingerprint_changes_with_all_that_changes_token_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(folder)))
    base = fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert fingerprint(tokenizer) == base
    assert fingerprint(load_tokenizer(Model(path=str(tiny_tokenizer(tmp_path / "again"))))) == base
    spec = json.loads((folder / "tokenizer.json").read_text())
    merges = without_tokens(folder, tmp_path / "merges")
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    (merges / "tokenizer.json").write_text(json.dumps(spec))
    others = [
        Model(path=str(folder), eos_token="</s>"),
        Model(path=str(folder), pad_token="</s>"),
        Model(path=str(folder), chat_template=CHATML + " "),
        Model(path=str(merges)),
    ]
    assert len({base, *(fingerprint(load_tokenizer(model)) for model in others)}) == 5


def test_offsets_are_exact_even_where_the_tokenizer_trims_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_tokenizer(tmp_path, trim_offsets=True))))
    text = "The  answer is\n\n 4. \U0001f600"
    trimmed = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    exact = exact_backend(tokenizer).encode(text, add_special_tokens=False)
    assert exact.ids == tokenizer.encode(text)
    assert exact.offsets != trimmed
    assert {c for start, end in exact.offsets for c in range(start, end)} == set(range(len(text)))
    assert [text[start:end] for start, end in exact.offsets][:3] == ["The", " ", " answer"]
    assert special_tokens(tokenizer) >= {"<|im_end|>", "<|eot_id|>"}


def test_leading_tokens_are_those_the_tokenizer_adds(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(Model(path=str(folder)))
    assert leading_tokens(tokenizer) == ()
    tokenizer.bos_token = "<s>"
    assert leading_tokens(tokenizer) == ()
    bos = tokenizer.backend_tokenizer.token_to_id("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", bos)])
    assert leading_tokens(tokenizer) == (bos,)
    assert exact_backend(tokenizer).encode("a").ids == tokenizer.encode("a")[1:]
