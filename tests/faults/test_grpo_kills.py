"""kill -9 of every process of an online run, and a hang, each while groups are under way.

On-policy, with engines and rewards that are functions of weights and seeds, the run must go on as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from random import Random

import pytest

from faults.job import DIE_S, LOSS, Job, attempts, draw_numbers, exact, relative, resumed_at, train, values, wait
from faults.online import EVERY, STEPS, assert_all_accounted_for, fates, journal, wait_for_event, write_online
from rayft.checkpoint.resume import newest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

HOOKS = ("note_process", "slow_steps")
NOISE = 1e-5
"""What another batch of requests may change in an engine's sums."""
AGREES = 1e-4
"""Between log-probabilities of trainer and engine, both float32, when they hold the same weights."""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, rewards and run.yaml."""
    return write_online(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def calm(online: Path) -> Path:
    """Directory of a run that nothing happened to."""
    return train(online, "calm")


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str]) -> Random:
    """Random numbers whose seed is printed."""
    return draw_numbers(capsys)


def assert_whole(run_dir: Path, calm: Path) -> None:
    """Every step once, the same batches, the same rewards up to noise, every prompt accounted for, the end reached."""
    found = assert_all_accounted_for(run_dir)
    assert found.batches == fates(calm).batches and not found.dropped
    assert relative(values(run_dir, "reward/mean"), values(calm, "reward/mean")) <= NOISE
    assert set(values(run_dir, "staleness/max").values()) == {0.0}
    assert max(values(run_dir, "train/rollout_logprob_difference").values()) < AGREES, "no token came from other weights than the trainer's"
    checkpoint = newest(run_dir)
    assert checkpoint is not None and checkpoint.step == STEPS and (run_dir / "export" / "model.safetensors").exists()


def test_an_engine_in_the_middle_of_its_answers(online: Path, calm: Path, draw: Random) -> None:
    """It comes back, is brought to the current weights, and answers again; the trainer never notices but for the wait."""
    with Job(online, "engine", hooks=HOOKS) as job:
        wait_for_event(job, draw.randint(3, 8), "started")
        job.kill(job.actor("EngineActor"))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0], "the trainer was not restarted"
    assert fates(job.run_dir).failures["process"] >= 1, "no answer was under way"
    assert "Ray restarts it" in job.text() or "died (" in job.text()
    assert_whole(job.run_dir, calm)


def test_an_engine_that_hangs(online: Path, calm: Path, draw: Random) -> None:
    """Stopped, it answers nothing and holds its groups: it is found by the deadline of its state, ended, and made anew."""
    with Job(online, "hang", "rollout.health_s=4", hooks=HOOKS) as job:
        wait_for_event(job, draw.randint(3, 8), "started")
        pid = job.actor("EngineActor")
        os.kill(pid, signal.SIGSTOP)
        wait(lambda: pid not in job.processes(), 4 + 2 * DIE_S, "the end of the engine that hangs")
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0]
    assert "did not answer in time and is restarted" in job.text()
    assert_whole(job.run_dir, calm)


def test_a_judge(online: Path, calm: Path, draw: Random) -> None:
    """The groups that it was scoring are scored by its successor."""
    slowly = "reward.functions.letters.function=./rewards.py:slowly"
    with Job(online, "judge", slowly, hooks=HOOKS) as job:
        wait_for_event(job, draw.randint(3, 8), "finished")
        job.kill(job.actor("RewardActor"))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0] and fates(job.run_dir).failures["reward"] >= 1
    assert "the process that rewards run in died" in job.text()
    assert_whole(job.run_dir, calm)


def test_the_controller(online: Path, calm: Path, draw: Random) -> None:
    """Its journal brings the state back; what was under way is asked for again."""
    with Job(online, "controller", hooks=HOOKS) as job:
        wait_for_event(job, draw.randint(3, 8), "started")
        job.kill(job.actor("Controller"))
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0]
    assert sum(line.get("event") == "controller_restarted" for line in journal(job.run_dir)) == 1
    assert "the controller died and was restarted" in job.text()
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
    assert "attempt 1 died" in job.text() and "starting again from the newest checkpoint" in job.text()
    assert_whole(job.run_dir, calm)


def test_the_controller_of_ray_train(online: Path, calm: Path, draw: Random) -> None:
    """Its workers die with it; engines, judges and the run's own controller are not its, and stay."""
    step = draw.randint(EVERY + 1, 2 * EVERY - 1)
    with Job(online, "ray-train", hooks=HOOKS) as job:
        job.wait_for_step(step)
        engine = job.actor("EngineActor")
        job.kill(job.actor("TrainController"))
        job.wait_for_step(step, attempt=2)
        assert job.actor("EngineActor") == engine
        assert job.end() == 0
    assert attempts(job.run_dir) == [1, 1] and resumed_at(job.run_dir) == [0, EVERY]
    assert "Ray Train's controller died" in job.text()
    assert list(values(job.run_dir, LOSS)) == list(values(calm, LOSS))
    assert_whole(job.run_dir, calm)
