"""Tool calls: found in what the policy wrote, answered, and refused in words that it reads."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.data.prompts import PromptSet, prepare_prompts
from rayft.errors import ConfigError
from rayft.models.tokenizer import load_tokenizer
from rayft.rollout.environments.tools import Call, Tools, parse_call
from rayft.rollout.stage import maker_of, scene_of
from tiny import tiny_tokenizer

GLAIVE = Path(os.environ.get("RAYFT_TEST_DATA", "data")) / "llm_demos" / "glaive_toolcall_en_demo.json"


def look(place: str, deep: bool = False) -> str:
    """Look into a place.

    Args:
        place: where to look
        deep: to the bottom
    """
    if place == "well":
        raise ValueError("it is too dark")
    return f"{place}: {'gold' if deep else 'red'}"


async def count(words: list[str]) -> dict[str, int]:
    """Count words.

    Args:
        words: what to count
    """
    await asyncio.sleep(0)
    return {word: words.count(word) for word in words}


def broken() -> None:
    """Fail."""
    raise OSError("the disk is gone")


def call(name: str, **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def said(text: str, **options: Any) -> list[str]:
    observation = Tools([look, count, broken], **options).step(text)
    assert observation.done == (not observation.reply)
    assert all(not isinstance(message, str) and message["role"] == "tool" for message in observation.reply)
    return [message["content"] for message in observation.reply if not isinstance(message, str)]


def test_calls_are_answered_in_order_and_a_turn_without_any_is_the_last() -> None:
    assert said("It is red.") == []
    text = f"I look.{call('look', place='box')}and{call('look', place='sea', deep=True)}{call('count', words=['a', 'b', 'a'])}"
    assert said(text) == ["box: red", "sea: gold", '{"a": 2, "b": 1}']
    assert said('<tool_call>{"name": "look", "arguments": {"place": "cut"}}') == ["cut: red"], "a call at the end needs no closing tag"
    assert said('[look {"name": "look", "parameters": {"place": "box"}}]', pattern=r"\[look (.*?)\]") == ["box: red"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>look</tool_call>", "error: the call is not valid JSON (Expecting value"),
        ("<tool_call>[1]</tool_call>", 'error: a call is a JSON object such as {"name"'),
        ('<tool_call>{"name": "look", "arguments": "box"}</tool_call>', "error: a call is a JSON object such as"),
        (call("find"), "error: there is no tool find; the tools are look, count, broken"),
        (call("look"), "error: look: missing a required argument: 'place'"),
        (call("look", place="a", much=1), "error: look: got an unexpected keyword argument 'much'"),
        (call("look", place="well"), "error: it is too dark"),
    ],
)
def test_what_the_policy_does_wrong_it_reads(text: str, expected: str) -> None:
    (answer,) = said(text)
    assert answer.startswith(expected)


def test_what_a_tool_does_wrong_is_a_failure() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        said(call("broken"))


@given(st.text(max_size=60))
def test_any_text_is_a_call_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_call(text), Call)
    except ValueError as refusal:
        assert "call" in str(refusal)


def test_real_calls_are_found() -> None:
    if not GLAIVE.exists():
        pytest.skip("no copy of the tool-call rows here")
    turns = [turn["value"] for row in json.loads(GLAIVE.read_text()) for turn in row["conversations"] if turn["from"] == "function_call"]
    assert len(turns) > 100
    for turn in turns:
        assert parse_call(turn) == Call(json.loads(turn)["name"], json.loads(turn)["arguments"])
        assert said(f"<tool_call>\n{turn}\n</tool_call>")[0].startswith("error: there is no tool")


def test_functions_need_types_and_descriptions() -> None:
    def bare(place, deep: bool = False) -> str:  # type: ignore[no-untyped-def]
        """Look."""
        return str(place)

    with pytest.raises(ConfigError, match=r"environment\.tools = 'bare': has no schema"):
        Tools([bare])
    with pytest.raises(ConfigError, match=r"environment.arguments.pattern = '\(': is no regular expression"):
        Tools([look], pattern="(")


def test_prompts_show_the_tools_and_change_with_them(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "what is in the box"}]}) + "\n")
    base = ["method=grpo", "run.name=a", f"run.dir={tmp_path}", f"model.path={tmp_path / 'model'}", "reward.functions.r.function=exact"]
    more = [f"data.train.a.path={tmp_path / 'rows.jsonl'}", "model.chat_template=chatml"]
    tools = [f"environment.tools=[{__file__}:look]", "environment.function=tools"]
    cfg = load([], [*base, *more, *tools])
    assert isinstance(cfg, GrpoRun)
    scene = scene_of(cfg)
    assert scene is not None
    make, schemas = maker_of(scene)
    assert schemas is not None and [schema["function"]["name"] for schema in schemas] == ["look"]
    assert make().step(call("look", place="box")).reply[0]["content"] == "box: red"  # type: ignore[union-attr, index]
    folder, plain = prepare_prompts(cfg, "train", schemas), prepare_prompts(cfg, "train")
    texts = [load_tokenizer(cfg.model).decode(PromptSet(one, seed=0, shuffle=False).prompt(0).tokens) for one in (folder, plain)]
    assert folder != plain and json.dumps(schemas[0]) in texts[0].replace("&#34;", '"') and "look" not in texts[1]


def test_programs_are_run_and_what_went_wrong_is_told() -> None:
    from rayft.rewards.sandbox import refusal
    from rayft.rollout.environments.python import python

    if why := refusal():
        pytest.skip(f"no sandbox here: {why}")
    assert python("x = 6\nprint(x * 7)") == "42\n"
    assert python("print('a')\n1 / 0").splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in python("print(") and python("raise SystemExit(3)").startswith("error: it used too much")
    assert [schema["function"]["name"] for schema in Tools([python]).tools] == ["python"]
