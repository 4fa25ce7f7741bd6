"""Signals on the driver ask the run to stop; a second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rayft.actors.stop import beside_signals, stop_on_signals
from rayft.train.requests import STOP_NOW


def wait_for(file: Path) -> None:
    end = time.monotonic() + 5
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupts(number: int, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), stop_on_signals(str(tmp_path)):
        os.kill(os.getpid(), number)
        wait_for(tmp_path / STOP_NOW)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_reaches_the_main_thread_while_it_waits(tmp_path: Path) -> None:
    """As when Ray Train runs the workers; a library that sets up signals itself finds that it is in no main thread."""

    def train() -> str:
        with pytest.raises(ValueError, match="main thread"):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(tmp_path / STOP_NOW)
        return threading.current_thread().name

    with stop_on_signals(str(tmp_path)):
        assert beside_signals(train) == "rayft-fit"


def test_what_the_function_raises_is_raised() -> None:
    def fail() -> None:
        raise LookupError("lost")

    with pytest.raises(LookupError, match="lost"):
        beside_signals(fail)


def test_other_threads_are_left_alone(tmp_path: Path) -> None:
    def block() -> bool:
        with stop_on_signals(str(tmp_path)):
            return signal.getsignal(signal.SIGTERM) == before

    before = signal.getsignal(signal.SIGTERM)
    assert beside_signals(block)
