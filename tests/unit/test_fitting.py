"""Micro-batches chosen by the plan, and remedies that fit by it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.config.load import load
from rayft.config.schema import SftRun
from rayft.errors import ConfigError
from rayft.observe.flops import LayerShape, ModelShape
from rayft.parallel import fitting
from rayft.parallel.memory import estimate

GIB = 2**30
SHAPE = ModelShape(1024, 151936, True, False, (LayerShape(16, 8, 128, None, 2, True, 3072, True),) * 28)


def run(*overrides: str) -> SftRun:
    return load([], ["method=sft", "run.name=x", "model.path=m", "data.train.a.path=x", "data.seq_len=4096", *overrides])


def total(cfg: SftRun) -> int:
    return estimate(SHAPE, cfg, "cuda").total


@given(rows=st.integers(1, 200), workers=st.integers(1, 16))
def test_splits_leave_less_than_a_micro_batch_empty(rows: int, workers: int) -> None:
    each = -(-rows // workers)
    found = fitting.splits(rows, workers)
    assert (found[0], found[-1]) == (each, 1)
    for micro in found:
        parts = -(-each // micro)
        assert parts * micro - each < parts, "with as many parts, a smaller micro-batch would do"


@settings(max_examples=25, deadline=None)
@given(room=st.integers(8, 140), rows=st.sampled_from([1, 7, 32, 96]))
def test_auto_is_the_most_that_fits(room: int, rows: int) -> None:
    chosen = fitting.choose_micro_rows(SHAPE, run(f"batch.rows={rows}", "batch.micro_rows=auto"), "cuda", room * GIB)
    micro = int(chosen.batch.micro_rows)
    larger = [number for number in fitting.splits(rows, 1) if number > micro]
    assert micro == 1 or total(chosen) <= fitting.FILLED * room * GIB
    if larger:
        assert total(fitting.changed(chosen, {"micro_rows": larger[-1]}, {})) > fitting.FILLED * room * GIB


def test_auto_on_a_cpu_and_without_a_plan() -> None:
    auto = run("batch.rows=32", "batch.micro_rows=auto")
    assert fitting.choose_micro_rows(SHAPE, auto, "cpu", 0).batch.micro_rows == 1
    assert fitting.choose_micro_rows(None, run("batch.micro_rows=3"), "cuda", 0).batch.micro_rows == 3
    with pytest.raises(ConfigError, match=r"batch.micro_rows = 'auto': needs a memory plan"):
        fitting.choose_micro_rows(None, auto, "cuda", 80 * GIB)


@pytest.mark.parametrize(
    ("room", "fields"),
    [
        (40, {"batch.micro_rows"}),
        (13.5, {"batch.micro_rows", "parallel.activation_checkpointing"}),
        (5, {"batch.micro_rows", "parallel.activation_checkpointing", "parallel.activation_offload", "parallel.cpu_offload"}),
    ],
)
def test_a_remedy_fits_and_changes_no_more_than_it_must(room: float, fields: set[str]) -> None:
    said = fitting.remedy(SHAPE, run("batch.rows=32", "batch.micro_rows=8"), "cuda", lambda _, plan: plan.total <= room * GIB)
    found = re.fullmatch(r"Set (.*), with the same result: the plan is then ([\d.]+) GiB a worker", said)
    assert found is not None
    assert {setting.split("=")[0] for setting in found[1].split(" and ")} == fields
    changed = run("batch.rows=32", "batch.micro_rows=8", *found[1].split(" and "))
    assert total(changed) / GIB == pytest.approx(float(found[2]), abs=0.05)
    assert total(changed) <= room * GIB


def test_a_remedy_asks_for_workers_where_offloading_is_not_enough_or_says_that_there_is_none() -> None:
    frugal = ["batch.rows=32", "batch.micro_rows=1", "parallel.activation_checkpointing=full", "parallel.activation_offload=true"]
    said = fitting.remedy(SHAPE, run(*frugal), "cuda", lambda cfg, plan: cfg.parallel.workers >= 4 and not cfg.parallel.cpu_offload)
    assert said.startswith("Set parallel.workers=4, with the same result")
    assert fitting.remedy(SHAPE, run(), "cuda", lambda *_: False).startswith("Take a smaller model")
    on_cpu = fitting.remedy(SHAPE, run("batch.micro_rows=1"), "cpu", lambda cfg, plan: cfg.parallel.activation_checkpointing == "full")
    assert on_cpu.startswith("Set parallel.activation_checkpointing=full,")
