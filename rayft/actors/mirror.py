"""The files of a run on an object store: a worker writes them in a folder of its node, and this copies what is new to the store."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rayft.actors.engine_requests import ANSWER, REQUEST
from rayft.data import store
from rayft.errors import RayftError

log = logging.getLogger("rayft")

EVERY_S = 15.0
"""Time between copies."""
WEIGHTS = "weights/"
"""Files on their way to engines, which end with the push."""
DRIVERS = {"config.yaml", "attempts.jsonl", "lease.json", "evaluation.json", REQUEST, ANSWER}
"""Files of the run's directory that are written to the store itself."""


@contextmanager
def mirrored(folder: Path, remote: str | None, pull: bool) -> Iterator[Callable[[], None]]:
    """Keep the store's copies of a folder's files fresh while the block runs, and complete at its end.

    Args:
        folder: of this process.
        remote: URL of the run's directory; None for a run on a path, whose files are where they belong.
        pull: first fetch the files that the run has left there.

    Yields:
        A function that returns when the store has everything that was written so far; it raises what stands in the way.
    """
    if remote is None:
        yield lambda: None
        return
    if pull:
        for name in store.sizes(remote, "*"):
            if name not in DRIVERS:
                store.fetch(store.join(remote, name), folder / name)
    copies = _Copies(folder, remote)
    stop = threading.Event()
    thread = threading.Thread(target=_repeat, args=(copies.refresh, stop), name="rayft-mirror", daemon=True)
    thread.start()
    try:
        yield copies.refresh
    except BaseException:
        _attempt(copies.refresh)
        raise
    else:
        copies.refresh()
    finally:
        stop.set()
        thread.join()


@contextmanager
def followed(url: str, file: Path) -> Iterator[None]:
    """Keep a local copy of an object fresh while the block runs, and once more at its end."""
    known = [-1]

    def refresh() -> None:
        if store.exists(url) and (size := store.size(url)) != known[0]:
            store.fetch(url, file)
            known[0] = size

    stop = threading.Event()
    thread = threading.Thread(target=_repeat, args=(refresh, stop), name="rayft-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _attempt(refresh)


@contextmanager
def carried(file: Path, url: str) -> Iterator[None]:
    """Fetch what the store has of a file that is written on this node while the block runs, and leave it there at the end."""
    if store.exists(url):
        store.fetch(url, file)
    try:
        yield
    finally:
        _attempt(lambda: store.upload(file, url))


def _repeat(action: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(EVERY_S):
        _attempt(action)


def _attempt(action: Callable[[], None]) -> None:
    """The next time may work, and what must work is repeated by who needs it."""
    try:
        action()
    except (RayftError, FileNotFoundError) as problem:
        log.warning("the run's files are not copied for now: %s", problem)


class _Copies:
    """What the store has of a folder's files, by the state in which each was copied."""

    def __init__(self, folder: Path, remote: str) -> None:
        self._folder, self._remote = folder, remote
        self._copied: dict[str, tuple[int, int]] = {}
        self._one_at_a_time = threading.Lock()

    def refresh(self) -> None:
        """Copy every file that has changed."""
        with self._one_at_a_time:
            for file in sorted(self._folder.rglob("*")):
                name = file.relative_to(self._folder).as_posix()
                if name.startswith(WEIGHTS):
                    continue
                if file.is_file() and not file.name.startswith(".") and file.suffix not in (".new", ".tmp"):
                    stat = file.stat()
                    state = (stat.st_mtime_ns, stat.st_size)
                    if self._copied.get(name) != state:
                        self._copy(file, name)
                        self._copied[name] = state

    def _copy(self, file: Path, name: str) -> None:
        with tempfile.TemporaryDirectory(prefix="rayft-mirror-") as folder:
            snapshot = Path(folder) / file.name  # the file itself may grow meanwhile
            shutil.copyfile(file, snapshot)
            store.upload(snapshot, store.join(self._remote, name))
