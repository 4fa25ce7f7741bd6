"""`rayft evaluate` of an online run on a local cluster: the reward that the run itself found, of its result and of any other model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.cli import main
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = ("red", "green", "blue", "black", "white")
REWARD = '''
def letters(prompt, completion, row):
    """Share of the completion's letters that are the row's."""
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of a LoRA run of one step on a model with weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("evaluated")
    write_tiny_model(folder / "model", WORDS, vocab_size=300, hidden_size=64, layers=1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model")).save_pretrained(folder / "model")
    for split, count in (("train", 20), ("eval", 5)):
        rows = [{"text": f"say {WORDS[n % 5]}", "word": WORDS[n % 5], "n": n} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    run: dict[str, Any] = {
        "method": "grpo",
        "run": {"name": "x", "dir": str(folder / "runs"), "max_steps": 1, "deadline_s": 120.0},
        "model": {"path": str(folder / "model")},
        "adapter": {"type": "lora", "r": 4},
        "data": {split: {"words": {"path": str(folder / f"{split}.jsonl"), "format": "text"}} for split in ("train", "eval")},
        "rollout": {"engine": "local", "prompts_per_step": 3, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8},
        "reward": {"functions": {"letters": {"function": f"{folder}/rewards.py:letters"}}},
        "algorithm": {"beta": 0.1},
        "optim": {"lr": 5e-1, "schedule": "constant"},
        "parallel": {"device": "cpu"},
        "eval": {"at_start": True, "samples": 2},
        "export": {"dtype": "float32"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def evaluated(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[float, float]:
    """Reward and reward without sampling, as printed."""
    capfd.readouterr()
    assert main(["evaluate", *words]) == 0
    out = capfd.readouterr().out
    found = re.search(r"step \d+: reward ([\d.]+) \(95% interval \+-[\d.]+\) over 5 prompts\nwithout sampling: ([\d.]+)", out)
    assert found is not None, out
    return float(found[1]), float(found[2])


def test_evaluate_finds_what_the_run_found(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(site / "run.yaml")
    assert main(["train", run]) == 0
    found = {record["step"]: record for record in read(site / "runs" / "x" / "metrics.jsonl") if "eval/reward" in record}
    assert found[0]["eval/reward_greedy"] != pytest.approx(found[1]["eval/reward_greedy"], abs=1e-4), "the step changed nothing"
    files = sorted(file for file in (site / "runs" / "x").rglob("*") if file.is_file() and "export" not in str(file))
    before = {file: file.read_bytes() for file in files}
    for _ in range(2):  # an earlier evaluation is not taken for the present one
        assert evaluated(capfd, run)[1] == pytest.approx(found[1]["eval/reward_greedy"], abs=1e-4)
    _, greedy = evaluated(capfd, run, "--model", str(site / "model"))
    assert greedy == pytest.approx(found[0]["eval/reward_greedy"], abs=1e-4)
    assert {file: file.read_bytes() for file in files} == before, "the run itself is not touched"
