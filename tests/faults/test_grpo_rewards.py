"""Rewards that fail: for every twentieth call, which another try mends, and for one row always, which is given up and replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.job import Job
from faults.online import STEPS, assert_all_accounted_for, write_online

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_a_reward_that_raises_one_time_in_twenty(tmp_path: Path) -> None:
    folder = write_online(tmp_path, reward={"functions": {"letters": {"function": "./rewards.py:moody"}}})
    with Job(folder, "moody") as job:
        assert job.end() == 0
    found = assert_all_accounted_for(job.run_dir)
    given_up = job.text().count("a row that no reward can be given for")
    assert len(found.dropped) == given_up // 3 >= 1, "a row is tried three times, then it is given up"
    assert found.failures["reward"] - given_up == job.text().count("one call in twenty") >= STEPS // 2
    assert "reward.functions.letters: raised ValueError on row {'text': 'say " in job.text()
