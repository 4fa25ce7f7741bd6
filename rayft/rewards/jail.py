"""Runs programs that nobody trusts. A script for a fresh interpreter of its own: it uses the standard library alone, and is not imported.

Standard input has a JSON object a line: first what holds for every run, which is answered by what the kernel refuses, then the runs, each
answered by how it ended. The script moves into namespaces of its own: no network, no process but its own, every file system read-only, a
small one in memory over /tmp. The first process in there starts each run as another, powerless user with limits, and afterwards kills
whatever is left; when it dies, the kernel kills all the rest.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, System V IPC, processes, network
MOUNTS, USERS = 0x00020000, 0x10000000
PRIVATE, READ_ONLY, NO_SETUID, RECURSIVE = 1 << 18, 1, 2, 0x8000
BIND = 0x1000 | 0x4000  # with what is mounted below
MOUNT_SETATTR = 442  # number of the system call on every architecture
DEATH_SIGNAL, KEEP_CAPABILITIES, ADOPT_ORPHANS, NO_NEW_PRIVILEGES = 1, 8, 36, 38
READ_ANY_FILE = 1 << 2
FIRST_UID = 1_000_000_000
"""Users of root's runs start here, each with a number of its own: the limit on processes counts by user, and leaves root out."""
HIDDEN = tuple(folder for folder in ("/proc", "/run", "/dev", "/tmp") if os.path.isdir(folder) and not os.__file__.startswith(f"{folder}/"))
"""Each is an empty file system in memory to a run: sockets, devices and files of others lie there. The last one is the run's folder."""
LIBRARY = (Path(sys.base_prefix), Path(sys.base_prefix).resolve())
"""The folder of the interpreter and its library, as it is named and where it lies."""
PROOF = 100
"""File descriptor on which a run says that it came to its end."""
CHUNK = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Answer line by line until there are no more."""
    request = json.loads(sys.stdin.readline())
    outside = os.getpid()
    try:
        if request["isolated"]:
            _enter_namespaces()
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        if first := os.fork():
            os.waitpid(first, 0)
            return
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        _prctl(ADOPT_ORPHANS, 1)
        if request["isolated"]:
            _forbid_shared_memory()
            _make_read_only()
    except OSError as problem:
        _say({"refused": str(problem)})
        return
    _say({"refused": ""})
    while line := sys.stdin.readline():
        _say(_supervise(json.loads(line), request, FIRST_UID + outside))


def _supervise(run: dict[str, Any], request: dict[str, Any], uid: int) -> dict[str, Any]:
    """Start a run, read what it writes, and end it and all that it started."""
    given = os.memfd_create("stdin")
    os.write(given, run["stdin"].encode())
    os.lseek(given, 0, os.SEEK_SET)
    out, out_end = os.pipe()
    proof, proof_end = os.pipe()
    secret = os.urandom(16).hex().encode()
    child = os.fork()
    if not child:
        _start(run, request, uid, (given, out_end, proof_end), secret)
    for end in (given, out_end, proof_end):
        os.close(end)
    watch = os.pidfd_open(child)
    texts: dict[int, bytes] = {out: b"", proof: b""}
    until, ended = time.monotonic() + request["wall_s"], ""
    while not ended:
        ready = select.select([out, proof, watch], [], [], max(until - time.monotonic(), 0.0))[0]
        for pipe in texts.keys() & ready:
            texts[pipe] += os.read(pipe, CHUNK)
        if max(map(len, texts.values())) > request["output_bytes"]:
            ended = "output"
        elif watch in ready:
            ended = "exit"
        elif not ready:
            ended = "time"
    status = _kill_all(child)
    for pipe in texts:
        os.set_blocking(pipe, False)
        texts[pipe] += _rest(pipe, request["output_bytes"])
    for end in (out, proof, watch):
        os.close(end)
    done = ended == "exit" and status == 0
    texts[proof] = texts[proof].removeprefix(secret) if texts[proof].startswith(secret) else b""
    return {"ended": "done" if done else "failed" if ended == "exit" else ended} | {
        name: texts[pipe][: request["output_bytes"]].decode(errors="replace") for name, pipe in (("out", out), ("proof", proof))
    }


def _rest(pipe: int, most: int) -> bytes:
    """What is left in a pipe that nobody writes to any more."""
    text = b""
    while len(text) <= most and (more := _read_now(pipe)):
        text += more
    return text


def _read_now(pipe: int) -> bytes:
    try:
        return os.read(pipe, CHUNK)
    except BlockingIOError:
        return b""


def _kill_all(child: int) -> int:
    """Kill every process but this one, and wait for all of them; the exit status of `child`."""
    status = -1
    while True:
        if os.getpid() == 1:
            _kill(-1)
        else:
            for pid in _children():
                _kill(pid)
        try:
            pid, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == child:
            status = code


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _children() -> list[int]:
    """Of this process; an orphan below it becomes one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _start(run: dict[str, Any], request: dict[str, Any], uid: int, ends: tuple[int, int, int], secret: bytes) -> None:
    """The run's process; it never returns."""
    status = 1
    try:
        given, out_end, proof_end = ends
        for source, target in ((given, 0), (out_end, 1), (os.open(os.devnull, os.O_WRONLY), 2), (proof_end, PROOF)):
            os.dup2(source, target)
        os.closerange(3, PROOF)
        os.closerange(PROOF + 1, 4096)
        os.setsid()
        kept = 0 if request["isolated"] else _may_read_any_file()
        if request["isolated"]:
            _check(_libc.unshare(MOUNTS))
            _reach_library()
            _hide(run["stdin"])
        os.chdir(HIDDEN[-1] if request["isolated"] else request["folder"])
        _limit(request)
        _give_up_power(uid, kept)
        _prctl(DEATH_SIGNAL, signal.SIGKILL)
        status = _execute(run, secret)
    finally:
        os._exit(status)


def _execute(run: dict[str, Any], secret: bytes) -> int:
    module = types.ModuleType(run["name"])
    sys.modules[run["name"]], sys.argv = module, ["answer.py"]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    proof = b"true"
    try:
        exec(compile(run["code"], "answer.py", "exec"), module.__dict__)
        if run["function"]:
            proof = json.dumps(_function(module, run["function"])(*run["arguments"]), default=repr).encode()
    except SystemExit as end:
        sys.stdout.flush()
        return 0 if end.code in (None, 0) else 1
    sys.stdout.flush()
    os.set_blocking(PROOF, True)
    view = memoryview(secret + proof)  # so that a program cannot just write what a proof looks like
    while view:
        view = view[os.write(PROOF, view) :]
    return 0


def _function(module: types.ModuleType, name: str) -> Any:
    """A function of the program, or a method of its class Solution."""
    return getattr(module, name) if hasattr(module, name) else getattr(module.Solution(), name)


def _limit(request: dict[str, Any]) -> None:
    seconds = math.ceil(request["cpu_s"])
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, request["memory_bytes"], request["memory_bytes"]),
        (resource.RLIMIT_NPROC, request["processes"], request["processes"]),
        (resource.RLIMIT_FSIZE, request["output_bytes"], request["output_bytes"]),
        (resource.RLIMIT_NOFILE, PROOF + 28, PROOF + 28),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def _give_up_power(uid: int, kept: int) -> None:
    """Root becomes another user. Nobody gets power back by a program."""
    if os.geteuid() == 0:
        _prctl(KEEP_CAPABILITIES, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)))
    _prctl(NO_NEW_PRIVILEGES, 1)


def _may_read_any_file() -> int:
    """The capability, when this process is root's and has it, and needs it: its library lies where no other user may go."""
    if not any(map(_closed, LIBRARY)):
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.partition("CapPrm:")[2].split()[0], 16) & READ_ANY_FILE if os.geteuid() == 0 else 0


def _enter_namespaces() -> None:
    """The next child of this process is the first one in there."""
    if os.geteuid() == 0:
        _check(_libc.unshare(NAMESPACES))
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(NAMESPACES | USERS))
    for file, text in (("uid_map", f"{uid} {uid} 1"), ("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", file).write_text(text)


def _forbid_shared_memory() -> None:
    """Segments of System V outlive the process that fills them, and no limit of a process counts them."""
    with suppress(OSError):  # older kernels give this to root alone, and some containers to nobody
        Path("/proc/sys/kernel/shmmni").write_text("0")


def _make_read_only() -> None:
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID, 0, PRIVATE, 0)
    _check(_libc.syscall(MOUNT_SETATTR, -1, b"/", RECURSIVE, attributes, ctypes.sizeof(attributes)))


def _closed(way: Path) -> Path | None:
    """The first folder on the way that only some users may enter, as /root often is."""
    return next((folder for folder in reversed(way.parents) if not folder.stat().st_mode & 1), None)


def _reach_library() -> None:
    """Let the user that root becomes reach the library, and nothing else in the folder that is closed to that user."""
    if os.geteuid() != 0:
        return
    library = os.open(sys.base_prefix, os.O_PATH)
    for way in LIBRARY:
        if (closed := _closed(way)) is not None:
            _check(_libc.mount(b"none", os.fsencode(closed), b"tmpfs", NO_SETUID, b"size=1m,mode=755"))
            way.mkdir(parents=True)
            _check(_libc.mount(f"/proc/self/fd/{library}".encode(), os.fsencode(way), None, BIND, None))
    os.close(library)


def _hide(stdin: str) -> None:
    """File systems of this run alone, which end with it."""
    for folder in HIDDEN:
        _check(_libc.mount(b"none", folder.encode(), b"tmpfs", NO_SETUID, b"size=64m,nr_inodes=4k,mode=1777"))
    for name, text in (("null", ""), ("stdin", stdin)):  # as files, for programs that open them
        Path("/dev", name).write_text(text, encoding="utf-8")
        os.chmod(f"/dev/{name}", 0o666)


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
