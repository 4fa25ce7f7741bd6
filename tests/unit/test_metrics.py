"""The table of metric names, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import ConfigError
from rayft.observe.metrics import METRICS, REDUCTIONS, check_names, finish, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), "run: python -m rayft.observe.metrics > docs/metrics.md"


def test_the_page_has_every_name_once_and_no_broken_row() -> None:
    rows = [line.split("|")[1:-1] for line in page().splitlines() if line.startswith("| `")]
    assert [row[0].strip(" `") for row in rows] == list(METRICS)
    assert all(len(row) == 4 and row[2].strip() in REDUCTIONS for row in rows)


def test_an_unknown_name_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"metric = 'train/los': .*nearest is 'train/loss'"):
        check_names(["train/lr", "train/los"])


def test_only_token_means_are_divided() -> None:
    assert finish({"train/loss": 12.0, "train/num_tokens": 8.0}, 8.0) == {"train/loss": 1.5, "train/num_tokens": 8.0}
    with pytest.raises(ConfigError):
        finish({"loss": 1.0}, 1.0)


def test_a_source_has_its_own_divisor_and_any_name() -> None:
    sums = {"train/loss": 6.0, "train/loss/a-1": 4.0, "train/weights/a-1": 2.0, "train/loss/b": 0.0, "train/weights/b": 0.0}
    assert finish(sums, 3.0) == {"train/loss": 2.0, "train/loss/a-1": 2.0, "train/weights/a-1": 2.0, "train/weights/b": 0.0}
    for unknown in ("train/grad_norm/a", "train/loss/a/b", "loss/a", "eval/weights/a"):
        with pytest.raises(ConfigError):
            check_names([unknown])
