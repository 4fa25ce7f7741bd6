"""What nodes answer about the run's directory, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.actors.shared import refuse_blind
from rayft.errors import ResourceError


def test_nodes_that_do_not_see_it_or_do_not_answer_are_named() -> None:
    refuse_blind(Path("/runs/a"), [("one (10.0.0.1)", True), ("two (10.0.0.2)", True)])
    with pytest.raises(ResourceError, match=r"is not there on two \(10\.0\.0\.2\)\. Use a folder .* or s3://"):
        refuse_blind(Path("/runs/a"), [("two (10.0.0.2)", False), ("two (10.0.0.2)", True), ("three", None)])
    with pytest.raises(ResourceError, match=r"cannot be checked: three gave no answer"):
        refuse_blind(Path("/runs/a"), [("one", True), ("three", None)])
