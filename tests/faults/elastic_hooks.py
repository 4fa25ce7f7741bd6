"""Callbacks of runs whose pool changes: they make steps slow, and hold a step until the test has seen what it waits for.

Workers load this file from its source, so it imports nothing of the tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

STEP_S, HELD_S = 1.0, 100.0
HELD = {5: "grown", 9: "shrunk"}
"""Step -> file of the run's directory, without which its end is not reached."""


def hold_steps(event: str, state: Mapping[str, Any]) -> None:
    """Go on slowly, and past a held step only when its file is there."""
    if event == "train_start":
        (state["run_dir"] / f"rank-{state['rank']}.pid").write_text(str(os.getpid()))
    if event == "step_end":
        time.sleep(STEP_S)
        end = time.monotonic() + HELD_S
        while (name := HELD.get(state["step"])) and not (state["run_dir"] / name).exists() and time.monotonic() < end:
            time.sleep(0.05)
