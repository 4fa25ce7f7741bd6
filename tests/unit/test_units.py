"""The plan: every row in exactly one unit, in the order of the configuration, and limits that are exact."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest

from rayft.config.schema import Dataset
from rayft.data.units import plan_units

MEGABYTE = 1e-6
"""A unit of one byte, in megabytes."""


def write(directory: Path, name: str, texts: list[str]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def datasets(tmp_path: Path) -> dict[str, Dataset]:
    write(tmp_path / "zoo", "2.jsonl", [f"z2-{i}" * (i % 4 + 1) for i in range(9)])
    write(tmp_path / "zoo", "1.jsonl", [f"z1-{i}" for i in range(7)])
    write(tmp_path / "air", "a.jsonl", [f"a-{i}" for i in range(5)])
    return {name: Dataset(path=str(tmp_path / name), format="text") for name in ("zoo", "air")}


def texts(datasets: dict[str, Dataset], unit_mb: float) -> list[str]:
    return [str(row["text"]) for unit in plan_units("train", datasets, unit_mb) for _, row in unit.rows()]


@pytest.mark.parametrize("unit_bytes", [0.1, 1, 17, 40, 100, 10_000])
def test_units_hold_every_row_once_in_order(datasets: dict[str, Dataset], unit_bytes: float) -> None:
    expected = [f"z1-{i}" for i in range(7)] + [f"z2-{i}" * (i % 4 + 1) for i in range(9)] + [f"a-{i}" for i in range(5)]
    assert texts(datasets, unit_bytes * MEGABYTE) == expected


def test_units_follow_sources_files_and_ranges(datasets: dict[str, Dataset]) -> None:
    units = plan_units("eval", datasets, 40 * MEGABYTE)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert {(unit.split, unit.source, unit.source_id) for unit in units} == {("eval", "zoo", 0), ("eval", "air", 1)}
    places = [(unit.source_id, Path(unit.file).name, unit.start) for unit in units]
    assert places == sorted(places)
    assert all(first.stop == second.start for first, second in pairwise(units) if first.file == second.file)
    assert plan_units("eval", datasets, 40 * MEGABYTE) == units == pickle.loads(pickle.dumps(units))


@pytest.mark.parametrize("unit_bytes", [30, 10_000])
@pytest.mark.parametrize("limit", range(1, 19))
def test_a_limit_takes_exactly_the_first_rows(datasets: dict[str, Dataset], unit_bytes: int, limit: int) -> None:
    everything = texts(datasets, unit_bytes * MEGABYTE)
    limited = {**datasets, "zoo": datasets["zoo"].model_copy(update={"limit": limit})}
    assert texts(limited, unit_bytes * MEGABYTE) == everything[: min(limit, 16)] + everything[16:]


def test_what_lies_behind_a_limit_is_neither_planned_nor_read(datasets: dict[str, Dataset], tmp_path: Path) -> None:
    (tmp_path / "zoo" / "2.jsonl").write_text("not json\n")
    limited = {"zoo": datasets["zoo"].model_copy(update={"limit": 7})}
    assert {Path(unit.file).name for unit in plan_units("train", limited, 20 * MEGABYTE)} == {"1.jsonl"}
