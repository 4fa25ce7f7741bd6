"""1 for an answer whose last block of Python passes all tests of the row, run in a sandbox; else 0, or on request the share that passes.

The column `tests` is a list or its JSON text, and all of its items are of one kind:

    "assert add(1, 2) == 3"                  Python that follows the program; it passes when it does not raise
    {"input": "1 2", "output": "3"}          what the program reads and prints, white space aside
    {"input": [1, 2], "output": 3, "fn_name": "add"}      arguments and result of a function, or of a method of the class Solution

or one mapping {"inputs": [...], "outputs": [...], "fn_name": ...} of the two latter kinds, without the name for the former of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from rayft.errors import ConfigError, DataError
from rayft.rewards.sandbox import Limits, Outcome, Program, refusal, run

BLOCK = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")


@dataclass(frozen=True)
class Case:
    """A test of a row.

    Attributes:
        check: Python to run after the program.
        stdin, printed: what it reads, and must print.
        function, arguments, result: a call, and what it must give.
    """

    check: str = ""
    stdin: str = ""
    printed: str | None = None
    function: str = ""
    arguments: tuple[Any, ...] = ()
    result: Any = None


def reward(
    prompt: str,
    completion: str,
    row: Mapping[str, Any],
    *,
    share: bool = False,
    column: str = "tests",
    cpu_s: float = 5.0,
    memory_mb: int = 512,
    isolated: bool = True,
) -> float:
    """Whether the program passes all tests, 0 or 1; an answer without a block of Python has 0.

    Args:
        prompt: is not read.
        completion: the answer.
        row: has the tests.
        share: give the share of the tests that it passes.
        column: that the tests are in.
        cpu_s: seconds of CPU time of a test; on the clock it may take three times as long.
        memory_mb: address space of a test's process.
        isolated: see `sandbox.run`.

    Raises:
        DataError: the row has no tests, or they have none of the forms above.
        ConfigError: the kernel refuses to isolate programs.
    """
    cases = tests(row, column)
    code = program(completion)
    if code is None:
        return 0.0
    programs = [_program(code, case) for case in cases]
    passed = 0
    with closing(run(programs, Limits(cpu_s=cpu_s, memory_bytes=memory_mb << 20), isolated=isolated)) as outcomes:
        for case, outcome in zip(cases, outcomes, strict=True):
            good = passes(case, outcome)
            if not good and not share:
                return 0.0
            passed += good
    return passed / len(cases)


def check(arguments: Mapping[str, Any]) -> None:
    """Refuse a machine whose kernel does not isolate programs.

    Raises:
        ConfigError: it does not, and the argument `isolated` is not false.
    """
    if arguments.get("isolated", True) and (why := refusal()) is not None:
        rule = f"programs cannot be isolated here: {why}"
        remedy = "Run where the kernel allows namespaces, or set the argument isolated to false when all programs can be trusted"
        raise ConfigError("the reward code", None, rule, remedy)


def program(completion: str) -> str | None:
    """The last fenced block of Python, or of no language; None when there is none."""
    blocks = [block["code"] for block in BLOCK.finditer(completion) if block["language"].lower() in PYTHON]
    return blocks[-1] if blocks else None


def tests(row: Mapping[str, Any], column: str) -> list[Case]:
    """The row's tests.

    Raises:
        DataError: there are none, or they have another form.
    """
    given = row.get(column)
    try:
        found = json.loads(given) if isinstance(given, str) else given
        if isinstance(found, Mapping):
            name = {"fn_name": found.get("fn_name")}
            found = [name | {"input": one, "output": other} for one, other in zip(found["inputs"], found["outputs"], strict=True)]
        cases = [_case(one) for one in found or ()]
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        rule = f"are no tests, as {type(problem).__name__}: {problem}"
        raise DataError(column, repr(given)[:80], rule, "Use a form that rayft/rewards/code.py describes") from problem
    if not cases:
        raise DataError(
            column, given, "the row has no tests in this column", "Name the column with the argument column, or take the row out"
        )
    return cases


def passes(case: Case, outcome: Outcome) -> bool:
    """Whether a program did what the test wants."""
    if outcome.ended != "done":
        return False
    if case.printed is not None:
        return outcome.out.split() == case.printed.split()
    if not outcome.proof:
        return False
    if not case.function:
        return True
    try:
        result = json.loads(outcome.proof)
    except (ValueError, RecursionError):  # a whole number of too many digits, say: what a program returns is its own fault
        return False
    return bool(result == case.result or [result] == case.result)  # some data sets put the result into a list


def _program(code: str, case: Case) -> Program:
    name = "answer" if case.printed is None else "__main__"  # tests of functions want no main part
    return Program(f"{code}\n{case.check}", name, case.stdin, case.function, case.arguments)


def _case(test: Any) -> Case:
    if isinstance(test, str):
        return Case(check=test)
    given, wanted, name = test["input"], test["output"], test.get("fn_name")
    if name:
        arguments = given if isinstance(given, list) else [json.loads(line) for line in given.splitlines()]
        return Case(function=name, arguments=tuple(arguments), result=json.loads(wanted) if isinstance(given, str) else wanted)
    return Case(stdin=_text(given), printed=_text(wanted))


def _text(value: Any) -> str:
    """Standard input or output; some data sets have it as a list of lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value))
