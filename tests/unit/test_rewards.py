"""Ready rewards: exact values, what is a legitimate 0, what is an error instead, and how a run names them."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import json
import os
import pkgutil
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rayft.rewards
from rayft.config.load import load
from rayft.config.online_rules import READY_REWARDS
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError, DataError
from rayft.experience.judge import Judge, reward_functions
from rayft.rewards import exact, gsm8k, length, math
from rayft.rewards import format as pattern
from rayft.rewards.answers import final, last_number, number
from rayft.types import Group, Prompt, Trajectory
from tiny import tiny_tokenizer

GSM8K = Path(os.environ.get("RAYFT_TEST_DATA", "data")) / "gsm8k/test.jsonl"
"""Real rows, where somebody has put them."""
RUN = ["method=grpo", "run.name=a", "data.train.a.path=x"]

NUMBERS = [
    *[("18", 18), ("-18", -18), ("+18", 18), ("- 18", -18), ("\N{MINUS SIGN}3", -3), ("007", 7), ("18.", 18), ("18.0", 18), (".5", "1/2")],
    *[("1,234", 1234), ("1,234,567.25", "4938269/4"), ("10{,}000", 10000), ("10,\\!000", 10000), ("10\\,000", 10000)],
    *[("$18", 18), ("\\$18.50", "37/2"), ("$5$", 5), ("50\\%", 50), ("50 %", 50), ("5\\text{ cm}", 5), ("\\$1,000.", 1000)],
    *[
        ("1/2", "1/2"),
        ("-2/4", "-1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\dfrac{3}{6}", "-1/2"),
        ("\\frac12", "1/2"),
        ("\\frac{1}{-2}", "-1/2"),
    ],
]
NO_NUMBERS = [
    *[
        "",
        "x",
        "-",
        ".",
        ",",
        "1,23",
        "12,34,567",
        "1234,567",
        "1 2",
        "3 or 4",
        "18 million",
        "1e9",
        "nan",
        "inf",
        "1_000",
        "2\\pi",
        "2\\sqrt{3}",
        "m2",
    ],
    *["2\\frac12", "\\frac123", "\\frac{1}{0}", "1/0", "1.2.3", "3^2", "(3, 4)", "3-4", "0x10", "9" * 5000, "\N{ARABIC-INDIC DIGIT TWO}"],
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read_exactly(text: str, value: int | str) -> None:
    assert number(text) == Fraction(value)


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: ascii(text[:12]))
def test_other_texts_are_no_numbers(text: str) -> None:
    assert number(text) is None


@given(st.fractions(), st.text(max_size=20))
def test_any_fraction_is_found_behind_any_text(value: Fraction, before: str) -> None:
    shown = f"{value.numerator:,}/{value.denominator:,}"
    for text in (f"{before}#### {shown}", f"{before}\\boxed{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}."):
        assert gsm8k.reward("", text, {"answer": str(value)}) == 1.0
        assert gsm8k.reward("", text, {"answer": str(value + Fraction(1, 10**9))}) == 0.0


@given(st.decimals(-(10**12), 10**12, places=4))
def test_decimals_are_compared_as_numbers_and_not_as_text(value: object) -> None:
    assert gsm8k.reward("", f"#### ${value:,}00", {"answer": f"{value:f}"}) == 1.0


@given(st.text(alphabet="#\\boxed{}$ \n,./-12frac", max_size=60))
def test_no_completion_is_an_error(text: str) -> None:
    assert gsm8k.reward("", text, {"answer": 12}) in (0.0, 1.0)
    assert math.reward("", text, {"answer": "12"}) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so #### 18\nmore", "18"),
        ("#### 1\n#### 2", "2"),
        ("\\boxed{1} #### 2", "2"),
        ("#### \\boxed{3}", "3"),
        ("\\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed {a\\}b}", "a\\}b"),
        ("\\boxed{1} then \\boxed{2", None),
        ("18", None),
        ("####", ""),
    ],
)
def test_the_last_mark_counts(text: str, found: str | None) -> None:
    assert final(text) == found


def test_exact_ignores_spaces_and_nothing_else() -> None:
    assert exact.reward("", "  two\n words ", {"answer": "two words"}) == 1.0
    assert exact.reward("", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", {"answer": "cafe\N{COMBINING ACUTE ACCENT}"}) == 1.0
    assert exact.reward("", "72", {"answer": 72}) == 1.0
    assert [exact.reward("", text, {"answer": "two"}) for text in ("Two", "two.", "t wo", "")] == [0.0] * 4


def test_length_falls_linearly_beyond_the_budget() -> None:
    row = {"max_chars": 10}
    assert [length.reward("", "x" * size, row) for size in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [length.reward("", "x" * size, {}) for size in (2000, 3000)] == [1.0, 0.5]


def test_format_is_of_the_whole_answer() -> None:
    good = "<think>a\nb</think>\n<answer>4</answer>"
    bad = [
        "",
        f"x{good}",
        good + good,
        "<think></think><answer>4</answer>",
        "<think>a</think><answer>4",
        good.replace("4", "<answer>4</answer>"),
    ]
    assert pattern.reward("", f" {good}\n", {}) == 1.0
    assert [pattern.reward("", text, {}) for text in bad] == [0.0] * len(bad)
    assert [pattern.reward("", text, {"pattern": "[0-9]+"}) for text in ("12", "12a")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("module", "row", "sentence"),
    [
        *[(module, {"question": "q"}, "answer: the row has no such column, only question.") for module in (exact, gsm8k, math)],
        *[(exact, {"answer": value}, "is no reference answer") for value in (None, " ", True, float("nan"), ["a"])],
        (gsm8k, {"answer": "eighteen"}, "answer = 'eighteen': has no final number"),
        (gsm8k, {"answer": "18 eggs\n#### many"}, "has no final number"),
        *[(length, {"max_chars": value}, "must be a positive integer") for value in (None, 0, 1.5, True, "10")],
        *[(pattern, {"pattern": value}, "is no regular expression") for value in (None, "(", 5)],
    ],
)
def test_a_row_that_cannot_be_judged_is_an_error(module: object, row: dict[str, object], sentence: str) -> None:
    for completion in ("", "#### 18"):
        with pytest.raises(DataError, match=re.escape(sentence)):
            module.reward("", completion, row)


def test_expressions_need_their_package_and_numbers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: object) -> object:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    assert math.reward("", "\\boxed{0.5}", {"answer": "so \\boxed{\\frac12}"}) == 1.0
    for completion in ("", "\\boxed{x^2}"):  # whether it is right or not
        with pytest.raises(ConfigError, match=re.escape("answer = 'x^2': is not a number, and math-verify")):
            math.reward("", completion, {"answer": "x^2"})


def test_expressions_are_compared_outside_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    cases = [
        ("\\boxed{x^2+2x}", "x(x+2)", 1.0),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1.0),
        ("\\boxed{x}", "x^2", 0.0),
        ("x^2", "x^2", 0.0),
    ]

    async def values() -> list[float]:
        return [await asyncio.to_thread(math.reward, "", completion, {"answer": answer}) for completion, answer, _ in cases]

    assert asyncio.run(values()) == [value for _, _, value in cases]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("She has 5 left, so $1,250.50.", "1,250.50"),
        ("12 - 5 = 7", "7"),
        ("12-5", "5"),
        ("it falls to -3", "-3"),
        ("1,2 or 34,5", "5"),
        ("version 1.2.3", "1.2"),
        ("none", None),
    ],
)
def test_the_last_number_of_an_answer_may_count(text: str, last: str | None) -> None:
    assert last_number(text) == last
    assert gsm8k.reward("", text, {"answer": f"so\n#### {last or 0}"}, read="number") == float(last is not None)
    assert gsm8k.reward("", text, {"answer": f"so\n#### {last or 0}"}) == 0.0
    with pytest.raises(ConfigError, match=re.escape("arguments.read = 'last': is no way to read an answer. Use marked or number")):
        gsm8k.reward("", text, {"answer": "1"}, read="last")


def test_rows_of_gsm8k() -> None:
    if not GSM8K.is_file():
        pytest.skip("GSM8K is not there")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    assert [gsm8k.reward(row["question"], row["answer"], row) for row in rows] == [1.0] * len(rows)
    assert [math.reward("", f"\\boxed{{{text.split()[-1]}.00}}", row) for text, row in zip(answers, rows, strict=True)] == [1.0] * len(rows)
    assert [gsm8k.reward("", f"{text}1", row) for text, row in zip(answers, rows, strict=True) if not text.endswith(" 0")].count(1.0) == 0


def test_the_names_are_those_of_the_package() -> None:
    modules = [module.name for module in pkgutil.iter_modules(rayft.rewards.__path__)]
    assert tuple(name for name in modules if hasattr(importlib.import_module(f"rayft.rewards.{name}"), "reward")) == READY_REWARDS


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["reward.functions.r.function=answers"],
            "reward.functions.r.function = 'answers': is not the name of a ready reward. "
            "Use one of code, exact, format, gsm8k, length, math, reasoning_gym, or",
        ),
        (["reward.functions.r.function=exact", "reward.functions.r.batch=true"], "reward.functions.r.batch = True: gives all answers"),
    ],
)
def test_a_run_names_ready_rewards_only(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load([], [*RUN, "model.path=m", *overrides])


def test_a_run_is_judged_by_ready_rewards(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    named = [f"reward.functions.{name}.function={name}" for name in ("exact", "length")]
    cfg = load([], [*RUN, f"model.path={tmp_path / 'model'}", *named])
    assert isinstance(cfg, GrpoRun)
    judge = Judge(cfg, reward_functions(cfg))
    tokens = [tuple(judge._tokenizer.encode(text, add_special_tokens=False)) for text in ("four", "the the")]
    made = tuple(Trajectory(ids, (True,) * len(ids), (-1.0,) * len(ids), (("1.3", 0, len(ids)),), "stop") for ids in tokens)
    scored = asyncio.run(judge.score(Group(Prompt("0-1", 1, (5, 6), {"answer": "four", "max_chars": 4}), made)))
    assert scored.rewards == {"exact": (1.0, 0.0), "length": (1.0, 0.25)}
