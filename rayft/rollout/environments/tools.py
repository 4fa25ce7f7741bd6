"""Python functions that the policy may call: it writes calls, and reads what they return as messages of the role tool.

An answer without a call is its last turn. A call looks as Hermes and Qwen write it, or as `pattern` says:

    <tool_call>
    {"name": "look", "arguments": {"place": "box"}}
    </tool_call>
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayft.data.chat import Message
from rayft.errors import ConfigError
from rayft.models.tools import tool_schema
from rayft.rollout.env import Observation

HERMES = r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)"


@dataclass(frozen=True)
class Call:
    """A call that the policy wrote.

    Attributes:
        name: of the function.
        arguments: by name.
    """

    name: str
    arguments: Mapping[str, Any]


def parse_call(text: str) -> Call:
    """The call that a JSON text stands for, with the keys name and arguments (or parameters, as some models write).

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"the call is not valid JSON ({problem})") from problem
    arguments = found.get("arguments", found.get("parameters", {})) if isinstance(found, dict) else None
    if arguments is None or not isinstance(arguments, dict) or not isinstance(found.get("name"), str):
        raise ValueError('a call is a JSON object such as {"name": "...", "arguments": {...}}')
    return Call(found["name"], arguments)


class Tools:
    """The environment `tools`. It gives no reward of its own.

    What the policy does wrong it reads as the tool's message, "error: ...": a text that is no call, a name or arguments that do not fit,
    and whatever a function refuses with a ValueError. Anything else that a function raises is a failure of the rollout.

    Args:
        tools: plain or async functions with types and a docstring with `Args:`, from which prompts get their schemas.
        pattern: regular expression whose first group is the JSON text of a call; it may match several times, and a dot matches line ends.

    Raises:
        ConfigError: a function has no schema, or the pattern is none.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], pattern: str = HERMES) -> None:
        self._functions = {tool.__name__: tool for tool in tools}
        self.tools = [tool_schema(tool) for tool in tools]
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as problem:
            raise ConfigError("environment.arguments.pattern", pattern, f"is no regular expression ({problem})", "Correct it") from problem

    def reset(self, row: Mapping[str, Any], seed: int) -> tuple[()]:
        """Nothing is said before the policy."""
        return ()

    def step(self, text: str) -> Observation:
        """Run the calls of a turn, in order; a turn without any is the last."""
        messages = [self._message(found[1]) for found in self._pattern.finditer(text)]
        return Observation(messages, done=not messages)

    def _message(self, text: str) -> Message:
        name = "unknown"
        try:
            call = parse_call(text)
            name = call.name
            content = self._run(call)
        except ValueError as refusal:
            content = f"error: {refusal}"
        return {"role": "tool", "name": name, "content": content}

    def _run(self, call: Call) -> str:
        function = self._functions.get(call.name)
        if function is None:
            raise ValueError(f"there is no tool {call.name}; the tools are {', '.join(self._functions)}")
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as problem:
            raise ValueError(f"{call.name}: {problem}") from problem
        value = function(**call.arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(_value_of(value))
        return value if isinstance(value, str) else json.dumps(value)


async def _value_of(awaitable: Any) -> Any:
    return await awaitable
