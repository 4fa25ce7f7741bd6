"""Waiting for room in a cluster that is busy, has lost a node or is about to grow: with an end, and with lines that say what for.

The caller has initialised Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rayft.errors import ResourceError

log = logging.getLogger("rayft")

Bundles = Sequence[Mapping[str, float]]
"""What Ray is to reserve for each process: kind of resource -> amount."""

ROOM = "rayft-room"
"""Name of the placement groups that only ask whether there is room."""
POLL_S, FIRST_LINE_S, LINE_S = 2, 5.0, 60.0
"""Between two looks, which Ray counts in whole seconds; until the first line; and from one line to the next."""


def wait_for_room(bundles: Bundles, seconds: float, who: str, stop: Callable[[], bool] = lambda: False) -> bool:
    """Wait until the cluster can place these bundles at once. Nothing is kept; an autoscaler sees what is wanted meanwhile.

    Args:
        bundles: of all processes together.
        seconds: longest wait.
        who: waits, for the sentence.
        stop: asked at every look whether to wait no more.

    Returns:
        Whether there was room; False after `stop`.

    Raises:
        ResourceError: there was none for so long; with what is needed and what is free.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    began, lines = time.monotonic(), _Lines(FIRST_LINE_S)
    group = placement_group(wanted, name=ROOM)
    try:
        while not group.wait(POLL_S):
            if stop():
                return False
            if time.monotonic() - began > seconds:
                rule = f"was not enough for {who} to find room, which needs {_shortage(wanted)}"
                remedy = "Look who holds the rest, ask for less, or raise it; run the same command again to go on"
                raise ResourceError("run.start_s", seconds, rule, remedy)
            if lines.due():
                log.warning("%s waits for %s", who, _shortage(wanted))
    finally:
        remove_placement_group(group)
    return True


def _shortage(bundles: Bundles) -> str:
    import ray

    return shortage(bundles, ray.cluster_resources(), ray.available_resources())


def shortage(bundles: Bundles, totals: Mapping[str, float], free: Mapping[str, float]) -> str:
    """What is needed, free and there of each kind, in words: "2 CPUs (1 of 4 is free)"."""
    parts = []
    for kind in dict.fromkeys(kind for bundle in bundles for kind in bundle):
        needed, left = sum(bundle.get(kind, 0.0) for bundle in bundles), free.get(kind, 0.0)
        amount = f"{needed:g} {kind}{'s' if needed != 1 else ''}"
        parts.append(f"{amount} ({left:g} of {totals.get(kind, 0.0):g} {'is' if left == 1 else 'are'} free)")
    return " and ".join(parts)


@contextmanager
def silence_told(what: str, bundles: Bundles) -> Iterator[Callable[[], None]]:
    """While the block runs, log once a minute that nothing has happened since, with what of the cluster is free.

    Args:
        what: happens, such as "packing".
        bundles: what one process of it takes.

    Yields:
        To be called whenever something has happened.
    """
    lines, end = _Lines(LINE_S), threading.Event()

    def watch() -> None:
        while not end.wait(POLL_S):
            if lines.due():
                log.warning("%s: nothing was finished for a minute; a process of it takes %s", what, _shortage(bundles))

    thread = threading.Thread(target=watch, name="rayft-silence", daemon=True)
    thread.start()
    try:
        yield lines.reset
    finally:
        end.set()
        thread.join()


class _Lines:
    """When the next line is due.

    Args:
        first_s: until the first one.
    """

    def __init__(self, first_s: float) -> None:
        self._next = time.monotonic() + first_s

    def due(self) -> bool:
        """Whether it is; if so, the next one is after LINE_S."""
        due = time.monotonic() >= self._next
        if due:
            self.reset()
        return due

    def reset(self) -> None:
        """The next one is after LINE_S."""
        self._next = time.monotonic() + LINE_S
