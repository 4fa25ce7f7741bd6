"""What the controller makes of late answers, failed requests and lost groups, with a pool and judges that do as they are told."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

from rayft.actors import members
from rayft.actors.dispatch import Dispatch
from rayft.actors.engine_actor import EngineState
from rayft.actors.groups import Groups
from rayft.actors.journal import Journal
from rayft.actors.members import Member
from rayft.actors.pool import Pool
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.errors import InfrastructureError
from rayft.experience.admission import Limits
from rayft.types import Prompt, Scored


def run_of(*overrides: str) -> GrpoRun:
    base = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "reward.functions.r.function=exact"]
    cfg = load([], [*base, "rollout.prompts_per_step=1", *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


class Prompts:
    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(f"0-{ordinal}", ordinal, (1, 2), {})


class Told:
    """Answers each request once it is told to."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[Any]] = []
        self.lost = set[Any]()

    async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
        self.asked.append(asyncio.get_running_loop().create_future())
        return "engine", await self.asked[-1]

    async def score(self, group: str) -> Scored:
        if group in self.lost:
            self.lost.discard(group)
            raise InfrastructureError("a group", None, "was lost", "It is asked for again")
        return Scored(group, {}, (0.0, 1.0), (1, 1), (3, 3), (False, False), 0, 0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def groups_of(folder: Path, pool: Any, restarts: int = 2) -> tuple[Groups, Journal]:
    journal = Journal(folder / "journal.jsonl", Limits(groups=1, staleness=0, steps=9, restarts=restarts, rescores=0), "d", 0)
    prompts: Any = Prompts()
    groups = Groups(run_of(), journal, pool, prompts, lambda: groups.start_all())
    journal.add("pushed", step=0)
    groups.start_all()
    return groups, journal


@pytest.mark.parametrize("first", ["answers", "fails"])
def test_an_answer_to_an_earlier_start_does_not_count(tmp_path: Path, first: str) -> None:
    """After a rollback the same group is started under other weights; what comes of its old start is nobody's."""

    async def play() -> None:
        pool = Told()
        groups, journal = groups_of(tmp_path, pool)
        await settle()
        journal.add("driver_restarted", step=0)
        journal.add("pushed", step=0)
        groups.start_all()
        await settle()
        old, new = pool.asked
        if first == "answers":
            old.set_result("old")
        else:
            old.set_exception(InfrastructureError("engine", None, "died", "Ask again"))
        await settle()
        assert list(journal.state.running) == [0] and not groups.answers and not journal.state.counts
        new.set_result("new")
        await settle()
        assert groups.answers == {0: "new"} and groups.scores[0].key == "new"

    asyncio.run(play())


def test_a_lost_group_is_asked_for_again_and_no_reward_is_blamed(tmp_path: Path) -> None:
    async def play() -> None:
        pool = Told()
        groups, journal = groups_of(tmp_path, pool)
        await settle()
        pool.lost.add("gone")
        pool.asked[0].set_result("gone")
        await settle()
        assert dict(journal.state.counts) == {"restarted": 1}
        pool.asked[1].set_result("there")
        await settle()
        assert groups.answers == {0: "there"} and not journal.state.counts["rescored"]

    asyncio.run(play())


def test_a_filtered_prompt_is_asked_again_under_another_key(tmp_path: Path) -> None:
    """Everything random about a group is drawn from its key."""

    keys: list[str] = []

    class Dull(Told):
        async def ask(self, prompt: Prompt, n: int, temperature: float) -> tuple[str, Any]:
            keys.append(prompt.key)
            return "engine", prompt.key

        async def score(self, group: str) -> Scored:
            differs = float(group in ("0-1", "0-0-roll-1"))
            return Scored(group, {}, (0.0, differs), (1, 1), (3, 3), (False, False), 0, 0)

    async def play() -> None:
        journal = Journal(tmp_path / "journal.jsonl", Limits(1, 0, 9, restarts=0, rescores=0, rerolls=1), "d", 0)
        prompts: Any = Prompts()
        pool: Any = Dull()
        groups = Groups(run_of("algorithm.filter=zero_variance"), journal, pool, prompts, lambda: groups.start_all())
        journal.add("pushed", step=0)
        groups.start_all()
        await settle()
        assert keys == ["0-0", "0-1"] and list(groups.answers) == [1]
        journal.add("consumed", step=0, ordinals=[1])
        journal.add("pushed", step=1)
        groups.start_all()
        await settle()
        assert keys[2:] == ["0-0-roll-1"] and list(groups.answers) == [1, 0]

    asyncio.run(play())


class Method:
    """A method of an actor."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *_: Any) -> Any:
        async def answer() -> Any:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

        return answer()


class TwoReturns(Method):
    def remote(self, *_: Any) -> Any:
        return super().remote(), "group"


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("f", "traceback", cause)


def dispatch_with(monkeypatch: pytest.MonkeyPatch, *overrides: str, **methods: Method) -> tuple[Dispatch, Member, list[Any]]:
    """A dispatch with one serving engine and one judge, both with these methods, and what is killed."""
    import ray

    actor: Any = type("Actor", (), methods)()
    killed: list[Any] = []
    monkeypatch.setattr(ray, "get_actor", lambda name: actor)
    monkeypatch.setattr(ray, "kill", lambda one, no_restart: killed.append(one))
    cfg = run_of(*overrides)
    pool = Pool(["engine"], cfg.rollout, lambda: None)
    (member,) = pool._members
    member.life, member.version, pool.current = "life", "1.0", "1.0"
    return Dispatch(cfg, pool, ["judge"]), member, killed


@pytest.mark.parametrize(("state", "ended"), [("well", False), (raised(InfrastructureError("vllm", None, "is dead", "Restart")), True)])
def test_only_an_engine_that_is_broken_itself_is_ended(monkeypatch: pytest.MonkeyPatch, state: Any, ended: bool) -> None:
    failed = raised(InfrastructureError("engine", None, "ended a request with 'abort'", "Ask another"))
    dispatch, member, killed = dispatch_with(monkeypatch, rollout=TwoReturns(failed), state=Method(state))
    with pytest.raises(InfrastructureError, match="ended a request with 'abort'"):
        asyncio.run(dispatch.ask(Prompt("0-0", 0, (1,), {}), 2, 1.0))
    assert bool(killed) == ended and (member.life == "") == ended and member.running == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_news_of_a_death_does_not_take_prompts_from_the_engine_that_came_after(monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    class Late(TwoReturns):
        def remote(self, *_: Any) -> Any:
            if restarted:
                member.life = "second"
            return super().remote()

    dispatch, member, _ = dispatch_with(monkeypatch, rollout=Late(ActorDiedError()))
    with pytest.raises(InfrastructureError, match="died"):
        asyncio.run(dispatch.ask(Prompt("0-0", 0, (1,), {}), 2, 1.0))
    assert (member.life, member.version) == (("second", "1.0") if restarted else ("", ""))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_group_whose_owner_died_is_no_fault_of_its_reward(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    lost = OwnerDiedError("00" * 28, "", "a stack")
    dispatch, _, killed = dispatch_with(monkeypatch, score=Method(raised(lost) if wrapped else lost))
    with pytest.raises(InfrastructureError, match=r"was lost before it was scored \(OwnerDiedError\)"):
        asyncio.run(dispatch.score("group"))
    assert not killed


def test_a_judge_that_cannot_be_reached_fails_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    away = InfrastructureError("reward.functions.r.judge.url", "http://h", "has not answered within 54 s", "Look into the endpoint")
    dispatch, _, killed = dispatch_with(monkeypatch, score=Method(raised(away)))
    with pytest.raises(InfrastructureError, match=r"has not answered within 54 s"):
        asyncio.run(dispatch.score("group"))
    assert not killed


@pytest.mark.parametrize("loads", [True, False])
def test_a_reward_model_that_loads_takes_no_time_of_a_group(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    class Slow(Method):
        def remote(self, *_: Any) -> Any:
            return asyncio.sleep(0.3 if loads else 60.0)

    limits = ["reward.deadline_s=0.2", f"rollout.start_s={60.0 if loads else 0.3}"]
    more = ["reward.functions.m.model.path=m", "reward.functions.m.model.gpus=0", *limits]
    dispatch, _, killed = dispatch_with(monkeypatch, *more, models_loaded=Slow(None), score=Method("scored"))
    if loads:
        assert asyncio.run(dispatch.score("group")) == "scored"
    else:
        with pytest.raises(InfrastructureError, match=r"rollout.start_s = 0.3: a reward model was not loaded again within 0.3 s"):
            asyncio.run(dispatch.score("group"))
    assert not killed


def test_who_knew_an_engine_before_a_push_goes_on_with_the_version_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the push it says none. A controller that was restarted meanwhile knows none either, and gives it nothing."""
    monkeypatch.setattr(members, "LOOK_S", 0.001)
    load = {"running": 0.0, "waiting": 0.0, "kv_use": 0.0, "preemptions": 0.0}
    told = ["1.0", "", "1.1"]

    class State(Method):
        def remote(self, *_: Any) -> Any:
            self.outcome = EngineState("life", told[0], load)
            return super().remote()

    async def play() -> None:
        actor: Any = type("Actor", (), {"start": Method("life"), "state": State(None)})()
        old, new = Member("engine", actor), Member("engine", actor)
        before, after = (members.Watches(run_of().rollout, lambda: None) for _ in range(2))
        before.begin(old)
        await asyncio.sleep(0.05)
        told.pop(0)
        after.begin(new)
        await asyncio.sleep(0.05)
        assert (old.version, new.life, new.version) == ("1.0", "life", "")
        told.pop(0)
        await asyncio.sleep(0.05)
        assert old.version == new.version == "1.1"
        before.end("engine")
        after.end("engine")

    asyncio.run(play())


def test_an_engine_that_preempts_gets_fewer_groups_until_its_cache_has_room() -> None:
    member = Member("engine", None, running=12)
    assert member.allowed == math.inf
    member.note({"preemptions": 3.0, "kv_use": 1.0})
    assert member.allowed == 6
    member.note({"preemptions": 3.0, "kv_use": 0.95})
    assert member.allowed == 6, "no room yet"
    member.note({"preemptions": 3.0, "kv_use": 0.5})
    assert member.allowed == 7
    member.running = 1
    member.note({"preemptions": 4.0, "kv_use": 1.0})
    assert member.allowed == 1, "one always goes on"


def test_a_group_goes_to_the_engine_with_the_fewest_tokens_that_may_have_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "get_actor", lambda name: None)
    pool = Pool(["a", "b"], run_of().rollout, lambda: None)
    a, b = pool._members
    for member in (a, b):
        member.life, member.version = member.name, ""

    async def play() -> None:
        async with pool.take(100) as first, pool.take(10) as second, pool.take(20) as third:
            assert [first, second, third] == [a, b, b] and (a.running, b.running, a.tokens, b.tokens) == (1, 2, 100, 30)
            b.allowed = 2
            async with pool.take(1) as fourth:
                assert fourth is a, "the other one has all that it may have"
            a.allowed = 1
            waiting = asyncio.create_task(pool.take(1).__aenter__())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            b.allowed = 3
            assert await waiting is b
        a.life = b.life = ""
        with pytest.raises(InfrastructureError, match="no engine serves the current weights"):
            await pool.take(1).__aenter__()

    asyncio.run(play())
