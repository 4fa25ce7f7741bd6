"""journal.jsonl of an online run: what happened to which group, one line an event, so that a restarted controller knows all it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayft.experience.admission import Admission, Limits


class Journal:
    """The journal, open for appending, and the state that its events lead to.

    Args:
        path: of the file.
        limits: of the run.
        driver: names the command that this process belongs to; where the last line about drivers names it, an earlier controller of the
            same command died.
        step: of the newest checkpoint, from which a new command goes on.

    Attributes:
        state: after all events.
        attempt: of the trainer that joined last under this command; 0 for none.
        serving: version that engines were last brought to under this command; empty for none.
    """

    def __init__(self, path: Path, limits: Limits, driver: str, step: int) -> None:
        self.state, self.attempt, self.serving = Admission(limits), 0, ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        lines = path.read_bytes().split(b"\n")
        self._file.truncate(self._file.tell() - len(lines.pop()))  # a killed writer leaves half a line
        last = None
        for line in map(json.loads, lines):
            if "driver" in line:
                last, self.attempt, self.serving = line["driver"], 0, ""
            elif "event" in line:
                self.state.apply(line)
            else:
                vars(self).update(line)
        if last == driver:
            self.add("controller_restarted")
        else:
            self._append({"driver": driver})
            self.attempt, self.serving = 0, ""
            self.add("driver_restarted", step=step)

    def add(self, name: str, **fields: Any) -> None:
        """Change the state by an event, on file first."""
        self._append({"event": name, **fields})
        self.state.apply({"event": name, **fields})

    def joined(self, attempt: int) -> None:
        """Note the trainer's attempt."""
        self._append({"attempt": attempt})
        self.attempt = attempt

    def serves(self, version: str) -> None:
        """Note what engines were brought to."""
        self._append({"serving": version})
        self.serving = version

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
