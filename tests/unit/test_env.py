"""Environments as they are called: in threads or in the loop, within a deadline, and failures that are never rewards."""

from __future__ import annotations

import asyncio
import concurrent.futures as futures
import json
import pickle
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rayft.actors.engine_actor import EngineActor
from rayft.config.environment import Credentials
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.data.prompts import prompt_tokens
from rayft.errors import ConfigError, InfrastructureError
from rayft.models.tokenizer import load_tokenizer
from rayft.rollout import env
from rayft.rollout.agent import Sampling, rollout
from rayft.rollout.env import EnvironmentFailed, Episode, Observation
from rayft.rollout.environments.guess import write_assets
from rayft.rollout.stage import Scene, maker_of, scene_of, stage_of
from rayft.types import Completion, Group, Prompt
from tiny import tiny_tokenizer


class Plain:
    """Counts its calls, all in one thread that is not the loop's."""

    def __init__(self, nap_s: float = 0.0, answer: Any = None) -> None:
        self.nap_s, self.answer, self.threads, self.closed = nap_s, answer, set[int](), 0
        self.threads.add(threading.get_ident())

    def reset(self, row: Any, seed: int) -> str:
        self.threads.add(threading.get_ident())
        return "begin"

    def step(self, text: str) -> Observation:
        self.threads.add(threading.get_ident())
        time.sleep(self.nap_s)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or Observation(text, reward=1.0)

    def close(self) -> None:
        self.closed += 1


class Async(Plain):
    """The same, in the loop."""

    async def step(self, text: str) -> Observation:  # type: ignore[override]
        await asyncio.sleep(self.nap_s)
        return super().step(text) if not self.nap_s else Observation()


async def play(made: Plain, deadline_s: float = 5.0) -> Observation:
    episode = Episode(lambda: made, deadline_s, "0-7")
    try:
        assert await episode.reset({}, 1) == "begin"
        return await episode.step("hi")
    finally:
        await episode.close()
        await episode.close()


def test_plain_and_async_environments_are_closed_once_and_keep_to_their_place() -> None:
    plain, other = Plain(), Async()
    assert asyncio.run(play(plain)) == asyncio.run(play(other)) == Observation("hi", reward=1.0)
    assert plain.closed == other.closed == 1
    assert len(plain.threads) == 2 and len(other.threads) == 2  # of this test, which made it, and of the episode, or of the loop


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Plain(answer=KeyError("x")), "environment: prompt 0-7: step raised KeyError: 'x'. The prompt is asked again"),
        (Plain(answer=TimeoutError("mine")), "step raised TimeoutError: mine"),
        (Plain(answer="text"), "must answer with an Observation whose reward is a finite number, and gave 'text'"),
        (Plain(answer=Observation(reward=None)), "must answer with an Observation whose reward is a finite number"),  # type: ignore[arg-type]
        (Plain(answer=Observation(reward=float("nan"))), "must answer with an Observation whose reward is a finite number"),
    ],
)
def test_what_is_no_observation_is_a_failure(made: Plain, expected: str) -> None:
    with pytest.raises(EnvironmentFailed) as caught:
        asyncio.run(play(made))
    assert expected in str(caught.value) and made.closed == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_slow_environment_fails_in_time_and_holds_nobody_up() -> None:
    stuck, slow = Plain(nap_s=1.5), Async(nap_s=30.0)

    async def run() -> list[Any]:
        quick = [play(Plain(nap_s=0.1)) for _ in range(40)]  # at once, not one after another
        return await asyncio.gather(play(stuck, 1.0), play(slow, 1.0), *quick, return_exceptions=True)

    began = time.monotonic()
    late, later, *others = asyncio.run(run())
    assert "step took longer than environment.deadline_s = 1" in str(late) and "step took longer" in str(later)
    assert others == [Observation("hi", reward=1.0)] * 40 and time.monotonic() - began < 3.0
    assert (stuck.closed, slow.closed) == (0, 1), "nothing more is asked of a thread that does not come back"


def test_calls_that_never_return_are_counted_until_the_process_is_to_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then they hold no other environment up; one that comes back late counts no more."""
    monkeypatch.setattr(env, "MOST_STUCK", 3)
    monkeypatch.setattr(env, "_stuck", set())
    free = threading.Event()

    class Hangs(Plain):
        def step(self, text: str) -> Observation:
            free.wait(60.0)
            return Observation("late")

    async def run() -> list[Any]:
        cancelled = asyncio.create_task(play(Hangs(), 0.2))  # as when another answer of its group fails
        late = await asyncio.gather(*(play(Hangs(), 0.05) for _ in range(3)), return_exceptions=True)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return late

    env.refuse_stuck()
    assert all(isinstance(problem, EnvironmentFailed) for problem in asyncio.run(run()))
    assert asyncio.run(play(Plain())) == Observation("hi", reward=1.0)
    with pytest.raises(InfrastructureError, match=r"environment: 4 calls of episodes that are over have not returned"):
        env.refuse_stuck()
    actor: Any = EngineActor(None, Credentials({}, {}), None, None)  # type: ignore[arg-type]
    actor._engine = object()
    with pytest.raises(InfrastructureError, match="The engine is restarted"):
        asyncio.run(actor.state())
    free.set()
    futures.wait(env._stuck, 10.0)
    env.refuse_stuck()


USER = """
from rayft.rollout.env import Observation

class Game:
    tools = [{"name": "look"}]
    def __init__(self, size=1):
        if size > 9: raise ValueError("too large")
        self.size = size
    def reset(self, row, seed): return ()
    def step(self, text): return Observation(done=True, reward=float(self.size))

def nothing(): return 3
"""


def run_of(folder: Path, *overrides: str) -> GrpoRun:
    tiny_tokenizer(folder / "model")
    (folder / "game.py").write_text(USER)
    base = ["method=grpo", "run.name=a", f"model.path={folder / 'model'}", "data.train.a.path=x", "reward.functions.r.function=exact"]
    cfg = load([], [*base, *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


def test_a_scene_travels_with_its_code(tmp_path: Path) -> None:
    assert scene_of(run_of(tmp_path)) is None
    cfg = run_of(tmp_path, f"environment.function={tmp_path}/game.py:Game", "environment.arguments.size=3", "environment.max_turns=2")
    scene: Scene = pickle.loads(pickle.dumps(scene_of(cfg)))
    (tmp_path / "game.py").unlink()
    make, tools = maker_of(scene)
    assert tools == [{"name": "look"}] and make().step("") == Observation(done=True, reward=3.0) and make() is not make()
    assert stage_of(cfg, scene).max_turns == 2


@pytest.mark.parametrize(
    ("function", "size", "expected"),
    [
        ("Game", 10, "called with environment.arguments, raised ValueError: too large"),
        ("nothing", None, "makes a int, which lacks reset or step"),
        ("Other", None, "does not define Other"),
    ],
)
def test_what_is_no_environment_is_refused_on_the_driver(tmp_path: Path, function: str, size: int | None, expected: str) -> None:
    more = [f"environment.arguments.size={size}"] if size else []
    scene = scene_of(run_of(tmp_path, f"environment.function={tmp_path}/game.py:{function}", *more))
    assert scene is not None
    with pytest.raises(ConfigError, match=expected):
        maker_of(scene)


class Writer:
    """An engine that writes given texts turn by turn, each ended by the end token."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts, self.prompts = tokenizer, texts, list[tuple[int, ...]]()

    async def generate(self, request_id: str, prompt: Sequence[int], *, max_tokens: int, **_: Any) -> Completion:
        self.prompts.append(tuple(prompt))
        turn = int(request_id.split("/")[2])
        tokens = [*self._tokenizer.encode(self._texts[turn], add_special_tokens=False), self._tokenizer.eos_token_id]
        kept = tuple(tokens[:max_tokens])
        return Completion(kept, (-0.25,) * len(kept), (("1.4", 0, len(kept)),), "stop" if len(kept) == len(tokens) else "length")


def test_a_game_of_several_turns_from_the_configuration_to_a_trajectory(tmp_path: Path) -> None:
    name = "rayft.rollout.environments.guess:Guess"
    cfg = run_of(tmp_path, f"environment.function={name}", "environment.arguments.high=9")
    scene, tokenizer = scene_of(cfg), load_tokenizer(cfg.model)
    assert scene is not None
    chat = [{"role": "user", "content": "Let us play."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt, engine = Prompt("0-1", 1, tuple(ids), {"number": 7}), Writer(tokenizer, ["is it 5", "what", "then 7"])

    def drawn(**options: int) -> Group:
        return asyncio.run(rollout(engine, prompt, 2, Sampling(**({"max_tokens": 99, "context": 300} | options)), stage_of(cfg, scene)))

    group = drawn()
    said = ["guess a number from 1 to 9", "is it 5", "higher", "what", "say a number", "then 7"]
    roles = ["user", "assistant"] * 3
    expected = [*chat, *({"role": role, "content": text} for role, text in zip(roles, said, strict=True))]
    whole = tokenizer.apply_chat_template(expected, return_dict=True)["input_ids"]
    for trajectory in group.trajectories:
        everything = [*group.prompt.tokens, *trajectory.tokens]
        assert everything == whole[: len(everything)] and tokenizer.decode(whole[len(everything) :]) == "\n"
        own = tokenizer.decode([token for token, by in zip(trajectory.tokens, trajectory.by_policy, strict=True) if by])
        assert own == "is it 5<|im_end|>what<|im_end|>then 7<|im_end|>"
        assert (trajectory.finish_reason, trajectory.turns, trajectory.rewards) == ("stop", 3, {"environment": pytest.approx(1 / 3)})
        starts = [first for _, first, _ in trajectory.versions]
        assert len(starts) == 3 and all(trajectory.by_policy[start] and not trajectory.by_policy[start - 1] for start in starts)
    short = drawn(context=len(ids) + len(tokenizer.encode(said[0])) + 20).trajectories[0]
    assert (short.finish_reason, short.rewards) == ("length", {"environment": 0.0}) and short.turns < 3


def test_the_shipped_game_fits_its_configuration(tmp_path: Path) -> None:
    write_assets(tmp_path, high=7)
    cfg = load([Path(__file__).parents[2] / "recipes/configs/tiny/guess.yaml"], [f"model.path={tmp_path / 'model'}"])
    assert isinstance(cfg, GrpoRun)
    scene, tokenizer = scene_of(cfg), load_tokenizer(cfg.model)
    assert scene is not None
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    prompts = [prompt_tokens(row, cfg.data.train["numbers"], tokenizer, "here") for row in rows]
    assert len(rows) == 7 and max(map(len, prompts)) <= cfg.rollout.max_prompt_tokens
    engine, context = Writer(tokenizer, ["5", "1", "2", "say", "4", "3"]), cfg.rollout.max_prompt_tokens + cfg.rollout.max_tokens
    drawn = rollout(
        engine, Prompt("0-2", 2, tuple(prompts[2]), rows[2]), 1, Sampling(cfg.rollout.max_tokens, context), stage_of(cfg, scene)
    )
    (trajectory,) = asyncio.run(drawn).trajectories
    assert (trajectory.finish_reason, trajectory.turns, trajectory.rewards) == ("stop", 6, {"environment": pytest.approx(1 / 6)})
    assert tokenizer.pad_token_id not in [*prompts[2], *trajectory.tokens], "the model knows every word of the game"
