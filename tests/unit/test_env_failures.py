"""What becomes of a group whose environment fails, and what rewards read of answers with one."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rayft.actors.groups import Groups
from rayft.actors.journal import Journal
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.experience.admission import Limits
from rayft.experience.algorithm import weighing_of
from rayft.experience.judge import Judge, reward_functions
from rayft.experience.pack import build, plan
from rayft.experience.summary import of_batch
from rayft.rollout.env import EnvironmentFailed
from rayft.types import Group, Prompt, Scored, Trajectory
from tiny import tiny_tokenizer

ENVIRONMENT = ["environment.function=rayft.rollout.environments.guess:Guess", "environment.weight=0.5"]


def run_of(folder: Path, *overrides: str) -> GrpoRun:
    base = ["method=grpo", "run.name=a", f"model.path={folder / 'model'}", "data.train.a.path=x", "rollout.prompts_per_step=1"]
    cfg = load([], [*base, *ENVIRONMENT, *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


class Prompts:
    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(f"0-{ordinal}", ordinal, (1, 2), {})


class Unlucky:
    """A pool whose environments fail so many times for each prompt of an even number."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, list[str]()

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        self.asked.append(prompt.key)
        if prompt.row_id % 2 == 0 and self.asked.count(prompt.key) <= self.failures:
            raise EnvironmentFailed("environment", None, f"prompt {prompt.key}: step raised OSError: gone", "Look")
        return "d-engine-0", "group"

    async def score(self, group: str) -> Scored:
        return Scored("k", {}, (0.0, 1.0), (1, 1), (3, 3), (False, False), 0, 0, (1, 1))


@pytest.mark.parametrize(("failures", "dropped"), [(2, 0), (3, 1)])
def test_a_group_is_asked_for_again_and_then_its_prompt_is_dropped(tmp_path: Path, failures: int, dropped: int) -> None:
    limits = Limits(groups=1, staleness=0, steps=9, restarts=2, rescores=0)
    journal = Journal(tmp_path / "journal.jsonl", limits, "d", 0)
    pool: Any = Unlucky(failures)

    async def play() -> Groups:
        prompts: Any = Prompts()
        groups = Groups(run_of(tmp_path, "rollout.restarts=2"), journal, pool, prompts, lambda: groups.start_all())
        journal.add("pushed", step=0)
        groups.start_all()
        while not groups.answers:
            assert groups.fatal is None
            await asyncio.sleep(0)
        return groups

    groups = asyncio.run(play())
    assert pool.asked == ["0-0"] * 3 + ["0-1"] * dropped and list(groups.answers) == [dropped]
    assert dict(journal.state.counts) == ({"restarted": 2, "dropped": 1} if dropped else {"restarted": 2})
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["why"] for line in lines if line.get("event") == "failed"] == ["environment"] * failures


def conversation(tokenizer: Any, reward: float, truncated: bool = False) -> Trajectory:
    """The policy says "four", reads "is it two?", says "the"."""
    parts = [(True, "four<|im_end|>"), (False, " is it two?"), (True, "the<|im_end|>")]
    tokens = [(own, token) for own, text in parts for token in tokenizer.encode(text, add_special_tokens=False)]
    own = tuple(by for by, _ in tokens)
    edges = [0, *(place for place in range(1, len(own)) if own[place] != own[place - 1]), len(own)]
    spans = tuple(("1.0", start, end) for start, end in itertools.pairwise(edges) if own[start])
    logprobs = tuple(-0.5 if by else 0.0 for by in own)
    reason = "length" if truncated else "stop"
    return Trajectory(tuple(token for _, token in tokens), own, logprobs, spans, reason, 2, {"environment": reward})


REWARD = """
def words(prompt, completion, row):
    assert completion == "four\\nthe", completion
    return 2.0
"""


@pytest.mark.parametrize("advantage", ["group_mean", "gdpo"])
def test_rewards_read_the_policy_and_only_its_tokens_are_trained(tmp_path: Path, advantage: str) -> None:
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARD)
    cfg = run_of(tmp_path, f"reward.functions.words.function={tmp_path}/rewards.py:words", f"algorithm.advantage={advantage}")
    judge = Judge(cfg, reward_functions(cfg))
    group = Group(Prompt("0-1", 1, (5, 6), {}), tuple(conversation(judge._tokenizer, reward) for reward in (1.0, -1.0)))
    scored = asyncio.run(judge.score(group))
    assert scored.rewards == {"words": (2.0, 2.0), "environment": (1.0, -1.0)} and scored.total == (2.5, 1.5) and scored.turns == (2, 2)
    values = of_batch([scored], 0)
    assert values["rollout/turns"] == 2.0 and values["reward/part/environment"] == 0.0
    (update,) = plan([scored], weighing_of(cfg), budget=256, world=1, updates=1)
    (answers,) = update.micro[0]
    batch = build(answers, {0: group}, budget=256, documents=update.documents, step=0)
    own = [place + 2 for place, by in enumerate(group.trajectories[0].by_policy) if by]
    size, trained = scored.sizes[0], batch.trained.tolist()
    assert trained == [start + place - 1 for start in (0, size) for place in own]
    assert batch.rollout_logprobs is not None and batch.advantages is not None
    assert all(batch.rollout_logprobs[place] == -0.5 for place in trained) and float(batch.rollout_logprobs.sum()) == -0.5 * len(trained)
    first, second = batch.advantages[trained[0]].item(), batch.advantages[trained[-1]].item()
    assert first == pytest.approx(-second) and first > 0
    assert update.divisor == (2.0 if batch.loss_weights.sum() == pytest.approx(2.0) else len(trained))
