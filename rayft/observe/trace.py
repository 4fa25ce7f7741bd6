"""A Chrome trace of an online run, from what it wrote down: who did what when, across trainer, engines and judges.

Times are those of the controller's journal. Of the trainer the journal knows when a push was over and when a batch was handed out; how long
its phases took is in the metrics. Open the file in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
TRAINER, CONTROLLER, JUDGES = "trainer", "controller", "judges"


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        actor: who did it.
        name: what it was.
        start, end: seconds since the epoch; equal for a moment.
        facts: further things about it, by name.
    """

    actor: str
    name: str
    start: float
    end: float
    facts: Record = field(default_factory=dict)


def spans_of(journal: Iterable[Record], metrics: Iterable[Record]) -> list[Span]:
    """What every actor did, in order of time.

    Args:
        journal: lines of journal.jsonl that have a time.
        metrics: records of metrics.jsonl.
    """
    spans, starts = list[Span](), dict[tuple[str, int], float]()
    pushed, consumed = dict[int, float](), dict[int, float]()
    for line in journal:
        event, now, note = line.get("event"), line["time"], line.get("note", {})
        if event in ("started", "finished", "scored", "failed"):
            ordinal = line["ordinal"]
            if event in ("scored", "failed") and ("judge", ordinal) in starts:
                spans.append(Span(JUDGES, f"score {ordinal}", starts.pop(("judge", ordinal)), now, note | _but(line, "kept", "why")))
            elif event in ("finished", "failed") and ("engine", ordinal) in starts:
                actor = _plain(note.get("engine", "engine that failed"))
                spans.append(Span(actor, f"group {ordinal}", starts.pop(("engine", ordinal)), now, _but(line, "why")))
            if event in ("started", "finished"):
                starts["engine" if event == "started" else "judge", ordinal] = now
        elif event in ("pushed", "consumed"):
            (pushed if event == "pushed" else consumed)[line["step"]] = now
        else:
            if event in ("controller_restarted", "driver_restarted", "trainer_restarted"):
                starts.clear()
            if event is not None:
                spans.append(Span(CONTROLLER, event, now, now, _but(line, "step", "ordinals")))
    return sorted([*spans, *_trainer(pushed, consumed, metrics)], key=lambda span: span.start)


def _trainer(pushed: Mapping[int, float], consumed: Mapping[int, float], metrics: Iterable[Record]) -> list[Span]:
    """The phases of every step that is in the metrics."""
    phases: dict[int, dict[str, float]] = {}
    for record in metrics:
        phases.setdefault(record["step"], {}).update({name: value for name, value in record.items() if name.startswith("perf/")})
    spans = []
    for step, now in pushed.items():
        seconds = phases.get(step + 1, {}).get("perf/push_s", 0.0)
        spans.append(Span(TRAINER, f"push {step}", now - seconds, now, {"step": step + 1}))
    for step, now in consumed.items():
        if (took := phases.get(step + 1)) is None:
            continue
        since = max(pushed.get(step, 0.0), now - took.get("perf/batch_wait_s", 0.0))
        edges = [since if since <= now else now, now]
        for name in ("logprobs", "update"):
            edges.append(edges[-1] + took.get(f"perf/{name}_s", 0.0))
        names = ("wait for groups", "log-probabilities", "update")
        phased = zip(names, edges, edges[1:], strict=False)
        spans += [Span(TRAINER, f"{name} {step + 1}", start, end, {"step": step + 1}) for name, start, end in phased if end > start]
    return spans


def window(spans: Sequence[Span], step: int) -> list[Span]:
    """What overlaps the trainer's work on that step, from the push before it to the end of its update; empty when it is not there.

    Steps are counted as in metrics.jsonl: step 1 is the first, on the weights of the push 0.
    """
    own = [span for span in spans if span.actor == TRAINER and span.facts["step"] == step]
    if not own:
        return []
    first, last = min(span.start for span in own), max(span.end for span in own)
    return [span for span in spans if span.end >= first and span.start <= last]


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in Chrome's trace event format: a process for each actor, and in it as many rows as things that it did at once."""
    events: list[dict[str, Any]] = []
    actors = sorted({span.actor for span in spans}, key=lambda actor: (actor != TRAINER, actor == CONTROLLER, actor))
    zero = min((span.start for span in spans), default=0.0)
    for pid, actor in enumerate(actors):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": actor}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        rows: list[float] = []
        for span in sorted((span for span in spans if span.actor == actor), key=lambda span: (span.start, span.end)):
            row = next((row for row, busy in enumerate(rows) if busy <= span.start), len(rows))
            rows[row : row + 1] = [span.end]
            what = {"ph": "X", "dur": round((span.end - span.start) * 1e6)} if span.end > span.start else {"ph": "i", "s": "p"}
            where = {"pid": pid, "tid": row, "ts": round((span.start - zero) * 1e6)}
            events.append({"name": span.name, **what, **where, "args": dict(span.facts)})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _plain(name: str) -> str:
    """An actor's name without the command that it belongs to: 1a2b3c4d-engine-0 is engine-0."""
    return name.partition("-")[2] or name


def _but(line: Record, *names: str) -> dict[str, Any]:
    """These of the line's fields, where it has them."""
    return {name: line[name] for name in names if name in line}
