"""The driver's view of a running job: it tails metrics.jsonl and shows the newest step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rayft.errors import DataError
from rayft.observe.log import decode
from rayft.observe.startup import FirstStep

_SHOWN = (
    ("train/loss", "loss {:.4f}"),
    ("reward/mean", "reward {:.3f}"),
    ("rollout/length", "{:.0f} tokens an answer"),
    ("train/grad_norm", "grad norm {:.2f}"),
    ("train/lr", "lr {:.1e}"),
    ("perf/tokens_per_s", "{:,.0f} tok/s"),
    ("perf/mfu", "{:.1%} mfu"),
    ("perf/peak_memory_gib", "{:.1f} GiB"),
    ("perf/data_wait_s", "data wait {:.2f} s"),
    ("staleness/max", "staleness {:.0f}"),
    ("eval/loss", "eval loss {:.4f}"),
    ("eval/perplexity", "perplexity {:.2f}"),
    ("eval/reward", "eval reward {:.3f}"),
    ("eval/reward_greedy", "greedy {:.3f}"),
    ("eval/num_tokens", "{:,.0f} tokens"),
    ("checkpoint/stage_s", "checkpoint staged in {:.2f} s"),
)


def summary(record: Mapping[str, Any], total_steps: int) -> str:
    """A record as one line; metrics that it lacks are left out."""
    if "event" in record:
        return f"start from step {record['step']} | attempt {record['attempt']} | workers {record['workers']}"
    shown = [form.format(record[name]) for name, form in _SHOWN if name in record]
    return " | ".join([f"step {record['step']}/{total_steps}", *shown])


@contextmanager
def follow(
    path: Path, total_steps: int, *, console: Console | None = None, interval_s: float = 5.0, poll_s: float = 0.25
) -> Iterator[None]:
    """Show the records that are appended to `path` meanwhile; on exit, all that were written before are shown.

    Args:
        path: metrics.jsonl; it may not exist yet. What it holds already is not shown.
        total_steps: steps of the whole run.
        console: where to show them; None is standard output. A terminal gets a progress line, anything else plain lines.
        interval_s: shortest time between plain lines of training steps; evaluations, checkpoints and starts are always shown.
        poll_s: time between looks at the file.
    """
    console = console or Console()
    tail = _Tail(path)
    tail.poll()
    view: _View = _Bar(console, total_steps) if console.is_terminal else _Lines(console, total_steps, interval_s)
    stop, first = threading.Event(), FirstStep()
    batch: dict[str, Any] = {}

    def show() -> None:
        records = tail.poll()
        view.add(joined(records, batch))
        first.look(records)

    def watch() -> None:
        try:
            while not stop.wait(poll_s):
                show()
            show()
        finally:
            view.close()

    thread = threading.Thread(target=watch, name="rayft-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tail.close()


def joined(records: list[dict[str, Any]], batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The records, those of an online run's batches put into those of the steps on them, which follow.

    Args:
        records: in file order.
        batch: the newest record of a batch; kept from call to call.
    """
    shown = []
    for record in records:
        if "reward/mean" in record:
            batch.clear()
            batch.update(record)
        else:
            same = "train/loss" in record and batch.get("step") == record["step"]
            shown.append({**batch, **record} if same else record)
    return shown


class _Tail:
    """New complete lines of a file that may not exist yet, may be replaced by another, or cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._partial = b""
        # A replaced file begins with lines of the old one. They are known by their hash: start events and times differ.
        self._seen: set[int] = set()

    def poll(self) -> list[dict[str, Any]]:
        """The records that were completed since the last call."""
        lines = self._rest()
        if self._replaced():
            self.close()
            self._file, self._partial = self._path.open("rb"), b""
            lines += self._rest()
        new = []
        for line in lines:
            if (key := hash(line)) not in self._seen:
                self._seen.add(key)
                new.append(self._record(line))
        return new

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            return decode(line)
        except ValueError as problem:
            rule = "is not a record of metrics"
            raise DataError(str(self._path), line[:60].decode(errors="replace"), rule, "Delete that line, or restore the file") from problem

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _rest(self) -> list[bytes]:
        if self._file is None:
            return []
        *lines, self._partial = (self._partial + self._file.read()).split(b"\n")
        return lines

    def _replaced(self) -> bool:
        if not self._path.exists():
            return False
        if self._file is None:
            return True
        now, opened = self._path.stat(), os.fstat(self._file.fileno())
        return (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino) or now.st_size < self._file.tell()


class _View(Protocol):
    def add(self, records: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines: the first step, then one every few seconds, the last; everything that is not a step at once."""

    def __init__(self, console: Console, total_steps: int, interval_s: float) -> None:
        self._console, self._total, self._interval_s = console, total_steps, interval_s
        self._waiting: dict[str, Any] | None = None
        self._next = 0.0

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "train/loss" in record:
                self._waiting = record
                if time.monotonic() >= self._next:
                    self._flush()
            else:
                self._flush()
                self._print(record)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self._print(self._waiting)
            self._waiting = None
            self._next = time.monotonic() + self._interval_s

    def _print(self, record: Mapping[str, Any]) -> None:
        self._console.print(summary(record, self._total), markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """One line that is redrawn, with the time left; everything that is not a step is printed above it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._total = total_steps
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task: TaskID | None = None

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            text = summary(record, self._total)
            if "train/loss" not in record:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self._task is None:
                # Created at the first step, so that the time left is not computed from steps that an earlier run did.
                self._progress.start()
                self._task = self._progress.add_task(text, total=self._total, completed=record["step"])
            else:
                self._progress.update(self._task, description=text, completed=record["step"])

    def close(self) -> None:
        self._progress.stop()
