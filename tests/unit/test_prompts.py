"""Prompts: what is rendered, in which order it is asked, and what happens to what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.data import prompts
from rayft.data.prompts import PromptSet, prepare_prompts
from rayft.errors import DataError
from rayft.models.tokenizer import exact_backend
from tiny import tiny_tokenizer


def run(folder: Path, *overrides: str) -> GrpoRun:
    tiny_tokenizer(folder / "model")
    base = ["method=grpo", "run.name=a", f"run.dir={folder}", f"model.path={folder / 'model'}", "reward.functions.r.function=m:f"]
    cfg = load([], [*base, f"data.train.a.path={folder / 'rows.jsonl'}", *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


def write(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CHATS = [{"messages": [{"role": "user", "content": f"two and {n}"}, {"role": "assistant", "content": "no"}], "answer": n} for n in range(7)]


def test_a_chat_is_asked_up_to_its_last_answer_and_keeps_its_columns(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, CHATS)
    prompts = PromptSet(prepare_prompts(run(tmp_path), "train"), seed=3, shuffle=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(prompts.prompt(2).tokens) == "<|im_start|>user\ntwo and 2<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.prompt(2).row == CHATS[2] | {"asked": CHATS[2]["messages"][:1]} and prompts.prompt(9).key == "1-2"


def test_instructions_need_no_output_and_texts_are_asked_as_they_are(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, [{"instruction": "add", "input": "1 2", "text": "add 1 2 ="}])
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "model"))
    for form, expected in [
        ("instruction", "<|im_start|>user\nadd\n\n1 2<|im_end|>\n<|im_start|>assistant\n"),
        ("text", "add 1 2 ="),
    ]:
        folder = prepare_prompts(run(tmp_path, f"data.train.a.format={form}"), "train")
        assert tokenizer.decode(PromptSet(folder, seed=0, shuffle=False).prompt(0).tokens) == expected


def test_the_tokenizer_is_read_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes a tenth of a second."""
    read: list[object] = []
    monkeypatch.setattr(prompts, "exact_backend", lambda tokenizer: read.append(tokenizer) or exact_backend(tokenizer))
    write(tmp_path, CHATS)
    prepare_prompts(run(tmp_path), "train")
    assert len(read) == 1


def test_every_epoch_asks_every_prompt_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, CHATS)
    folder = prepare_prompts(run(tmp_path), "train")
    prompts = PromptSet(folder, seed=3, shuffle=True)
    epochs = [[prompts.prompt(7 * epoch + place).row_id for place in range(7)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3 and epochs[0] != epochs[1]
    again = PromptSet(folder, seed=3, shuffle=True)
    assert [again.prompt(ordinal).key for ordinal in (20, 3)] == [prompts.prompt(ordinal).key for ordinal in (20, 3)]
    assert [PromptSet(folder, seed=4, shuffle=True).prompt(place).row_id for place in range(7)] != epochs[0]


def test_long_prompts_are_dropped_or_refused(tmp_path: Path) -> None:
    write(tmp_path, [*CHATS, {"messages": [{"role": "user", "content": "two " * 200}]}])
    folder = prepare_prompts(run(tmp_path, "rollout.max_prompt_tokens=64"), "train")
    assert len(PromptSet(folder, seed=0, shuffle=True)) == 7
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, rollout.max_prompt_tokens = 64"):
        prepare_prompts(run(tmp_path, "rollout.max_prompt_tokens=64", "data.too_long=raise"), "train")
    with pytest.raises(DataError, match="none of its rows gives a prompt; 8 are longer"):
        prepare_prompts(run(tmp_path, "rollout.max_prompt_tokens=2"), "train")
