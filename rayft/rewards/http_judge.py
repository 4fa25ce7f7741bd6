"""A judge behind an OpenAI-compatible chat endpoint: asks for a score in words, and takes nothing but a score for an answer."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayft.config.environment import credentials
from rayft.config.paths import is_template_file
from rayft.config.schema import HttpJudge
from rayft.errors import ConfigError, DataError, InfrastructureError

SHARE = 0.9
"""Of reward.deadline_s that the tries of a score may take; at its end the whole process is replaced."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
PASSING = (408, 409, 425, 429)
"""States of a request, beside 5xx, after which it is worth another try."""


class Judge:
    """Scores answers one by one.

    Args:
        field: dotted name of the reward, for messages.
        wanted: how it is asked.
        deadline_s: reward.deadline_s.

    Raises:
        ConfigError: the template or the pattern cannot be used, or the variable of the key is not set.
    """

    def __init__(self, field: str, wanted: HttpJudge, deadline_s: float) -> None:
        self._field, self._wanted, self._deadline_s = field, wanted, SHARE * deadline_s
        self._template, self._score = _template(field, wanted.prompt), _pattern(field, wanted.score)
        self._key = credentials(forward=(wanted.api_key_env,)).forwarded[wanted.api_key_env] if wanted.api_key_env else None
        self._room = asyncio.Semaphore(wanted.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """The score as a part of the best one, 0 to 1.

        Raises:
            DataError: the judge's answer has no score, or one that is out of range.
            InfrastructureError: there was no answer in time.
            ConfigError: the endpoint refuses the request.
        """
        try:
            text = self._template.render(prompt=prompt, completion=completion, row=row)
        except jinja2.TemplateError as problem:
            rule = f"cannot be made of row {dict(row)!r:.200}: {problem}"
            raise DataError(f"{self._field}.prompt", None, rule, "Correct the template, or the row") from problem
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await self._ask(text)
        except TimeoutError as problem:
            rule = f"has not answered within {self._deadline_s:g} s"
            raise InfrastructureError(f"{self._field}.url", self._wanted.url, rule, "Look into the endpoint, or ask it less") from problem
        score = self._score_of(answer)
        if score is None or not 0 <= score <= self._wanted.max_score:
            what = "has no score" if score is None else f"has the score {score:g}, which is not between 0 and {self._wanted.max_score:g}"
            rule = f"the answer {what}: {answer[-300:]!r}, asked {text[:300]!r}"
            raise DataError(self._field, None, rule, "Ask for it more clearly, or correct score, json_field or max_score")
        return score / self._wanted.max_score

    async def close(self) -> None:
        """Close the connections; the next question opens them anew."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _ask(self, text: str) -> str:
        """The judge's answer, asked again for as long as there is hope."""
        wait_s = FIRST_WAIT_S
        while True:
            async with self._room:
                answer, again_s = await self._ask_once(text)
            if answer is not None:
                return answer
            await asyncio.sleep(max(again_s, wait_s * random.uniform(0.5, 1.0)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def _ask_once(self, text: str) -> tuple[str | None, float]:
        """The answer, or None and the seconds that the endpoint asks to wait."""
        wanted = self._wanted
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=wanted.timeout_s))
        body = {
            "model": wanted.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": wanted.temperature,
            "max_tokens": wanted.max_tokens,
        }
        try:
            async with self._session.post(f"{wanted.url.rstrip('/')}/chat/completions", json=body) as response:
                given = await response.text(errors="replace")
                if response.status in PASSING or response.status >= 500:
                    after = response.headers.get("Retry-After", "")
                    return None, float(after) if after.isdecimal() else 0.0
                if response.status != 200:
                    rule = f"refuses the request with {response.status}: {given[:200]}"
                    raise ConfigError(f"{self._field}.url", wanted.url, rule, "Correct url, model or api_key_env")
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError):
            return None, 0.0
        return self._content(given), 0.0

    def _content(self, body: str) -> str:
        try:
            return str(json.loads(body)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as problem:
            rule = f"gave what is no chat completion: {body[:200]!r}"
            raise DataError(f"{self._field}.url", self._wanted.url, rule, "Name an OpenAI-compatible endpoint") from problem

    def _score_of(self, answer: str) -> float | None:
        if self._wanted.json_field is None:
            found = self._score.findall(answer)
            return _number(found[-1]) if found else None
        first, last = answer.find("{"), answer.rfind("}")
        try:
            return _number(json.loads(answer[first : last + 1])[self._wanted.json_field])
        except (ValueError, LookupError, TypeError):
            return None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (ValueError, TypeError):
        return None


def _template(field: str, text: str) -> jinja2.Template:
    if is_template_file(text):  # one that is there has been read with the run's other paths
        raise ConfigError(f"{field}.prompt", text, "there is no such file", "Correct the path, or write the template itself")
    try:
        return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(text)
    except jinja2.TemplateSyntaxError as problem:
        raise ConfigError(f"{field}.prompt", text[:80], f"is no Jinja template: {problem}", "Correct it") from problem


def _pattern(field: str, pattern: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except re.error as problem:
        raise ConfigError(f"{field}.score", pattern, f"is no regular expression: {problem}", "Correct it") from problem
    if found.groups != 1:
        raise ConfigError(f"{field}.score", pattern, f"has {found.groups} groups", "Use one group, which holds the number")
    return found
