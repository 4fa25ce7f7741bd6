"""A run whose policy uses a tool: two turns through prompts, engines, rewards, trainer and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rayft.recipes import grpo

from rayft.commands import trace
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.models.tiny import write_word_model
from rayft.models.tokenizer import load_tokenizer
from rayft.observe.log import read

pytestmark = pytest.mark.usefixtures("ray_cluster")

CALL = '<tool_call>{"name":"look","arguments":{"place":"box"}}</tool_call>'
USER = '''
def look(place: str) -> str:
    """Look into a place.

    Args:
        place: where
    """
    return "red red"

def says_red(prompt, completion, row):
    return float("red" in completion)
'''
NOTE_BATCHES = """
import json

def note(event, state):
    if event == "step_end":
        with (state["run_dir"] / "batches.jsonl").open("a") as file:
            for batch in state["batches"]:
                columns = {name: getattr(batch, name).tolist() for name in ("tokens", "rollout_logprobs", "trained")}
                file.write(json.dumps(columns | {"lengths": batch.document_lengths, "used": batch.num_tokens}) + "\\n")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights whose dozen tokens are words, one of them a whole tool call, so that it calls and ends by chance."""
    folder = tmp_path_factory.mktemp("tools")
    write_word_model(folder / "model", ("box", "red", CALL, "where", "?"), hidden_size=32, layers=1)
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
        "rollout": {"engine": "local", "prompts_per_step": 4, "group_size": 6, "max_staleness": 0, "samples": 24}
        | {"max_prompt_tokens": 16, "max_tokens": 64},
        "reward": {"functions": {"red": {"function": f"{folder}/user.py:says_red"}}},
        "optim": {"lr": 1e-3},
        "parallel": {"device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_a_tool_is_used_and_only_the_policys_tokens_are_trained(site: Path) -> None:
    cfg = load([site / "run.yaml"], [])
    assert isinstance(cfg, GrpoRun)
    grpo.main(cfg)
    run_dir = site / "runs" / "tools"
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    called = [sample for sample in samples if [turn["by"] for turn in sample["turns"]] == ["environment", "policy"] * 2]
    assert len(samples) == 48 and len(called) > 4
    for sample in called:
        opening, first, answer, _ = (turn["text"] for turn in sample["turns"])
        assert opening == "<|im_start|> assistant" and CALL in first and first.endswith("<|im_end|>")
        assert answer == " ".join(["<|im_start|> tool red red <|im_end|>"] * first.count(CALL)) + " <|im_start|> assistant"
    check_weights(run_dir, load_tokenizer(cfg.model), {sample["answer"] for sample in samples})

    steps: dict[int, dict[str, float]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        steps.setdefault(int(record["step"]), {}).update(record)
    journal = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    turns = {line["ordinal"]: line["note"]["turns"] for line in journal if line.get("event") == "scored"}
    batches = {line["step"] + 1: line["ordinals"] for line in journal if line.get("event") == "consumed"}
    for step in (1, 2):
        assert 1 < steps[step]["rollout/turns"] < 2 and steps[step]["reward/part/environment"] == 0.0
        assert steps[step]["rollout/turns"] * 24 == pytest.approx(sum(turns[ordinal] for ordinal in batches[step]))
        assert steps[step]["train/rollout_logprob_difference"] < 1e-4, "trainer and engine see the same tokens"
    trace(cfg, 1, run_dir / "trace.json")
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    assert {"trainer", "engine-0", "judges"} <= {event["args"].get("name") for event in events if event["ph"] == "M"}
    assert {"update 1", "wait for groups 1", "push 0"} <= {event["name"] for event in events}


def check_weights(run_dir: Path, tokenizer: Any, answers: set[str]) -> None:
    """In every trained document exactly the tokens that the policy wrote have a weight, and a log-probability of the engine."""
    seen = 0
    for batch in map(json.loads, (run_dir / "batches.jsonl").read_text().splitlines()):
        start = 0
        for length in batch["lengths"]:
            end = start + length
            tokens = batch["tokens"][start:end]
            if start < batch["used"]:
                text, own = tokenizer.decode(tokens), written(tokenizer.convert_ids_to_tokens(tokens))
                assert text.removeprefix("<|im_start|> user where box ? <|im_end|> ") in answers or not text
                trained = [position - start + 1 for position in batch["trained"] if start <= position < end]
                assert trained == own, text
                assert all((batch["rollout_logprobs"][start + place - 1] < 0) == (place in own) for place in range(1, length))
                seen += 1
            start = end
    assert seen == 48


def written(words: list[str]) -> list[int]:
    """Places of the words that the policy wrote, by the rules of the game: after `<|im_start|> assistant`, to the end of the turn."""
    places, own, turns = list[int](), False, 0
    for place, word in enumerate(words):
        if own:
            places.append(place)
            own = word != "<|im_end|>"
        elif turns < 2 and words[max(place - 1, 0) : place + 1] == ["<|im_start|>", "assistant"]:
            own, turns = True, turns + 1
    return places
