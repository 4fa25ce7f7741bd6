"""Rows of each format to documents: what is read, what is dropped and why, what is refused and how it is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.config.schema import Data, Dataset, Model
from rayft.data.formats import EMPTY, NOTHING_TO_TRAIN, TOO_LONG, Encoded, Encoder, make_encoder
from rayft.errors import DataError
from rayft.models.tokenizer import Tokenizer, load_tokenizer
from tiny import CHATML, tiny_tokenizer

CHAT = Dataset(path="x")
TEXT = Dataset(path="x", format="text")
ALPACA = Dataset(path="x", format="instruction", system="system")
HI = {"role": "user", "content": "Hi"}
OK = {"role": "assistant", "content": "Ok"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(Model(path=str(folder)))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return encoder_of(tokenizer)


def encoder_of(tokenizer: Tokenizer, **data: Any) -> Encoder:
    return make_encoder(Data(train={"d": CHAT}, **data), tokenizer)


def shown(encoder: Encoder, encoded: Encoded) -> list[str]:
    """Each document with runs of trained tokens between {+ and +}."""
    texts = []
    for document in encoded.documents:
        assert document.tokens.dtype == np.int32
        assert document.loss_weights.dtype == np.float32
        assert document.tokens.shape == document.loss_weights.shape
        edges = np.flatnonzero(np.diff(document.loss_weights, prepend=0, append=0))
        runs = np.split(document.tokens, edges)
        decoded = [str(encoder.tokenizer.decode(run)) for run in runs]
        texts.append("".join(f"{{+{text}+}}" if i % 2 else text for i, text in enumerate(decoded)))
    return texts


def chatml(*turns: tuple[str, str]) -> str:
    """ChatML with the assistant's turns trained."""
    return "".join(
        f"<|im_start|>{role}\n" + (f"{{+{text}<|im_end|>+}}" if role == "assistant" else f"{text}<|im_end|>") + "\n" for role, text in turns
    )


@pytest.mark.parametrize(
    "messages",
    [
        [HI, OK],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ok"}],
        [
            {"role": "user", "content": ["H", {"type": "text", "text": "i"}]},
            {"role": "model", "content": [{"content": "O"}, {"value": "k"}]},
        ],
        [{**HI, "name": None, "tool_calls": None, "weight": None}, {**OK, "train": None}],
        ({"from": "human", "role": None} | HI, OK),
    ],
)
def test_spellings_of_a_chat(encoder: Encoder, messages: Any) -> None:
    encoded = encoder.encode({"messages": messages}, CHAT, "row")
    assert shown(encoder, encoded) == [chatml(("user", "Hi"), ("assistant", "Ok"))]


def test_columns_and_roles_are_named_in_the_configuration(encoder: Encoder) -> None:
    dataset = Dataset(path="x", messages="talk", role="who", content="says", roles={"q": "user", "a": "assistant"})
    encoded = encoder.encode({"talk": [{"who": "q", "says": "Hi"}, {"who": "a", "says": "Ok"}]}, dataset, "row")
    assert shown(encoder, encoded) == [chatml(("user", "Hi"), ("assistant", "Ok"))]


def test_message_flags_override_roles(encoder: Encoder) -> None:
    row = {"messages": [{**HI, "weight": 1}, {**OK, "weight": 0}, HI, {**OK, "train": True}]}
    assert shown(encoder, encoder.encode(row, CHAT, "row")) == [
        "<|im_start|>user\n{+Hi<|im_end|>+}\n<|im_start|>assistant\nOk<|im_end|>\n" + chatml(("user", "Hi"), ("assistant", "Ok"))
    ]
    assert encoder.encode({"messages": [HI, {**OK, "train": False}]}, CHAT, "row").dropped == NOTHING_TO_TRAIN


def test_training_on_inputs_leaves_out_the_first_token_only(tokenizer: Tokenizer) -> None:
    encoder = encoder_of(tokenizer, train_on_inputs=True)
    (document,) = encoder.encode({"messages": [HI, OK]}, CHAT, "row").documents
    assert document.loss_weights.tolist() == [0] + [1] * (len(document.tokens) - 1)


def test_instruction_rows_go_through_the_template(encoder: Encoder) -> None:
    row: dict[str, Any] = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Go"}
    full = chatml(("system", "Go"), ("user", "Add\n\n2 2"), ("assistant", "4"))
    short = chatml(("user", "Add"), ("assistant", "4"))
    cases = [row, {**row, "input": " ", "system": ""}, {**row, "input": None, "system": None}]
    assert [text for case in cases for text in shown(encoder, encoder.encode(case, ALPACA, "row"))] == [full, short, short]
    plain = Dataset(path="x", format="instruction", instruction="q", output="a")
    assert shown(encoder, encoder.encode({"q": "Add", "a": "4"}, plain, "row")) == [short]


def test_tools_reach_the_template(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shows = encoder_of(load_tokenizer(Model(path=str(folder), chat_template="{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)))
    expected = ['[{"type": "function", "function": {"name": "add", "parameters": {}}}]' + chatml(("user", "Hi"), ("assistant", "Ok"))]
    as_text = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
    for tools in ([TOOL], (TOOL,), as_text):
        assert shown(shows, shows.encode({"messages": [HI, OK], "tools": tools}, CHAT, "row")) == expected
    nothings: tuple[Any, ...] = (None, "", [], "[]")
    for nothing in nothings:
        assert shown(shows, shows.encode({"messages": [HI, OK], "tools": nothing}, CHAT, "row")) == [expected[0].removeprefix(as_text)]
    assert caplog.records == []
    hides = encoder_of(load_tokenizer(Model(path=str(folder))))
    for _ in range(2):
        hides.encode({"messages": [HI, OK], "tools": [TOOL]}, CHAT, "row")
    assert ["does not show them" in record.getMessage() for record in caplog.records] == [True]


def test_length_policy_counts_and_cuts_token_ids(tokenizer: Tokenizer) -> None:
    row = {"messages": [HI, {"role": "assistant", "content": "The answer is \U0001f600 four."}]}
    (whole,) = encoder_of(tokenizer).encode(row, CHAT, "row").documents
    length, prompt = len(whole.tokens), int(np.flatnonzero(whole.loss_weights)[0])
    for policy in ("drop", "truncate", "raise"):
        (same,) = encoder_of(tokenizer, seq_len=length, too_long=policy).encode(row, CHAT, "row").documents
        assert np.array_equal(same.tokens, whole.tokens)
        assert np.array_equal(same.loss_weights, whole.loss_weights)
    assert encoder_of(tokenizer, seq_len=length - 1).encode(row, CHAT, "row").dropped == TOO_LONG
    with pytest.raises(DataError, match=rf"^row 7: the row has {length} tokens, more than data.seq_len = {length - 1}\."):
        encoder_of(tokenizer, seq_len=length - 1, too_long="raise").encode(row, CHAT, "row 7")
    for cut in range(prompt + 1, length):  # through the bytes of one character, too
        (document,) = encoder_of(tokenizer, seq_len=cut, too_long="truncate").encode(row, CHAT, "row").documents
        assert np.array_equal(document.tokens, whole.tokens[:cut])
        assert np.array_equal(document.loss_weights, whole.loss_weights[:cut])
    assert encoder_of(tokenizer, seq_len=prompt, too_long="truncate").encode(row, CHAT, "row").dropped == NOTHING_TO_TRAIN


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("The answer. \n\u4e16\U0001f600"), max_size=40), seq_len=st.integers(1, 12))
def test_texts_are_cut_into_pieces_that_join_to_the_whole(encoder: Encoder, text: str, seq_len: int) -> None:
    encoded = replace(encoder, data=Data(train={"d": TEXT}, seq_len=seq_len)).encode({"text": text}, TEXT, "row")
    if not text.strip():
        assert (encoded.documents, encoded.dropped) == ((), EMPTY)
        return
    ids = [*encoder.tokenizer.encode(text), encoder.tokenizer.eos_token_id]
    kept = len(ids) - (len(ids) % seq_len == 1)  # a piece of one token teaches nothing
    pieces = [document.tokens.tolist() for document in encoded.documents]
    if seq_len == 1:
        assert (pieces, encoded.dropped) == ([], NOTHING_TO_TRAIN)
        return
    assert [token for piece in pieces for token in piece] == ids[:kept]
    assert all(len(piece) == seq_len for piece in pieces[:-1])
    assert all(document.loss_weights.tolist() == [0] + [1] * (len(document.tokens) - 1) for document in encoded.documents)


def test_texts_begin_with_the_token_that_the_tokenizer_adds(folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(Model(path=str(folder)))
    tokenizer.bos_token = "<s>"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Some tokenizers add an end token too; there is still only one.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", pair=None, special_tokens=[("<s>", bos), ("<|im_end|>", eos)]
    )
    (document,) = make_encoder(Data(train={"d": TEXT}), tokenizer).encode({"text": "The answer"}, TEXT, "row").documents
    assert document.tokens.tolist() == [bos, *tokenizer.encode("The answer", add_special_tokens=False), eos]


def test_many_rows_equal_one_by_one(encoder: Encoder) -> None:
    chats = [{"messages": [HI, {"role": "assistant", "content": "word " * n}]} for n in range(5)]
    chats[2:2] = [{"messages": []}, {"messages": [HI]}]
    for rows, dataset in ((chats, CHAT), ([{"text": text} for text in ("The answer", "", "a", "four\n")], TEXT)):
        many = encoder.encode_many(rows, dataset, [f"row {i}" for i in range(len(rows))])
        single = [encoder.encode(row, dataset, "row") for row in rows]
        assert [encoded.dropped for encoded in many] == [encoded.dropped for encoded in single]
        assert [shown(encoder, encoded) for encoded in many] == [shown(encoder, encoded) for encoded in single]
    reasons = [encoded.dropped for encoded in encoder.encode_many(chats, CHAT, ["row"] * 7)]
    assert reasons == [None, None, EMPTY, NOTHING_TO_TRAIN, None, None, None]
    assert encoder.encode({"text": None}, TEXT, "row").dropped == EMPTY


@pytest.mark.parametrize(
    ("row", "dataset", "said"),
    [
        ({"text": "a"}, CHAT, "row 3: the row has no column 'messages'; it has 'text'"),
        ({"messages": "[]"}, CHAT, "row 3: column 'messages' must be a list of messages, but is str"),
        ({"messages": [HI, "Ok"]}, CHAT, "row 3, message 1: a message must be an object, but is str"),
        ({"messages": [{"content": "Ok"}]}, CHAT, "row 3, message 0: the row has no column 'role'"),
        ({"messages": [{"role": "bot", "content": "Ok"}]}, CHAT, "message 0: the role 'bot' is not one of assistant, developer, system"),
        ({"messages": [{"role": "user"}]}, CHAT, "message 0: the message has no 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, CHAT, "message 0: the content must be text, but is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, CHAT, "part 0 = 'image': only text parts can be trained on"),
        ({"messages": [{"role": "user", "content": [{"text": "a", "train": True}]}]}, CHAT, "train and weight are read on messages"),
        ({"messages": [{**OK, "train": True, "weight": 1}]}, CHAT, "train and weight say the same thing twice"),
        ({"messages": [{**OK, "weight": 0.5}]}, CHAT, "train must be true or false, or weight 0 or 1"),
        ({"messages": [{**OK, "weight": True}]}, CHAT, "train must be true or false, or weight 0 or 1"),
        ({"messages": [{**OK, "train": 1}]}, CHAT, "train must be true or false, or weight 0 or 1"),
        ({"messages": [{**OK, "tool_calls": ["add"]}]}, CHAT, "a tool call must be an object"),
        ({"messages": [HI, OK], "tools": "{"}, CHAT, "column 'tools' is not JSON"),
        ({"messages": [HI, OK], "tools": {"a": 1}}, CHAT, "column 'tools' must be a list of objects"),
        ({"messages": [HI, {"role": "assistant", "content": "\ud83d"}]}, CHAT, "half of a surrogate pair (\\ud83d)"),
        ({"text": "a \udc00"}, TEXT, "half of a surrogate pair (\\udc00)"),
        ({"text": 3}, TEXT, "row 3: column 'text' must be text, but is int"),
        ({"a": 3}, TEXT, "row 3: the row has no column 'text'"),
        ({"instruction": "a", "system": "b"}, ALPACA, "row 3: the row has no column 'output'"),
        ({"instruction": "a", "output": "b"}, ALPACA, "row 3: the row has no column 'system'"),
        ({"instruction": "a", "output": None, "system": "b"}, ALPACA, "column 'output' must be text, but is NoneType"),
    ],
)
def test_unusable_rows_are_named(encoder: Encoder, row: dict[str, Any], dataset: Dataset, said: str) -> None:
    with pytest.raises(DataError) as caught:
        encoder.encode(row, dataset, "row 3")
    assert str(caught.value).startswith("row 3")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("template", "eos", "said"),
    [
        (CHATML, "<|im_end|>", []),
        (CHATML, "</s>", ["ends assistant turns with '<|im_end|>', but the tokenizer's end token is '</s>'"]),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "</s>", ["ends assistant turns with no special token"]),
        (CHATML + "{{ strftime_now('%Y') }}<|im_end|>", "<|im_end|>", ["prints the date"]),
        ("{{ raise_exception('only for tools') }}", "</s>", []),
    ],
)
def test_warnings_about_the_template(folder: Path, caplog: pytest.LogCaptureFixture, template: str, eos: str, said: list[str]) -> None:
    encoder_of(load_tokenizer(Model(path=str(folder), chat_template=template, eos_token=eos)))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == len(said)
    assert all(part in message for part, message in zip(said, messages, strict=True))


def test_what_a_format_needs_is_checked_before_any_row(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(tiny_tokenizer(tmp_path, template=None))))
    with pytest.raises(DataError, match=r"^model\.chat_template: the tokenizer has no chat template"):
        make_encoder(Data(train={"d": TEXT}, eval={"e": ALPACA}), tokenizer)
    assert make_encoder(Data(train={"d": TEXT}), tokenizer).encode({"text": "a b"}, TEXT, "row").documents
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"^model\.eos_token: the tokenizer has no end token"):
        make_encoder(Data(train={"d": TEXT}), tokenizer)


def test_a_render_across_midnight_is_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(Model(path=str(folder), chat_template="{{ strftime_now('%d') }}" + CHATML))
    encoder = encoder_of(tokenizer)
    expected = shown(encoder, encoder.encode({"messages": [HI, OK]}, CHAT, "row"))
    real: Callable[..., Any] = type(tokenizer).apply_chat_template
    calls = []

    def first_call_yesterday(self: Tokenizer, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return ("yesterday" if len(calls) == 1 else "") + real(self, *args, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", first_call_yesterday)
    assert shown(encoder, encoder.encode({"messages": [HI, OK]}, CHAT, "row")) == expected
    assert len(calls) > 2


TEMPLATES = Path(__file__).parents[2] / "rayft" / "data" / "templates"
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


SPELLINGS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "strings": lambda text: [text[:1], text[1:]],
    "text and value": lambda text: [{"type": "text", "text": text[:1]}, {"value": text[1:]}],
    "content": lambda text: [{"content": text}],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_chatml_bytes(folder: Path, spelling: Callable[[str], Any]) -> None:
    tokenizer = load_tokenizer(Model(path=str(folder), chat_template="chatml"))
    messages = [
        {"role": "system", "content": spelling("Be good.")},
        {"role": "user", "content": spelling("Hi ")},
        {"role": "assistant", "content": spelling(" Ok"), "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": spelling("2")},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
    ]
    calls = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    rest = (
        f"<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n Ok\n{calls}\n{calls}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
    )
    about = (
        'Tools that can be called, one JSON schema a line:\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": {}}}\n'
        "</tools>\nA call is a JSON object with the keys name and arguments, written as:\n"
        '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n'
    )
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == "<|im_start|>system\nBe good.<|im_end|>\n" + rest
    assert render(messages, [TOOL], tokenize=False) == "<|im_start|>system\nBe good.\n\n" + about + rest
    assert render(messages[1:], [TOOL], tokenize=False) == "<|im_start|>system\n" + about + rest
    assert render(messages[1:2], tokenize=False, add_generation_prompt=True) == "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
    assert [file.name for file in TEMPLATES.iterdir()] == ["chatml.jinja"], "every shipped template needs such a test"
