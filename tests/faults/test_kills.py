"""kill -9, from outside and at a random step, of every process that a run depends on. The run ends as if nothing had happened."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from faults.conftest import EPOCH_STEPS, ROWS, STEPS
from faults.job import LOSS, Job, attempts, exact, resumed_at, shard_rows, trained_rows, values, wait
from rayft.checkpoint.resume import committed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

HOOKS = ("note_process", "slow_steps", "record_rows")


def assert_equals(run_dir: Path, undisturbed: Path) -> None:
    """Losses and evaluations bit by bit, each step once; the same rows; the same export."""
    for name in (LOSS, "eval/loss", "train/grad_norm"):
        assert exact(values(run_dir, name)) == exact(values(undisturbed, name))
    assert trained_rows(run_dir) == trained_rows(undisturbed)
    assert [restored.step for restored in committed(run_dir)] == [20, STEPS], "old checkpoints are left"
    assert (run_dir / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()


def assert_resumed(run_dir: Path, killed_at: list[int], lived_on: int = 2) -> None:
    """Each start went on from a checkpoint: at most an interval before the kill, or of the steps that were done until it took effect."""
    first, *later = resumed_at(run_dir)
    assert first == 0
    for step, at in zip(later, killed_at, strict=True):
        assert step % 5 == 0 and max(5, at - 6) <= step <= min(at + lived_on, STEPS - 1), f"killed at step {at}, resumed at {step}"


def test_the_undisturbed_run_is_whole(site: Path, undisturbed: Path) -> None:
    """Every step and due evaluation once, every row once in an epoch, in another order in the next."""
    losses = values(undisturbed, LOSS)
    assert list(losses) == list(range(1, STEPS + 1)) and all(loss > 0 for loss in losses.values())
    assert list(values(undisturbed, "eval/loss")) == [10, 20, STEPS]
    assert attempts(undisturbed) == [2]
    rows = trained_rows(undisturbed)
    assert list(rows) == list(range(ROWS))
    order, epoch = list(rows.values()), EPOCH_STEPS * 4
    first, second = order[:epoch], order[epoch : 2 * epoch]
    assert Counter(first) == Counter(second) == Counter(shard_rows(site))
    assert first != second


def test_both_workers(site: Path, undisturbed: Path, draw: Random) -> None:
    """One after the other. The second death is one more than allowed, which ends the command; the same command again resumes."""
    ranks, steps = draw.sample([0, 1], 2), [draw.randint(7, 12), draw.randint(14, 20)]
    overrides = ("run.max_failures=1",)
    with Job(site, "workers", *overrides, hooks=HOOKS) as job:
        for attempt, (rank, step) in enumerate(zip(ranks, steps, strict=True), start=1):
            job.wait_for_step(step, attempt)
            job.kill(job.worker(rank))
        assert job.end() == 6
        assert len(set(job.killed)) == 2
        assert "error (infrastructure): run.max_failures = 1" in job.text()
    with Job(site, "workers", *overrides, hooks=HOOKS) as job:
        assert job.end() == 0
    assert attempts(job.run_dir) == [2, 2, 2]
    assert_resumed(job.run_dir, steps)
    assert_equals(job.run_dir, undisturbed)


@pytest.mark.parametrize("title", ["TrainController", "SynchronizationActor"])
def test_an_actor_of_ray_train(site: Path, undisturbed: Path, draw: Random, title: str) -> None:
    step = draw.randint(7, 18)
    with Job(site, title, hooks=HOOKS) as job:
        job.wait_for_step(step)
        job.kill(job.actor(title))
        assert job.end() == 0
        assert len(job.killed) == 1
    assert attempts(job.run_dir) == [2, 2]
    assert_resumed(job.run_dir, [step])
    assert_equals(job.run_dir, undisturbed)


def test_the_driver(site: Path, undisturbed: Path, draw: Random) -> None:
    """While it lives, a second one is refused; once it is dead, the same command may start at once.

    The orphaned workers live on for some 3 s and 15 steps, and may commit a checkpoint after the kill.
    """
    step = draw.randint(6, 8)
    with Job(site, "driver", hooks=HOOKS) as first:
        wait((first.run_dir / "lease.json").exists, 60, "the lease")
        with Job(site, "driver", hooks=HOOKS) as second:
            assert second.end() == 6
            assert f"is in use by rayft on {first.host}, process {first.driver.pid}" in second.text()
        first.wait_for_step(step)
        first.kill(first.driver.pid)
        with Job(site, "driver", hooks=HOOKS) as third:
            assert third.end() == 0
        first.gone()
        assert first.killed == [first.driver.pid]
    assert attempts(third.run_dir) == [2, 2]
    assert_resumed(third.run_dir, [step], lived_on=15)
    assert_equals(third.run_dir, undisturbed)
