"""What environments say, as tokens after the policy's own: equal to the whole conversation rendered at once, by every template here."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rayft.data.chat import Message
from rayft.errors import DataError
from rayft.models.tiny import fit_tokenizer
from rayft.rollout.dialogue import Dialogue
from tiny import CORPUS

SMOLLM2 = Path(os.environ.get("RAYFT_TEST_DATA", "data")) / "smollm2_tokenizer"

# As Qwen's: tool results are grouped under one user turn, and an assistant's last turn is given an empty thought.
GROUPED = """{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + message.content + '<|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
# As Llama 2's: no generation prompt, turns strictly in alternation, a space before the end.
ALTERNATING = """{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '[INST] ' + message.content + ' [/INST]' if message.role == 'user' else ' ' + message.content + ' <|im_end|>' }}
{%- endfor -%}"""
TOOL_RESULTS: list[Message] = [{"role": "tool", "content": "three"}, {"role": "tool", "content": "four"}]
ASKED_ONLY: list[Message] = [{"role": "user", "content": "What is it?"}]
USER: list[Message] = [{"role": "user", "content": "and the other one"}]


@cache
def tokenizer_of(name: str) -> Any:
    if name == "smollm2":
        if not SMOLLM2.is_dir():
            pytest.skip("no copy of SmolLM2's tokenizer here")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SMOLLM2)
    made = fit_tokenizer(CORPUS, 400)
    if name != "chatml":
        made.chat_template = {"grouped": GROUPED, "alternating": ALTERNATING}[name]
    return made


def ids(tokenizer: Any, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)["input_ids"])


@pytest.mark.parametrize("name", ["chatml", "smollm2", "grouped", "alternating"])
@pytest.mark.parametrize("reply", [TOOL_RESULTS, USER, []], ids=["tools", "user", "nothing"])
def test_a_reply_continues_the_conversation_token_for_token(name: str, reply: list[Message]) -> None:
    if name == "alternating" and reply is TOOL_RESULTS:
        pytest.skip("the template has no tools")
    tokenizer = tokenizer_of(name)
    dialogue, asked = Dialogue(tokenizer), [{"role": "user", "content": "What is it?"}]
    prompt = ids(tokenizer, asked, True)
    cut, generation = dialogue.without_generation(prompt)
    assert [*cut, *generation] == prompt and (name == "alternating") == (generation == ())
    answer = {"role": "assistant", "content": " It is four" if name == "alternating" else "It is four"}
    written = [*tokenizer.encode(answer["content"], add_special_tokens=False), tokenizer.eos_token_id]
    assert dialogue.text(written) == answer["content"]
    answer["content"] = answer["content"].strip()
    read = dialogue.reply(reply, written[-1])
    everything = tokenizer.decode([*prompt, *written, *read])
    expected = tokenizer.apply_chat_template([*asked, answer, *reply], tokenize=False, add_generation_prompt=True)
    assert everything.replace(" <|im_end|>", "<|im_end|>") == (
        expected.replace(" <|im_end|>", "<|im_end|>").replace("<think>\n\n</think>\n\n", "")
    )
    if name in ("chatml", "smollm2"):
        assert [*prompt, *written, *read] == ids(tokenizer, [*asked, answer, *reply], True)


@pytest.mark.parametrize("name", ["chatml", "smollm2", "grouped"])
def test_an_opening_stands_between_prompt_and_generation_prompt(name: str) -> None:
    tokenizer = tokenizer_of(name)
    dialogue, asked = Dialogue(tokenizer), [{"role": "system", "content": "Play."}]
    cut, generation = dialogue.without_generation(ids(tokenizer, asked, True))
    assert [*cut, *dialogue.opening(USER, generation)] == ids(tokenizer, [*asked, *USER], True)
    assert [*cut, *dialogue.opening((), generation)] == ids(tokenizer, asked, True)


def test_texts_are_read_as_they_are() -> None:
    tokenizer = tokenizer_of("chatml")
    dialogue = Dialogue(tokenizer)
    assert tokenizer.decode(dialogue.reply("\nhigher ", 7)) == "\nhigher "
    assert tokenizer.decode(dialogue.opening("so", dialogue.without_generation([5, 6])[1])) == "so"


def test_an_end_token_that_is_not_the_templates_is_followed_by_the_templates() -> None:
    tokenizer = tokenizer_of("chatml")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.decode(Dialogue(tokenizer).reply([], other)) == "<|im_end|>\n<|im_start|>assistant\n"


def test_what_cannot_be_rendered_is_refused() -> None:
    tokenizer = tokenizer_of("alternating")
    with pytest.raises(DataError, match=r"refuses messages of the roles user, assistant, tool, tool \(roles must alternate"):
        Dialogue(tokenizer).reply(TOOL_RESULTS, tokenizer.eos_token_id)
    with pytest.raises(DataError, match="does not end with the chat template's generation prompt"):
        Dialogue(tokenizer_of("chatml")).opening(USER, ())
    bare = fit_tokenizer(CORPUS, 400)
    bare.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        Dialogue(bare).reply(USER, 1)


@pytest.mark.parametrize("given", [None, 5, ["hi"], {"role": "user", "content": "hi"}, [USER]], ids=repr)
def test_what_is_no_reply_is_named_with_its_environment(given: Any) -> None:
    dialogue = Dialogue(tokenizer_of("chatml"), "./game.py:Game")
    generation = dialogue.without_generation(ids(tokenizer_of("chatml"), ASKED_ONLY, True))[1]
    name = "environment.function = './game.py:Game'"
    sentence = re.escape(f"{name}: must reply with a text or a list of messages, each a mapping, and gave {given!r}.")
    with pytest.raises(DataError, match=sentence):
        dialogue.reply(given, 0)
    if given is None:
        assert dialogue.opening(given, generation) == generation, "an opening may be nothing"
    else:
        with pytest.raises(DataError, match=sentence):
            dialogue.opening(given, generation)
