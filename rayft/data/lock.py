"""A lock file between processes that may run on different hosts, for work that another process need not repeat."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayft.errors import InfrastructureError

log = logging.getLogger("rayft")

HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lock file that has not changed for this long belongs to nobody."""
POLL_S = 0.5


@contextmanager
def exclusive(lock: Path, deadline_s: float) -> Iterator[None]:
    """Hold a lock file; wait while somebody else does.

    A holder touches its file. It is taken over when its process is gone from this host, or when it has not changed for
    STALE_S by the clock of who waits. Two writers in spite of it do no harm: what they write is the same.

    Raises:
        InfrastructureError: somebody else held it for `deadline_s`.
    """
    name = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    _acquire(lock, name, deadline_s)
    done = threading.Event()
    beat = threading.Thread(target=_touch, args=(lock, done), name="rayft-lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        found = _state(lock)
        if found is not None and found[0] == name:
            lock.unlink(missing_ok=True)


def _acquire(lock: Path, name: str, deadline_s: float) -> None:
    started = changed = time.monotonic()
    seen: tuple[str, int] | None = None
    while not _create(lock, name):
        found, now = _state(lock), time.monotonic()
        if found is None:
            continue
        holder = found[0].rpartition(" ")[0]
        if seen is None:
            log.info("waiting for %s (host, process), which holds %s", holder, lock)
        if found != seen:
            seen, changed = found, now
        if _is_gone(found[0]) or now - changed > STALE_S:
            if _take_over(lock, found, name):
                return
        elif now - started > deadline_s:
            rule = f"{holder} (host, process) still holds it after {deadline_s:.0f} s"
            raise InfrastructureError(str(lock), None, rule, "Wait for it to end and run again, or raise run.deadline_s")
        time.sleep(POLL_S)


def _create(lock: Path, name: str) -> bool:
    """Create the lock file; False when there is one."""
    try:
        with lock.open("x") as stream:
            stream.write(name)
    except FileExistsError:
        return False
    return True


def _take_over(lock: Path, found: tuple[str, int], name: str) -> bool:
    """Put this name into a dead holder's lock. Of several that do so at once, the one whose name stays has it."""
    temporary = lock.with_name(f".{lock.name}.{name.split()[-1]}.tmp")
    temporary.write_text(name)
    if _state(lock) != found:
        temporary.unlink()
        return False
    temporary.replace(lock)
    time.sleep(2 * POLL_S)
    left = _state(lock)
    return left is not None and left[0] == name


def _state(lock: Path) -> tuple[str, int] | None:
    """(name of the holder, time of its last sign of life); None when there is no lock."""
    try:
        return lock.read_text(), lock.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _touch(lock: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_S):
        with suppress(FileNotFoundError):
            os.utime(lock)


def _is_gone(holder: str) -> bool:
    """Whether the holder was a process of this host that no longer exists."""
    host, _, process = holder.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process.split()[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, so it exists
        return False
    return False
