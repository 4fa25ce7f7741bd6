"""Another number of engines, asked of a run under way by files in its directory: a request, and the answer of its driver."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from rayft import errors
from rayft.checkpoint import resume
from rayft.data import store
from rayft.errors import InfrastructureError, RayftError

REQUEST, ANSWER = "engines.json", "engines-answer.json"
LOOK_S = 1.0
MARGIN_S = 300.0
"""What an answer may take beyond the start of engines and the end of groups: a trainer on its way back is waited for."""


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        token: names it.
        engines: that the pool is to have.
    """

    token: str
    engines: int


def ask(home: str, engines: int, deadline_s: float) -> str:
    """Ask the driver that holds a run's directory for so many engines, and wait; what it did, in a sentence.

    Raises:
        RayftError: why it did nothing, as the driver gave it.
        InfrastructureError: no driver holds the directory, it went or only came meanwhile, another request is under way, or there was no
            answer in time.
    """
    _require_driver(home)
    token, request, answer = uuid.uuid4().hex, store.join(home, REQUEST), store.join(home, ANSWER)
    if (other := asked(home)) is not None:
        remedy = f"Wait for its answer; delete {request} if nobody waits for it"
        raise InfrastructureError("engines", engines, f"another request, for {other.engines}, is under way", remedy)
    store.write(request, json.dumps({"token": token, "engines": engines}).encode())
    until = time.monotonic() + deadline_s
    try:
        while time.monotonic() < until:
            waiting = asked(home)  # before the answer, which comes before the request is deleted
            if (found := _read(answer)) is not None and found["token"] == token:
                store.delete(answer)
                if found["error"] is not None:
                    kind, *fields = found["error"]
                    raise getattr(errors, kind)(*fields)
                return str(found["done"])
            _require_driver(home)
            if waiting is None or waiting.token != token:
                raise InfrastructureError("engines", engines, "the request was dropped by a run that has only just begun", "Ask again")
            time.sleep(LOOK_S)
    finally:
        if (left := asked(home)) is not None and left.token == token:  # nobody would read the answer
            store.delete(request)
    raise InfrastructureError("engines", engines, f"the run gave no answer within {deadline_s:g} s", "Look into its log, and ask again")


def asked(home: str) -> Asked | None:
    """The request that waits for an answer."""
    found = _read(store.join(home, REQUEST))
    return Asked(found["token"], found["engines"]) if found is not None else None


def answer(home: str, request: Asked, done: str, error: RayftError | None) -> None:
    """Say what came of a request, which is thereby over."""
    said = None if error is None else [type(error).__name__, error.field, error.value, error.rule, error.remedy]
    store.write(store.join(home, ANSWER), json.dumps({"token": request.token, "done": done, "error": said}).encode())
    store.delete(store.join(home, REQUEST))


def forget(home: str) -> None:
    """Delete what was asked of an earlier command."""
    for name in (REQUEST, ANSWER):
        store.delete(store.join(home, name))


def _require_driver(home: str) -> None:
    if not resume.is_held(home):
        raise InfrastructureError("run directory", home, "no run is under way there", "Start it, or name the directory of one that is")


def _read(file: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(store.read(file)))
    except FileNotFoundError:
        return None
