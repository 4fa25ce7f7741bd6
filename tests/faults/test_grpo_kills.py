"""kill -9 of an engine, the controller and a trainer's worker of an online run, each while groups are under way.

On-policy, with engines and rewards that are functions of weights and seeds, the run must go on as if nothing had happened.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from faults.job import LOSS, Job, draw_numbers, exact, relative, resumed_at, train, values
from rayft.checkpoint.resume import newest
from rayft.models.tiny import write_tiny_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

HOOKS = ("note_process", "slow_steps")
STEPS, EVERY, WORDS = 12, 4, ("red", "green", "blue", "black", "white")
REWARDS = """
def letters(prompt, completion, row):
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)
"""
NOISE = 1e-5
"""What another batch of requests may change in an engine's sums."""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, a reward and run.yaml."""
    folder = tmp_path_factory.mktemp("online")
    write_tiny_model(folder / "model", WORDS, vocab_size=300, hidden_size=64, layers=1)
    rows = [{"text": f"say {WORDS[n % 5]} {n}", "word": WORDS[n % 5]} for n in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    run: dict[str, Any] = {
        "method": "grpo",
        "run": {"seed": 1, "max_steps": STEPS, "deadline_s": 120.0},
        "model": {"path": "model", "init": "random"},
        "data": {"train": {"words": {"path": "train.jsonl", "format": "text"}}},
        "rollout": {
            "engine": "local",
            "prompts_per_step": 3,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_tokens": 16,
            "max_staleness": 0,
        },
        "reward": {"functions": {"letters": {"function": "./rewards.py:letters"}}},
        "optim": {"lr": 1e-3},
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": EVERY},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def calm(online: Path) -> Path:
    """Directory of a run that nothing happened to."""
    return train(online, "calm")


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str]) -> Random:
    """Random numbers whose seed is printed."""
    return draw_numbers(capsys)


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the journal."""
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


def assert_whole(run_dir: Path, calm: Path) -> None:
    """Every step once, the same batches, the same losses up to noise, the end reached."""
    assert list(values(run_dir, LOSS)) == list(range(1, STEPS + 1))
    batches = [{line["step"]: line["ordinals"] for line in journal(one) if line.get("event") == "consumed"} for one in (run_dir, calm)]
    assert batches[0] == batches[1]
    assert relative(values(run_dir, "reward/mean"), values(calm, "reward/mean")) <= NOISE
    assert set(values(run_dir, "staleness/max").values()) == {0.0}
    checkpoint = newest(run_dir)
    assert checkpoint is not None and checkpoint.step == STEPS and (run_dir / "export" / "model.safetensors").exists()


def test_an_engine_in_the_middle_of_its_answers(online: Path, calm: Path, draw: Random) -> None:
    """It comes back, is brought to the current weights, and answers again; the trainer never notices but for the wait."""
    with Job(online, "engine", hooks=HOOKS) as job:
        job.wait_for_step(draw.randint(3, 8))
        job.kill(job.actor("EngineActor"))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0], "the trainer was not restarted"
    assert_whole(job.run_dir, calm)


def test_the_controller(online: Path, calm: Path, draw: Random) -> None:
    """Its journal brings the state back; what was under way is asked for again."""
    with Job(online, "controller", hooks=HOOKS) as job:
        job.wait_for_step(draw.randint(3, 8))
        job.kill(job.actor("Controller"))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0]
    assert [line["event"] for line in journal(job.run_dir) if line.get("event") == "controller_restarted"] == ["controller_restarted"]
    assert_whole(job.run_dir, calm)


def test_a_worker_gets_the_same_batches_again(online: Path, calm: Path, draw: Random) -> None:
    """The steps since the checkpoint are trained again on the very groups that they had, bit by bit."""
    step = draw.randint(EVERY + 1, 2 * EVERY - 1)
    with Job(online, "worker", hooks=HOOKS) as job:
        job.wait_for_step(step)
        job.kill(job.worker(0))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0, EVERY]
    events = journal(job.run_dir)
    assert not [line for line in events if line.get("event") == "lost"], "no group was made again"
    assert exact(values(job.run_dir, "reward/mean")) == exact(values(calm, "reward/mean"))
    assert_whole(job.run_dir, calm)
