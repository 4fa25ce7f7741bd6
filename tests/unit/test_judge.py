"""Scoring a group: plain, async and group-wise rewards, environment rewards, penalties, and failures that are never zeros."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.errors import ConfigError, DataError, InfrastructureError
from rayft.experience.judge import Judge, reward_functions
from rayft.types import Group, Prompt, Scored, Trajectory
from tiny import tiny_tokenizer

REWARDS = """
async def plain(prompt, completion, row): return float(completion == row["answer"])
def group(prompt, completions, row): return [len(completion) for completion in completions]
def broken(prompt, completion, row): raise KeyError("answer")
def nothing(prompt, completion, row): return float("nan")
def away(prompt, completion, row):
    from rayft.errors import InfrastructureError
    raise InfrastructureError("reward.functions.r.judge.url", "http://h", "has not answered within 54 s", "Look into the endpoint")
def few(prompt, completions, row): return [1.0]
"""
CRITICS = """
def check(prompt, answers, by_policy, row):
    assert prompt == [5, 6] and row == {"answer": "four"} and [len(a) for a in answers] == [len(b) for b in by_policy]

def good(prompt, answers, by_policy, row):
    check(prompt, answers, by_policy, row)
    return [[0.25 * place for place, own in enumerate(flags) if own] for flags in by_policy]

async def later(prompt, answers, by_policy, row): return good(prompt, answers, by_policy, row)
def few(prompt, answers, by_policy, row): return good(prompt, answers, by_policy, row)[:1]
def all_tokens(prompt, answers, by_policy, row): return [[0.0] * len(answer) for answer in answers]
def nothing(prompt, answers, by_policy, row): return [[float("nan")] * sum(flags) for flags in by_policy]
def none(prompt, answers, by_policy, row): return None
def broken(prompt, answers, by_policy, row): raise KeyError("answer")
def other(prompt, answer): return 0.0
"""


def judge(folder: Path, *overrides: str) -> Judge:
    tiny_tokenizer(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    base = ["method=grpo", "run.name=a", f"model.path={folder / 'model'}", "data.train.a.path=x", "rollout.max_tokens=10"]
    cfg = load([], [*base, *overrides])
    assert isinstance(cfg, GrpoRun)
    return Judge(cfg, reward_functions(cfg))


def score(folder: Path, *overrides: str, rewards: dict[str, float] | None = None) -> Scored:
    """Of two answers, "four" and "the the"; the second was cut and switched weights in its middle."""
    made = judge(folder, *overrides)
    texts = ["four", "the the"]
    answers = []
    for text, reason in zip(texts, ("stop", "length"), strict=True):
        tokens = tuple(made._tokenizer.encode(text, add_special_tokens=False))
        spans = (("1.3", 0, 1), ("1.4", 1, len(tokens)))
        answers.append(Trajectory(tokens, (True,) * len(tokens), (-1.0,) * len(tokens), spans, reason, rewards=rewards or {}))
    return asyncio.run(made.score(Group(Prompt("0-1", 1, (5, 6), {"answer": "four"}), tuple(answers))))


def function(folder: Path, name: str, kind: str, *more: str) -> list[str]:
    return [f"reward.functions.{name}.function={folder}/rewards.py:{kind}", *(f"reward.functions.{name}.{one}" for one in more)]


def test_rewards_are_summed_by_weight_and_numbers_are_kept(tmp_path: Path) -> None:
    given = [*function(tmp_path, "right", "plain", "weight=2.0"), *function(tmp_path, "size", "group", "batch=true", "weight=-0.1")]
    scored = score(tmp_path, *given, rewards={"steps": 0.5})
    assert scored.rewards == {"right": (1.0, 0.0), "size": (4.0, 7.0), "steps": (0.5, 0.5)}
    assert scored.total == pytest.approx((2.0 - 0.4 + 0.5, -0.7 + 0.5))
    assert (scored.key, scored.truncated, scored.oldest, scored.newest) == ("0-1", (False, True), 3, 4)
    assert scored.sizes == tuple(length + 2 for length in scored.lengths)


def test_long_answers_lose(tmp_path: Path) -> None:
    free = score(tmp_path, *function(tmp_path, "right", "plain"))
    less = score(tmp_path, *function(tmp_path, "right", "plain"), "reward.overlong_buffer=10", "reward.overlong_penalty=3.0")
    assert [a - b for a, b in zip(free.total, less.total, strict=True)] == pytest.approx([0.3 * length for length in free.lengths])


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("broken", (), "reward.functions.r: raised KeyError on row {'answer': 'four'}: 'answer'"),
        ("nothing", (), "reward.functions.r: must give 2 finite numbers for 2 answers, and gave [nan, nan]"),
        ("few", ("batch=true",), "reward.functions.r: must give 2 finite numbers for 2 answers, and gave [1.0]"),
    ],
)
def test_what_is_no_reward_is_an_error(tmp_path: Path, kind: str, more: tuple[str, ...], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        score(tmp_path, *function(tmp_path, "r", kind, *more))
    assert str(caught.value).startswith(expected)


def test_what_could_not_be_asked_is_no_fault_of_the_row(tmp_path: Path) -> None:
    with pytest.raises(
        InfrastructureError, match=r"^reward.functions.r.judge.url = 'http://h': has not answered within 54 s. Look into the"
    ):
        score(tmp_path, *function(tmp_path, "r", "away"))


def criticised(folder: Path, kind: str, *overrides: str) -> Scored:
    """Scores of an answer of two turns with a turn of an environment between them, and of one of one token."""
    (folder / "critic.py").write_text(CRITICS)
    critic = ["algorithm.advantage=gae", f"algorithm.values={folder}/critic.py:{kind}"]
    made = judge(folder, *function(folder, "size", "group", "batch=true"), *critic, *overrides)
    (word,) = made._tokenizer.encode("four", add_special_tokens=False)[:1]
    spans = (("1.3", 0, 1),)
    answers = (
        Trajectory((word,) * 5, (True, True, False, False, True), (-1.0,) * 5, spans, "stop"),
        Trajectory((word,), (True,), (-1.0,), spans, "stop"),
    )
    return asyncio.run(made.score(Group(Prompt("0-1", 1, (5, 6), {"answer": "four"}), answers)))


@pytest.mark.parametrize("kind", ["good", "later"])
def test_a_critic_gives_each_token_of_the_policy_its_advantage(tmp_path: Path, kind: str) -> None:
    scored = criticised(tmp_path, kind, "algorithm.gamma=0.5", "algorithm.lam=0.5")
    reward, other = scored.total
    last = reward - 1.0  # the values of the first answer are 0, 0.25 and, behind the environment's turn, 1
    middle = 0.5 * 1.0 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.0 + 0.25 * middle
    assert list(scored.advantages[0]) == pytest.approx([first, middle, last], rel=1e-6)
    assert list(scored.advantages[1]) == pytest.approx([other], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("broken", "algorithm.values: raised KeyError on row {'answer': 'four'}: 'answer'. Mend it, or take such rows out."),
        ("none", "algorithm.values: raised TypeError on row {'answer': 'four'}: 'NoneType' object is not iterable."),
        ("few", "algorithm.values: must give finite numbers, [3, 1] of them for the 2 answers, and gave [3]: "),
        ("all_tokens", "algorithm.values: must give finite numbers, [3, 1] of them for the 2 answers, and gave [5, 1]: "),
        (
            "nothing",
            "algorithm.values: must give finite numbers, [3, 1] of them for the 2 answers, and gave [3, 1]: [[nan, nan, nan], [nan]]",
        ),
    ],
)
def test_what_is_no_value_is_an_error(tmp_path: Path, kind: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        criticised(tmp_path, kind)
    assert str(caught.value).startswith(expected)


def test_a_critic_is_tried_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"algorithm.values = .*critic.py:other'?: cannot be called with \(prompt, answers, by_policy, row\)"
    ):
        criticised(tmp_path, "other")
