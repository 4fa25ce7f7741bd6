"""kill -9 of the controller of an online run in the middle of an evaluation on held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from faults.job import START_S, Job, values, wait
from faults.online import STEPS, journal, write_online

REWARDS = """
import time

def letters(prompt, completion, row):
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)

def slow_on_held_out(prompt, completion, row):
    time.sleep(0.5 if row.get("held_out") else 0.0)
    return letters(prompt, completion, row)
"""


def test_the_controller_in_an_evaluation(tmp_path: Path) -> None:
    """It begins again under the same weights, and no evaluation is missing or told twice."""
    sections: dict[str, dict[str, Any]] = {
        "data": {
            "train": {"words": {"path": "train.jsonl", "format": "text"}},
            "eval": {"words": {"path": "eval.jsonl", "format": "text"}},
        },
        "eval": {"every": 4},
        "reward": {"functions": {"letters": {"function": "./rewards.py:slow_on_held_out"}}},
    }
    write_online(tmp_path, **sections)
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"text": f"say red {n}", "word": "red", "held_out": True} for n in range(4)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Job(tmp_path, "evaluation") as job:

        def evaluating() -> bool:
            assert job.driver.poll() is None
            lines = journal(job.run_dir)
            begun = any(line.get("event") == "pushed" and line["step"] == 4 for line in lines)
            return begun and not any("evaluated" in line for line in lines)

        wait(evaluating, START_S, "the evaluation of step 4")
        job.kill(job.actor("Controller"))
        assert job.end() == 0
    lines = journal(job.run_dir)
    assert sum(line.get("event") == "controller_restarted" for line in lines) == 1
    assert [line["evaluated"] for line in lines if "evaluated" in line] == [4, 8, STEPS]
    assert list(values(job.run_dir, "eval/reward")) == [4, 8, STEPS] and set(values(job.run_dir, "eval/num_prompts").values()) == {4.0}
