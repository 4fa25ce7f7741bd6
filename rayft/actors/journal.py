"""journal.jsonl of an online run: what happened to which group, one line an event, so that a restarted controller knows all it must."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayft.experience.admission import Admission, Limits

log = logging.getLogger("rayft")

NOTES = ("time", "note")
"""What a line has for those who read it: seconds since the epoch, and facts by name. The state does not depend on them."""


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
        engines: names of the engines of the pool, once it has changed under this command; empty before.
        evaluated: step -> metrics on held-out prompts of its weights, of evaluations under this command.
    """

    def __init__(self, path: Path, limits: Limits, driver: str, step: int) -> None:
        self.state, self.attempt, self.serving, self.engines = Admission(limits), 0, "", tuple[str, ...]()
        self.evaluated: dict[int, dict[str, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("ab")
        lines = path.read_bytes().split(b"\n")
        self._file.truncate(self._file.tell() - len(lines.pop()))  # a killed writer leaves half a line
        last = None
        for line in map(json.loads, lines):
            for said in NOTES:
                line.pop(said, None)
            if "driver" in line:
                last, self.attempt, self.serving, self.engines, self.evaluated = line["driver"], 0, "", (), {}
            elif "event" in line:
                self._change(line)
            elif "evaluated" in line:
                self.evaluated[line["evaluated"]] = line["values"]
            else:
                vars(self).update({name: tuple(value) if name == "engines" else value for name, value in line.items()})
        if last == driver:
            log.warning("the controller died and was restarted; by its journal, what was under way is asked for again")
            self.add("controller_restarted")
        else:
            self._append({"driver": driver})
            self.attempt, self.serving, self.engines, self.evaluated = 0, "", (), {}
            self.add("driver_restarted", step=step)

    def add(self, name: str, note: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """Change the state by an event, on file first, with a note of what belongs to it."""
        self._append({"event": name, **fields} | ({"note": note} if note else {}))
        self._change({"event": name, **fields})

    def joined(self, attempt: int) -> None:
        """Note the trainer's attempt."""
        self._append({"attempt": attempt})
        self.attempt = attempt

    def serves(self, version: str) -> None:
        """Note what engines were brought to."""
        self._append({"serving": version})
        self.serving = version

    def has_engines(self, names: tuple[str, ...]) -> None:
        """Note the engines of the pool, when they are not those that were noted last."""
        if names != self.engines:
            self._append({"engines": names})
            self.engines = names

    def has_evaluated(self, step: int, values: dict[str, float]) -> None:
        """Note an evaluation, so that whoever restarts can tell the trainer of it."""
        self._append({"evaluated": step, "values": values})
        self.evaluated[step] = values

    def content(self) -> bytes:
        """All lines so far."""
        return self._path.read_bytes()

    def _change(self, event: dict[str, Any]) -> None:
        self.state.apply(event)
        if event["event"] == "trainer_restarted":  # what it has forgotten, it is told again
            self.evaluated = {step: values for step, values in self.evaluated.items() if step <= event["step"]}

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line | {"time": round(time.time(), 4)}).encode() + b"\n")
        self._file.flush()
