"""Callbacks of the runs under test: they slow a run down until it can be hit, disturb its checkpoints, and record what it did.

Workers load this file from its source, so it imports nothing of the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Mapping
from typing import Any

STEP_S = 0.2
DELAYED_STEP, DELAY_S = 120, 20.0
FAILING_STEP = 10
SPOILED_PUSH = 3
"""Of the weights of step 2: the first push is of step 0. Models of these tests fit into one chunk."""


def digest(tokens: list[int]) -> str:
    """Of one packed row."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def note_process(event: str, state: Mapping[str, Any]) -> None:
    """Leave this rank's pid in the run's directory."""
    if event == "train_start":
        (state["run_dir"] / f"rank-{state['rank']}.pid").write_text(str(os.getpid()))


def note_events(event: str, state: Mapping[str, Any]) -> None:
    """Append every event that this rank is told, with its step."""
    with (state["run_dir"] / f"events-{state['rank']}.jsonl").open("a") as stream:
        stream.write(json.dumps([event, state["step"]]) + "\n")


def slow_steps(event: str, state: Mapping[str, Any]) -> None:
    """Give whoever wants to hit a step the time to."""
    if event == "step_end":
        time.sleep(STEP_S)


def record_rows(event: str, state: Mapping[str, Any]) -> None:
    """Append position and digest of every row that this rank trained on in the step; empty rows of a last step are left out."""
    if event != "step_end":
        return
    rows = []
    for batch in state["batches"]:
        (begins,) = ((batch.row_keys & 0xFFFFFF) == 0).nonzero(as_tuple=True)
        length = batch.tokens.shape[0] // len(begins)
        for begin in begins.tolist():
            if batch.loss_weights[begin : begin + length].any():
                rows.append((int(batch.row_keys[begin]) >> 24, digest(batch.tokens[begin : begin + length].tolist())))
    with (state["run_dir"] / f"rows-{state['rank']}.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": state["step"], "rank": state["rank"], "rows": rows}) + "\n")


def delay_commit(event: str, state: Mapping[str, Any]) -> None:
    """Delay one commit of the run's first attempt, as slow storage would."""
    first = len((state["run_dir"] / "attempts.jsonl").read_text().splitlines()) == 1
    if event == "checkpoint_committing" and state["step"] == DELAYED_STEP and first:
        time.sleep(DELAY_S)


def delay_commits(event: str, state: Mapping[str, Any]) -> None:
    """Delay every commit a little, also the last one, which nothing follows."""
    if event == "checkpoint_committing":
        time.sleep(2.0)


def refuse_commit(event: str, state: Mapping[str, Any]) -> None:
    """Raise in the place of one commit."""
    if event == "checkpoint_committing" and state["step"] == FAILING_STEP:
        raise ValueError("this checkpoint is refused")


def fill_disk(event: str, state: Mapping[str, Any]) -> None:
    """From the step before a save on, let this process write no file of the size of a checkpoint's, as if the disk were full."""
    if event == "step_end" and state["step"] == FAILING_STEP - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def record_loads(event: str, state: Mapping[str, Any]) -> None:
    """Append what the engines of an online run say of their load after every step."""
    if event != "step_end" or state["rank"]:
        return
    import ray

    with (state["run_dir"] / "loads.jsonl").open("a") as stream:
        for name in sorted(ray.util.list_named_actors()):
            if "-engine-" in name:
                stream.write(json.dumps(dict(ray.get(ray.get_actor(name).state.remote()).load)) + "\n")


def drop_tensor(event: str, state: Mapping[str, Any]) -> None:
    """One push lacks a tensor."""
    _spoil_a_push(event, lambda buffer, entries, before: entries[1:])


def swap_tensors(event: str, state: Mapping[str, Any]) -> None:
    """In one push two tensors of the same shape have each other's values."""

    def swap(buffer: Any, entries: Any, before: Any) -> Any:
        by_shape: dict[Any, Any] = {}
        for entry in entries:
            other = by_shape.setdefault((entry.shape, entry.dtype), entry)
            if other is not entry:
                kept = buffer[other.offset : other.end].clone()
                buffer[other.offset : other.end] = buffer[entry.offset : entry.end]
                buffer[entry.offset : entry.end] = kept
                return entries
        raise ValueError("no two tensors have the same shape")

    _spoil_a_push(event, swap)


def stale_tensor(event: str, state: Mapping[str, Any]) -> None:
    """In one push a tensor has the values of the push before."""

    def repeat(buffer: Any, entries: Any, before: Any) -> Any:
        (entry,) = (entry for entry in entries if entry.name.endswith("q_proj.weight"))
        buffer[entry.offset : entry.end] = before[entry.offset : entry.end]
        return entries

    _spoil_a_push(event, repeat)


def _spoil_a_push(event: str, spoil: Any) -> None:
    """Between packing and sending, whatever carries it: `spoil(bytes, entries, bytes of the push before)` gives the entries to send."""
    if event != "train_start":
        return
    from rayft.weight_sync.broadcast import BroadcastOutlet
    from rayft.weight_sync.disk import DiskOutlet
    from rayft.weight_sync.wire import to_table

    def spoiling(offer: Any) -> Any:
        pushes: list[Any] = []

        def spoiled(self: Any, buffer: Any, entries: Any) -> dict[str, Any]:
            pushes.append(buffer.clone())
            if len(pushes) == SPOILED_PUSH:
                entries = spoil(buffer, entries, pushes[-2])
            return {**offer(self, buffer, entries), "table": to_table(entries)}

        return spoiled

    for outlet in (BroadcastOutlet, DiskOutlet):
        outlet.offer = spoiling(outlet.offer)  # type: ignore[method-assign]
