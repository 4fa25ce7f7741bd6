"""Chat rows: a column of messages, in the spellings that data sets use, to one conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.config.schema import Data, Dataset
from rayft.data.chat import Conversation, Message
from rayft.data.formats.columns import as_text, column
from rayft.errors import DataError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
PART_TEXT = ("text", "content", "value")
FLAGS = ("train", "weight")


def conversation(row: Mapping[str, Any], dataset: Dataset, data: Data, where: str) -> Conversation:
    """The conversation of a chat row.

    Every message has a role and a content: a string, or a list of strings and text parts, which are joined. Other keys
    (tool_calls, name, reasoning_content, ...) go to the template as they are, without those that are null. A message may
    decide for itself whether it counts in the loss: `train` (true or false) or `weight` (0 or 1). A `tools` column, a list
    or its JSON text, goes to the template too.

    Raises:
        DataError: a column or key is missing or has the wrong type, or a role is unknown.
    """
    given = column(row, dataset.messages, where)
    if not isinstance(given, Sequence) or isinstance(given, str):
        rule = f"column {dataset.messages!r} must be a list of messages, but is {type(given).__name__}"
        raise DataError(where, None, rule, "Correct the row, or choose another format for the dataset")
    known = ROLES.union(dataset.roles.values(), data.roles_to_train)
    messages: list[Message] = []
    train: list[bool] = []
    for index, item in enumerate(given):
        place = f"{where}, message {index}"
        if not isinstance(item, Mapping):
            raise DataError(place, None, f"a message must be an object, but is {type(item).__name__}", "Correct the row")
        message = _message(item, dataset, known, place)
        flag = _flag(item, place)
        messages.append(message)
        train.append((data.train_on_inputs or message["role"] in data.roles_to_train) if flag is None else flag)
    return Conversation(messages, tuple(train), data.train_on_inputs, _tools(row.get("tools"), where))


def _message(item: Mapping[str, Any], dataset: Dataset, known: frozenset[str], place: str) -> Message:
    role_key = dataset.role if dataset.role in item else "from"
    content_key = dataset.content if dataset.content in item else "value"
    role = as_text(column(item, role_key if role_key in item else dataset.role, place), f"key {role_key!r}", place)
    role = dataset.roles.get(role, role)
    if role not in known:
        rule = f"the role {role!r} is not one of {', '.join(sorted(known))}"
        raise DataError(place, None, rule, "Map it to one of them with the dataset's roles")
    message: Message = {"role": role}
    content = item.get(content_key)
    if content is not None:
        message["content"] = _text(content, place)
    elif not item.get("tool_calls"):
        raise DataError(place, None, f"the message has no {dataset.content!r}", "Name the key with the dataset's content")
    for key, value in item.items():
        if value is not None and key not in (role_key, content_key, *FLAGS):
            message[key] = value
    for call in message.get("tool_calls") or ():
        if not isinstance(call, Mapping) or not isinstance(call.get("function", call), Mapping) or "name" not in call.get("function", call):
            raise DataError(place, None, "a tool call must be an object with a function's name and arguments", "Correct the row")
    return message


def _text(content: Any, place: str) -> str:
    """The text of a content."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return as_text(content, "the content", place)
    return "".join(_part(part, f"{place}, part {index}") for index, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping):
        return as_text(part, "a content part", place)
    present = {key for key, value in part.items() if value is not None}
    if part.get("type", "text") != "text" or not present.intersection(PART_TEXT):
        raise DataError(place, part.get("type"), "only text parts can be trained on", "Remove the part")
    if present.intersection(FLAGS):
        raise DataError(place, None, "train and weight are read on messages, not on parts", "Split the message, or remove the flag")
    return as_text(next(part[key] for key in PART_TEXT if key in present), "the text", place)


def _flag(item: Mapping[str, Any], place: str) -> bool | None:
    """What a message says about itself: whether it counts in the loss, or nothing."""
    train, weight = item.get("train"), item.get("weight")
    if train is None and weight is None:
        return None
    if train is not None and weight is not None:
        raise DataError(place, None, "train and weight say the same thing twice", "Keep one of them")
    if train is None and not isinstance(weight, bool) and weight in (0, 1):
        return bool(weight)
    if not isinstance(train, bool):
        raise DataError(place, None, "train must be true or false, or weight 0 or 1", "Correct the row")
    return train


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as problem:
            raise DataError(where, None, f"column 'tools' is not JSON ({problem})", "Correct the row") from problem
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(where, None, "column 'tools' must be a list of objects", "Correct the row")
    return [dict(tool) for tool in tools]
