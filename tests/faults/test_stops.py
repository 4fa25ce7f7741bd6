"""Orderly stops, and going on with the same or another number of workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults.conftest import EPOCH_STEPS, STEPS
from faults.job import LOSS, attempts, exact, relative, resumed_at, train, trained_rows, values
from rayft.checkpoint.resume import committed
from rayft.observe.log import read

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


def test_stops_at_an_epoch_edge_in_an_epoch_and_after_the_end(site: Path, undisturbed: Path) -> None:
    for stop in (EPOCH_STEPS, 17):
        run_dir = train(site, "stops", f"run.stop_at={stop}", hooks=["record_rows"])
        assert list(values(run_dir, LOSS)) == list(range(1, stop + 1))
        assert committed(run_dir)[-1].step == stop
    shutil.rmtree(committed(run_dir)[-1].directory)  # as the message about an unreadable checkpoint advises; the one before is of step 15
    train(site, "stops", hooks=["record_rows", "delay_commits"])
    assert [restored.step for restored in committed(run_dir)] == [20, STEPS], "the command ended before its last commit"
    assert exact(values(run_dir, LOSS)) == exact(values(undisturbed, LOSS))
    evaluated = values(run_dir, "eval/loss")
    assert list(evaluated) == [10, EPOCH_STEPS, 20, STEPS]
    assert exact({step: evaluated[step] for step in (10, 20, STEPS)}) == exact(values(undisturbed, "eval/loss"))
    assert trained_rows(run_dir) == trained_rows(undisturbed)

    records = read(run_dir / "metrics.jsonl")
    train(site, "stops", hooks=["record_rows"])
    assert read(run_dir / "metrics.jsonl") == records, "something ran again after the last step"
    assert resumed_at(run_dir) == [0, EPOCH_STEPS, 15, STEPS] and attempts(run_dir) == [2, 2, 2, 2]
    assert trained_rows(run_dir) == trained_rows(undisturbed)
    assert (run_dir / "export" / "model.safetensors").read_bytes() == (undisturbed / "export" / "model.safetensors").read_bytes()


def test_two_then_three_then_one_worker(site: Path, undisturbed: Path) -> None:
    train(site, "sizes", "run.stop_at=8", hooks=["record_rows"])
    train(site, "sizes", "run.stop_at=16", "parallel.workers=3", hooks=["record_rows"])
    run_dir = train(site, "sizes", "parallel.workers=1", hooks=["record_rows"])
    assert attempts(run_dir) == [2, 3, 1] and resumed_at(run_dir) == [0, 8, 16]
    losses, reference = values(run_dir, LOSS), values(undisturbed, LOSS)
    assert relative(losses, reference) <= 1e-5
    assert exact({step: losses[step] for step in range(1, 9)}) == exact({step: reference[step] for step in range(1, 9)})
    assert trained_rows(run_dir) == trained_rows(undisturbed)
