"""The controller between a trainer and engines that do as they are told: evaluations over its own restart, and its report."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray

from rayft.actors import controller as module
from rayft.actors.controller import Controller, Setup
from rayft.actors.pool import Pool
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.experience.orders import Order
from rayft.types import Prompt, Scored


class Prompts:
    def __init__(self, folder: str, *, seed: int, shuffle: bool) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 3

    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(f"{self.folder}-{ordinal}", ordinal, (1, 2), {})


class Answers:
    """Answers at once, but held-out prompts only when they are not held."""

    hold = False

    def __init__(self, cfg: GrpoRun, pool: Pool, judges: tuple[str, ...]) -> None: ...

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        while prompt.key.startswith("eval") and Answers.hold:
            await asyncio.sleep(0.001)
        return "engine", n

    async def score(self, n: int) -> Scored:
        return Scored("k", {"r": (1.0,) * n}, tuple(map(float, range(n))), (1,) * n, (3,) * n, (False,) * n, 0, 0)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Starts the run's controller, or another one after it, with engines that are up and have the weights that it remembers."""
    monkeypatch.setattr(ray, "get_actor", lambda name: None)
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(Pool, "watch", lambda self: None)
    monkeypatch.setattr(module, "POLL_S", 0.3)
    monkeypatch.setattr(module, "PromptSet", Prompts)
    monkeypatch.setattr(module, "Dispatch", Answers)
    base = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "data.eval.a.path=x", "reward.functions.r.function=exact"]

    def make(*overrides: str) -> Controller:
        cfg = load([], [*base, "rollout.prompts_per_step=1", "rollout.group_size=2", "eval.at_start=true", *overrides])
        assert isinstance(cfg, GrpoRun)
        made = Controller(Setup(cfg, tmp_path, "train", "eval", 9, "driver", 0, ("engine-0",), ()))
        (member,) = made._pool._members
        member.life, member.version = "life", made._pool.current
        return made

    return make


async def order(controller: Controller, step: int, index: int) -> Order:
    while (found := await controller.order(1, step, index, 0)) is None:
        pass
    return found


def test_an_evaluation_survives_the_controller(start: Any) -> None:
    """The first one dies in the middle of it; the second one begins again, and the third tells again what the second knew."""

    async def live() -> None:
        Answers.hold = True
        first = start()
        await first.join(1, 0, 1)
        push = await order(first, 0, 0)
        assert push.kind == "push" and push.version == "1.0"
        await first.pushed(1, 0, ["life"], {})
        batch = await order(first, 0, 1)
        assert batch.kind == "batch" and not [values for _, values in batch.records if "eval/reward" in values]
        assert "weights stay as they are until 3 of 3 held-out prompts are answered" in await first.report()
        first._groups._tasks.clear()

        second = start()
        waiting = asyncio.create_task(second.order(1, 1, 0, 0))
        await asyncio.sleep(0.05)
        assert second._held_out.running and not waiting.done(), "the push of step 1 waits for what is asked of step 0"
        Answers.hold = False
        assert (await waiting).kind == "push"
        await second.pushed(1, 1, ["life"], {})
        assert "held-out" not in await second.report()

        third = start()
        third._wake()
        batch = await order(third, 1, 1)
        (told,) = [(step, values) for step, values in batch.records if "eval/reward" in values]
        assert told[0] == 0 and told[1]["eval/num_prompts"] == 3 and not third._held_out.running

    asyncio.run(asyncio.wait_for(live(), 20))


def test_engines_are_brought_back_to_the_weights_that_are_evaluated(start: Any) -> None:
    """While the trainer has them. Once it has later ones, and no engine those, the evaluation is given up."""

    async def live() -> None:
        Answers.hold = True
        controller = start()
        await controller.join(1, 0, 1)
        await order(controller, 0, 0)
        await controller.pushed(1, 0, ["life"], {})
        await order(controller, 0, 1)
        (member,) = controller._pool._members
        member.life, member.version = "second", ""
        again = await order(controller, 0, 2)
        assert again.kind == "push" and again.engines == (("second", "engine-0"),) and not controller._held_out.superseded
        assert await asyncio.wait_for(controller.order(1, 1, 0, 0), 6) is None
        assert controller._held_out.superseded
        Answers.hold = False

    asyncio.run(asyncio.wait_for(live(), 20))


@pytest.mark.parametrize("told", [False, True])
def test_engines_of_a_push_that_the_trainer_died_in_are_ended(start: Any, told: bool) -> None:
    async def live() -> None:
        controller = start()
        await controller.join(1, 0, 1)
        assert (await order(controller, 0, 0)).kind == "push"
        if told:
            await controller.pushed(1, 0, ["life"], {})
        await controller.join(2, 0, 1)
        (member,) = controller._pool._members
        assert (member.life == "life") == told

    asyncio.run(asyncio.wait_for(live(), 20))


def test_a_lost_group_that_came_back_between_two_questions_is_not_made_once_more(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks repeat what they lost with every question until they have an order."""
    held = asyncio.Event()
    plain = Answers.ask

    async def ask(self: Answers, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        if prompt.key.startswith("train"):
            await held.wait()
        return await plain(self, prompt, n, temperature)

    async def live() -> None:
        monkeypatch.setattr(Answers, "hold", False)
        monkeypatch.setattr(Answers, "ask", ask)
        held.set()
        controller = start()
        await controller.join(1, 0, 1)
        await order(controller, 0, 0)
        await controller.pushed(1, 0, ["life"], {})
        assert (await order(controller, 0, 1)).kind == "batch"
        held.clear()
        assert await controller.order(1, 0, 2, 0, lost=[0]) is None, "it is being made again"
        held.set()
        while controller._journal.state.missing:
            await asyncio.sleep(0.01)
        again = await controller.order(1, 0, 2, 0, lost=[0])
        assert again is not None and again.kind == "batch"
        assert (tmp_path / "journal.jsonl").read_text().count('"event": "lost"') == 1

    asyncio.run(asyncio.wait_for(live(), 20))


REPLAY = ("rollout.prompts_per_step=2", "algorithm.type=dapo", "algorithm.replay=1", "eval.at_start=false")


def test_a_replayed_group_stays_until_its_batches_are_covered_and_is_made_again_for_them(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups 0 and 1 are trained; 2 has no signal, so step 1 trains 1 once more. Then the controller and the trainer die."""
    allowed = {0, 1}

    async def ask(self: Answers, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        ordinal = int(prompt.key.rpartition("-")[2])
        while ordinal not in allowed:
            await asyncio.sleep(0.001)
        return "engine", ordinal

    async def score(self: Answers, ordinal: int) -> Scored:
        return Scored(f"{ordinal}", {}, (0.0, 0.0 if ordinal == 2 else ordinal + 1.0), (1, 1), (3, 3), (False, False), 0, 0)

    async def live() -> None:
        monkeypatch.setattr(Answers, "ask", ask)
        monkeypatch.setattr(Answers, "score", score)
        first = start(*REPLAY)
        await first.join(1, 0, 1)
        await order(first, 0, 0)
        await first.pushed(1, 0, ["life"], {})
        assert [one.key for one in (await order(first, 0, 1)).scores] == ["0", "1"]
        await order(first, 1, 0)
        await first.pushed(1, 1, ["life"], {})
        allowed.update({2, 3})
        batch = await order(first, 1, 1)
        assert [one.key for one in batch.scores] == ["3", "1"] and batch.groups == {0: 3, 1: 1}
        assert [values["rollout/replayed"] for _, values in batch.records] == [1.0]
        await first.committed(1)
        assert set(first._groups.answers) == set(first._groups.scores) == {1, 3}

        second = start(*REPLAY)
        await second.join(2, 1, 1)
        push = await second.order(2, 1, 0, 0)
        assert push is not None and push.kind == "push"
        await second.pushed(2, 1, ["life"], {})
        while (again := await second.order(2, 1, 1, 0)) is None:
            pass
        assert [one.key for one in again.scores] == ["3", "1"], "the very batch"
        assert again.records[-1][1]["rollout/replayed"] == 1.0
        allowed.update({4, 5})
        await second.committed(2)
        await second.pushed(2, 2, ["life"], {})
        assert not second._groups.answers.keys() & {0, 1, 2, 3}, "nobody needs them any more"

    asyncio.run(asyncio.wait_for(live(), 20))
