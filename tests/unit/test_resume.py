"""The run directory: lease, committed checkpoints, and what may change on resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayft.checkpoint import resume
from rayft.errors import ConfigError, InfrastructureError

HOLD = """
import sys, time
from pathlib import Path
from rayft.checkpoint import resume
with resume.lease(Path(sys.argv[1]), "other"):
    print("held", flush=True)
    time.sleep(60)
"""


def checkpoint(run_dir: Path, step: int, attempt: int, committed: bool = True) -> Path:
    directory = Path(resume.checkpoints_dir(run_dir)) / f"step-{step:08d}-a{attempt}"
    directory.mkdir(parents=True)
    if committed:
        (directory / resume.COMMITTED).write_text(json.dumps({"step": step, "attempt": attempt}))
    return directory


def test_newest_is_the_committed_one_with_most_steps_and_latest_attempt(tmp_path: Path) -> None:
    assert resume.newest(tmp_path) is None
    checkpoint(tmp_path, 10, 1)
    checkpoint(tmp_path, 20, 1)
    last = checkpoint(tmp_path, 20, 3)
    unfinished = checkpoint(tmp_path, 30, 3, committed=False)
    found = resume.newest(tmp_path)
    assert found is not None and (found.directory, found.step) == (str(last), 20)
    resume.remove_unfinished(tmp_path)
    assert not unfinished.exists() and last.exists()
    resume.prune(tmp_path, keep=2)
    assert [one.step for one in resume.committed(tmp_path)] == [20, 20]


def test_a_second_driver_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InfrastructureError, match=rf"in use by other \(process {holder.pid}"), resume.lease(tmp_path, "me"):
            pass
        holder.send_signal(signal.SIGKILL)  # stays a zombie until it is waited for, which must not count as alive
        deadline = time.time() + 5
        while True:
            try:
                with resume.lease(tmp_path, "me"):
                    assert json.loads((tmp_path / resume.LEASE).read_text())["owner"] == "me"
                break
            except InfrastructureError:
                assert time.time() < deadline
    finally:
        holder.kill()
        holder.wait()
    assert not (tmp_path / resume.LEASE).exists()


def test_a_lease_of_another_host_counts_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    lease = {"owner": "far", "host": "elsewhere", "pid": 1, "token": "x", "heartbeat": time.time()}
    (tmp_path / resume.LEASE).write_text(json.dumps(lease))
    with pytest.raises(InfrastructureError, match="far"), resume.lease(tmp_path, "me"):
        pass
    (tmp_path / resume.LEASE).write_text(json.dumps(lease | {"heartbeat": time.time() - resume.LEASE_EXPIRES_S}))
    with resume.lease(tmp_path, "me"):
        assert json.loads((tmp_path / resume.LEASE).read_text())["pid"] == os.getpid()


def test_the_heartbeat_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "LEASE_BEAT_S", 0.05)
    with resume.lease(tmp_path, "me"):
        first = json.loads((tmp_path / resume.LEASE).read_text())["heartbeat"]
        deadline = time.time() + 5
        while json.loads((tmp_path / resume.LEASE).read_text())["heartbeat"] == first:
            assert time.time() < deadline
            time.sleep(0.02)


def test_only_what_cannot_change_the_result_may_change() -> None:
    resume.refuse_changes([("parallel.workers", 2, 3), ("checkpoint.every", 10, 20), ("run.stop_at", 5, None), ("model.path", "a", "b")])
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.1 and is 0\.2; run\.seed was 0 and is 1"):
        resume.refuse_changes([("optim.lr", 0.1, 0.2), ("parallel.workers", 1, 2), ("run.seed", 0, 1)])
    with pytest.raises(ConfigError, match=r"data\.evaluation"):
        resume.refuse_changes([("data.evaluation", 1, 2)])


def test_the_best_checkpoint_outlives_newer_ones_until_another_is_better(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        checkpoint(tmp_path, step, 1)
    assert resume.best(tmp_path) is None
    (tmp_path / resume.BEST).write_text(json.dumps({"step": 20, "loss": 1.5}))
    resume.prune(tmp_path, 2)
    assert [one.step for one in resume.committed(tmp_path)] == [20, 30, 40]
    found = resume.best(tmp_path)
    assert found is not None and found.step == 20
    (tmp_path / resume.BEST).write_text(json.dumps({"step": 40, "loss": 1.0}))
    resume.prune(tmp_path, 2)
    assert [one.step for one in resume.committed(tmp_path)] == [30, 40]
    (tmp_path / resume.BEST).write_text(json.dumps({"step": 25, "loss": 0.5}))
    assert resume.best(tmp_path) is None, "an evaluation whose checkpoint was not committed before a death"
