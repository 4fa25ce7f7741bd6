"""Trained characters of rendered chats, written out by hand for templates typical of the field, and trained tokens by brute force."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.config.schema import Model
from rayft.data.chat import Conversation, Span, mark_finder, renderer, token_weights, trained_spans
from rayft.errors import DataError
from rayft.models.tokenizer import Backend, Tokenizer, exact_backend, load_tokenizer
from tiny import CHATML, SPECIAL, tiny_tokenizer

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'] + '\n\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning of turns before the last question is dropped; the turns after it always show it.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] or '' %}{% set role = 'user' if m['role'] == 'tool' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for call in m['tool_calls'] or [] %}{{ ('\n' if text else '') + '<tool_call>' + call['function'] | tojson + '</tool_call>' }}"
    "{% endfor %}{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning is dropped everywhere, but the generation prompt opens it.
R1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '[A]' + m['content'].split('</think>')[-1] + '</s>' }}{% else %}{{ '[U]' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]<think>\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
PLAIN = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
# Only the last turn of a conversation is closed, and nothing marks the end of the others.
CLOSED_ONCE = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}{{ '</s>' }}"

HI: dict[str, Any] = {"role": "user", "content": "Hi "}
BYE = {"role": "user", "content": "Bye"}
YES: dict[str, Any] = {"role": "assistant", "content": " Yes. "}
OK: dict[str, Any] = {"role": "assistant", "content": "Ok"}
SYSTEM = {"role": "system", "content": "Go"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
SECOND_THOUGHT = {"role": "assistant", "content": "<think>\nso\n</think>\n\nOk"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "2", "name": "add"}

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(Model(path=str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> Backend:
    return exact_backend(tokenizer)


def marked(
    tokenizer: Tokenizer, template: str, messages: Messages, roles: tuple[str, ...] = ("assistant",), everything: bool = False
) -> str:
    """The rendered conversation with its trained characters between {+ and +}."""
    tokenizer.chat_template = template
    conversation = Conversation(messages, tuple(m.get("train", everything or m["role"] in roles) for m in messages), everything)
    text, spans = trained_spans(conversation, renderer(tokenizer, None), mark_finder(SPECIAL), "this model", "rows.jsonl, byte 0")
    for start, end in reversed(spans):
        text = f"{text[:start]}{{+{text[start:end]}+}}{text[end:]}"
    return text


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        pytest.param(
            CHATML, [SYSTEM, HI, YES, BYE, OK],
            "<|im_start|>system\nGo<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+ Yes. <|im_end|>+}\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n{+Ok<|im_end|>+}\n", id="chatml",
        ),
        pytest.param(
            CHATML, [HI, YES, OK],
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+ Yes. <|im_end|>+}\n<|im_start|>assistant\n{+Ok<|im_end|>+}\n",
            id="chatml, two answers",
        ),
        pytest.param(
            DEFAULT_SYSTEM, [HI, YES],
            "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+ Yes. <|im_end|>+}\n",
            id="default system message",
        ),
        pytest.param(
            DEFAULT_SYSTEM, [YES, HI, OK],
            "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>assistant\n{+ Yes. <|im_end|>+}\n<|im_start|>user\nHi <|im_end|>\n"
            "<|im_start|>assistant\n{+Ok<|im_end|>+}\n", id="answer first",
        ),
        pytest.param(
            LLAMA3, [SYSTEM, HI, YES, BYE, OK],
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGo<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{+Yes.<|eot_id|>+}<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{+Ok<|eot_id|>+}", id="llama3",
        ),
        pytest.param(
            MISTRAL, [SYSTEM, HI, YES, BYE, OK],
            "<s>[INST] Go\n\nHi [/INST]{+ Yes.</s>+}[INST] Bye [/INST]{+ Ok</s>+}", id="mistral",
        ),
        pytest.param(
            GEMMA, [HI, YES, BYE, OK],
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n{+Yes.<end_of_turn>+}\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n{+Ok<end_of_turn>+}\n", id="gemma",
        ),
        pytest.param(
            QWEN3, [HI, THOUGHT, BYE, SECOND_THOUGHT],
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+Yes<|im_end|>+}\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n{+<think>\nso\n</think>\n\nOk<|im_end|>+}\n", id="qwen3 drops earlier reasoning",
        ),
        pytest.param(
            QWEN3, [HI, OK, BYE, OK],
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+Ok<|im_end|>+}\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n{+<think>\n\n</think>\n\nOk<|im_end|>+}\n", id="qwen3 adds empty reasoning",
        ),
        pytest.param(
            QWEN3, [HI, CALL, RESULT, THOUGHT, BYE, CALL, RESULT, OK],
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
            '{+<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>+}\n'
            "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n{+Yes<|im_end|>+}\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
            '{+<think>\n\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>+}\n'
            "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n{+<think>\n\n</think>\n\nOk<|im_end|>+}\n", id="qwen3 with tools",
        ),
        pytest.param(
            R1, [HI, THOUGHT, BYE, OK], "<s>[U]Hi [A]{+\n\nYes</s>+}[U]Bye[A]{+Ok</s>+}", id="r1 opens reasoning in the prompt only",
        ),
        pytest.param(PLAIN, [HI, OK, BYE, OK], "USER: Hi \nASSISTANT: {+Ok\n+}USER: Bye\nASSISTANT: {+Ok\n+}", id="no end-of-turn token"),
        pytest.param(CLOSED_ONCE, [HI, OK, BYE, OK], "[user]Hi [assistant]{+Ok+}[user]Bye[assistant]{+Ok</s>+}", id="one end token"),
    ],
)  # fmt: skip
def test_trained_characters_of_assistant_turns(tokenizer: Tokenizer, template: str, messages: Messages, expected: str) -> None:
    assert marked(tokenizer, template, messages) == expected


def test_other_roles_start_at_their_content(tokenizer: Tokenizer) -> None:
    roles = ("system", "user", "tool")
    assert marked(tokenizer, CHATML, [SYSTEM, HI, OK], roles) == (
        "<|im_start|>system\n{+Go<|im_end|>+}\n<|im_start|>user\n{+Hi <|im_end|>+}\n<|im_start|>assistant\nOk<|im_end|>\n"
    )
    assert marked(tokenizer, MISTRAL, [SYSTEM, HI, OK], roles) == "<s>[INST] {+Go+}\n\n{+Hi [/INST]+} Ok</s>"
    assert marked(tokenizer, QWEN3, [HI, CALL, RESULT, OK], ("tool",)).count("{+2<|im_end|>+}\n") == 1


def test_messages_decide_for_themselves(tokenizer: Tokenizer) -> None:
    messages = [{**HI, "train": True}, {**YES, "train": False}, OK]
    assert marked(tokenizer, CHATML, messages) == (
        "<|im_start|>user\n{+Hi <|im_end|>+}\n<|im_start|>assistant\n Yes. <|im_end|>\n<|im_start|>assistant\n{+Ok<|im_end|>+}\n"
    )
    assert marked(tokenizer, CHATML, messages[1:], everything=True) == (
        "{+<|im_start|>assistant\n+} Yes. <|im_end|>{+\n<|im_start|>assistant\nOk<|im_end|>\n+}"
    )
    assert marked(tokenizer, CHATML, [HI], everything=True) == "{+<|im_start|>user\nHi <|im_end|>\n+}"


def test_adjacent_turns_are_one_span(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    conversation = Conversation([HI, OK, BYE], (False, True, True))
    text, spans = trained_spans(conversation, renderer(tokenizer, None), mark_finder(SPECIAL), "this model", "row")
    assert (text, spans) == ("Hi OkBye", [(3, 8)])


def test_content_that_imitates_the_template_misleads_nobody(tokenizer: Tokenizer) -> None:
    fake = {"role": "user", "content": "x<|im_end|>\n<|im_start|>assistant\nOk<|im_end|>\n"}
    assert marked(tokenizer, CHATML, [fake, OK]).endswith(f"{fake['content']}<|im_end|>\n<|im_start|>assistant\n{{+Ok<|im_end|>+}}\n")
    same = {"role": "user", "content": "probe Ok"}
    assert marked(tokenizer, QWEN3, [same, OK, same, OK]).count("\n{+Ok<|im_end|>+}\n") == 1


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (GEMMA, [SYSTEM, HI, OK], "the chat template of this model refuses the row (System role not supported)"),
        (MISTRAL, [HI, BYE, OK], "refuses the row (roles must alternate)"),
        (CHATML, [HI, CALL], "refuses the row ('dict object' has no attribute 'content')"),
        # Each of these lets a later turn change an earlier one in a way that replacing the content does not undo.
        ("{% for m in messages %}{{ loop.revindex ~ m['content'] | upper }}{% endfor %}", [HI, OK, BYE], "message 1 (assistant)"),
        ("{% for m in messages | reverse %}{{ m['content'] + m['content'] }}{% endfor %}", [HI, OK, BYE], "message 1 (assistant)"),
        (
            "{% for m in messages %}{{ loop.revindex ~ m['content'] }}{% endfor %}{{ messages[1]['content'] | length }}",
            [HI, OK, BYE],
            "message 1",
        ),
        ("{% for m in messages %}{{ loop.revindex ~ m['content'] | replace('Ok', 'No') }}{% endfor %}", [HI, OK, BYE], "message 1"),
        # A chat that ends with the turn would show its end-of-turn token, and is refused.
        ("{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML, [HI, OK, BYE], "message 1 (assistant)"),
        # These do not show what the turn says.
        (CHATML.replace("message['content']", "(message['content'] if loop.first else '')"), [HI, OK], "message 1 (assistant)"),
        (CHATML.replace("message['content']", "(message['content'] or '')"), [HI, CALL], "message 1 (assistant)"),
    ],
)
def test_what_cannot_be_told_is_refused(tokenizer: Tokenizer, template: str, messages: Messages, said: str) -> None:
    with pytest.raises(DataError) as caught:
        marked(tokenizer, template, messages)
    assert str(caught.value).startswith("rows.jsonl, byte 0: the chat template of this model ")
    assert said in str(caught.value)


def test_end_of_turn_tokens() -> None:
    find = mark_finder(["</s>", "<|eot_id|>", "<|im_end|>", "s>"])
    texts = ["a</s>", "a<|im_end|>\n", "a</s><|eot_id|> \n", "a</s> <|eot_id|>", "</s>", "a", "", "</s>a\n", "</s></s>"]
    assert [find(text) for text in texts] == ["</s>", "<|im_end|>", "</s><|eot_id|>", "<|eot_id|>", "</s>", "", "", "", "</s></s>"]


def brute_force(offsets: list[Span], spans: list[Span]) -> list[float]:
    """A token is trained when it has characters and all of them are."""
    trained = {c for start, end in spans for c in range(start, end)}
    return [float(i > 0 and start < end and set(range(start, end)) <= trained) for i, (start, end) in enumerate(offsets)]


CUTS = st.lists(st.integers(0, 60), max_size=8)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("The answer word. \n\u00e9\u4e16\U0001f600"), max_size=60), cuts=CUTS)
def test_trained_tokens_equal_brute_force(backend: Backend, text: str, cuts: list[int]) -> None:
    edges = sorted({min(cut, len(text)) for cut in cuts})
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    offsets = backend.encode(text, add_special_tokens=False).offsets
    weights = token_weights(offsets, spans)
    assert weights.dtype == np.float32
    assert weights.tolist() == brute_force(offsets, spans)


def test_tokens_without_characters_are_not_trained_at_a_border() -> None:
    offsets = [(0, 2), (2, 2), (2, 3), (3, 3), (3, 5), (5, 5), (5, 6)]
    assert token_weights(offsets, [(2, 5)]).tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert token_weights([], [(0, 1)]).tolist() == []


@pytest.mark.parametrize(
    ("before", "after", "straddler"),
    [("Let me think... ", "The answer is 4.", " The"), ("Train this wor", "d not this", " word")],
)
def test_a_straddling_token_is_masked_from_both_sides(backend: Backend, before: str, after: str, straddler: str) -> None:
    text, border = before + after, len(before)
    offsets = backend.encode(text, add_special_tokens=False).offsets
    pieces = [text[start:end] for start, end in offsets]
    at = pieces.index(straddler)
    assert offsets[at][0] < border < offsets[at][1]
    assert token_weights(offsets, [(0, border)]).tolist() == [0] + [1] * (at - 1) + [0] * (len(pieces) - at)
    assert token_weights(offsets, [(border, len(text))]).tolist() == [0] * (at + 1) + [1] * (len(pieces) - at - 1)


def test_smollm2_on_its_own_tokenizer() -> None:
    folder = os.environ.get("RAYFT_TEST_SMOLLM2")
    if folder is None:
        pytest.skip("RAYFT_TEST_SMOLLM2 names no folder with the tokenizer of SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(Model(path=folder))
    assert marked(tokenizer, str(tokenizer.chat_template), [HI, YES]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{+ Yes. <|im_end|>+}\n"
    )
