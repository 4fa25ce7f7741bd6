"""Where a run stands on storage: its newest committed checkpoint, who holds it, and what may change when it goes on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.data import store
from rayft.data.store import Location
from rayft.errors import ConfigError, DataError, InfrastructureError, RayftError, room_for

log = logging.getLogger("rayft")

COMMITTED = "progress.json"
"""The file that makes a checkpoint directory count."""

BEST = "best.json"
"""Step and loss of the best evaluation, in the directory of a run that keeps its checkpoint."""

LEASE = "lease.json"
LEASE_EXPIRES_S = 60.0
LEASE_BEAT_S = 10.0
LEASE_SETTLES_S = 2.0
"""On an object store, how long after taking over a dead lease it is read again: of several drivers, the last one to write has it."""

MAY_CHANGE = (
    "run.dir",
    "run.max_failures",
    "run.stop_at",
    "run.deadline_s",
    "run.start_s",
    "run.callbacks",
    "parallel",
    "kernels",
    "batch.micro_rows",
    "checkpoint",
    "eval",
    "export",
    "data.actors",
    "data.cache_dir",
    "data.eval",
    "model.path",
    "batch.micro_tokens",
    "placement",
    "weight_sync",
    "environment.deadline_s",
    "reward.workers",
    "reward.deadline_s",
    "reward.retries",
    "reward.max_dropped",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.kv_cache_gib",
    "rollout.deadline_s",
    "rollout.health_s",
    "rollout.start_s",
    "rollout.restarts",
    "rollout.samples",
    "trackers",
    "env",
)
"""Fields and sections that a resumed run may have otherwise: none of them changes which rows a step sees or what it learns
from them. model.path may move, because the weights' identity is checked on its own."""


@dataclass(frozen=True)
class Restored:
    """A committed checkpoint.

    Attributes:
        directory: where it is, by path or URL.
        progress: what was stored beside the tensors: step, attempt, shards, weights, and of the files on a store sizes and hashes.
    """

    directory: str
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it covers."""
        return int(self.progress["step"])


def checkpoints_dir(home: Location) -> str:
    """Where a run's checkpoints are; for a run on a path also Ray Train's experiment directory."""
    return store.join(home, "checkpoints")


def committed(home: Location) -> list[Restored]:
    """All committed checkpoints of a run's directory, oldest first.

    Raises:
        DataError: a commit mark is damaged.
    """
    top = checkpoints_dir(home)
    marks = [store.join(top, name) for name in store.sizes(top, f"step-*/{COMMITTED}")]
    texts = store.many(store.read, marks)
    found = [Restored(mark.rpartition("/")[0], _progress(mark, text)) for mark, text in zip(marks, texts, strict=True)]
    return sorted(found, key=lambda r: (r.step, int(r.progress["attempt"])))


def _progress(mark: str, text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError as problem:
        remedy = "Delete that folder to resume from an older one, or choose a new run.name"
        raise DataError(mark, None, f"cannot be read ({problem})", remedy) from problem


def newest(home: Location) -> Restored | None:
    """The committed checkpoint with the most steps, or None."""
    found = committed(home)
    return found[-1] if found else None


def best(home: Location) -> Restored | None:
    """The committed checkpoint with the lowest evaluation loss, when the run keeps it."""
    record = store.join(home, BEST)
    step = json.loads(store.read(record))["step"] if store.exists(record) else None
    return next((one for one in reversed(committed(home)) if one.step == step), None)


def surplus(home: Location, keep: int) -> list[Restored]:
    """Committed checkpoints that are neither among the newest `keep` nor the best."""
    kept = best(home)
    return [one for one in committed(home)[:-keep] if kept is None or one.directory != kept.directory]


def prune(home: Location, keep: int) -> None:
    """Delete committed checkpoints but the newest `keep` and the best."""
    for old in surplus(home, keep):
        store.delete_tree(old.directory, mark=COMMITTED)


def unfinished(home: Location) -> list[str]:
    """Checkpoint directories that never got their commit mark."""
    top = checkpoints_dir(home)
    directories = {name.partition("/")[0] for name in store.sizes(top, "step-*/*")}
    if not store.is_url(top):
        directories |= {folder.name for folder in Path(top).glob("step-*")}
    return [store.join(top, name) for name in sorted(directories) if not store.exists(store.join(top, name, COMMITTED))]


def remove_unfinished(home: Location) -> None:
    """Delete checkpoint directories that never got their commit mark. Only the holder of the lease may, before training starts."""
    for directory in unfinished(home):
        store.delete_tree(directory)


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
def lease(home: Location, owner: str) -> Iterator[None]:
    """Hold the run directory, so that two drivers never write in it at once.

    The lease is a file with owner, host, process and a heartbeat. It is taken over when its heartbeat is older than
    LEASE_EXPIRES_S, or at once when its process ran on this host and is gone.

    Args:
        home: the run's directory, by path (created when missing) or URL.
        owner: shown to whoever is refused.

    Raises:
        ResourceError: the directory cannot be made or written.
        InfrastructureError: somebody else holds it, or took it over meanwhile because this process gave no sign of life.
    """
    file = store.join(home, LEASE)
    mine = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "token": os.urandom(8).hex()}
    if store.is_url(file):
        _take_object(file, mine)
    else:
        store.make_folder(home)
        if not os.access(home, os.W_OK):
            raise store.not_writable(home, "the folder is not writable")
        with open(store.join(home, f".{LEASE}.lock"), "w") as mutex:
            fcntl.flock(mutex, fcntl.LOCK_EX)  # two drivers may find the same dead lease at once
            refuse_held(home)
            _write_lease(file, mine)
    stop, lost = threading.Event(), threading.Event()
    beat = threading.Thread(target=_beat, args=(file, mine, stop, lost), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        if (holder := _read_lease(file)) is not None and holder["token"] == mine["token"]:
            store.delete(file)
    if lost.is_set():
        raise InfrastructureError(
            "run directory", os.fspath(home), "was taken over by another driver", "Find out which one is wanted, and run that one again"
        )


def refuse_held(home: Location) -> None:
    """Refuse when another driver lives that holds the run directory.

    Raises:
        InfrastructureError: naming it.
    """
    holder = _read_lease(store.join(home, LEASE))
    if holder is not None and _alive(holder):
        raise _held(store.join(home, LEASE), holder)


def is_held(home: str) -> bool:
    """Whether a driver lives that holds the run directory."""
    holder = _read_lease(store.join(home, LEASE))
    return holder is not None and _alive(holder)


def _held(file: str, holder: Mapping[str, Any]) -> InfrastructureError:
    return InfrastructureError(
        "run directory",
        file.rpartition("/")[0],
        f"is in use by {holder['owner']} (process {holder['pid']} on {holder['host']})",
        f"Wait for it to end, or choose another run.name; a dead owner's lease ends after {LEASE_EXPIRES_S:.0f} s",
    )


def _take_object(file: str, mine: dict[str, Any]) -> None:
    """Take a lease on an object store: a conditional put, or over a dead one a plain put that must last."""
    if store.create(file, _signed(mine)):
        return
    refuse_held(file.rpartition("/")[0])
    store.write(file, _signed(mine))
    time.sleep(LEASE_SETTLES_S)
    if (holder := _read_lease(file)) is None or holder["token"] != mine["token"]:
        raise _held(file, holder or mine)


def _signed(mine: Mapping[str, Any]) -> bytes:
    return json.dumps({**mine, "heartbeat": time.time()}).encode()


def _write_lease(file: str, mine: dict[str, Any]) -> None:
    temporary = Path(file).with_name(f".{LEASE}.{mine['token']}")
    with room_for(file):
        temporary.write_bytes(_signed(mine))
        temporary.rename(file)


def _beat(file: str, mine: dict[str, Any], stop: threading.Event, lost: threading.Event) -> None:
    """Renew the lease until `stop`, or until it is somebody else's."""
    while not stop.wait(LEASE_BEAT_S):
        try:
            if (holder := _read_lease(file)) is not None and holder["token"] != mine["token"]:
                log.error("%s now belongs to %s", file, holder["owner"])
                lost.set()
                return
            if store.is_url(file):
                store.write(file, _signed(mine))
            else:
                _write_lease(file, mine)
        except (RayftError, OSError) as problem:
            log.warning("the lease is not renewed: %s", problem)


def _read_lease(file: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(store.read(file)))
    except FileNotFoundError:
        return None


def _alive(holder: Mapping[str, Any]) -> bool:
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
