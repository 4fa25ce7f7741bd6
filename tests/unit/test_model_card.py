"""`rayft push --dry-run` on runs of either method: the card tells what the method's metrics say, and nothing is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rayft.cli import main

SHARED = {"model": {"path": "org/base"}, "optim": {"lr": 1e-5}}
RUNS = {
    "sft": {"data": {"train": {"a": {"path": "a.jsonl"}}, "seq_len": 64}, "batch": {"rows": 4}},
    "grpo": {
        "data": {"train": {"a": {"path": "openai/gsm8k", "split": "train"}}},
        "reward": {"functions": {"a": {"function": "length"}}},
        "rollout": {"prompts_per_step": 4, "group_size": 2},
        "batch": {},
    },
}
RECORDS = {
    "sft": [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 1.25, "eval/loss": 1.5, "eval/perplexity": 4.4817}],
    "grpo": [
        {"step": 0, "eval/reward": 0.125, "eval/reward_ci": 0.1, "eval/reward_greedy": 0.25},
        {"step": 1, "train/loss": 0.01, "reward/mean": 0.2},
        {"step": 2, "train/loss": -0.02, "reward/mean": 0.6, "eval/reward": 0.5, "eval/reward_ci": 0.1, "eval/reward_greedy": 0.75},
        {"step": 3, "train/loss": -0.02, "reward/mean": 0.9},
    ],
}
ROWS = {
    "sft": [
        "a step | 4 rows of 64 tokens",
        "training loss, first and last | 2.5000, 1.2500",
        "evaluation loss, first and last | 1.5000, 1.5000",
    ],
    "grpo": [
        "a step | 4 prompts with 2 answers each",
        "reward of a step's answers, first and last | 0.2000, 0.6000",
        "reward on held-out prompts, first and last | 0.1250, 0.5000",
        "the same without sampling, first and last | 0.2500, 0.7500",
    ],
}


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_the_card_tells_what_the_method_measures(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"method": method, "run": {"name": "r", "dir": str(tmp_path), "max_steps": 9}, **SHARED, **RUNS[method]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "r" / "export").mkdir(parents=True)
    for name, content in {"config.json": {}, "export.json": {"step": 2}}.items():
        (tmp_path / "r" / "export" / name).write_text(json.dumps(content))
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[method]))
    assert main(["push", str(tmp_path / "run.yaml"), "--repo", "me/x", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {row} |" in out for row in ROWS[method]), out
    assert method in out and "nothing was sent to me/x" in out
    assert ("loss" in out) == (method == "sft"), "a policy loss says nothing"
    assert ("openai/gsm8k" in out) == (method == "grpo")
