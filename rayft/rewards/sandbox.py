"""Runs Python programs where they can do no harm; `jail.py` is what happens in there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rayft.errors import ConfigError, DataError

JAIL = Path(__file__).with_name("jail.py")
WALL = 3
"""Seconds on the clock for each second of CPU time, and so for a program that sleeps."""
SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Sandboxes of this process at a time, so that none starves another of the time that it is allowed."""


@dataclass(frozen=True)
class Program:
    """What to run once.

    Attributes:
        code: Python source.
        name: its `__name__`.
        stdin: what it may read.
        function: name of a function that is called afterwards, or of a method of the class Solution.
        arguments: of that function.
    """

    code: str
    name: str = "__main__"
    stdin: str = ""
    function: str = ""
    arguments: Sequence[Any] = ()


@dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
        cpu_s: seconds of CPU time.
        memory_bytes: address space of each of its processes.
        output_bytes: of what it prints, and of each file.
        processes: at a time, threads included.
    """

    cpu_s: float = 5.0
    memory_bytes: int = 1 << 29
    output_bytes: int = 1 << 20
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended: done, failed (it raised, exited with a code, or a limit of the kernel ended it), time or output.
        out: what it printed.
        proof: what its function returned, as JSON, or true; empty when it did not come to its end.
    """

    ended: str
    out: str = field(repr=False)
    proof: str = field(repr=False)


def run(programs: Sequence[Program], limits: Limits, *, isolated: bool = True) -> Generator[Outcome, None, None]:
    """Run programs one after the other; what is not asked for any more is not run.

    Args:
        programs: each starts afresh, in an empty folder that is gone afterwards.
        limits: of each.
        isolated: false leaves out the namespaces, which kernels of many containers refuse: a program can then use the network,
            write where the user of this process may, and signal that user's other processes, unless the user is root.

    Raises:
        ConfigError: the kernel refuses the namespaces.
        DataError: the sandbox itself died.
    """
    with SLOTS, tempfile.TemporaryDirectory(prefix="rayft-code-") as folder:
        os.chmod(folder, 0o777)
        command = [sys.executable, "-I", "-S", "-B", str(JAIL)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/") as jail:
            common = {"wall_s": WALL * limits.cpu_s, "isolated": isolated, "folder": folder}
            refused = _answer(jail, asdict(limits) | common)["refused"]
            if refused:
                rule = "is what the kernel says to namespaces, in which programs can do no harm"
                remedy = "Run rewards where it allows them, or set the argument isolated to false when all programs can be trusted"
                raise ConfigError("sandbox", refused, rule, remedy)
            for program in programs:
                yield Outcome(**_answer(jail, asdict(program)))


@cache
def refusal() -> str | None:
    """Why programs cannot be isolated on this machine; None when they can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    try:
        (outcome,) = run([Program("import decimal\nprint(decimal.Decimal(6) * 7)")], Limits())  # of the library, which must be in reach
    except ConfigError as problem:
        return str(problem.value)
    return None if outcome.out == "42\n" else f"a first program ended with {outcome}"


def _answer(jail: subprocess.Popen[bytes], line: dict[str, Any]) -> dict[str, Any]:
    assert jail.stdin is not None and jail.stdout is not None
    jail.stdin.write(json.dumps(line).encode() + b"\n")
    jail.stdin.flush()
    answer = jail.stdout.readline()
    if not answer:
        raise DataError("sandbox", None, f"died with code {jail.wait()}", "Look for a full memory or process table")
    return json.loads(answer)  # type: ignore[no-any-return]
