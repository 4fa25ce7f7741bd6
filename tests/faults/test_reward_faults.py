"""Processes that score are killed in the middle of a run: their questions are asked again, and no prompt is lost or scored otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from faults.job import Job, exact, train, values
from faults.online import STEPS, assert_all_accounted_for, write_online
from rayft.rewards.sandbox import refusal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

CODE = """
from rayft.rewards import code

def solves(prompt, completion, row):
    program = "print(7)" if row["n"] % 2 else "import os; os.kill(-1, 9)"
    return code.reward(prompt, f"```python\\n{program}\\n```", {"tests": [{"input": "", "output": "7"}]}) + len(completion) / 1000
"""


@pytest.fixture
def online(tmp_path: Path) -> Path:
    """A run that a reward model of one process scores, beside a function."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    model = {"model": {"path": "judge", "gpus": 0}, "weight": 0.5}
    folder = write_online(tmp_path, reward={"functions": {"letters": {"function": "./rewards.py:letters"}, "model": model}})
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "judge")
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "judge")
    return folder


def test_a_reward_model_that_is_killed_comes_back_and_says_the_same(online: Path) -> None:
    calm = train(online, "calm")
    with Job(online, "killed") as job:
        job.wait_for_step(Random().randint(2, STEPS - 4))
        first = job.actor("RewardModelActor")
        job.kill(first)
        assert job.end() == 0
    found = assert_all_accounted_for(job.run_dir)
    assert not found.failures, "the group was scored by the model that came back"
    assert re.search(r"reward-model-0 died \(\w+\); its chats are scored again", job.text())
    assert exact(values(job.run_dir, "reward/mean")) == exact(values(calm, "reward/mean"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("path=model", "model.path = '"),
        ("gpus=1.0", "reward.functions.model.model.gpus = 1.0: brings the run to 1 GPUs, the cluster has 0."),
        ("replicas=9", "reward.functions.model.model.replicas = 9: brings the run to "),
    ],
)
def test_a_model_that_cannot_be_had_ends_the_command(online: Path, override: str, sentence: str) -> None:
    with Job(online, "none", f"reward.functions.model.model.{override}") as job:
        assert job.end() != 0
    assert sentence in job.text() and not (job.run_dir / "metrics.jsonl").exists()


@pytest.mark.skipif(refusal() is not None, reason=f"programs cannot be isolated: {refusal()}")
def test_code_that_kills_whatever_it_can_reaches_nothing(tmp_path: Path) -> None:
    folder = write_online(tmp_path, reward={"functions": {"solves": {"function": "./code.py:solves"}}})
    (folder / "code.py").write_text(CODE)
    with Job(folder, "code") as job:
        assert job.end() == 0
    found = assert_all_accounted_for(job.run_dir)
    assert not found.failures
    means = values(job.run_dir, "reward/mean").values()
    assert all(min(abs(mean - third / 3) for third in range(4)) < 0.2 for mean in means) and max(means) > 0.3
