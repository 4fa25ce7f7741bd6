"""A client of OpenEnv environment servers, by their WebSocket protocol: one connection is one session, and one answer.

Messages are JSON objects with type and data. The client sends reset, step and close; the server answers each but close with an observation
({"observation": {...}, "reward": number or null, "done": bool}) or an error ({"message": ..., "code": ...}).
Source: github.com/meta-pytorch/OpenEnv, openenv-core 0.3.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.data.chat import Message
from rayft.errors import InfrastructureError
from rayft.rollout.env import Observation

MAX_MESSAGE = 100 * 2**20
"""Bytes of the longest message; observations may hold pictures."""
AGAIN_S = 0.5
"""Between tries to get a session from a server that has all its sessions in use."""


class OpenEnv:
    """The environment `openenv`.

    Args:
        url: of the server, http:// or ws://.
        action: field of the action that takes what the policy wrote; null: the policy writes the action itself, a JSON object.
        observation: field of the observation that the policy reads; null shows all of it as JSON.
        reset: columns of the row that go to the server's reset, beside the seed.
    """

    def __init__(self, url: str, action: str | None = "message", observation: str | None = None, reset: Sequence[str] = ()) -> None:
        self._url = f"{url.rstrip('/')}/ws"
        self._action, self._observation, self._columns = action, observation, tuple(reset)
        self._session: Any = None
        self._socket: Any = None

    async def reset(self, row: Mapping[str, Any], seed: int) -> list[Message]:
        """Get a session, as soon as the server has one to give, and begin an episode; what it shows is the policy's first message.

        Raises:
            InfrastructureError: the server cannot be reached, or answers with an error.
        """
        import aiohttp

        self._session = aiohttp.ClientSession()
        while True:
            self._socket = await self._session.ws_connect(self._url, max_msg_size=MAX_MESSAGE)
            answer = await self._ask("reset", {"seed": seed, **{column: row[column] for column in self._columns}})
            if answer["type"] != "error":
                return self._shown(answer["data"])
            if answer["data"].get("code") != "CAPACITY_REACHED":
                raise self._refused(answer["data"])
            await self._socket.close()
            await asyncio.sleep(AGAIN_S)

    async def step(self, text: str) -> Observation:
        """Act; an action that the server finds malformed is answered to the policy, as a message.

        Raises:
            InfrastructureError: the server is gone, or answers with another error.
        """
        action: Any = {self._action: text}
        if self._action is None:
            try:
                action = json.loads(text)
            except json.JSONDecodeError as problem:
                return Observation(_message(f"error: the action is not valid JSON ({problem})"))
            if not isinstance(action, dict):
                return Observation(_message("error: the action is not a JSON object"))
        answer = await self._ask("step", action)
        data = answer["data"]
        if answer["type"] == "error":
            if data.get("code") != "VALIDATION_ERROR":
                raise self._refused(data)
            return Observation(_message(f"error: {json.dumps([problem.get('msg') for problem in data.get('errors', ())])}"))
        return Observation(self._shown(data), bool(data.get("done")), float(data.get("reward") or 0.0))

    async def close(self) -> None:
        """End the session."""
        if self._session is None:
            return
        async with self._session:
            if self._socket is not None and not self._socket.closed:
                await self._socket.send_json({"type": "close"})
                await self._socket.close()

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        await self._socket.send_json({"type": kind, "data": data})
        message = await self._socket.receive()
        if not isinstance(message.data, str):
            rule = "ended the session"
            raise InfrastructureError("environment.arguments.url", self._url, rule, "Look at the server's log")
        answer: dict[str, Any] = json.loads(message.data)
        return answer

    def _shown(self, data: Mapping[str, Any]) -> list[Message]:
        observation = data["observation"]
        shown = observation if self._observation is None else observation[self._observation]
        return _message(shown if isinstance(shown, str) else json.dumps(shown))

    def _refused(self, data: Mapping[str, Any]) -> InfrastructureError:
        rule = f"answered with the error {data.get('code')} ({data.get('message')})"
        return InfrastructureError("environment.arguments.url", self._url, rule, "Look at the server's log")


def _message(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
