"""A judge behind HTTP: what it is asked, how its words become a number, and everything that an endpoint may do instead of answering."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from rayft.config.schema import HttpJudge
from rayft.errors import ConfigError, DataError, InfrastructureError, RayftError
from rayft.rewards import http_judge
from rayft.rewards.http_judge import Judge

Handler = Callable[[web.Request, int], Awaitable[web.StreamResponse]]
FIELD = "reward.functions.quality.judge"
PROMPT = "Question: {{ prompt }} Answer: {{ completion }} Topic: {{ row.topic }}. Say score: 0 to 10."
ROW = {"topic": "zoo"}


def completion(text: object) -> web.Response:
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


async def asked(answer: Handler, count: int = 1, deadline_s: float = 10.0, **fields: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """What `count` questions at once gave, each a reward or an error, and the bodies of the requests with their headers."""
    seen: list[dict[str, Any]] = []

    async def post(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json() | {"key": request.headers.get("Authorization")})
        return await answer(request, len(seen))

    app = web.Application()
    app.router.add_post("/v1/chat/completions", post)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]
    wanted = HttpJudge.model_validate({"url": f"http://127.0.0.1:{port}/v1/", "model": "m", "prompt": PROMPT} | fields)
    judge = Judge(FIELD, wanted, deadline_s)
    try:
        tries = (judge.reward("why?", f"because {number}", ROW) for number in range(count))
        return list(await asyncio.gather(*tries, return_exceptions=True)), seen
    finally:
        await judge.close()
        await runner.cleanup()


def says(text: object) -> Handler:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        return completion(text)

    return answer


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_judge, "FIRST_WAIT_S", 0.02)


def test_the_judge_is_asked_with_columns_and_key_and_its_score_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    (value,), (body,) = asyncio.run(asked(says("I thought of score: 2 first.\nScore: 7.5"), api_key_env="JUDGE_KEY", temperature=0.5))
    assert value == 0.75
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Question: why? Answer: because 0 Topic: zoo. Say score: 0 to 10."}],
        "temperature": 0.5,
        "max_tokens": 512,
        "key": "Bearer secret",
    }


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ('{"why": {"a": 1}, "points": 3}', {"json_field": "points", "max_score": 4.0}, 0.75),
        ('Sure:\n```json\n{"points": "2"}\n```', {"json_field": "points"}, 0.2),
        ("verdict 1/1", {"score": r"(\d)/1", "max_score": 1.0}, 1.0),
    ],
)
def test_scores_are_found_where_the_run_says(text: str, fields: dict[str, Any], expected: float) -> None:
    (value,), _ = asyncio.run(asked(says(text), **fields))
    assert value == expected


@pytest.mark.parametrize(
    ("text", "fields", "sentence"),
    [
        ("A fine answer.", {}, "the answer has no score: 'A fine answer.', asked 'Question: why? Answer: because 0 Topic: zoo."),
        ("score: 11", {}, "has the score 11, which is not between 0 and 10"),
        ("score: -1", {}, "has the score -1, which is not between 0 and 10"),
        ("score: 5", {"json_field": "points"}, "has no score"),
        ('{"points": true}', {"json_field": "points"}, "has no score"),
        ('{"points": NaN}', {"json_field": "points"}, "has the score nan"),
        (None, {}, "has no score: 'None'"),
    ],
)
def test_an_answer_without_a_usable_score_is_an_error_with_its_question(text: object, fields: dict[str, Any], sentence: str) -> None:
    (problem,), seen = asyncio.run(asked(says(text), **fields))
    assert isinstance(problem, DataError) and sentence in str(problem) and len(seen) == 1


def test_what_passes_is_tried_again() -> None:
    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        if number == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        if number == 2:
            return web.Response(status=500, text="oh")
        if number == 3:
            await asyncio.sleep(5)  # longer than timeout_s
        if number == 4:
            assert request.transport is not None
            request.transport.abort()  # the connection breaks
        return completion("score: 5")

    start = time.monotonic()
    (value,), seen = asyncio.run(asked(answer, timeout_s=0.3))
    assert value == 0.5 and len(seen) == 5
    assert 1.3 <= time.monotonic() - start < 5, "the wait that was asked for, and one time limit"


async def overloaded(request: web.Request, number: int) -> web.StreamResponse:
    return web.Response(status=503)


async def stalled(request: web.Request, number: int) -> web.StreamResponse:
    await asyncio.sleep(5)
    return completion("score: 5")


async def forbidden(request: web.Request, number: int) -> web.StreamResponse:
    return web.Response(status=401, text="no such key")


async def garbage(request: web.Request, number: int) -> web.StreamResponse:
    return web.Response(text="<html>welcome</html>")


async def other(request: web.Request, number: int) -> web.StreamResponse:
    return web.json_response({"choices": []})


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (overloaded, InfrastructureError, "has not answered within 0.45 s. Look into the endpoint"),
        (stalled, InfrastructureError, "has not answered within 0.45 s. Look into the endpoint"),
        (forbidden, ConfigError, "refuses the request with 401: no such key. Correct url, model or api_key_env."),
        (garbage, DataError, "gave what is no chat completion: '<html>welcome</html>'."),
        (other, DataError, "gave what is no chat completion: '{\"choices\": []}'."),
    ],
)
def test_what_does_not_pass_is_said_in_time(answer: Handler, kind: type[RayftError], sentence: str) -> None:
    start = time.monotonic()
    (problem,), _ = asyncio.run(asked(answer, deadline_s=0.5))
    assert type(problem) is kind and sentence in str(problem)
    assert time.monotonic() - start < 3


def test_no_more_requests_at_a_time_than_allowed() -> None:
    now, most = 0, 0

    async def answer(request: web.Request, number: int) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return completion(json.dumps({"s": number % 10}))

    values, seen = asyncio.run(asked(answer, count=9, concurrency=3, json_field="s"))
    assert (len(seen), most, sorted(values)) == (9, 3, [number / 10 for number in range(1, 10)])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "{{ prompt"}, f"{FIELD}.prompt = '{{{{ prompt': is no Jinja template"),
        ({"prompt": "./none.jinja"}, f"{FIELD}.prompt = './none.jinja': there is no such file"),
        ({"score": "("}, f"{FIELD}.score = '(': is no regular expression"),
        ({"score": "[0-9]+"}, f"{FIELD}.score = '[0-9]+': has 0 groups. Use one group"),
        ({"api_key_env": "NOT_THERE"}, "env.forward = 'NOT_THERE': is not set"),
    ],
)
def test_a_judge_that_can_never_be_asked_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Judge(FIELD, HttpJudge.model_validate({"url": "http://h/v1", "model": "m", "prompt": PROMPT} | fields), 1.0)


def test_a_template_that_asks_for_a_missing_column_is_an_error_of_the_row() -> None:
    async def run() -> None:
        judge = Judge(FIELD, HttpJudge(url="http://h/v1", model="m", prompt="{{ row.nothing }}"), 1.0)
        with pytest.raises(DataError, match="cannot be made of row"):
            await judge.reward("", "", ROW)

    asyncio.run(run())
