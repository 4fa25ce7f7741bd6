"""An online run that trains groups a second time in the place of those without signal, through the death of its worker."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from faults.job import LOSS, Job, attempts, values
from faults.online import GROUPS, STEPS, journal, write_online

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

STALENESS, REPLAY = 3, 2
SOMETIMES = """
import time

def letters(prompt, completion, row):
    time.sleep(0.05)
    return 0.0 if row["n"] % 2 else sum(map(completion.count, row["word"])) / max(len(completion), 1)
"""


def test_replay_stays_within_the_bound_and_a_killed_worker_gets_the_same_batches(tmp_path: Path) -> None:
    rollout = {"engine": "local", "prompts_per_step": GROUPS, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 16}
    sections: dict[str, dict[str, Any]] = {
        "rollout": rollout | {"max_staleness": STALENESS, "samples": 99},
        "algorithm": {"type": "dapo", "replay": REPLAY},
    }
    write_online(tmp_path, **sections)
    (tmp_path / "rewards.py").write_text(SOMETIMES)
    with Job(tmp_path, "replay", hooks=("note_process",)) as job:
        job.wait_for_step(7)
        job.kill(job.worker(0))
        assert job.end() == 0
        run_dir = job.run_dir
    assert len(attempts(run_dir)) == 2
    assert list(values(run_dir, LOSS)) == list(range(1, STEPS + 1))
    consumed = [line for line in journal(run_dir) if line.get("event") == "consumed"]
    batches = {line["step"]: line for line in consumed}
    assert len(consumed) == STEPS, "steps after the checkpoint had their batches already"
    assert sorted(batches) == list(range(STEPS)) and all(len({*line["ordinals"]}) == GROUPS for line in batches.values())
    uses = Counter(ordinal for line in batches.values() for ordinal in line["ordinals"])
    replayed = {step + 1: float(len(line["replayed"])) for step, line in batches.items()}
    assert values(run_dir, "rollout/replayed") == replayed and max(replayed.values()) <= REPLAY
    assert 0 < sum(replayed.values()) == sum(times - 1 for times in uses.values()) and max(uses.values()) == 2
    assert max(values(run_dir, "staleness/max").values()) <= STALENESS
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == STEPS * GROUPS * rollout["group_size"]
    ages = {line["step"] - 1 - int(version.partition(".")[2]) for line in samples for version, _, _ in line["versions"]}
    assert max(ages) <= STALENESS, "the bound holds for every token that was trained"
