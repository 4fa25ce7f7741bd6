"""A real vLLM engine on the CPU in an online run: its child killed or hanging, itself killed, its cache too small for what it is asked.

Skipped where vLLM is not installed; `make test-rollout` runs them. An engine takes some 30 s to start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

from faults.job import DIE_S, LOSS, Job, resumed_at, values, wait
from faults.online import assert_all_accounted_for, fates, wait_for_event, write_online

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make env-rollout-cpu"),
    pytest.mark.timeout(400),
]
STEPS = 10
AGREES = 1e-5
"""Between log-probabilities of trainer and vLLM, both float32, when they hold the same weights."""
CHILD = "VLLM::EngineCor"


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, rewards and run.yaml, with a vLLM engine."""
    folder = tmp_path_factory.mktemp("online")
    return write_online(folder, run={"seed": 1, "max_steps": STEPS, "deadline_s": 150.0}, parallel={"device": "cpu"})


OVERRIDES = ("rollout.engine=vllm", "rollout.kv_cache_gib=0.25", "rollout.max_tokens=200")


def assert_went_on(job: Job) -> None:
    """The engine came back and was brought to the trainer's weights before it answered."""
    assert resumed_at(job.run_dir) == [0], "the trainer was not restarted"
    found = assert_all_accounted_for(job.run_dir, STEPS)
    assert found.failures["process"] >= 1 and not found.dropped
    assert max(values(job.run_dir, "train/rollout_logprob_difference").values()) < AGREES
    assert set(values(job.run_dir, "staleness/max").values()) == {0.0}


def child(job: Job) -> int:
    """The pid of the process that vLLM keeps its model in."""
    (pid,) = [pid for pid, title in job.processes().items() if title.startswith(CHILD)]
    return pid


def test_the_child_of_an_engine(online: Path) -> None:
    with Job(online, "child", *OVERRIDES, hooks=["slow_steps"]) as job:
        wait_for_event(job, 1, "started")
        found = child(job)
        wait_for_event(job, 2, "started")
        job.kill(found)
        assert job.end() == 0
    assert "vLLM is gone or stuck" in job.text()
    assert_went_on(job)


def test_a_child_that_hangs(online: Path) -> None:
    """The engine's own process answers still: it asks the child when it is asked how it is."""
    with Job(online, "hang", *OVERRIDES, "rollout.health_s=8", hooks=["slow_steps"]) as job:
        wait_for_event(job, 1, "started")
        pid = child(job)
        wait_for_event(job, 2, "started")
        os.kill(pid, signal.SIGSTOP)
        wait(lambda: pid not in job.processes(), 8 + 2 * DIE_S, "the end of the child that hangs")
        assert job.end() == 0
    assert "did not answer in time and is restarted" in job.text()
    assert_went_on(job)


def test_an_engine_takes_its_child_along(online: Path) -> None:
    """An orphan would keep its memory, on a GPU the card's."""
    with Job(online, "parent", *OVERRIDES, hooks=["slow_steps"]) as job:
        wait_for_event(job, 1, "started")
        orphan, engine = child(job), job.actor("EngineActor")
        wait_for_event(job, 2, "started")
        job.kill(engine)
        wait(lambda: orphan not in job.processes(), DIE_S, "the death of the engine's child")
        assert job.end() == 0
    assert_went_on(job)


def test_a_cache_that_is_too_small(online: Path) -> None:
    """Four blocks for twelve answers of two: vLLM preempts some for others, and all of them are finished."""
    tiny = 5 * 128 * 256 / 2**30
    with Job(online, "cache", *OVERRIDES, f"rollout.kv_cache_gib={tiny!r}", hooks=["record_loads"]) as job:
        assert job.end() == 0
    loads = [json.loads(line) for line in (job.run_dir / "loads.jsonl").read_text().splitlines()]
    assert loads[-1]["preemptions"] > 0, "the cache was large enough"
    assert not fates(job.run_dir).failures
    assert_all_accounted_for(job.run_dir, STEPS)
    assert list(values(job.run_dir, LOSS)) == list(range(1, STEPS + 1))
    assert max(values(job.run_dir, "train/rollout_logprob_difference").values()) < AGREES
