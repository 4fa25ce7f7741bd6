"""An online run whose directory is on an object store: a killed driver loses nothing of what the last checkpoint covers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.cluster import joined, started
from faults.job import LOSS, Job, resumed_at, values, wait
from faults.online import EVERY, GROUPS, write_online
from rayft.checkpoint import resume
from rayft.data import store
from s3_server import S3, reached, serve

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

STEPS = 8
AGREES = 1e-4
"""Between log-probabilities of trainer and engine, both float32, when they hold the same weights."""
SOURCE = """
def picky(prompt, completion, row):
    return letters(prompt, completion, row) if row["n"] % 3 else 0.0
"""
PICKY = {"functions": {"letters": {"function": "./rewards.py:picky"}}}
RUN = "s3://bucket/runs/far"


@pytest.fixture
def s3() -> Iterator[S3]:
    """The store, and a cluster to join whose processes were started without its credentials."""
    with started(cpus=3) as cluster, serve() as endpoint, reached(endpoint, retry_s=20.0, request_s=5.0), joined(cluster):
        yield endpoint


def test_the_driver_is_killed_and_another_one_goes_on(s3: S3, tmp_path: Path) -> None:
    """A third of the groups is filtered, so which prompts a step has follows from the journal alone."""
    site = write_online(tmp_path / "site", run={"max_steps": STEPS}, algorithm={"filter": "zero_variance"}, reward=PICKY)
    with (site / "rewards.py").open("a") as file:
        file.write(SOURCE)
    with Job(site, "far", "run.dir=s3://bucket/runs", hooks=["slow_steps"]) as job:
        wait(lambda: job.driver.poll() is not None or resume.newest(RUN) is not None, 120, "a checkpoint")
        assert set(batches(lines())) >= set(range(EVERY)), "the journal came after its checkpoint"
        job.kill(job.driver.pid)
    store.delete(f"{RUN}/lease.json")  # which would have ended by itself
    with Job(site, "far", "run.dir=s3://bucket/runs") as job:
        assert job.end() == 0

    store.fetch(f"{RUN}/metrics.jsonl", tmp_path / "metrics.jsonl")
    assert resumed_at(tmp_path) == [0, EVERY] and list(values(tmp_path, LOSS)) == list(range(1, STEPS + 1))
    filtered = {line["ordinal"] for line in lines() if line.get("event") == "scored" and not line["kept"]}
    used = [ordinal for _, batch in sorted(batches(lines()).items()) for ordinal in batch]
    assert len(used) == STEPS * GROUPS and used == [ordinal for ordinal in range(used[-1] + 1) if ordinal not in filtered]
    assert values(tmp_path, "rollout/filtered")[STEPS] == sum(ordinal < used[-1] for ordinal in filtered) > 0
    assert max(values(tmp_path, "train/rollout_logprob_difference").values()) < AGREES
    assert not (site / "runs" / "far").exists()


def lines() -> list[dict[str, Any]]:
    """Of the journal on the store."""
    return [json.loads(line) for line in store.read(f"{RUN}/journal.jsonl").splitlines()]


def batches(journal: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Step -> ordinals of its groups, as they were handed out last."""
    return {line["step"]: line["ordinals"] for line in journal if line.get("event") == "consumed"}
