"""metrics.jsonl: one JSON line per record, written by rank 0, cut back to the restored step on every start.

A killed writer leaves half a line and, after the restart, steps that are run twice. Opening the log drops both, so the file
of an interrupted run reads like that of an undisturbed one, but for the start events in it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rayft.errors import DataError, room_for
from rayft.observe.metrics import check_names


class MetricsLog:
    """The run's log, open for appending.

    Args:
        path: metrics.jsonl in the run's directory.
        resume_step: steps done so far, of the restored checkpoint; 0 for a fresh run. Later records are dropped; one at that
            very step (its evaluation, say) stays, because the weights are the same.

    Attributes:
        reached: metric -> last step that the file had of it before it was cut back.

    Raises:
        DataError: the file holds a line that is not a record.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._resume_step, self._path = resume_step, path
        found = list(_lines(path))
        self.reached = {name: record["step"] for _, record in found for name in record if "/" in name}
        kept = [line for line, record in found if "event" in record or record["step"] <= resume_step]
        # Always a new file: a writer of an earlier attempt that is still dying holds the old one and can no longer add to ours.
        new = path.with_name(path.name + ".new")
        with room_for(path), new.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        self._file = path.open("ab")

    def start(self, attempt: int, workers: int) -> None:
        """Record that the workers start from the resume step; `attempt` counts the starts of the run from 1."""
        self._append({"event": "start", "step": self._resume_step, "attempt": attempt, "workers": workers, "time": time.time()})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a record of `step`, complete on return.

        Raises:
            ConfigError: a name is not in the table of metrics.
        """
        check_names(values)
        self._append({"step": step} | {name: value if math.isfinite(value) else _NON_FINITE[str(value)] for name, value in values.items()})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        with room_for(self._path):
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def decode(line: bytes) -> dict[str, Any]:
    """A line as a record: metrics are numbers again, also those that JSON cannot write.

    Raises:
        ValueError: the line is not a JSON object with a step.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError("no step")
    return {key: float(value) if "/" in key else value for key, value in record.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """The records of metrics in file order, without start events; none when the file is missing.

    Raises:
        DataError: the file holds a line that is not a record.
    """
    return [record for _, record in _lines(path) if "event" not in record]


def starts(path: Path) -> list[dict[str, Any]]:
    """The start events in file order, with the keys step, attempt, workers and time.

    Raises:
        DataError: the file holds a line that is not a record.
    """
    return [record for _, record in _lines(path) if "event" in record]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line and its record; what follows the last line end was being written when the writer died."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = decode(line)
        except ValueError as problem:
            raise DataError(str(path), f"line {number}", "is not a record of metrics", "Delete that line, or restore the file") from problem
        yield line, record
