"""A run of the command line that is stopped, asked to save, ends early or keeps its best: in one process, and once on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.job import LOSS, Job, exact, resumed_at, train, values, wait, write_site
from rayft.checkpoint.resume import best, committed
from rayft.observe.log import read
from rayft.train.requests import SAVE_NOW, STOP_NOW

pytestmark = pytest.mark.timeout(300)

STEPS = 24
PROMPT = "Which animals live in the zoo?"
OVERFIT = ["optim.lr=5e-2", "optim.schedule=constant", "run.max_steps=200", "eval.every=5", "data.train.zoo.limit=12"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "run": {"seed": 1, "max_steps": STEPS},
        "eval": {"every": 6, "samples": {"prompts": [PROMPT], "every": 8, "max_tokens": 6}},
        "export": {"dtype": "float32"},
    }
    return write_site(tmp_path_factory.mktemp("site"), **sections)


@pytest.fixture(scope="module")
def undisturbed(site: Path) -> Path:
    return train(site, "undisturbed", local=True)


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def assert_equal(run_dir: Path, undisturbed: Path) -> None:
    for name in (LOSS, "eval/loss"):
        assert exact(values(run_dir, name)) == exact(values(undisturbed, name))
    assert samples(run_dir) == samples(undisturbed)
    assert (run_dir / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order_and_the_same_command_goes_on(site: Path, undisturbed: Path, number: int) -> None:
    name = f"signal-{number}"
    with Job(site, name, hooks=["slow_steps"], local=True) as job:
        job.wait_for_step(7)
        os.kill(job.driver.pid, number)
        assert job.end() == 143
        step = committed(job.run_dir)[-1].step
        assert list(values(job.run_dir, LOSS))[-1] == step < STEPS
        assert "stopping after this step, with a checkpoint" in job.text()
        assert f"stopped as asked after step {step} of {STEPS}, with a checkpoint. Run the same command again to resume." in job.text()
        assert not (job.run_dir / "export").exists()
    run_dir = train(site, name, local=True)
    assert resumed_at(run_dir) == [0, step]
    assert_equal(run_dir, undisturbed)
    assert [sample["step"] for sample in samples(run_dir)] == [8, 16, STEPS]
    assert all(sample["prompt"] == PROMPT and isinstance(sample["text"], str) for sample in samples(run_dir))


def test_a_file_asks_for_a_checkpoint_and_another_one_to_stop(site: Path, undisturbed: Path) -> None:
    with Job(site, "files", hooks=["slow_steps"], local=True) as job:
        job.wait_for_step(3)
        (job.run_dir / SAVE_NOW).touch()
        wait(lambda: bool(committed(job.run_dir)), 30, "the checkpoint")
        assert not (job.run_dir / SAVE_NOW).exists()
        (job.run_dir / STOP_NOW).touch()
        assert job.end() == 143
    first, last = (found.step for found in committed(job.run_dir))
    assert 3 < first < last < STEPS
    assert [record["step"] for record in read(job.run_dir / "metrics.jsonl") if "checkpoint/stage_s" in record] == [first, last]
    assert_equal(train(site, "files", local=True), undisturbed)


def test_early_stopping_counts_over_a_restart_and_the_best_stays(site: Path) -> None:
    """Few rows and a high rate: the evaluation soon gets worse."""
    control = [*OVERFIT, "eval.patience=3", "checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.every=5"]
    whole = train(site, "early", *control, local=True)
    losses = values(whole, "eval/loss")
    lowest = min(losses, key=lambda step: losses[step])
    assert list(losses)[-1] == lowest + 15 < 200
    assert [found.step for found in committed(whole)] == [lowest, lowest + 15]
    found = best(whole)
    assert found is not None and found.step == lowest
    records = read(whole / "metrics.jsonl")
    train(site, "early", *control, local=True)
    assert read(whole / "metrics.jsonl") == records, "it ended once, so nothing runs again"

    stop = lowest + 7  # two evaluations after the best are still to come, one is done
    train(site, "early-2", *control, f"run.stop_at={stop}", local=True)
    again = train(site, "early-2", *control, local=True)
    evaluated = values(again, "eval/loss")
    assert exact({step: evaluated[step] for step in losses if step <= stop}) == exact({s: v for s, v in losses.items() if s <= stop})
    assert lowest in {found.step for found in committed(again)}

    command = [sys.executable, "-m", "rayft", "export", "run.yaml", "run.name=early", *control, "--best", "--out", "best"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"step {lowest} is at" in done.stdout, done.stderr
    assert (site / "best" / "model.safetensors").is_file()


def test_sigterm_to_the_driver_of_a_ray_run(site: Path, undisturbed: Path) -> None:
    with Job(site, "ray", "parallel.workers=2", hooks=["slow_steps"]) as job:
        job.wait_for_step(4)
        os.kill(job.driver.pid, signal.SIGTERM)
        assert job.end() == 143
        assert "stopped as asked" in job.text()
    step = committed(job.run_dir)[-1].step
    assert list(values(job.run_dir, LOSS))[-1] == step < STEPS
    run_dir = train(site, "ray", local=True)
    assert resumed_at(run_dir) == [0, step]
    assert values(run_dir, LOSS) == pytest.approx(values(undisturbed, LOSS), rel=1e-5)
