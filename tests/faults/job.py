"""Runs of the real command line, each in processes of its own, to be watched, killed from outside and asked what they left."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml

from rayft.data.reader import Reader
from rayft.data.zoo import write_rows, zoo_rows
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read, starts

HOOKS = Path(__file__).with_name("hooks.py")
LOSS = "train/loss"
START_S, END_S, GONE_S, DIE_S = 120.0, 180.0, 90.0, 10.0
"""Longest waits: for a step, for the end of a command, until no process of it is left, and for a killed process to die. When the
driver is killed, all but two agents of Ray are gone in 3 s; these take a minute to notice."""


def write_site(folder: Path, documents: int = 91, seq_len: int = 128, **sections: dict[str, Any]) -> Path:
    """Write a tiny model, rows and run.yaml of a run that takes about 40 ms a step, and return the folder.

    Args:
        folder: created if needed; the command runs in it.
        documents: chats to train on; 91 fill 44 rows of 128 tokens.
        seq_len: tokens in a packed row.
        sections: fields of the configuration, over those here.
    """
    rows = zoo_rows("train", documents)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", zoo_rows("eval", 20))
    write_tiny_model(folder / "model", (message["content"] for row in rows for message in row["messages"]), hidden_size=64)
    fields: dict[str, dict[str, Any]] = {
        "run": {"seed": 1},
        "model": {"path": "model", "init": "random"},
        "data": {"train": {"zoo": {"path": "train.jsonl"}}, "eval": {"zoo": {"path": "eval.jsonl"}}, "seq_len": seq_len, "shard_rows": 8},
        "batch": {"rows": 4},
        "optim": {"lr": 3e-3},
        "parallel": {"device": "cpu"},
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in {**fields, **sections}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"method": "sft", **merged}))
    return folder


def draw_numbers(capsys: pytest.CaptureFixture[str]) -> random.Random:
    """A generator from RAYFT_FAULT_SEED, or from a fresh seed; the seed is printed past pytest's capture, to repeat the run with."""
    seed = int(os.environ.get("RAYFT_FAULT_SEED") or random.SystemRandom().randrange(2**32))
    with capsys.disabled():
        print(f"\nRAYFT_FAULT_SEED={seed}")
    return random.Random(seed)


class Job:
    """One start of `rayft train run.yaml`; leaving the `with` block kills whatever is left of it.

    All its processes, Ray's too, share a session of their own, by which they are told from everybody else's.

    Args:
        folder: from `write_site`.
        name: of the run.
        overrides: of its configuration, as on the command line.
        hooks: functions of hooks.py to call on the events of the trainer.
        local: train in the driver's own process.
    """

    def __init__(self, folder: Path, name: str, *overrides: str, hooks: Sequence[str] = (), local: bool = False) -> None:
        self.run_dir = folder / "runs" / name
        self.output = folder / f"{name}-{len(list(folder.glob(f'{name}-*.log')))}.log"
        self.killed: list[int] = []
        self.host = socket.gethostname()
        callbacks = "run.callbacks=[" + ", ".join(f"{HOOKS}:{hook}" for hook in hooks) + "]"
        command = [sys.executable, "-m", "rayft", "train", "run.yaml", f"run.name={name}", callbacks, *overrides, *["--local"] * local]
        with self.output.open("wb") as stream:
            self.driver = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=stream, start_new_session=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            print(f"== end of {self.output}:\n{self.text()[-6000:]}")
        while left := self.processes():
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.driver.poll()
            time.sleep(0.1)

    def text(self) -> str:
        """What the command has printed."""
        return self.output.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Pid -> title of every living process of this job."""
        return processes_of(self.driver.pid)

    def actor(self, title: str) -> int:
        """The pid of the only actor of that class."""
        (pid,) = [pid for pid, found in self.processes().items() if found.startswith(f"ray::{title}")]
        return pid

    def worker(self, rank: int) -> int:
        """The pid of a rank, which `hooks.note_process` left."""
        pid = int((self.run_dir / f"rank-{rank}.pid").read_text())
        assert self.processes()[pid].startswith("ray::RayTrainWorker")
        return pid

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Wait until that attempt, counted over the whole run, has logged that step."""
        log = self.run_dir / "metrics.jsonl"

        def reached() -> bool:
            assert self.driver.poll() is None, f"the job ended before step {step} of attempt {attempt}"
            return any(start["attempt"] >= attempt for start in starts(log)) and any(record["step"] >= step for record in read(log))

        wait(reached, START_S, f"step {step} of attempt {attempt}")

    def kill(self, pid: int) -> None:
        """Send SIGKILL to a living process of this job, and see it die."""
        assert pid in self.processes(), f"{pid} was gone before it was killed"
        os.kill(pid, signal.SIGKILL)
        wait(lambda: self.driver.poll() is not None if pid == self.driver.pid else pid not in self.processes(), DIE_S, f"death of {pid}")
        self.killed.append(pid)

    def end(self) -> int:
        """Wait for the command and for the last of its processes; the exit code."""
        code = self.driver.wait(END_S)
        self.gone()
        return code

    def gone(self) -> None:
        """Wait until no process of this job is left."""
        end = time.monotonic() + GONE_S
        while left := self.processes():
            assert time.monotonic() < end, f"still there {GONE_S:.0f} s after the driver: {left}"
            time.sleep(0.1)


def processes_of(session: int) -> dict[int, str]:
    """Pid -> title of every living process of a session."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            title = stat.with_name("cmdline").read_text(errors="replace").replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == session and state not in "ZX":
            found[int(stat.parent.name)] = title
    return found


def wait(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s for {what}"
        time.sleep(0.02)


def train(folder: Path, name: str, *overrides: str, hooks: Sequence[str] = (), local: bool = False) -> Path:
    """Run the command to its end, which must be good; the run's directory."""
    with Job(folder, name, *overrides, hooks=hooks, local=local) as job:
        assert job.end() == 0
        return job.run_dir


def values(run_dir: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric, in the order of the file; a step must not have two."""
    found = [(record["step"], record[name]) for record in read(run_dir / "metrics.jsonl") if name in record]
    assert [step for step, times in Counter(step for step, _ in found).items() if times > 1] == [], f"{name} is logged twice"
    return dict(found)


def exact(numbers: dict[int, float]) -> dict[int, str]:
    """The numbers bit by bit, in a form that is readable when they differ."""
    return {step: number.hex() for step, number in numbers.items()}


def relative(numbers: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative difference; the steps must be the same."""
    assert list(numbers) == list(reference)
    return max(abs(numbers[step] - reference[step]) / abs(reference[step]) for step in reference)


def attempts(run_dir: Path) -> list[int]:
    """Workers of each start of the run."""
    records = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [record["attempt"] for record in records] == list(range(1, len(records) + 1))
    return [record["workers"] for record in records]


def resumed_at(run_dir: Path) -> list[int]:
    """The step that each start of the workers began at."""
    return [record["step"] for record in starts(run_dir / "metrics.jsonl")]


def trained_rows(run_dir: Path) -> dict[int, str]:
    """Position in the order of all epochs -> digest of the row's tokens, of the steps that count: a replayed step counts once.

    From what `hooks.record_rows` left; asserts that no position is in two steps.
    """
    last: dict[tuple[int, int], dict[str, Any]] = {}
    for file in run_dir.glob("rows-*.jsonl"):
        for record in map(json.loads, file.read_text().splitlines()):
            last[record["step"], record["rank"]] = record
    found = [(position, digest) for record in last.values() for position, digest in record["rows"]]
    assert len({position for position, _ in found}) == len(found), "a row position was trained in two steps or on two ranks"
    return dict(sorted(found))


def shard_rows(folder: Path) -> list[str]:
    """Digest of the tokens of every packed training row, in the order of the shards."""
    from faults.hooks import digest

    (shards,) = (folder / "runs" / ".shards").glob("train-*/")
    reader = Reader(shards, seed=0, shuffle=False, window=1)
    return [digest(reader.row(place).tokens.tolist()) for place in range(reader.num_rows)]
