"""An online run that is asked to save or stop, tells its callbacks, ends when the held-out reward no longer rises, and keeps its best."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from faults.job import LOSS, Job, exact, resumed_at, train, values, wait
from faults.online import STEPS, write_online
from rayft.checkpoint.resume import best, committed
from rayft.observe.log import read
from rayft.train.requests import SAVE_NOW

pytestmark = pytest.mark.timeout(600)

HOOKS = ("slow_steps", "note_events")
REWARDS = """
def letters(prompt, completion, row):
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)

def same(prompt, completion, row):
    return 1.0
"""
TRACKED = ["trackers.names=[tensorboard]"]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny site with held-out prompts."""
    folder = tmp_path_factory.mktemp("control")
    held_out = {"words": {"path": "train.jsonl", "format": "text", "limit": 3}}
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": {"words": {"path": "train.jsonl", "format": "text"}}, "eval": held_out},
        "eval": {"every": 2},
    }
    write_online(folder, **sections)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def events(run_dir: Path) -> list[tuple[str, int]]:
    """(event, step) of rank 0, in order."""
    return [tuple(json.loads(line)) for line in (run_dir / "events-0.jsonl").read_text().splitlines()]


def test_it_saves_and_stops_when_asked_and_the_same_command_goes_on(online: Path) -> None:
    pytest.importorskip("tensorboard")
    with Job(online, "asked", "checkpoint.every=null", *TRACKED, hooks=HOOKS) as job:
        job.wait_for_step(2)
        (job.run_dir / SAVE_NOW).touch()
        wait(lambda: bool(committed(job.run_dir)), 60, "the checkpoint")
        os.kill(job.driver.pid, signal.SIGTERM)
        assert job.end() == 143
        step = committed(job.run_dir)[-1].step
        assert f"stopped as asked after step {step} of {STEPS}, with a checkpoint" in job.text()
    assert list(values(job.run_dir, LOSS))[-1] == step < STEPS and not (job.run_dir / SAVE_NOW).exists()
    assert not (job.run_dir / "export").exists()

    run_dir = train(online, "asked", "checkpoint.every=null", *TRACKED, hooks=HOOKS)
    assert resumed_at(run_dir) == [0, step] and list(values(run_dir, LOSS)) == list(range(1, STEPS + 1))
    assert list(values(run_dir, "eval/reward")) == [2, 4, 6, 8, 10, 12]
    assert (run_dir / "export" / "model.safetensors").exists()
    told = events(run_dir)
    count = Counter(name for name, _ in told)
    assert count["train_start"] == count["train_end"] == 2 and told[0] == ("train_start", 0) and told[-1] == ("train_end", STEPS)
    for name in ("step_end", "logged", "sampled"):
        assert [one for event, one in told if event == name] == list(range(1, STEPS + 1)), name
    assert {one for event, one in told if event == "evaluated"} == {2, 4, 6, 8, 10, 12}
    assert {found.step for found in committed(run_dir)} <= {one for event, one in told if event == "checkpoint_committing"}
    sent = json.loads((run_dir / "trackers.json").read_text())["tensorboard"]["sent"]
    assert {"train/loss", "reward/mean", "eval/reward"} <= sent.keys() and list((run_dir / "trackers").rglob("events.*"))


def test_it_ends_when_the_reward_no_longer_rises_and_keeps_the_best(online: Path) -> None:
    """Every answer is worth the same, so the first evaluation stays the best; the third one is known when step 7 is asked for."""
    same = "reward.functions.letters.function=./rewards.py:same"
    control = ["eval.patience=2", "checkpoint.keep_best=true", "checkpoint.every=null", same]
    run_dir = train(online, "early", *control)
    assert list(values(run_dir, "eval/reward").items()) == [(2, 1.0), (4, 1.0), (6, 1.0)]
    assert [found.step for found in committed(run_dir)] == [2, 6, 7] and list(values(run_dir, LOSS))[-1] == 7
    found = best(run_dir)
    assert found is not None and found.step == 2 and json.loads((run_dir / "best.json").read_text()) == {"step": 2, "eval/reward": 1.0}
    assert (run_dir / "export" / "model.safetensors").exists()
    losses, records = exact(values(run_dir, LOSS)), read(run_dir / "metrics.jsonl")
    train(online, "early", *control)
    assert exact(values(run_dir, LOSS)) == losses and read(run_dir / "metrics.jsonl") == records, "it ended once, so nothing runs again"
