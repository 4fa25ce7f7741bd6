"""Evaluations on held-out prompts: all of the prompts under one policy, or no number."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rayft.actors import held_out
from rayft.actors.held_out import HeldOut
from rayft.errors import InfrastructureError
from rayft.types import Scored


class Prompts:
    """Three of them."""

    def __len__(self) -> int:
        return 3

    def prompt(self, place: int) -> Any:
        """The prompt at a place."""
        return SimpleNamespace(key=str(place))


class Engines:
    """Answers until its weights are gone; then each question fails, as with a dead engine."""

    def __init__(self, lasts: int) -> None:
        self.left, self.evaluation = lasts, cast(HeldOut, None)

    async def ask(self, prompt: Any, n: int, temperature: float) -> tuple[str, Any]:
        if self.left == 0:
            self.evaluation.superseded = True
            raise InfrastructureError("engine", prompt.key, "is gone", "Wait")
        self.left -= 1
        return "engine", n

    async def score(self, n: int) -> Scored:
        ones, lengths = (1.0,) * n, (3,) * n
        return Scored("", {"a": ones}, ones, lengths, lengths, (False,) * n, 0, 0)


@pytest.mark.parametrize(("lasts", "counted"), [(100, 3.0), (4, None)])
def test_an_evaluation_whose_weights_went_before_its_end_has_no_number(
    lasts: int, counted: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(held_out, "PAUSE_S", 0.0)
    engines = Engines(lasts)
    wanted = SimpleNamespace(samples=2, max_prompts=None, correct_from=1.0)
    cfg = SimpleNamespace(eval=wanted, rollout=SimpleNamespace(temperature=1.0, start_s=0.0))
    pool = SimpleNamespace(serving=list)
    engines.evaluation = HeldOut(cast(Any, cfg), cast(Any, Prompts()), cast(Any, engines), cast(Any, pool), 10)
    values = asyncio.run(engines.evaluation.run())
    assert values.get("eval/num_prompts") == counted
    assert ("given up" in caplog.text) == (counted is None)
