"""A tool that runs Python programs of the policy in the sandbox of rewards: no network, no files but its own, limits on everything."""

from __future__ import annotations

from rayft.errors import ConfigError
from rayft.rewards.sandbox import Limits, Program, refusal, run

LIMITS = Limits(cpu_s=5.0)
# The sandbox tells only that a program failed; the policy should read why.
WITH_TRACE = """import sys, traceback
try:
    exec(compile({code!r}, "program.py", "exec"), {{"__name__": "__main__"}})
except Exception:
    traceback.print_exc(limit=-2, file=sys.stdout)
"""


def python(code: str) -> str:
    """Run a Python program and get what it prints. Each program starts afresh.

    Args:
        code: the program
    """
    (outcome,) = run([Program(WITH_TRACE.format(code=code))], LIMITS)
    said = {"done": "", "time": "error: it took too long", "output": "error: it printed too much"}
    return outcome.out + said.get(outcome.ended, "error: it used too much memory or too many processes, or exited with a code")


def check() -> None:
    """Refuse a machine whose kernel does not isolate programs.

    Raises:
        ConfigError: it does not.
    """
    if (why := refusal()) is not None:
        remedy = "Run where the kernel allows namespaces, or leave this tool out"
        raise ConfigError("the tool python", None, f"programs cannot be isolated here: {why}", remedy)
