"""Engines come and go by command while an on-policy run trains on, and it is the run that it would have been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from faults.job import LOSS, START_S, Job, relative, resumed_at, train, values, wait
from faults.online import EVERY, assert_all_accounted_for, fates, journal, write_online
from rayft.actors.engine_requests import ANSWER, REQUEST

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

SLOWLY = f"run.callbacks=[{Path(__file__).with_name('elastic_hooks.py')}:hold_steps]"
NOISE, AGREES = 1e-5, 1e-4
"""What another batch of requests may change in an engine's sums; and a dozen steps in what is trained on them."""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, rewards and run.yaml."""
    return write_online(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def calm(online: Path) -> Path:
    """Directory of a run that nothing happened to."""
    return train(online, "calm")


def ask(job: Job, engines: int) -> tuple[int, str]:
    """Ask from another process for so many engines; exit code and what was printed."""
    command = [sys.executable, "-m", "rayft", "engines", "run.yaml", f"run.name={job.run_dir.name}", "--count", str(engines)]
    done = subprocess.run(command, cwd=job.run_dir.parent.parent, capture_output=True, text=True, timeout=START_S)
    return done.returncode, done.stdout + done.stderr


def actors(job: Job) -> int:
    """Engines that live."""
    return sum(title.startswith("ray::EngineActor") for title in job.processes().values())


def serving(run_dir: Path) -> Mapping[int, float]:
    """Step -> engines that served when its batch was taken."""
    return values(run_dir, "rollout/engines")


def assert_as_calm(run_dir: Path, calm: Path) -> None:
    """Every step once, on the same batches, with the same losses up to noise; every prompt accounted for and the bound held."""
    found = assert_all_accounted_for(run_dir)
    assert found.batches == fates(calm).batches and not found.dropped
    loss, reference = values(run_dir, LOSS), values(calm, LOSS)
    assert list(loss) == list(reference) and max(abs(loss[step] - reference[step]) for step in loss) <= AGREES
    assert relative(values(run_dir, "train/grad_norm"), values(calm, "train/grad_norm")) <= AGREES, "on-policy losses are near 0 anyway"
    assert relative(values(run_dir, "reward/mean"), values(calm, "reward/mean")) <= NOISE
    assert set(values(run_dir, "staleness/max").values()) == {0.0}
    assert max(values(run_dir, "train/rollout_logprob_difference").values()) < AGREES, "no token came from other weights than the trainer's"


def test_one_three_one(online: Path, calm: Path) -> None:
    """Also refused: more than fit beside the trainer, and a run that is over. Neither changes anything."""
    with Job(online, "elastic", SLOWLY, "run.max_failures=0") as job:
        job.wait_for_step(2)
        code, said = ask(job, 9)
        assert code == 4 and "engines = 9: need" in said and "kept for the trainer" in said
        assert actors(job) == 1
        code, said = ask(job, 3)
        assert code == 0 and "engines: 3, before: 1" in said and actors(job) == 3
        (job.run_dir / "grown").touch()
        wait(lambda: 3.0 in serving(job.run_dir).values(), START_S, "three engines that serve")
        code, said = ask(job, 1)
        assert code == 0 and "engines: 1, before: 3" in said
        wait(lambda: actors(job) == 1, START_S, "the end of two engines")
        (job.run_dir / "shrunk").touch()
        assert job.end() == 0
        code, said = ask(job, 2)
        assert code == 6 and "no run is under way there" in said
    assert resumed_at(job.run_dir) == [0], "the trainer was not restarted"
    found = serving(job.run_dir)
    assert found[1] == found[12] == 1.0 and 3.0 in found.values()
    assert [len(line["engines"]) for line in journal(job.run_dir) if "engines" in line][-2:] == [3, 1]
    assert not (job.run_dir / REQUEST).exists() and not (job.run_dir / ANSWER).exists()
    assert not fates(job.run_dir).failures, "an engine that left took groups with it"
    assert_as_calm(job.run_dir, calm)


def test_the_pool_outlives_controller_and_trainer(online: Path, calm: Path) -> None:
    """A controller that is restarted knows the engine that was added, and a trainer that is restarted pushes to it."""
    with Job(online, "outlives", SLOWLY) as job:
        job.wait_for_step(1)
        assert ask(job, 2)[0] == 0
        (job.run_dir / "grown").touch()
        wait(lambda: 2.0 in serving(job.run_dir).values(), START_S, "two engines that serve")
        job.kill(job.actor("Controller"))
        job.wait_for_step(2 * EVERY + 1)
        job.kill(job.worker(0))
        (job.run_dir / "shrunk").touch()
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0, 2 * EVERY] and serving(job.run_dir)[12] == 2.0
    assert_as_calm(job.run_dir, calm)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a running cluster with room for a trainer and one engine, which runs find."""
    import ray

    # `ray start` notes the cluster in its folder, and in the usual one every later ray.init() of this machine would join it.
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.shutdown()
    address = str(ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder).address_info["gcs_address"])
    monkeypatch.setenv("RAY_ADDRESS", address)
    try:
        yield address
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_is_gone_with_its_engine(online: Path, calm: Path, cluster: str) -> None:
    """Nothing waits for it: the other engine serves, and the lost one is given up."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster, "--num-cpus", "1", "--block"]
    with Job(online, "gone", SLOWLY, "run.max_failures=0") as job:
        job.wait_for_step(1)
        code, said = ask(job, 2)
        assert code == 4 and "need 1 CPUs more than there are" in said
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            wait(lambda: ask(job, 2)[0] == 0, START_S, "an engine on the new node")
            (job.run_dir / "grown").touch()
            wait(lambda: 2.0 in serving(job.run_dir).values(), START_S, "two engines that serve")
        finally:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait(30)
        wait(lambda: "the trainer needs their place" in job.text(), START_S, "an engine to be given up")
        (job.run_dir / "shrunk").touch()
        assert job.end() == 0
    assert resumed_at(job.run_dir) == [0] and serving(job.run_dir)[12] == 1.0
    assert [len(line["engines"]) for line in journal(job.run_dir) if "engines" in line][-2:] == [2, 1]
    assert_as_calm(job.run_dir, calm)
