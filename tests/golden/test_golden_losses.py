"""The losses of two small runs are what they were: to the bit on a recorded version of torch and kind of CPU, else to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.record import FOLDER, RUNS, STEPS, losses, this_machine


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return losses(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_recorded(found: dict[str, list[float]], name: str) -> None:
    exact = this_machine().exists()
    record = this_machine() if exact else max(FOLDER.glob("*.json"))
    expected = json.loads(record.read_text())[name]
    assert len(found[name]) == STEPS
    if exact:
        assert [loss.hex() for loss in found[name]] == [loss.hex() for loss in expected], f"differs from {record}; see golden/record.py"
    else:
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=0), f"differs from {record} by more than a platform may"


def test_records_agree_with_each_other() -> None:
    """Otherwise the comparison across platforms would depend on which record is taken."""
    first, *others = [json.loads(file.read_text()) for file in sorted(Path(FOLDER).glob("*.json"))]
    for other in others:
        for name in RUNS:
            assert other[name] == pytest.approx(first[name], rel=1e-5, abs=0)
