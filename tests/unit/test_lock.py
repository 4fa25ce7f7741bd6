"""The lock between processes: one holder at a time, nobody waits for the dead, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayft.data import lock as locks
from rayft.data.lock import exclusive
from rayft.errors import InfrastructureError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 0.4)


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def held_by_turns(lock: Path, count: int) -> list[str]:
    """Let `count` threads take the lock; what they saw, as "in" and "out"."""
    events: list[str] = []

    def hold() -> None:
        with exclusive(lock, 20):
            events.append("in")
            time.sleep(0.05)
            events.append("out")

    threads = [threading.Thread(target=hold) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return events


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    assert held_by_turns(tmp_path / "lock", 4) == ["in", "out"] * 4
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_takes_over_from_a_dead_process(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{socket.gethostname()} {dead_process()} x")
    assert held_by_turns(tmp_path / "lock", 4) == ["in", "out"] * 4


def test_a_process_gone_from_this_host_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STALE_S", 1000.0)
    (tmp_path / "lock").write_text(f"{socket.gethostname()} {dead_process()} x")
    with exclusive(tmp_path / "lock", 0.0):
        pass


def test_a_silent_holder_of_another_host_is_taken_over_from_in_time(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("elsewhere 1 x")
    started = time.monotonic()
    with exclusive(tmp_path / "lock", 20):
        assert 0.4 <= time.monotonic() - started < 10


def test_a_holder_that_gives_signs_of_life_keeps_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("elsewhere 1 x")
    done = threading.Event()
    beat = threading.Thread(target=locks._touch, args=(lock, "elsewhere 1 x", done), daemon=True)
    beat.start()
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"elsewhere 1 .* still holds it after 1 s"), exclusive(lock, 1.0):
        pass
    assert time.monotonic() - started < 5
    done.set()
    beat.join()
    assert lock.read_text() == "elsewhere 1 x"


def test_a_long_holder_outlives_the_stale_time(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", 0):
        before = os.stat(tmp_path / "lock").st_mtime_ns
        time.sleep(0.3)
        assert os.stat(tmp_path / "lock").st_mtime_ns > before


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "lock", 0):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
