"""The loop of policy and environment: what is trained, where versions lie, budgets and seeds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.errors import DataError, InfrastructureError
from rayft.rollout.agent import Sampling, rollout
from rayft.rollout.compat import spans_of
from rayft.rollout.env import Observation
from rayft.rollout.stage import Stage
from rayft.types import Completion, Group, Prompt

PROMPT = Prompt("0-7", 7, (1, 2, 3), {"answer": "x"})


class Script:
    """An engine that writes `length` tokens counting up from 100 per call, a token of version 1.1 and the rest of 1.2."""

    def __init__(self, length: int, reason: str = "stop") -> None:
        self.length, self.reason = length, reason
        self.calls: list[dict[str, Any]] = []
        self.cancelled = 0

    async def generate(self, request_id: str, prompt: Sequence[int], **options: Any) -> Completion:
        self.calls.append({"id": request_id, "prompt": tuple(prompt), **options})
        try:
            await asyncio.sleep(0 if self.reason != "hang" or len(self.calls) == 1 else 30)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        n = min(self.length, options["max_tokens"])
        reason = "abort" if self.reason == "hang" else "length" if n < self.length else self.reason
        versions = (("1.1", 0, 1), ("1.2", 1, n)) if n > 1 else (("1.1", 0, n),)
        return Completion(tuple(range(100, 100 + n)), tuple(-0.5 for _ in range(n)), versions, reason)


class Numbers:
    """A dialogue whose replies are tokens already, and whose generation prompt is the prompt's last token."""

    def without_generation(self, prompt: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(prompt[:-1]), tuple(prompt[-1:])

    def opening(self, reply: Sequence[int], generation: tuple[int, ...]) -> tuple[int, ...]:
        return (*reply, *generation)

    def reply(self, reply: Sequence[int], last: int) -> tuple[int, ...]:
        assert last >= 100
        return tuple(reply)

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


class Talk:
    """An environment that opens with a token and answers `reply` tokens until it has seen `turns` turns."""

    def __init__(self, turns: int, reply: int) -> None:
        self.turns, self.reply, self.seen = turns, reply, list[str]()

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        assert row["answer"] == "x" and 0 <= seed < 2**31
        return (50,)

    async def step(self, text: str) -> Observation:
        self.seen.append(text)
        last: Any = len(self.seen) == self.turns
        return Observation([60] * self.reply, last, 1.0 if last else 0.25)  # type: ignore[list-item]


def run(engine: Any, n: int = 1, **options: Any) -> Group:
    environment, max_turns = options.pop("environment", None), options.pop("max_turns", 16)
    sampling = Sampling(**({"max_tokens": 20, "context": 64} | options))
    dialogue: Any = Numbers()
    return asyncio.run(rollout(engine, PROMPT, n, sampling, Stage(environment, dialogue, 5.0, max_turns) if environment else None))


def test_one_turn_gives_n_samples_with_their_own_seeds() -> None:
    engine = Script(4)
    group = run(engine, 3)
    assert [t.tokens for t in group.trajectories] == [(100, 101, 102, 103)] * 3
    assert group.trajectories[0].by_policy == (True,) * 4 and group.trajectories[0].versions == (("1.1", 0, 1), ("1.2", 1, 4))
    seeds = [call["seed"] for call in engine.calls]
    again, other = Script(4), Script(4)
    run(again, 3)
    run(other, 3, seed=1)
    assert len(set(seeds)) == 3 and [call["seed"] for call in again.calls] == seeds
    assert not {call["seed"] for call in other.calls} & set(seeds)
    assert len({call["id"] for call in engine.calls + again.calls}) == 6


def test_turns_are_strung_together_and_only_the_policy_is_trained() -> None:
    engine = Script(2)
    talk = Talk(turns=2, reply=3)
    (trajectory,) = run(engine, environment=lambda: talk).trajectories
    assert trajectory.tokens == (50, 3, 100, 101, 60, 60, 60, 100, 101)
    assert trajectory.by_policy == (False, False, True, True, False, False, False, True, True)
    assert trajectory.logprobs == (0, 0, -0.5, -0.5, 0, 0, 0, -0.5, -0.5)
    assert trajectory.versions == (("1.1", 2, 3), ("1.2", 3, 4), ("1.1", 7, 8), ("1.2", 8, 9))
    assert (trajectory.finish_reason, trajectory.turns, trajectory.rewards) == ("stop", 2, {"environment": 1.25})
    assert engine.calls[1]["prompt"] == (1, 2, 50, 3, 100, 101, 60, 60, 60) and talk.seen == ["100 101"] * 2
    assert engine.calls[0]["seed"] != engine.calls[1]["seed"]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(1, 30), st.integers(5, 40), st.integers(1, 6))
def test_budgets_hold(length: int, turns: int, reply: int, max_tokens: int, context: int, max_turns: int) -> None:
    engine = Script(length)
    options = {"max_tokens": max_tokens, "context": context, "max_turns": max_turns}
    (trajectory,) = run(engine, environment=lambda: Talk(turns, reply), **options).trajectories
    assert 0 < sum(trajectory.by_policy) <= max_tokens and len(PROMPT.tokens) - 1 + len(trajectory.tokens) <= context
    assert trajectory.turns == len(engine.calls) <= max_turns
    assert all(call["max_tokens"] >= 1 and len(call["prompt"]) + call["max_tokens"] <= context for call in engine.calls)
    written = [position for position, own in enumerate(trajectory.by_policy) if own]
    assert [position for _, first, end in trajectory.versions for position in range(first, end)] == written
    assert (trajectory.finish_reason == "stop") == (trajectory.rewards["environment"] == 0.25 * (turns - 1) + 1.0)


def test_failures_are_no_trajectories() -> None:
    engine = Script(4, "hang")  # gives up the first request, while the others are still under way
    with pytest.raises(InfrastructureError, match="abort"):
        run(engine, 3)
    assert engine.cancelled == 2
    with pytest.raises(DataError, match="leave no room"):
        run(Script(4), context=3)


@given(st.lists(st.tuples(st.sampled_from(["1.1", "1.2", "2.2"]), st.integers(0, 4))))
def test_streamed_tags_become_spans(tags: list[tuple[str, int]]) -> None:
    expected = [version for version, count in tags for _ in range(count)]
    spans = spans_of(tags)
    assert [version for version, first, end in spans for _ in range(first, end)] == expected
    assert all(end > first for _, first, end in spans) and all(a[2] == b[1] for a, b in pairwise(spans))
