"""The OpenEnv client against servers: one that speaks the documented messages, and OpenEnv's own where that is installed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rayft.rollout.env import EnvironmentFailed, Episode, Observation
from rayft.rollout.environments.openenv import OpenEnv

Serve = Callable[[str], Awaitable[Any]]


class Server:
    """A game of numbers for one session at a time; it counts sessions and keeps what it was sent."""

    def __init__(self, sessions: int = 1) -> None:
        self.free, self.began, self.ended, self.sent = sessions, 0, 0, list[dict[str, Any]]()

    async def session(self, request: Any) -> Any:
        from aiohttp import web

        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if not self.free:
            await socket.send_json({"type": "error", "data": {"message": "full", "code": "CAPACITY_REACHED"}})
            await socket.close()
            return socket
        self.free, self.began = self.free - 1, self.began + 1
        async for message in socket:
            asked = json.loads(message.data)
            self.sent.append(asked)
            if asked["type"] == "close":
                break
            await socket.send_json(self.answer(asked["type"], asked["data"]))
        self.free, self.ended = self.free + 1, self.ended + 1
        return socket

    def answer(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        if kind == "reset":
            return {"type": "observation", "data": {"observation": {"text": "guess", "tries": 0}, "reward": None, "done": False}}
        if "number" not in data:
            return {"type": "error", "data": {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": [{"msg": "no number"}]}}
        if data["number"] == "boom":
            return {"type": "error", "data": {"message": "it broke", "code": "EXECUTION_ERROR"}}
        right = data["number"] == 7
        return {"type": "observation", "data": {"observation": {"text": "no"}, "reward": float(right), "done": right}}

    async def run(self, client: Serve) -> Any:
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/ws", self.session)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await client(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_episode_of_json_actions() -> None:
    server = Server()

    async def client(url: str) -> list[Any]:
        episode = Episode(lambda: OpenEnv(url, action=None, observation="text", reset=["level"]), 5.0, "0-1")
        seen: list[Any] = [await episode.reset({"level": 3, "other": 1}, 99)]
        seen += [await episode.step(text) for text in ('{"number": 4}', "seven", "[7]", "{}", '{"number": 7}')]
        await episode.close()
        return seen

    opening, wrong, no_json, no_object, refused, right = asyncio.run(server.run(client))
    assert opening == user("guess") and wrong == Observation(user("no")) and right == Observation(user("no"), True, 1.0)
    assert no_json.reply[0]["content"].startswith("error: the action is not valid JSON")
    assert no_object == Observation(user("error: the action is not a JSON object")) and refused == Observation(user('error: ["no number"]'))
    assert server.sent[0] == {"type": "reset", "data": {"seed": 99, "level": 3}} and server.sent[-1]["type"] == "close"
    assert (server.began, server.ended) == (1, 1)


def test_answers_wait_for_each_other_when_sessions_are_few() -> None:
    server = Server(sessions=1)

    async def one(url: str) -> Any:
        episode = Episode(lambda: OpenEnv(url, action="number"), 10.0, "0-1")
        try:
            await episode.reset({}, 1)
            return (await episode.step("text")).reply
        finally:
            await episode.close()

    async def client(url: str) -> list[Any]:
        return await asyncio.gather(one(url), one(url))

    assert asyncio.run(server.run(client)) == [user('{"text": "no"}')] * 2 and server.began == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [("boom", r"answered with the error EXECUTION_ERROR \(it broke\)"), ("nobody", "reset raised ClientConnectorError")],
)
def test_a_server_that_fails_is_a_failure(number: str, expected: str) -> None:
    async def client(url: str) -> None:
        episode = Episode(lambda: OpenEnv("http://127.0.0.1:9" if number == "nobody" else url, action="number"), 5.0, "0-1")
        try:
            await episode.reset({}, 1)
            await episode.step(number)
        finally:
            await episode.close()

    with pytest.raises(EnvironmentFailed, match=expected):
        asyncio.run(Server().run(client))


def test_openenvs_own_server() -> None:
    openenv = pytest.importorskip("openenv.core.env_server")
    import uvicorn

    class Guess(openenv.Action):  # type: ignore[misc, name-defined]
        number: int

    class Told(openenv.Observation):  # type: ignore[misc, name-defined]
        text: str

    class Game(openenv.Environment):  # type: ignore[misc, name-defined]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Told:
            self.number = (seed or 0) % 10
            return Told(text=f"guess {more.get('level')}")

        def step(self, action: Guess, timeout_s: float | None = None, **more: Any) -> Told:
            if action.number > 99:
                raise OverflowError("too far")
            right = action.number == self.number
            return Told(text="yes" if right else "no", done=right, reward=float(right))

        @property
        def state(self) -> Any:
            return openenv.State()

    app = openenv.create_fastapi_app(Game, Guess, Told, max_concurrent_envs=1)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    async def play(texts: list[str]) -> list[Any]:
        episode = Episode(lambda: OpenEnv(url, action=None, observation="text", reset=["level"]), 10.0, "0-1")
        try:
            return [await episode.reset({"level": 3}, 17), *[await episode.step(text) for text in texts]]
        finally:
            await episode.close()

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(play(['{"number": 4}', '{"number": "x"}', '{"number": 7}']), play(['{"number": 7}']))

    try:
        (opening, wrong, refused, right), (_, again) = asyncio.run(all_at_once())
        assert opening == user("guess 3") and wrong == Observation(user("no")) and right == again == Observation(user("yes"), True, 1.0)
        assert "error: " in refused.reply[0]["content"] and "integer" in refused.reply[0]["content"]
        with pytest.raises(EnvironmentFailed, match=r"EXECUTION_ERROR \(too far\)"):
            asyncio.run(play(['{"number": 100}']))
    finally:
        server.should_exit = True
        thread.join(10)
