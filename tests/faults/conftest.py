"""The undisturbed run that every disturbed one must equal, and the seed of this test's random numbers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from faults.job import draw_numbers, train, write_site

STEPS, ROWS, EPOCH_STEPS = 24, 93, 11
"""2.1 epochs of 44 rows, 4 in a step: the last step has one row, and the first epoch ends with step 11."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are; they differ in their names."""
    sections = {"run": {"seed": 1, "epochs": 2.1}, "checkpoint": {"every": 5}, "eval": {"every": 10}, "parallel": {"workers": 2}}
    return write_site(tmp_path_factory.mktemp("site"), **sections)


@pytest.fixture(scope="session")
def undisturbed(site: Path) -> Path:
    """Directory of a run of two workers that nothing happened to."""
    return train(site, "undisturbed", hooks=["record_rows"])


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str]) -> Random:
    """Random numbers whose seed is printed."""
    return draw_numbers(capsys)
