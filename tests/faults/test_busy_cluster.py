"""A cluster whose CPUs somebody else holds: a run waits, says for what, and ends when that takes too long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.cluster import Cluster, held, joined, started
from faults.job import LOSS, Job, attempts, values, wait, write_site

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(cpus=3) as here, joined(here):
        yield here


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(tmp_path_factory.mktemp("site"), run={"seed": 1, "max_steps": 3})


def test_packing_that_finds_no_room_ends_the_run(cluster: Cluster, site: Path) -> None:
    with held(cluster, 3), Job(site, "packs", "run.start_s=10") as job:
        assert job.end() == 4
        text = job.text()
    assert "packing waits for 1 CPU (0 of 3 are free)" in text
    assert "run.start_s = 10.0: was not enough for packing to find room, which needs 1 CPU (0 of 3 are free)" in text


def test_workers_wait_for_room_and_get_it_or_end_the_run(cluster: Cluster, site: Path) -> None:
    """Rows are packed by the first run, so that the second one, which needs two CPUs, waits for nothing but its workers."""
    with Job(site, "first") as job:
        assert job.end() == 0
    with held(cluster, 2) as holder, Job(site, "second", "run.start_s=10", "parallel.workers=2") as job:
        assert job.end() == 4
        text = job.text()
        assert "training waits for 2 CPUs (1 of 3 is free)" in text
        assert "run.start_s = 10.0: was not enough for training to find room, which needs 2 CPUs (1 of 3 is free)" in text
        assert not (job.run_dir / "attempts.jsonl").exists()
        with Job(site, "second", "run.start_s=120", "parallel.workers=2") as again:
            wait(lambda: "training waits for 2 CPUs" in again.text() or again.driver.poll() is not None, 60, "a line about the wait")
            holder.kill()
            assert again.end() == 0
    assert list(values(again.run_dir, LOSS)) == [1, 2, 3] and attempts(again.run_dir) == [2]
