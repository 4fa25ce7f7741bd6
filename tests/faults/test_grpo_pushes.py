"""A push of weights that arrives otherwise than it was sent stops the run before a token is sampled from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.hooks import SPOILED_PUSH
from faults.job import LOSS, Job, values
from faults.online import fates, journal, write_online

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

GOOD = SPOILED_PUSH - 2
"""Step of the last push that is as it should be."""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, rewards and run.yaml."""
    return write_online(tmp_path_factory.mktemp("online"))


@pytest.mark.parametrize(
    ("hook", "transport", "verify_every", "sentence"),
    [
        ("drop_tensor", "disk", 10, "tensors arrived"),
        ("drop_tensor", "gloo", 1, "did not arrive"),
        ("swap_tensors", "gloo", 1, "differs"),
        ("stale_tensor", "disk", 1, "layers.0.self_attn.q_proj.weight differs (1 in all)"),
    ],
)
def test_a_spoiled_push_stops_the_run(online: Path, hook: str, transport: str, verify_every: int, sentence: str) -> None:
    """A missing tensor is found in every push; other values in those whose sums are compared."""
    name = f"{hook}-{transport}"
    with Job(online, name, f"weight_sync.type={transport}", f"weight_sync.verify_every={verify_every}", hooks=[hook]) as job:
        assert job.end() == 5
    assert "error (training): weight_sync: " in job.text() and "the engine does not hold the trainer's weights" in job.text()
    assert sentence in job.text()
    assert list(values(job.run_dir, LOSS)) == list(range(1, GOOD + 2)), "one step after the last good push, and none after the bad one"
    pushed = [line["step"] for line in journal(job.run_dir) if line.get("event") == "pushed"]
    assert pushed == list(range(GOOD + 1)), "the bad push counts as none"
    found = fates(job.run_dir)
    assert not found.under_way and not found.dropped, "no prompt was given to an engine after the bad push"
    assert len(found.used) == 3 * (GOOD + 1)


def test_an_engine_that_computes_something_else_stops_the_run(online: Path) -> None:
    """Weights are as sent, so only the tokens' log-probabilities tell; here rounding alone is made to be too much."""
    with Job(online, "other", "weight_sync.max_difference=1e-12") as job:
        assert job.end() == 5
    assert "error (training): weight_sync.max_difference = 1e-12: step 1: trainer and engine have the same weights" in job.text()
    assert list(values(job.run_dir, LOSS)) == [1]
