"""Rows that reasoning-gym makes, by an address of their own: reasoning-gym://chain_sum?size=1000&seed=7&max_terms=3.

The address names a task of the library, how many rows there are, the seed, and settings of the task. A row is made from (task, seed, place)
alone, so it is the same everywhere, and the reward makes it again instead of carrying what the library remembers of it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from rayft.errors import ConfigError, DataError

SCHEME = "reasoning-gym://"
SIZE = 500
"""Rows of an address that does not say."""
HINT = "Write the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class Task:
    """A task of the library with its settings.

    Attributes:
        name: in the library.
        size: rows.
        seed: of the first row; the next ones count on from it.
        settings: further ones, by name.
    """

    name: str
    size: int = SIZE
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()


def task_of(url: str) -> Task:
    """What an address names."""
    name, _, query = url.removeprefix(SCHEME).partition("?")
    given = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    return Task(name, given.pop("size", SIZE), given.pop("seed", 0), tuple(sorted(given.items())))


def version() -> str:
    """Of the library; another one may make other rows.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as problem:
        raise _missing() from problem


def rows(field: str, url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of an address: a chat of one question, the same as text, and what the reward needs to make it again.

    Raises:
        ConfigError: the library is not installed, or has no such task or setting.
    """
    task = task_of(url)
    try:
        places, made = range(task.size), _made(task)
    except (ValueError, TypeError, AssertionError) as problem:
        rule = f"is refused by reasoning-gym: {problem or type(problem).__name__}"
        raise ConfigError(
            field, url, rule, "Name a task and settings of the library, such as reasoning-gym://chain_sum?size=1000"
        ) from problem
    about = {"task": task.name, "size": task.size, "seed": task.seed, "settings": dict(task.settings)}
    for place in places:
        question, answer = str(made[place]["question"]), str(made[place]["answer"])
        text = f"{question}\n\n{HINT}"
        yield (
            place,
            about
            | {
                "place": place,
                "question": question,
                "answer": answer,
                "text": text,
                "messages": [{"role": "user", "content": text}],
            },
        )


def score(row: Mapping[str, Any], answer: str) -> float:
    """What the library gives an answer to a row of `rows`, mostly 0 to 1.

    Raises:
        DataError: the row is none of these, or the library of this machine makes another one.
        ConfigError: the library is not installed.
    """
    try:
        task = Task(row["task"], row["size"], row["seed"], tuple(sorted(row["settings"].items())))
        place, question = row["place"], row["question"]
    except (KeyError, AttributeError) as problem:
        rule = f"is no row of {SCHEME}, as it lacks {problem}"
        raise DataError("the reward reasoning_gym", None, rule, f"Use it with data.train.NAME.path={SCHEME}TASK") from problem
    made = _made(task)
    entry = made[place]
    if entry["question"] != question:
        rule = f"reasoning-gym {version()} of this machine makes another question at place {place} than the one that was asked"
        raise DataError(f"{SCHEME}{task.name}", None, rule, "Install the same version on every machine")
    return float(made.score_answer(answer, entry))


@functools.cache
def _made(task: Task) -> Any:
    try:
        import reasoning_gym
    except ImportError as problem:
        raise _missing() from problem
    return reasoning_gym.create_dataset(task.name, size=task.size, seed=task.seed, **dict(task.settings))


def _missing() -> ConfigError:
    return ConfigError(SCHEME, None, "needs the package reasoning-gym, which is not installed", "Install rayft[rewards] on every machine")


def _value(text: str) -> Any:
    """Numbers, true and false as such; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
