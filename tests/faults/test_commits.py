"""Slow and failing storage: training goes on beside a slow commit, and a failed one ends the run with a sentence."""

from __future__ import annotations

import statistics
from pathlib import Path
from random import Random

import pytest

from faults.hooks import DELAYED_STEP, FAILING_STEP
from faults.job import LOSS, Job, attempts, exact, resumed_at, train, values
from rayft.checkpoint.resume import COMMITTED, checkpoints_dir, committed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

EVERY = DELAYED_STEP // 2
SLOW = (f"checkpoint.every={EVERY}", f"run.max_steps={5 * EVERY}", "eval.every=null")


def typical(seconds: dict[int, float], steps: range) -> float:
    """The lower quartile, which other programs on the machine disturb least; before and after the slow commit it may differ still."""
    return statistics.quantiles((seconds[step] for step in steps), n=4)[0]


def test_a_commit_delayed_by_20_seconds(site: Path, draw: Random) -> None:
    """Steps keep at least 0.9 of their speed; killed meanwhile, the run resumes from the commit before, also past a later save."""
    step, rank = draw.randint(DELAYED_STEP + EVERY + 5, DELAYED_STEP + EVERY + 20), draw.choice([0, 1])
    with Job(site, "slow", *SLOW, hooks=["note_process", "delay_commit"]) as job:
        job.wait_for_step(step)
        job.kill(job.worker(rank))
        assert [restored.step for restored in committed(job.run_dir)] == [EVERY], "the commit was not delayed until the kill"
        before, seconds, staged = (values(job.run_dir, name) for name in (LOSS, "perf/step_s", "checkpoint/stage_s"))
        assert job.end() == 0
        assert len(job.killed) == 1
    after = values(job.run_dir, "perf/step_s")
    same = range(DELAYED_STEP + 1, step)
    usual = max(typical(seconds, range(EVERY + 1, DELAYED_STEP)), typical(after, same))
    meanwhile = typical(seconds, same)
    assert usual / meanwhile >= 0.9, f"a step took {usual:.3f} s without the slow commit and {meanwhile:.3f} s beside it"
    assert max(seconds[at] for at in same) < 2.0, "a step waited for the slow commit"
    assert list(staged) == [EVERY, DELAYED_STEP, DELAYED_STEP + EVERY]
    assert max(staged.values()) < 1.0, "a save waited for the slow commit"
    assert attempts(job.run_dir) == [2, 2] and resumed_at(job.run_dir) == [0, EVERY]
    losses = values(job.run_dir, LOSS)
    assert list(losses) == list(range(1, 5 * EVERY + 1))
    assert exact({at: losses[at] for at in before}) == exact(before)
    assert committed(job.run_dir)[-1].step == 5 * EVERY


def test_a_commit_that_a_callback_refuses(site: Path) -> None:
    """What a callback raises is the user's answer: no restart."""
    with Job(site, "refused", hooks=["refuse_commit"]) as job:
        assert job.end() == 5
    sentence = f"hooks.py:refuse_commit': raised ValueError at checkpoint_committing of step {FAILING_STEP}: this checkpoint is refused."
    assert "error (training): run.callbacks = " in job.text() and sentence in job.text()
    assert attempts(job.run_dir) == [2]
    assert not list(Path(checkpoints_dir(job.run_dir)).glob(f"step-{FAILING_STEP:08d}-*/{COMMITTED}"))


def test_a_full_disk(site: Path, undisturbed: Path) -> None:
    """Storage may come back, so it is tried again; then the command ends, and works once there is room."""
    with Job(site, "full", "run.max_failures=1", hooks=["fill_disk"]) as job:
        assert job.end() == 6
    assert "could not be written" in job.text() and "error (infrastructure): run.max_failures = 1" in job.text()
    assert committed(job.run_dir)[-1].step == FAILING_STEP - 5
    run_dir = train(site, "full", "run.max_failures=1")
    assert attempts(run_dir) == [2, 2, 2] and resumed_at(run_dir) == [0, 5, 5]
    assert exact(values(run_dir, LOSS)) == exact(values(undisturbed, LOSS))
