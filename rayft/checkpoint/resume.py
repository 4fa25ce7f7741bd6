"""Where a run stands on storage: its newest committed checkpoint, who holds it, and what may change when it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.errors import ConfigError, DataError, InfrastructureError

COMMITTED = "progress.json"
"""The file that makes a checkpoint directory count."""

LEASE = "lease.json"
LEASE_EXPIRES_S = 60.0
LEASE_BEAT_S = 10.0

MAY_CHANGE = (
    "run.dir",
    "run.max_failures",
    "run.stop_at",
    "run.deadline_s",
    "run.callbacks",
    "parallel",
    "batch.micro_rows",
    "checkpoint",
    "eval",
    "export",
    "data.actors",
    "data.cache_dir",
    "data.eval",
    "model.path",
)
"""Fields and sections that a resumed run may have otherwise: none of them changes which rows a step sees or what it learns
from them. model.path may move, because the weights' identity is checked on its own."""


@dataclass(frozen=True)
class Restored:
    """A committed checkpoint.

    Attributes:
        directory: where it is.
        progress: what was stored beside the tensors: step, attempt, shards, weights.
    """

    directory: Path
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it covers."""
        return int(self.progress["step"])


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints are; also Ray Train's experiment directory."""
    return run_dir / "checkpoints"


def committed(run_dir: Path) -> list[Restored]:
    """All committed checkpoints, oldest first."""
    marks = checkpoints_dir(run_dir).glob(f"step-*/{COMMITTED}")
    found = [Restored(mark.parent, json.loads(mark.read_text())) for mark in marks]
    return sorted(found, key=lambda r: (r.step, int(r.progress["attempt"])))


def newest(run_dir: Path) -> Restored | None:
    """The committed checkpoint with the most steps, or None."""
    found = committed(run_dir)
    return found[-1] if found else None


def prune(run_dir: Path, keep: int) -> None:
    """Delete committed checkpoints but the newest `keep`."""
    for old in committed(run_dir)[:-keep]:
        (old.directory / COMMITTED).unlink()  # first, so that half of a checkpoint never counts
        shutil.rmtree(old.directory)


def remove_unfinished(run_dir: Path) -> None:
    """Delete checkpoint directories that never got their commit mark. Only the holder of the lease may, before training starts."""
    for directory in checkpoints_dir(run_dir).glob("step-*"):
        if not (directory / COMMITTED).exists():
            shutil.rmtree(directory)


def refuse_changes(changes: Iterable[tuple[str, object, object]]) -> None:
    """Refuse to resume with a configuration that would make another run of it.

    Args:
        changes: (dotted field, value of the run so far, value now).

    Raises:
        ConfigError: listing every field that may not change.
    """
    bad = [change for change in changes if not any(change[0] == may or change[0].startswith(may + ".") for may in MAY_CHANGE)]
    if bad:
        listed = "; ".join(f"{field} was {old!r} and is {new!r}" for field, old, new in bad)
        raise ConfigError(
            "run.name", None, f"this run was started with another configuration: {listed}", "Restore these values, or choose a new run.name"
        )


def refuse_other_base(restored: Restored, identity: Mapping[str, str]) -> None:
    """Refuse a checkpoint that was made from other rows or weights.

    Args:
        restored: the checkpoint.
        identity: name -> digest of what there is now.

    Raises:
        DataError: naming what differs.
    """
    for name, digest in identity.items():
        if restored.progress[name] != digest:
            raise DataError(
                name, None, f"differ from those that {restored.directory} was trained with", "Restore the files, or choose a new run.name"
            )


@contextmanager
def lease(run_dir: Path, owner: str) -> Iterator[None]:
    """Hold the run directory, so that two drivers never write in it at once.

    The lease is a file with owner, host, process and a heartbeat. It is taken over when its heartbeat is older than
    LEASE_EXPIRES_S, or at once when its process ran on this host and is gone.

    Args:
        run_dir: created when missing.
        owner: shown to whoever is refused.

    Raises:
        InfrastructureError: somebody else holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / LEASE
    mine = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "token": os.urandom(8).hex()}
    with (run_dir / f".{LEASE}.lock").open("w") as mutex:
        fcntl.flock(mutex, fcntl.LOCK_EX)  # two drivers may find the same dead lease at once
        holder = _read_lease(file)
        if holder is not None and _alive(holder):
            raise InfrastructureError(
                "run directory",
                str(run_dir),
                f"is in use by {holder['owner']} (process {holder['pid']} on {holder['host']})",
                f"Wait for it to end, or choose another run.name; a dead owner's lease ends after {LEASE_EXPIRES_S:.0f} s",
            )
        _write_lease(file, mine)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, mine, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if (holder := _read_lease(file)) is not None and holder["token"] == mine["token"]:
            file.unlink(missing_ok=True)


def _write_lease(file: Path, mine: dict[str, Any]) -> None:
    temporary = file.with_name(f".{LEASE}.{mine['token']}")
    temporary.write_text(json.dumps(mine | {"heartbeat": time.time()}))
    temporary.rename(file)


def _beat(file: Path, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(LEASE_BEAT_S):
        _write_lease(file, mine)


def _read_lease(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return None


def _alive(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder["heartbeat"]) >= LEASE_EXPIRES_S:
        return False
    return holder["host"] != socket.gethostname() or _runs_here(int(holder["pid"]))


def _runs_here(pid: int) -> bool:
    """Whether a process of this host runs; one that was killed and waits to be reaped does not."""
    status = Path(f"/proc/{pid}/stat")
    if status.exists():
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError) as problem:
        return isinstance(problem, PermissionError)
    return True
