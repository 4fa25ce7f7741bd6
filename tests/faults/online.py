"""What fault tests of online runs share: a tiny site, the journal, and what became of every prompt by it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from faults.job import LOSS, START_S, Job, values, wait
from rayft.models.tiny import write_tiny_model

STEPS, EVERY, GROUPS, WORDS = 12, 4, 3, ("red", "green", "blue", "black", "white")
REWARDS = """
import itertools, time

CALLS = itertools.count(1)

def letters(prompt, completion, row):
    return sum(map(completion.count, row["word"])) / max(len(completion), 1)

def slowly(prompt, completion, row):
    time.sleep(0.2)
    return letters(prompt, completion, row)

async def moody(prompt, completion, row):
    if row["n"] == 7:
        raise KeyError("a row that no reward can be given for")
    if next(CALLS) % 20 == 0:
        raise ValueError("one call in twenty")
    return letters(prompt, completion, row)
"""


def write_online(folder: Path, hidden_size: int = 64, **sections: dict[str, Any]) -> Path:
    """Write a tiny model, prompts, rewards and run.yaml of an on-policy run of STEPS steps, and return the folder.

    Args:
        folder: the command runs in it.
        hidden_size: of the model.
        sections: fields of the configuration, over those here.
    """
    write_tiny_model(folder / "model", WORDS, vocab_size=300, hidden_size=hidden_size, layers=1)
    rows = [{"text": f"say {WORDS[n % 5]} {n}", "word": WORDS[n % 5], "n": n} for n in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    fields: dict[str, dict[str, Any]] = {
        "run": {"seed": 1, "max_steps": STEPS, "deadline_s": 120.0},
        "model": {"path": "model", "init": "random"},
        "data": {"train": {"words": {"path": "train.jsonl", "format": "text"}}},
        "rollout": {
            "engine": "local",
            "prompts_per_step": GROUPS,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_tokens": 16,
            "max_staleness": 0,
        },
        "reward": {"functions": {"letters": {"function": "./rewards.py:letters"}}},
        "optim": {"lr": 1e-3},
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": EVERY},
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in {**fields, **sections}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"method": "grpo", **merged}))
    return folder


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the journal that are whole."""
    path = run_dir / "journal.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def wait_for_event(job: Job, step: int, name: str) -> None:
    """Wait until that step is logged and the journal's last event after it is such a one."""
    job.wait_for_step(step)

    def there() -> bool:
        assert job.driver.poll() is None, f"the job ended before an event {name!r}"
        return journal(job.run_dir)[-1].get("event") == name

    wait(there, START_S, f"an event {name!r}")


@dataclass
class Fates:
    """What became of every group that was ever started, counted from the journal's events alone.

    Attributes:
        used, filtered, dropped, under_way: ordinals; every one that was started is in exactly one of them.
        failures: reason -> events.
        batches: step -> ordinals.
    """

    used: set[int]
    filtered: set[int]
    dropped: set[int]
    under_way: set[int]
    failures: Counter[str]
    batches: dict[int, list[int]]


def fates(run_dir: Path, restarts: int = 5, retries: int = 2) -> Fates:
    """Follow every prompt of a run of one command; asserts that no event contradicts those before it, and that none is lost.

    Args:
        run_dir: of the run.
        restarts, retries: its rollout.restarts and reward.retries.
    """
    state: dict[int, str] = {}
    failures: Counter[tuple[str, int]] = Counter()
    total: Counter[str] = Counter()
    batches: dict[int, list[int]] = {}
    missing: set[int] = set()
    for line in journal(run_dir):
        event, ordinal, before = line.get("event"), line.get("ordinal", -1), state.get(line.get("ordinal", -1), "new")
        if event == "started":
            assert before in ("new", "again"), f"{ordinal} was started while it was {before}"
            state[ordinal] = "running"
        elif event == "finished":
            assert before == "running"
            state[ordinal] = "scoring"
        elif event == "scored":
            assert before == "scoring"
            state[ordinal] = "used" if ordinal in missing else "accepted" if line["kept"] else "filtered"
            missing.discard(ordinal)
            failures = Counter({key: times for key, times in failures.items() if key[1] != ordinal})
        elif event == "failed":
            failures[line["why"], ordinal] += 1
            total[line["why"]] += 1
            budget = {"process": restarts, "environment": restarts, "reward": retries, "data": 0}[line["why"]]
            spent = failures[line["why"], ordinal] > budget
            state[ordinal] = "dropped" if spent else "scoring" if line["why"] == "reward" else "again"
        elif event == "consumed":
            assert all(state[one] == "accepted" for one in line["ordinals"]) and line["step"] not in batches
            batches[line["step"]] = line["ordinals"]
            state |= dict.fromkeys(line["ordinals"], "used")
        elif event == "lost":
            missing |= set(line["ordinals"])
            state |= dict.fromkeys(line["ordinals"], "again")
        elif event == "controller_restarted":
            state |= {one: "again" for one, was in state.items() if was in ("running", "scoring", "accepted")}
    found = {name: {one for one, is_ in state.items() if is_ == name} for name in ("used", "filtered", "dropped")}
    assert sorted(state) == list(range(len(state))), "a prompt was skipped"
    assert sorted(one for batch in batches.values() for one in batch) == sorted(found["used"]), "a group is in two batches, or in none"
    return Fates(**found, under_way=set(state).difference(*found.values()), failures=total, batches=batches)


def assert_all_accounted_for(run_dir: Path, steps: int = STEPS) -> Fates:
    """A run that came to its end: every step once, with its full batch, and every prompt used, filtered or dropped."""
    assert list(values(run_dir, LOSS)) == list(range(1, steps + 1))
    found = fates(run_dir)
    assert not found.under_way, "prompts were lost"
    assert {step: len(batch) for step, batch in found.batches.items()} == dict.fromkeys(range(steps), GROUPS)
    last = steps - 1
    counts = {name: values(run_dir, f"rollout/{name}")[last + 1] for name in ("filtered", "dropped")}
    assert counts == {"filtered": len(found.filtered), "dropped": len(found.dropped)}, "the metrics say otherwise"
    return found
