"""SIGTERM and Ctrl-C on the driver: the run is asked to stop at its next step with a checkpoint, instead of dying at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rayft.data import store
from rayft.train.requests import STOP_NOW

log = logging.getLogger("rayft")

T = TypeVar("T")


@contextmanager
def stop_on_signals(home: str) -> Iterator[None]:
    """While the block runs, the first signal asks the run to stop, and another one interrupts this process.

    Only a main thread gets signals; elsewhere, such as in a trial of Ray Tune, nothing changes.

    Args:
        home: the run's directory, through which every process is asked.

    Raises:
        KeyboardInterrupt: there was a second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.warning("%s: stopping after this step, with a checkpoint; once more to stop at once", signal.Signals(number).name)
        # Not here: a store may be in the middle of a request of this very thread.
        threading.Thread(target=store.write, args=(store.join(home, STOP_NOW), b""), daemon=True).start()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def beside_signals(function: Callable[[], T]) -> T:
    """The result of a function that runs in a thread of its own, so that it sets up no signals of its own and this thread gets them.

    Ray Train would otherwise abort the run on Ctrl-C.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as problem:  # whoever waits raises it
            result.set_exception(problem)
            if not isinstance(problem, Exception):
                raise

    threading.Thread(target=run, name="rayft-fit", daemon=True).start()
    return result.result()
