"""Another number of engines: what is asked and answered, what fits beside the trainer, and how the pool lets engines come and go."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from rayft.actors import engine_requests, engines, members
from rayft.actors.controller import Controller, Setup
from rayft.actors.engine_requests import Asked, ask
from rayft.actors.engines import LOST_S, Engines, holds, surplus
from rayft.actors.journal import Journal
from rayft.actors.pool import Pool
from rayft.actors.refusals import check_growth, engines_that_fit
from rayft.checkpoint import resume
from rayft.cli import main
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.data.waiting import ROOM
from rayft.errors import InfrastructureError, ResourceError
from rayft.experience.admission import Limits


def run_of(*overrides: str) -> GrpoRun:
    base = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "reward.functions.r.function=exact"]
    cfg = load([], [*base, *overrides])
    assert isinstance(cfg, GrpoRun)
    return cfg


# What fits


@pytest.mark.parametrize(
    ("overrides", "gpu", "resources", "fit"),
    [
        ((), False, {"CPU": 4.0}, 3),
        (("parallel.workers=2",), True, {"GPU": 8.0, "CPU": 1.0}, 6),
        (("parallel.workers=2", "rollout.tensor_parallel=4"), True, {"GPU": 8.0}, 1),
        (("reward.functions.m.model.path=m", "reward.functions.m.model.gpus=0.5"), True, {"GPU": 4.0}, 2),
        (("reward.functions.m.model.path=m", "reward.functions.m.model.gpus=0"), True, {"GPU": 4.0}, 3),
        (("parallel.workers=4",), True, {"GPU": 2.0}, 0),
        (("parallel.workers=4", "parallel.device=cuda", "parallel.autoscaling=true"), True, {"GPU": 2.0}, sys.maxsize),
    ],
)
def test_engines_that_fit_beside_trainer_and_reward_models(
    overrides: tuple[str, ...], gpu: bool, resources: dict[str, float], fit: int
) -> None:
    assert engines_that_fit(run_of(*overrides), gpu, resources) == fit


def test_a_refusal_says_what_is_missing() -> None:
    cfg = run_of("parallel.workers=2")
    check_growth(cfg, True, 6, 5, {"GPU": 8.0}, {"GPU": 5.0})
    with pytest.raises(ResourceError, match=r"engines = 7: need 1 GPUs more than there are beside 2 that are kept for the trainer, of 8\."):
        check_growth(cfg, True, 7, 6, {"GPU": 8.0}, {"GPU": 8.0})
    with pytest.raises(ResourceError, match=r"engines = 6: need 5 more GPUs, and 4 are free"):
        check_growth(cfg, True, 6, 5, {"GPU": 8.0}, {"GPU": 4.0})


def test_engines_make_room_for_the_trainer_those_without_a_place_first() -> None:
    assert surplus("abc", {}, 3) == surplus("abc", {"b": LOST_S / 2}, 3) == ()
    assert surplus("abc", {"b": LOST_S / 2}, 2) == ("b",), "the cluster shrank by its node"
    assert surplus("abc", {"b": LOST_S * 2}, 9) == ("b",), "it found no other place"
    assert surplus("abc", {"b": 1.0}, 1) == ("b", "c")
    assert surplus("abc", {"b": LOST_S * 2, "c": 1.0}, 1) == ("b", "c")
    assert surplus("abc", {}, 0) == ("c", "b") and surplus("a", {"a": LOST_S * 2}, 0) == (), "one stays"


def test_the_trainer_is_told_from_engines_by_the_bundles_of_its_placement_group() -> None:
    one = {"name": "", "state": "CREATED", "bundles": {0: {"CPU": 1.0}}}
    two = {"name": "", "state": "CREATED", "bundles": {0: {"CPU": 1.0}, 1: {"CPU": 1.0, "GPU": 0.0}}}
    assert holds({"engine": one, "trainer": one}, {"engine"}, [{"CPU": 1.0}])
    assert not holds({"engine": one}, {"engine"}, [{"CPU": 1.0}])
    assert not holds({"room": {**one, "name": ROOM}}, set(), [{"CPU": 1.0}]), "it only asked whether it could be placed"
    assert not holds({"trainer": {**one, "state": "PENDING"}}, set(), [{"CPU": 1.0}])
    assert holds({"engine": one, "trainer": two}, {"engine"}, [{"CPU": 1.0, "GPU": 0.0}] * 2)
    assert not holds({"trainer": two}, set(), [{"CPU": 1.0}])


# The command's side


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "is_held", lambda home: True)
    monkeypatch.setattr(engine_requests, "LOOK_S", 0.01)


def with_driver(home: Path, act: Callable[[Asked], tuple[str, Any]]) -> Callable[[], str]:
    """`ask` while a driver acts on the request."""

    def drive() -> None:
        while (request := engine_requests.asked(str(home))) is None:
            pass
        engine_requests.answer(str(home), request, *act(request))

    def asking() -> str:
        thread = threading.Thread(target=drive)
        thread.start()
        try:
            return ask(str(home), 3, 5.0)
        finally:
            thread.join()

    return asking


def test_what_is_asked_is_answered_or_refused_as_the_driver_says(tmp_path: Path, held: None) -> None:
    assert with_driver(tmp_path, lambda request: (f"it has {request.engines}", None))() == "it has 3"
    refused = ResourceError("engines", 3, "too many", "Ask for fewer")
    with pytest.raises(ResourceError, match=r"engines = 3: too many\. Ask for fewer\.") as raised:
        with_driver(tmp_path, lambda _: ("", refused))()
    assert raised.value.exit_code == 4 and list(tmp_path.iterdir()) == []


def test_nobody_acts_on_what_is_asked_no_more(tmp_path: Path, held: None) -> None:
    with pytest.raises(InfrastructureError, match=r"gave no answer within 0\.05 s"):
        ask(str(tmp_path), 3, 0.05)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / engine_requests.REQUEST).write_text('{"token": "other", "engines": 7}')
    with pytest.raises(InfrastructureError, match="another request, for 7, is under way"):
        ask(str(tmp_path), 3, 0.05)
    assert engine_requests.asked(str(tmp_path)) == Asked("other", 7), "it is the other one's"


def test_a_request_that_a_driver_drops_when_it_begins(tmp_path: Path, held: None) -> None:
    def drop() -> None:
        while engine_requests.asked(str(tmp_path)) is None:
            pass
        engine_requests.forget(str(tmp_path))

    thread = threading.Thread(target=drop)
    thread.start()
    with pytest.raises(InfrastructureError, match="has only just begun"):
        ask(str(tmp_path), 3, 5.0)
    thread.join()


def test_a_run_that_is_not_under_way(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="no run is under way there"):
        ask(str(tmp_path), 3, 5.0)


def command(folder: Path, *arguments: str) -> int:
    (folder / "run.yaml").write_text("run: {name: a, dir: runs}\nmodel: {path: m}\ndata: {train: {a: {path: x}}}\n")
    return main(["engines", str(folder / "run.yaml"), *arguments])


GRPO = ("method=grpo", "reward.functions.r.function=exact")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("method=sft", "--count", "2"), 2, "method = 'sft': has no engines."),
        ((*GRPO, "placement.mode=colocated", "--count", "2"), 2, "placement.mode = 'colocated': gives each of the 1 workers its engine"),
        ((*GRPO, "--count", "2"), 6, "no run is under way there"),
    ],
)
def test_the_command_refuses_what_no_driver_could_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(tmp_path, *arguments) == code
    assert said in capsys.readouterr().err


def test_there_is_always_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(tmp_path, *GRPO, "--count", "0")
    assert "must be 1 or more" in capsys.readouterr().err


# The driver's side


class Cluster:
    """Placement groups that are placed while there is room, and actors that start unless told otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch, cpus: float) -> None:
        self.cpus, self.free = cpus, cpus
        self.table: dict[str, Any] = {}
        self.alive: list[str] = []
        self.starts: Any = None
        self.asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self.busy = 0
        patch.setattr(engines, "POLL_S", 0.01)
        patch.setattr(engines, "placement_group_table", lambda: self.table)
        patch.setattr(engines, "placement_group", self.place)
        patch.setattr(engines, "remove_placement_group", self.remove)
        patch.setattr(engines, "PlacementGroupSchedulingStrategy", lambda group: group)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": self.cpus})
        patch.setattr(ray, "available_resources", lambda: {"CPU": self.free})
        patch.setattr(ray, "kill", lambda actor: self.alive.remove(actor.name))
        patch.setattr(ray, "wait", lambda waiting, **_: (waiting, []))
        patch.setattr(ray, "get", self.get)

    def place(self, bundles: list[dict[str, float]]) -> Any:
        name = f"group-{len(self.table)}"
        placed = self.free >= 1
        self.free -= placed
        self.table[name] = {"name": "", "state": "CREATED" if placed else "PENDING", "bundles": dict(enumerate(bundles))}
        hexed = type("Id", (), {"hex": lambda _: name})()
        return type("Group", (), {"id": hexed})()

    def remove(self, group: Any) -> None:
        self.free += self.table.pop(group.id.hex())["state"] == "CREATED"

    def make(self, name: str, **resources: Any) -> Any:
        assert resources["num_cpus"] == 1.0 and self.table[resources["scheduling_strategy"].id.hex()]["state"] == "CREATED"
        self.alive.append(name)
        return type("Actor", (), {"name": name, "start": type("Start", (), {"remote": lambda _: self.starts})()})()

    def get(self, what: Any, timeout: float | None = None) -> Any:
        if isinstance(what, Exception):
            raise what
        if isinstance(what, list):
            return [self.get(one) for one in what]
        return what

    @property
    def engines(self) -> Any:
        """The controller's method."""

        class Method:
            def remote(_, join: tuple[str, ...], leave: tuple[str, ...]) -> Any:
                self.asked.append((tuple(join), tuple(leave)))
                self.busy -= bool(self.busy)
                return (tuple(reversed(self.alive)), leave if self.busy else ())

        return Method()

    def trainer(self) -> None:
        self.table["trainer"] = {"name": "", "state": "CREATED", "bundles": {0: {"CPU": 1.0}}}
        self.free -= 1

    def pool(self, home: Path, *overrides: str) -> tuple[Engines, Callable[[int], Any]]:
        """The driver's engines, and a function that asks for another number and gives what it answers; None for not yet."""
        pool = Engines(run_of(*overrides), False, "d", self.make)
        pool._controller = self

        def follow(count: int) -> Any:
            (home / engine_requests.REQUEST).write_text(f'{{"token": "t", "engines": {count}}}')
            pool._follow(str(home), Asked("t", count))
            return engine_requests._read(str(home / engine_requests.ANSWER))

        return pool, follow


def test_engines_come_and_go_and_a_refusal_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(monkeypatch, 4.0)
    pool, follow = cluster.pool(tmp_path)
    with pool.open() as names:
        assert names == ("d-engine-0",)
        assert follow(2) is None and cluster.alive == ["d-engine-0"], "what is free may be what the trainer comes back to"
        cluster.trainer()
        assert follow(9)["error"][0] == "ResourceError" and follow(9)["error"][3].startswith("need 6 CPUs more")
        assert cluster.alive == ["d-engine-0"] and not cluster.asked
        assert follow(3)["error"] is None and len(cluster.alive) == 3 and cluster.free == 0
        assert cluster.asked == [(("d-engine-0", "d-engine-1", "d-engine-2"), ())]
        cluster.busy = 4
        assert "engines: 1, before: 3" in follow(1)["done"] and cluster.alive == ["d-engine-0"] and cluster.free == 2
        assert cluster.busy == 0 and cluster.asked[-1] == ((), ("d-engine-2", "d-engine-1")), "asked until their groups were done"
    assert not cluster.alive and list(cluster.table) == ["trainer"]


@pytest.mark.parametrize("flaw", ["no start", "no place", "trainer gone"])
def test_nothing_stays_of_engines_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flaw: str) -> None:
    cluster = Cluster(monkeypatch, 8.0)
    monkeypatch.setattr(engines, "PLACE_S", 0.05 if flaw == "no place" else 60.0)
    pool, follow = cluster.pool(tmp_path)
    with pool.open():
        cluster.trainer()
        placed = set(cluster.table)
        if flaw == "no start":
            cluster.starts = ActorDiedError()
        else:
            place = cluster.place

            def taken(bundles: list[dict[str, float]]) -> Any:
                cluster.free = 0.0  # by somebody, between the look and the placing
                if flaw == "trainer gone":
                    cluster.table["trainer"]["state"] = "REMOVED"
                return place(bundles)

            monkeypatch.setattr(engines, "placement_group", taken)
        kind, _, _, rule, _ = follow(3)["error"]
        assert kind == "ResourceError" and ("did not start" if flaw == "no start" else "found no place") in rule
        assert cluster.alive == ["d-engine-0"] and set(cluster.table) == placed and not cluster.asked


def test_an_engine_whose_node_is_gone_is_given_up_and_brought_back_beside_the_trainer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster = Cluster(monkeypatch, 4.0)
    pool, _ = cluster.pool(tmp_path, "rollout.engines=3")
    with pool.open():
        cluster.trainer()
        pool._keep()
        assert len(cluster.alive) == 3 and not cluster.asked
        cluster.cpus, cluster.table["group-1"]["state"] = 3.0, "RESCHEDULING"
        pool._keep()
        assert cluster.alive == ["d-engine-0", "d-engine-2"] and cluster.asked == [((), ("d-engine-1",))]
        cluster.cpus, cluster.free, cluster.table["trainer"]["state"] = 4.0, 1.0, "PENDING"
        pool._keep()
        assert len(cluster.alive) == 2, "the trainer comes first"
        cluster.table["trainer"]["state"] = "CREATED"
        pool._keep()
        assert cluster.alive[2:] == ["d-engine-3"] and cluster.asked[-1][0] == ("d-engine-0", "d-engine-2", "d-engine-3")


def test_a_controller_that_is_being_restarted_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(monkeypatch, 4.0)
    pool, _ = cluster.pool(tmp_path)
    answers = [ActorDiedError(), GetTimeoutError(), (("a",), ())]
    monkeypatch.setattr(ray, "get", lambda *_, **__: cluster.get(answers.pop(0)))
    with pool.open():
        assert pool._tell() == (("a",), ())


# The controller's side


def pool_of(monkeypatch: pytest.MonkeyPatch, *names: str, actor: Any = None) -> Pool:
    monkeypatch.setattr(ray, "get_actor", lambda name: actor)
    monkeypatch.setattr(ray, "kill", lambda one, no_restart: None)
    pool = Pool(names, run_of().rollout, lambda: None)
    for member in pool._members:
        member.life = member.name
    return pool


def test_an_engine_that_leaves_finishes_its_groups_and_the_push_that_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        pool = pool_of(monkeypatch, "a", "b", "c")
        async with pool.take(5) as one, pool.take(3) as other:
            assert [one.name, other.name] == ["a", "b"] and pool.idlest() == ("c", "b", "a")
            assert pool.change((), ("b", "gone"), ()) == (("a", "c"), ("b",))
            assert [member.name for member in pool.serving()] == ["a", "c"] == [member.name for member in pool.behind("1.1")]
            assert pool.change((), ("b",), ()) == (("a", "c"), ("b",)), "asked again"
        assert pool.change((), ("b", "c"), ("c",)) == (("a",), ("c",))
        assert pool.change((), ("b", "c"), ()) == (("a",), ())

    asyncio.run(play())


def test_the_pool_misses_those_least_that_are_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(monkeypatch, "a", "b", "c")
    pool._members[0].life = ""
    assert pool.idlest() == ("a", "c", "b")


def test_an_engine_that_joins_serves_once_it_was_brought_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(monkeypatch, "a")
    pool.has(("a",), "1.3")
    assert pool.change(("a", "b"), (), ()) == (("a", "b"), ()) == pool.change(("b",), (), ())
    joined = pool._members[1]
    assert not pool.behind("1.3"), "it is not up"
    joined.life = "b"
    assert pool.behind("1.3") == [joined] and joined not in pool.serving()
    pool.has(("b",), "1.3")
    assert len(pool.serving()) == 2


class Lost:
    """An actor without a place: what is asked of it has no answer."""

    class start:
        @staticmethod
        def remote() -> Any:
            return asyncio.sleep(60)


def test_others_serve_while_an_engine_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no push either."""

    async def play() -> None:
        pool = pool_of(monkeypatch, "there", "lost", actor=Lost())
        there, lost = pool._members
        lost.life = ""
        pool.watches.begin(lost)
        await asyncio.sleep(0)
        pool.has(("there",), "1.1")
        assert pool.behind("1.2") == [there] == pool.serving()
        for _ in range(9):
            async with pool.take(1) as member:
                assert member is there
        pool.watches.end("lost")

    asyncio.run(asyncio.wait_for(play(), 10))


def test_to_wait_for_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        monkeypatch.setattr(ray, "get_actor", lambda name: None)
        pool = Pool(["a"], run_of("rollout.deadline_s=0.01").rollout, lambda: None)
        (member,) = pool._members
        member.life, member.allowed = "a", 1
        async with pool.take(1):
            waiting = asyncio.create_task(pool.take(1).__aenter__())
            await asyncio.sleep(0.1)
            assert not waiting.done()
        assert await waiting is member

    asyncio.run(asyncio.wait_for(play(), 10))


def test_an_engine_that_nobody_looks_after_any_more_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        class start:
            @staticmethod
            async def remote() -> Any:
                raise KeyError("unexpected")

    async def play() -> None:
        woken = asyncio.Event()
        watches = members.Watches(run_of().rollout, woken.set)
        watches.begin(members.Member("a", Odd()))
        await asyncio.wait_for(woken.wait(), 5)
        assert isinstance(watches.problem, InfrastructureError) and "KeyError('unexpected')" in str(watches.problem)
        leaving = members.Watches(run_of().rollout, woken.set)
        leaving.begin(members.Member("b", Lost()))
        await asyncio.sleep(0)
        leaving.end("b")
        await asyncio.sleep(0.01)
        assert leaving.problem is None

    asyncio.run(play())


def test_the_journal_knows_the_engines_of_this_command_alone(tmp_path: Path) -> None:
    def journal(driver: str) -> Journal:
        return Journal(tmp_path / "journal.jsonl", Limits(1, 0, 9, 0, 0), driver, 0)

    first = journal("one")
    assert first.engines == ()
    first.has_engines(("a", "b"))
    first.has_engines(("a", "b"))
    assert (tmp_path / "journal.jsonl").read_text().count('"engines"') == 1
    assert journal("one").engines == ("a", "b"), "the controller was restarted"
    assert journal("two").engines == (), "a new command has its own"


def test_a_controller_that_is_restarted_knows_who_came_and_went(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rayft.actors import controller as module

    monkeypatch.setattr(ray, "get_actor", lambda name: None)
    monkeypatch.setattr(Pool, "watch", lambda self: None)
    monkeypatch.setattr(module, "PromptSet", lambda *_, **__: [])
    setup = Setup(run_of(), tmp_path, "train", None, 9, "driver", 0, ("a",), ("judge",))

    async def play() -> None:
        first = Controller(setup)
        assert await first.engines() == (("a",), ())
        assert await first.engines(join=("a", "b", "c")) == (("c", "b", "a"), ())
        assert await first.engines(leave=("a",)) == (("c", "b"), ())
        assert [member.name for member in Controller(setup)._pool._members] == ["b", "c"]

    asyncio.run(play())
