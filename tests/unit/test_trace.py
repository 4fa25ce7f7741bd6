"""The trace of an online run: spans from a journal and metrics, and a file in which nothing lies over anything else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rayft.actors.journal import Journal
from rayft.cli import main
from rayft.experience.admission import Limits
from rayft.observe.progress import joined, summary
from rayft.observe.samples import table
from rayft.observe.trace import Span, chrome_trace, spans_of, window


def line(time: float, event: str, note: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": time, **fields, **({"note": note} if note else {})}


JOURNAL = [
    {"driver": "d", "time": 99.0},
    line(100.0, "pushed", step=0),
    line(100.1, "started", ordinal=0),
    line(100.2, "started", ordinal=1),
    line(103.0, "finished", {"engine": "d-engine-1"}, ordinal=0),
    line(104.0, "scored", {"turns": 2}, ordinal=0, kept=True),
    line(104.5, "failed", ordinal=1, why="environment"),
    line(105.0, "consumed", step=0, ordinals=[0]),
    line(105.5, "started", ordinal=2),
    line(106.0, "controller_restarted"),
    line(106.1, "finished", {"engine": "d-engine-0"}, ordinal=2),
    line(109.0, "pushed", step=1),
    line(109.5, "committed", step=1),
]
METRICS = [
    {"step": 1, "train/loss": 0.0, "perf/batch_wait_s": 4.5, "perf/logprobs_s": 1.0, "perf/update_s": 2.0, "perf/push_s": 0.5},
    {"step": 1, "reward/mean": 0.0},
]


def test_spans_say_who_did_what_when() -> None:
    spans = spans_of(JOURNAL, METRICS)
    assert [(span.actor, span.name, span.start, span.end) for span in spans] == [
        ("trainer", "push 0", 99.5, 100.0),
        ("engine-1", "group 0", 100.1, 103.0),
        ("engine that failed", "group 1", 100.2, 104.5),
        ("trainer", "wait for groups 1", 100.5, 105.0),
        ("judges", "score 0", 103.0, 104.0),
        ("trainer", "log-probabilities 1", 105.0, 106.0),
        ("controller", "controller_restarted", 106.0, 106.0),
        ("trainer", "update 1", 106.0, 108.0),
        ("trainer", "push 1", 109.0, 109.0),
        ("controller", "committed", 109.5, 109.5),
    ]
    assert spans[2].facts == {"why": "environment"} and spans[4].facts == {"turns": 2, "kept": True}
    assert {span.name for span in spans} - {span.name for span in window(spans, 1)} == {"push 1", "committed"}
    assert window(spans, 3) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(0, 9)), max_size=40))
def test_no_row_of_the_file_holds_two_things_at_once(made: list[tuple[str, int, int]]) -> None:
    spans = [Span(actor, f"{number}", start, start + took) for number, (actor, start, took) in enumerate(made)]
    events = json.loads(json.dumps(chrome_trace(spans)))["traceEvents"]
    shown = [event for event in events if event["ph"] != "M"]
    zero = min((span.start for span in spans), default=0)
    assert sorted((int(event["name"]), event["ts"], event.get("dur", 0)) for event in shown) == [
        (number, (start - zero) * 1_000_000, took * 1_000_000) for number, (_, start, took) in enumerate(made)
    ]
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in shown:
        rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event.get("dur", 0)))
    assert all(before[1] <= after[0] for row in rows.values() for before, after in zip(sorted(row), sorted(row)[1:], strict=False))
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert all(names[event["pid"]] == made[int(event["name"])][0] for event in shown)


def test_a_journal_has_times_and_notes_and_reads_back_without(tmp_path: Path) -> None:
    limits = Limits(groups=1, staleness=1, steps=9, restarts=1, rescores=1)
    journal = Journal(tmp_path / "journal.jsonl", limits, "d", 0)
    journal.add("pushed", step=0)
    journal.add("started", ordinal=0)
    journal.add("finished", {"engine": "d-engine-0"}, ordinal=0)
    journal.add("scored", {"turns": 3}, ordinal=0, kept=True)
    lines = [json.loads(text) for text in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert all(one["time"] > 1e9 for one in lines) and lines[-1]["note"] == {"turns": 3}
    again = Journal(tmp_path / "journal.jsonl", limits, "d", 0)
    assert again.state.again == [0] and again.state.version == 0 and again.state.caught_up


def sample(step: int, **more: Any) -> dict[str, Any]:
    common = {"step": step, "prompt": "say [red]", "answer": "it is [/red]", "reward": 0.5, "finish_reason": "stop"}
    return common | {"rewards": {"exact": 0.25, "environment": 0.25}} | more


def test_samples_are_shown_as_they_are() -> None:
    turns = [{"by": "policy", "text": "is it 5"}, {"by": "environment", "text": "[higher]"}, {"by": "policy", "text": "7"}]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table([sample(3), sample(3, turns=turns)]))
    text = console.export_text()
    for wanted in ("say [red]", "it is [/red]", "environment 0.25", "is it 5", "[higher]"):
        assert wanted in text
    offline = Console(width=80, record=True, file=io.StringIO())
    offline.print(table([{"step": 3, "prompt": "p", "text": "made"}]))
    assert "made" in (shown := offline.export_text()) and "reward" not in shown


def test_the_commands_read_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "reward.functions.r.function=m:f", f"run.dir={tmp_path}"]
    out = tmp_path / "out.json"

    def said(*arguments: str) -> str:
        code = main([arguments[0], *run, *arguments[1:]])
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    assert "run.name = 'a': has no" in said("trace", "--out", str(out)) and not out.exists()
    (tmp_path / "a").mkdir()
    for name, lines in (("journal", JOURNAL), ("metrics", METRICS), ("samples", [sample(1, answer="old"), sample(2, answer="new")])):
        (tmp_path / "a" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"half')
    assert "8 spans over 8.5 s are in" in said("trace", "--step", "1", "--out", str(out))
    assert len(json.loads(out.read_text())["traceEvents"]) == 8 + 2 * 5
    assert "--step = 7: the run has no times of it" in said("trace", "--step", "7")
    for arguments, there, absent in ((("samples",), "new", "old"), (("samples", "--step", "1"), "old", "new")):
        assert there in (shown := said(*arguments)) and absent not in shown
    assert "--step = 9: has no samples. The steps with samples are [1, 2]" in said("samples", "--step", "9")


def test_a_step_is_shown_with_its_batch() -> None:
    records = [
        {"step": 4, "reward/mean": 0.5, "rollout/length": 7.4, "staleness/max": 1.0},
        {"step": 3, "eval/reward": 0.25, "eval/reward_greedy": 0.5},
        {"step": 4, "train/loss": 0.1},
        {"step": 5, "train/loss": 0.2},
    ]
    batch: dict[str, Any] = {}
    shown = [summary(record, 9) for part in (records[:2], records[2:]) for record in joined(part, batch)]
    assert shown == [
        "step 3/9 | eval reward 0.250 | greedy 0.500",
        "step 4/9 | loss 0.1000 | reward 0.500 | 7 tokens an answer | staleness 1",
        "step 5/9 | loss 0.2000",
    ]
