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


def digest(tokens: list[int]) -> str:
    """Of one packed row."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def note_process(event: str, state: Mapping[str, Any]) -> None:
    """Leave this rank's pid in the run's directory."""
    if event == "train_start":
        (state["run_dir"] / f"rank-{state['rank']}.pid").write_text(str(os.getpid()))


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
