"""A lock file between processes that may run on different hosts, for work that another process need not repeat.

On an object store the lock is an object, created by a conditional put, which its holder writes anew to show that it lives.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayft.data import store
from rayft.data.store import Location
from rayft.errors import InfrastructureError, RayftError

log = logging.getLogger("rayft")

HEARTBEAT_S = 10.0
STALE_S = 60.0
"""A lock file that has not changed for this long belongs to nobody."""
POLL_S = 0.5


@contextmanager
def exclusive(lock: Location, deadline_s: float) -> Iterator[None]:
    """Hold a lock file; wait while somebody else does.

    A holder touches its file. It is taken over when its process is gone from this host, or when it has not changed for
    STALE_S by the clock of who waits. Two writers in spite of it do no harm: what they write is the same.

    Raises:
        InfrastructureError: somebody else held it for `deadline_s`.
    """
    name = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    _acquire(lock, name, deadline_s)
    done = threading.Event()
    beat = threading.Thread(target=_touch, args=(lock, name, done), name="rayft-lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        found = _state(lock)
        if found is not None and found[0] == name:
            store.delete(lock)


def _acquire(lock: Location, name: str, deadline_s: float) -> None:
    started = changed = time.monotonic()
    seen: tuple[str, int] | None = None
    while not store.create(lock, name.encode()):
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
            raise InfrastructureError(os.fspath(lock), None, rule, "Wait for it to end and run again, or raise run.deadline_s")
        time.sleep(POLL_S)


def _take_over(lock: Location, found: tuple[str, int], name: str) -> bool:
    """Put this name into a dead holder's lock. Of several that do so at once, the one whose name stays has it."""
    if store.is_url(lock):
        if _state(lock) != found:
            return False
        store.write(lock, name.encode())
    else:
        file = Path(lock)
        temporary = file.with_name(f".{file.name}.{name.split()[-1]}.tmp")
        temporary.write_text(name)
        if _state(lock) != found:
            temporary.unlink()
            return False
        temporary.replace(file)
    time.sleep(2 * POLL_S)
    left = _state(lock)
    return left is not None and left[0] == name


def _state(lock: Location) -> tuple[str, int] | None:
    """(name of the holder, time or number of its last sign of life); None when there is no lock."""
    try:
        name, _, beat = store.read(lock).decode().partition("\n")
        return name, int(beat or 0) if store.is_url(lock) else os.stat(lock).st_mtime_ns
    except FileNotFoundError:
        return None


def _touch(lock: Location, name: str, done: threading.Event) -> None:
    """Give signs of life until `done`, in one's own lock only."""
    while not done.wait(HEARTBEAT_S):
        try:
            if not store.is_url(lock):
                os.utime(lock)
            elif (found := _state(lock)) is not None and found[0] == name:
                store.write(lock, f"{name}\n{found[1] + 1}".encode())
        except FileNotFoundError:
            continue
        except RayftError as problem:
            log.warning("no sign of life in %s: %s", lock, problem)


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
