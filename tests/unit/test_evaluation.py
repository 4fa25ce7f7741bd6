"""`rayft evaluate` of an online run without Ray: the real controller and trainer, engines that answer at once, and no step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from rayft.actors import controller as controlling
from rayft.actors import evaluation, feed
from rayft.actors.controller import Controller, Setup
from rayft.actors.pool import Pool
from rayft.checkpoint.resume import Restored
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.errors import InfrastructureError
from rayft.models.tiny import write_tiny_model
from rayft.types import Launch, Prompt, Scored
from rayft.weight_sync.protocol import PushReport


class Prompts:
    def __init__(self, folder: str, *, seed: int, shuffle: bool) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 3

    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(f"{self.folder}-{ordinal}", ordinal, (1, 2), {})


class Answers:
    """The reward of an answer is its number; prompts of the training split must not be asked."""

    asked: list[str] = []  # noqa: RUF012

    def __init__(self, *_: Any) -> None: ...

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        Answers.asked.append(prompt.key)
        return "engine", (n, temperature)

    async def score(self, group: tuple[int, float]) -> Scored:
        n, temperature = group
        rewards = tuple(float(place) for place in range(n)) if temperature else (5.0,)
        return Scored("k", {"r": rewards}, rewards, (1,) * n, (3,) * n, (False,) * n, 0, 0)


class Line:
    """From the trainer to the controller, which lives on a loop of its own; also the sender of weights."""

    def __init__(self, controller: Callable[[], Controller]) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.controller, self.pushes = controller(), list[str]()

    def wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def join(self, step: int) -> None:
        self.wait(self.controller.join(1, step, 1))

    def order(self, step: int, index: int, lost: Any) -> Any:
        while (order := self.wait(self.controller.order(1, step, index, 0, lost))) is None:
            pass
        return order

    def fetch(self, order: Any) -> Any:
        return {}, []

    def engines(self, order: Any) -> Any:
        return order.engines

    def pushed(self, step: int, order: Any, report: PushReport) -> None:
        self.wait(self.controller.pushed(1, step, [life for life, _ in order.engines], {}))

    def committed(self, step: int) -> None:
        raise AssertionError("nothing is saved")

    def push(self, module: Any, version: str, engines: Any) -> PushReport:
        self.pushes.append(version)
        return PushReport(version, 0.1, 1, True, (), {})

    def close(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpoRun]:
    """A LoRA run whose engines, rewards and cluster are made up."""
    write_tiny_model(tmp_path / "model", ["red green"], vocab_size=270, hidden_size=32, layers=1)
    held: dict[str, Any] = {}

    @contextmanager
    def open_run(cfg: Any, local: bool) -> Iterator[Any]:
        home = tmp_path / cfg.run.name
        home.mkdir(exist_ok=True)
        model = cfg.model.model_copy(update={"path": str(tmp_path / "model"), "init": "random"})
        held["cfg"] = cfg = cfg.model_copy(update={"model": model})
        yield type("Run", (), {"cfg": cfg, "home": str(home)})

    @contextmanager
    def open_flow(opened: Any) -> Iterator[Launch[GrpoRun]]:
        cfg, home = opened.cfg, Path(opened.home)
        assert not (home / "journal.jsonl").exists() and not (home / "metrics.jsonl").exists()
        steps = cfg.run.max_steps

        def controller() -> Controller:
            made = Controller(Setup(cfg, home, "train", "eval", steps, "driver", 0, ("engine-0",), ()))
            (member,) = made._pool._members
            member.life = "life"
            return made

        line = Line(controller)
        monkeypatch.setattr(feed, "RayFeed", lambda launch, session: line)
        monkeypatch.setattr(feed, "make_sender", lambda launch, session: line)
        yield Launch(cfg, home, "train", "eval", {"base weights": "x"}, steps, "cpu", True, attempt=1)
        assert line.pushes == ["1.0"]

    monkeypatch.setattr(ray, "get_actor", lambda name: None)
    monkeypatch.setattr(Pool, "watch", lambda self: None)
    monkeypatch.setattr(controlling, "PromptSet", Prompts)
    monkeypatch.setattr(controlling, "Dispatch", Answers)
    monkeypatch.setattr(evaluation, "open_run", open_run)
    monkeypatch.setattr(evaluation, "open_flow", open_flow)
    monkeypatch.setattr(evaluation, "fit", lambda worker, launch: worker(launch))
    monkeypatch.setattr(evaluation, "checkpoint_of", lambda cfg, step: Restored("somewhere", {"step": 7}))
    monkeypatch.setattr(Answers, "asked", [])
    base = ["method=grpo", "run.name=a", f"run.dir={tmp_path}", "model.path=m", "adapter.type=lora", "adapter.r=4", "rollout.engine=local"]
    more = ["data.train.a.path=x", "data.eval.a.path=x", "reward.functions.r.function=exact", "parallel.device=cpu", "algorithm.beta=0.1"]
    cfg = load([], [*base, *more, "weight_sync.payload=adapter", "kernels.lora=on", "eval.samples=3", "run.callbacks=['none:f']"])
    assert isinstance(cfg, GrpoRun)
    yield cfg
    assert held["cfg"].run.name == "a-evaluate" and held["cfg"].run.callbacks == ()


def test_held_out_prompts_are_answered_once_and_nothing_is_trained(run: GrpoRun) -> None:
    for _ in range(2):
        found = evaluation.of_prompts(run, None, False)
        assert found["step"] == 7 and found["eval/num_prompts"] == 3
        assert (found["eval/reward"], found["eval/reward_greedy"]) == (1.0, 5.0)
    assert sorted(Answers.asked) == sorted([f"eval-{number}" for number in range(3)] * 4)
    assert evaluation.of_prompts(run, "other/model", False)["step"] == 0


def test_no_answer_is_no_number(run: GrpoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayft.actors.held_out import HeldOut

    async def none(self: HeldOut) -> dict[str, float]:
        return {}

    monkeypatch.setattr(HeldOut, "run", none)
    with pytest.raises(InfrastructureError, match="not one held-out prompt was answered"):
        evaluation.of_prompts(run, None, False)
