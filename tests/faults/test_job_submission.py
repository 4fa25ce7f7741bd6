"""`ray job submit`: a job that is stopped leaves a checkpoint, and the same command as another job goes on and ends well."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.cluster import Cluster, started
from faults.job import END_S, HOOKS, LOSS, START_S, attempts, resumed_at, values, wait, write_site
from rayft.checkpoint.resume import committed
from rayft.observe.log import read

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

STEPS = 40


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with started(cpus=3) as here:
        yield here


def submitted(client: Any, entrypoint: str, folder: Path) -> str:
    """Submit as the documentation says, from the folder of the configuration; the job's id."""
    return str(client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)}))


def ended(client: Any, job: str) -> str:
    """How it ended."""
    wait(lambda: client.get_job_status(job).is_terminal(), END_S, "the end of the job")
    return str(client.get_job_status(job).value)


def test_a_job_is_stopped_with_a_checkpoint_and_the_next_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    site = write_site(tmp_path / "site", run={"seed": 1, "max_steps": STEPS}, checkpoint={"every": None})
    places = [f"data.{split}.zoo.path={site / f'{split}.jsonl'}" for split in ("train", "eval")]
    settings = ["run.name=job", f"run.dir={tmp_path / 'runs'}", f"model.path={site / 'model'}", f"run.callbacks=[{HOOKS}:slow_steps]"]
    entrypoint = shlex.join([sys.executable, "-m", "rayft", "train", "run.yaml", *places, *settings])
    run_dir, client = tmp_path / "runs" / "job", JobSubmissionClient(cluster.server)

    first = submitted(client, entrypoint, site)

    def at_work() -> bool:
        assert not client.get_job_status(first).is_terminal(), client.get_job_logs(first)
        return (run_dir / "metrics.jsonl").exists() and any(record["step"] >= 3 for record in read(run_dir / "metrics.jsonl"))

    wait(at_work, START_S, "the third step")
    client.stop_job(first)
    assert ended(client, first) == "STOPPED"
    (stopped,) = committed(run_dir)
    log = client.get_job_logs(first)
    assert 3 <= stopped.step < STEPS and f"stopped as asked after step {stopped.step} of {STEPS}, with a checkpoint" in log
    assert not (run_dir / "lease.json").exists()

    second = submitted(client, entrypoint, site)
    assert ended(client, second) == "SUCCEEDED", client.get_job_logs(second)
    assert resumed_at(run_dir) == [0, stopped.step] and attempts(run_dir) == [1, 1]
    assert list(values(run_dir, LOSS)) == list(range(1, STEPS + 1))
    assert committed(run_dir)[-1].step == STEPS and (run_dir / "export" / "model.safetensors").exists()
