"""Code by its tests: what passes, and programs that try everything but are right: 0 each, in time, with nothing left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rayft.errors import DataError
from rayft.rewards import code, sandbox
from rayft.rewards.sandbox import Limits, Program, refusal, run

needs_namespaces = pytest.mark.skipif(refusal() is not None, reason=f"programs cannot be isolated: {refusal()}")

ADD = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n"
LIMITS = Limits(cpu_s=0.4)
READS_SHADOW = "PermissionError" if Path("/etc/shadow").exists() else "FileNotFoundError"
SLACK_S = 20.0
"""Beyond the sandbox's own deadline, on a machine that is busy with other tests."""


def answer(*blocks: str) -> str:
    return "\n".join(f"so:\n```python\n{block}```" for block in blocks)


FORMS = [
    ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    [{"input": "1 2", "output": " 3\n"}, {"input": ["-1 1"], "output": ["0"]}],
    [{"input": [1, 2], "output": 3, "fn_name": "add"}, {"input": "-1\n1", "output": "0", "fn_name": "add"}],
    {"inputs": ["1 2\n", "-1 1\n"], "outputs": ["3\n", "0\n"]},
    {"inputs": [[1, 2], [-1, 1]], "outputs": [[3], [0]], "fn_name": "add"},
]


@needs_namespaces
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_every_form_of_tests_tells_right_from_wrong(form: object) -> None:
    for tests in (form, json.dumps(form)):
        assert code.reward("", answer("print('first')\n", ADD), {"tests": tests}) == 1.0
    always_zero = ADD.replace("return a + b", "return 0")
    assert code.reward("", answer(always_zero), {"tests": form}) == 0.0
    assert code.reward("", answer(always_zero), {"mine": form}, share=True, column="mine") == 0.5


@needs_namespaces
def test_methods_classes_and_the_library_work() -> None:
    source = (
        "import collections, dataclasses, heapq, re\nfrom typing import List\n@dataclasses.dataclass\nclass P:\n    x: int\n"
        "class Solution:\n    def double(self, xs: List[int]): return [P(2 * x).x for x in xs], True\n"
    )
    test = {"input": [[1, 2]], "output": [[2, 4], True], "fn_name": "double"}
    assert code.reward("", answer(source), {"tests": [test]}) == 1.0
    device = "import subprocess\nsubprocess.run(['true'], stdout=subprocess.DEVNULL)\nprint(open('/dev/stdin').read())\n"
    assert code.reward("", answer(device), {"tests": [{"input": "1\n2", "output": "1 2"}]}) == 1.0
    assert (
        code.reward("", answer("import sys\nprint(sys.stdin.read()[::-1])\nsys.exit(0)\n"), {"tests": [{"input": "ab", "output": "ba"}]})
        == 1
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```\n```text\nb\n```", "a\n"),
        ("1. so\n   ```py\n   a\n   ```\nend", "   a\n"),
        ("```python\na\n", None),
        ("a = 1", None),
        ("```js\na\n```", None),
    ],
)
def test_the_last_block_of_python_counts(text: str, found: str | None) -> None:
    assert code.program(text) == found


@pytest.mark.parametrize(
    "tests",
    [None, [], "[", "{}", 5, [5], [{"input": "1"}], {"inputs": ["1"], "outputs": []}, [{"input": 5, "output": 5, "fn_name": "f"}]],
    ids=repr,
)
def test_a_row_without_usable_tests_is_an_error(tests: object) -> None:
    with pytest.raises(DataError, match="tests"):
        code.reward("", "no program at all", {"tests": tests})
    with pytest.raises(DataError, match=re.escape("tests: the row has no tests in this column. Name the column")):
        code.reward("", answer(ADD), {"other": ["assert True"]})


def test_a_kernel_that_refuses_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayft.errors import ConfigError

    monkeypatch.setattr(code, "refusal", lambda: "Operation not permitted")
    with pytest.raises(ConfigError, match=re.escape("programs cannot be isolated here: Operation not permitted. Run where")):
        code.check({})
    code.check({"isolated": False})


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignores its limit": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "memory": "x = bytearray(1 << 30)",
    "many threads": "import threading, time\n[threading.Thread(target=time.sleep, args=(99,)).start() for _ in range(99)]",
    "prints without end": "while True: print('x' * 1000000)",
    "large file": "f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
    "recursion": "def f(): f()\nf()",
    "exits early": "raise SystemExit",
    "exits silently": "import os\nos._exit(0)",
    "kills its parents": "import os\nos.kill(-1, 9)",
    "forges its end": "import os\nos.write(100, b'true')\nos._exit(0)",
    "raises": "1 / 0",
    "no Python": "def",
}


@needs_namespaces
@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_an_answer_has_zero_in_time_and_leaves_nothing(name: str) -> None:
    start, before = time.monotonic(), set(Path("/tmp").glob("rayft-code-*"))
    value = code.reward("", answer(ATTACKS[name] + "\n"), {"tests": ["assert True"]}, cpu_s=LIMITS.cpu_s)
    assert value == 0.0
    assert time.monotonic() - start < sandbox.WALL * LIMITS.cpu_s + SLACK_S
    assert children(os.getpid()) == [] and set(Path("/tmp").glob("rayft-code-*")) <= before


@needs_namespaces
@pytest.mark.parametrize("digits", [1, 5000])
def test_a_result_that_cannot_be_read_is_wrong_and_no_error(digits: int) -> None:
    source = f"import sys\nsys.set_int_max_str_digits(0)\ndef f(): return 10 ** {digits}\n"
    assert code.reward("", answer(source), {"tests": [{"input": [], "output": 1, "fn_name": "f"}]}) == 0.0


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="older kernels let root alone limit segments")
def test_a_program_has_no_memory_that_outlives_it() -> None:
    script = "import ctypes\nprint(ctypes.CDLL(None).shmget(0, 4096, 0o1777))"
    (outcome,) = run([Program(script)], LIMITS)
    assert outcome.out == "-1\n"


@needs_namespaces
def test_a_program_sees_neither_files_nor_network_nor_processes_of_others(tmp_path: Path) -> None:
    outside, mine = Path(__file__).with_name("left-by-a-program"), tmp_path / "seen"
    mine.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"""
import os, socket
def tried(what):
    try: return bool(what()) or True
    except Exception: return False
print(tried(lambda: open({str(outside)!r}, "w")), tried(lambda: open({str(Path.cwd() / "x")!r}, "w")),
      tried(lambda: socket.create_connection(("127.0.0.1", {port}), 2)), tried(lambda: socket.create_connection(("1.1.1.1", 53), 2)),
      tried(lambda: os.kill({os.getpid()}, 0)), os.path.exists({str(mine)!r}) and {str(mine)!r}.startswith("/tmp"),
      tried(lambda: open("here", "w").write("1")),
      dict(os.environ).keys() - {{"LC_CTYPE"}}, os.listdir("/proc"), sorted(os.listdir("/dev")))
"""
        first, second = run([Program(script), Program("import os; print(os.listdir())")], LIMITS)
    assert first.out == "False False False False False False True set() [] ['null', 'stdin']\n"
    assert second.out == "[]\n", "each run has a folder of its own"
    assert not outside.exists()


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="the files of other users are closed to this one")
def test_a_program_of_root_reads_no_file_that_is_closed_to_others_and_has_no_power() -> None:
    with tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as mine, tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as nobodys:
        os.chmod(nobodys.name, 0)
        os.chown(nobodys.name, 12345, 12345)
        way = Path(sys.base_prefix)
        closed = [str(folder) for folder in reversed(way.parents) if not folder.stat().st_mode & 1][:1]  # /root, say
        inside = [[way.relative_to(folder).parts[0]] for folder in closed]
        script = f"""
import ctypes, fractions, os
for file in {[mine.name, nobodys.name, "/etc/shadow"]}:
    try:
        print(open(file).read())
    except OSError as problem:
        print(type(problem).__name__)
print(os.getuid() > 10**9, fractions.Fraction(1, 2), [os.listdir(folder) for folder in {closed}])
header, power = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
print(ctypes.CDLL(None).capget(header, power), list(power))
"""
        (outcome,) = run([Program(script)], LIMITS)
    assert outcome.out.splitlines() == ["PermissionError", "PermissionError", READS_SHADOW, f"True 1/2 {inside}", "0 [0, 0, 0, 0, 0, 0]"]


DAEMON = (
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\nos.wait()\n"
)


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=needs_namespaces), False])
def test_a_child_does_not_outlive_its_program(isolated: bool) -> None:
    before = python_sleepers()
    (outcome,) = run([Program(DAEMON + "print('started')")], LIMITS, isolated=isolated)
    assert outcome.out == "started\n"
    assert python_sleepers() <= before


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=needs_namespaces), False])
def test_a_program_dies_with_the_process_that_scores(isolated: bool) -> None:
    before = python_sleepers()
    start = (
        "from rayft.rewards.sandbox import *\nprint('up', flush=True)\n"
        f"list(run([Program('import time; time.sleep(1000)')], Limits(cpu_s=300.0), isolated={isolated}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        until = time.monotonic() + SLACK_S
        while len(python_sleepers() - before) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        assert len(python_sleepers() - before) == 3, "the sandbox, its first process and the program"
        owner.kill()
    while python_sleepers() - before and time.monotonic() < until:
        time.sleep(0.02)
    assert python_sleepers() <= before


def test_without_isolation_limits_hold_all_the_same() -> None:
    for name in ("fork bomb", "memory", "prints without end", "exits early"):
        (outcome,) = run([Program(ATTACKS[name])], LIMITS, isolated=False)
        assert not outcome.proof, name
    assert children(os.getpid()) == []


def children(pid: int) -> list[str]:
    """Command lines of the children of a process, dead ones that nobody waited for included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(stat.with_name("cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def python_sleepers() -> set[str]:
    """Pids of all processes of sandboxes."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(sandbox.JAIL) in file.read_text():
                found.add(file.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
