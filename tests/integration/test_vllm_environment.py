"""A run whose policy uses a tool, with a real vLLM engine on the CPU: its second turn reads the very tokens that it wrote in its first.

Skipped where vLLM is not installed; `make test-rollout` runs it. An engine takes some 30 s to start.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rayft.recipes import grpo

from integration.test_environment import CALL, NOTE_BATCHES, USER, check_weights
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.models.tiny import write_word_model
from rayft.models.tokenizer import load_tokenizer
from rayft.observe.log import read

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make env-rollout-cpu"),
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(400),
]
AGREES = 1e-5
"""Mean difference between log-probabilities of trainer and vLLM, both float32, on the same tokens."""
ONE = "red red"
"""A token that text never gives: its text is made of two others, so whoever makes tokens anew gets those."""


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> GrpoRun:
    """Two on-policy steps of 4 prompts with 6 answers of up to two turns each."""
    folder = tmp_path_factory.mktemp("tools-vllm")
    write_word_model(folder / "model", ("box", "red", ONE, CALL, "where", "?"))
    rows = [{"messages": [{"role": "user", "content": "where box ?"}], "n": n} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "user.py").write_text(USER)
    (folder / "note.py").write_text(NOTE_BATCHES)
    run: dict[str, Any] = {
        "method": "grpo",
        "run": {"name": "tools", "dir": str(folder / "runs"), "max_steps": 2, "deadline_s": 120.0, "callbacks": [f"{folder}/note.py:note"]},
        "model": {"path": str(folder / "model"), "init": "random"},
        "data": {"train": {"boxes": {"path": str(folder / "train.jsonl")}}},
        "environment": {"function": "tools", "tools": [f"{folder}/user.py:look"], "max_turns": 2},
        "rollout": {"prompts_per_step": 4, "group_size": 6, "max_staleness": 0, "samples": 24, "kv_cache_gib": 0.1}
        | {"max_prompt_tokens": 16, "max_tokens": 64},
        "reward": {"functions": {"red": {"function": f"{folder}/user.py:says_red"}}},
        "optim": {"lr": 3e-2, "schedule": "constant"},
        "parallel": {"device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    loaded = load([folder / "run.yaml"], [])
    assert isinstance(loaded, GrpoRun) and loaded.rollout.engine == "vllm"
    return loaded


def test_the_second_turn_reads_the_tokens_of_the_first(cfg: GrpoRun) -> None:
    grpo.main(cfg)
    run_dir = Path(cfg.run.dir) / cfg.run.name
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    called = [sample for sample in samples if [turn["by"] for turn in sample["turns"]] == ["environment", "policy"] * 2]
    assert len(samples) == 48 and len(called) > 4
    for sample in called:
        _, first, answer, _ = (turn["text"] for turn in sample["turns"])
        assert answer == " ".join([f"<|im_start|> tool {ONE} <|im_end|>"] * first.count(CALL)) + " <|im_start|> assistant"
    tokenizer = load_tokenizer(cfg.model)
    check_weights(run_dir, tokenizer, {sample["answer"] for sample in samples})
    assert tokens_of_first_turns(run_dir, tokenizer).count(tokenizer.convert_tokens_to_ids(ONE)) > 4, "tokens of turns were made anew"

    steps: dict[int, dict[str, float]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        steps.setdefault(int(record["step"]), {}).update(record)
    for step in (1, 2):
        assert 1 < steps[step]["rollout/turns"] < 2 and steps[step]["staleness/max"] == 0
        assert steps[step]["train/rollout_logprob_difference"] < AGREES, "the engine read other tokens than the trainer"


def tokens_of_first_turns(run_dir: Path, tokenizer: Any) -> list[int]:
    """What the policy wrote in first turns that a second one follows."""
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    found: list[int] = []
    for batch in map(json.loads, (run_dir / "batches.jsonl").read_text().splitlines()):
        place, opening = 0, tokenizer.encode("<|im_start|> user where box ? <|im_end|> <|im_start|> assistant")
        for length in batch["lengths"]:
            tokens, place = batch["tokens"][place : place + length], place + length
            written = tokens[len(opening) :]
            turn = written[: written.index(end)] if tokens[: len(opening)] == opening and end in written else []
            found += turn if written[len(turn) + 1 : len(turn) + 2] == [start] else []
    return found
