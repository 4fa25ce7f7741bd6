"""The driver's hand on the pool: makes engines, each in a placement group of its own, and ends them, also while the run goes on.

The trainer's resources are not the pool's. While its workers run, they hold them; between two attempts anyone could take them. So an
engine is placed only while the trainer holds its own, and only on what is free beside. A placement group that finds no place within
seconds, or waits when the trainer goes, is removed. When the cluster shrinks, engines make room for the trainer, down to one.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayft.actors import engine_requests
from rayft.actors.placement import engine_resources, worker_resources
from rayft.actors.refusals import check_growth, engines_that_fit
from rayft.config.schema import GrpoRun
from rayft.data.waiting import ROOM
from rayft.errors import InfrastructureError, RayftError, ResourceError

log = logging.getLogger("rayft")

LOOK_S, POLL_S, KEEP_S, ANSWER_S = 1.0, 0.2, 5.0, 10.0
PLACE_S, LOST_S, AGAIN_S = 15.0, 60.0, 60.0
"""For a place that was seen free; until an engine that has no place is given up; and from one try to bring one back to the next."""

Table = Mapping[str, Mapping[str, Any]]
"""Placement groups by id, as Ray lists them."""


@dataclass(frozen=True)
class Placed:
    """An engine that the driver made.

    Attributes:
        actor: its handle.
        group: the placement group that holds its resources.
    """

    actor: Any
    group: PlacementGroup


class Engines:
    """The engines of one command; see the module.

    Args:
        cfg: the run.
        gpu: whether it is on GPUs.
        driver: names the command.
        make: `make(name, **options)` makes an engine's actor with these options of Ray.
    """

    def __init__(self, cfg: GrpoRun, gpu: bool, driver: str, make: Callable[..., Any]) -> None:
        self._cfg, self._gpu, self._make = cfg, gpu, make
        self._names = (f"{driver}-engine-{number}" for number in itertools.count())
        self._engines: dict[str, Placed] = {}
        self._groups = set[str]()  # ids of all placement groups that were made here
        worker = worker_resources(cfg.parallel, "cuda" if gpu else "cpu")
        self._trainer_holds = partial(holds, engines=self._groups, bundles=[worker] * cfg.parallel.workers)
        self._lost: dict[str, float] = {}  # engines whose placement group has no place -> since when
        self._wanted, self._try_at = cfg.rollout.engines, 0.0
        self._controller: Any = None
        self._end = threading.Event()

    @contextmanager
    def open(self) -> Iterator[tuple[str, ...]]:
        """Make the engines that the run starts with; yields their names. All engines that there are then end with the block.

        Raises:
            ResourceError: they find no place within run.start_s.
        """
        with ExitStack() as undo:
            self._engines = self._place(self._wanted, self._cfg.run.start_s, undo, lambda table: True)
            undo.pop_all()
        try:
            yield tuple(self._engines)
        finally:
            for name in list(self._engines):
                self._kill(name)

    @contextmanager
    def serve(self, home: str, controller: Any) -> Iterator[None]:
        """While the block runs, follow requests for another number of engines, and look after their places."""
        self._controller = controller
        engine_requests.forget(home)
        thread = threading.Thread(target=self._watch, args=(home,), name="rayft-engines", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _watch(self, home: str) -> None:
        looked = time.monotonic()
        while not self._end.wait(LOOK_S):
            try:
                if (request := engine_requests.asked(home)) is not None:
                    self._follow(home, request)
                if time.monotonic() - looked > KEEP_S:
                    looked = time.monotonic()
                    self._keep()
            except (RayError, RayftError) as problem:
                log.warning("the engines stay as they are for now: %s", problem)

    def _follow(self, home: str, request: engine_requests.Asked) -> None:
        """Do what is asked, or nothing of it; a request for more waits while the trainer is being placed."""
        before, error = len(self._engines), None
        more = request.engines - before
        if more > 0 and not self._trainer_holds(placement_group_table()):
            return
        try:
            if more > 0:
                check_growth(self._cfg, self._gpu, request.engines, more, ray.cluster_resources(), ray.available_resources())
                self._grow(more)
            elif more < 0:
                self._shrink(self._tell()[0][:-more], self._cfg.rollout.deadline_s)
            self._wanted = request.engines
        except RayftError as problem:
            error = problem
        done = f"engines: {len(self._engines)}, before: {before}" + "; new ones serve after the next push of weights" * (more > 0)
        engine_requests.answer(home, request, done, error)

    def _keep(self) -> None:
        """Give up engines that have lost their place, and those in whose place the trainer must be; bring back one that is missing."""
        table, now = placement_group_table(), time.monotonic()
        fit, have = self._fit(), list(self._engines)
        self._lost = {name: self._lost.get(name, now) for name in have if not _is_placed(table, self._engines[name].group)}
        if going := surplus(have, {name: now - since for name, since in self._lost.items()}, fit):
            log.warning("given up, for their node is gone or the trainer needs their place: %s", ", ".join(going))
            self._shrink(going, 0.0)
        kind, each = engine_resources(self._cfg, self._gpu)
        room = len(self._engines) < min(self._wanted, fit) and ray.available_resources().get(kind, 0.0) >= each
        if room and now >= self._try_at and self._trainer_holds(table):
            self._try_at = now + AGAIN_S
            self._grow(1)

    def _grow(self, count: int) -> None:
        """Add engines once all have started, or none."""
        with ExitStack() as undo:
            made = self._place(count, PLACE_S, undo, self._trainer_holds)
            have = len(self._engines) + count
            start([one.actor for one in made.values()], self._cfg, lambda: self._end.is_set() or self._fit() < have)
            undo.pop_all()
        self._engines |= made
        self._tell(join=tuple(self._engines))
        log.info("engines added: %s; the pool has %d", ", ".join(made), len(self._engines))

    def _shrink(self, names: Sequence[str], patience_s: float) -> None:
        """End engines, after their groups and a push under way, but after so many seconds at any rate."""
        until = time.monotonic() + patience_s
        while self._tell(leave=names)[1] and time.monotonic() < until:
            self._end.wait(POLL_S)
        for name in names:
            self._kill(name)
        log.info("engines removed: %s; the pool has %d", ", ".join(names), len(self._engines))

    def _place(self, count: int, seconds: float, undo: ExitStack, allowed: Callable[[Table], bool]) -> dict[str, Placed]:
        """Make engines in places of their own; `undo` ends them."""
        kind, each = engine_resources(self._cfg, self._gpu)
        groups = {next(self._names): placement_group([{kind: each}]) for _ in range(count)}
        self._groups |= {group.id.hex() for group in groups.values()}
        for group in groups.values():
            undo.callback(remove_placement_group, group)
        until = time.monotonic() + seconds
        while not all(_is_placed(table := placement_group_table(), group) for group in groups.values()):
            if self._end.is_set() or time.monotonic() > until or not allowed(table):
                rule = f"found no place of {each:g} {kind}s each within {seconds:g} s, or not before the trainer had to be placed again"
                raise ResourceError("engines", count, rule, "Look who holds them, and try again")
            time.sleep(POLL_S)
        made = {}
        for name, group in groups.items():
            resources = {f"num_{kind.lower()}s": each, "scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
            made[name] = Placed(self._make(name, **resources), group)
            undo.callback(ray.kill, made[name].actor)
        return made

    def _fit(self) -> int:
        if self._cfg.parallel.autoscaling:
            return sys.maxsize  # it grows until the trainer has its place, and no engine need make room
        return engines_that_fit(self._cfg, self._gpu, ray.cluster_resources())

    def _tell(self, join: Sequence[str] = (), leave: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`Controller.engines`, asked again while it is being restarted. Raises InfrastructureError when it does not come back."""
        until = time.monotonic() + self._cfg.run.deadline_s
        while time.monotonic() < until and not self._end.is_set():
            try:
                idlest, busy = ray.get(self._controller.engines.remote(join, leave), timeout=ANSWER_S)
                return tuple(idlest), tuple(busy)
            except (RayActorError, GetTimeoutError):
                self._end.wait(POLL_S)
        raise InfrastructureError("controller", None, "did not answer before the end", "Ask again when it is back")

    def _kill(self, name: str) -> None:
        one = self._engines.pop(name)
        ray.kill(one.actor)
        remove_placement_group(one.group)


def start(pool: Sequence[Any], cfg: GrpoRun, given_up: Callable[[], bool] = lambda: False) -> None:
    """Wait until engines have started, or are not wanted any more.

    Raises:
        ResourceError: one did not.
        InfrastructureError: they are not wanted any more.
    """
    began, starting = time.monotonic(), [engine.start.remote() for engine in pool]
    while ray.wait(starting, num_returns=len(starting), timeout=POLL_S)[1]:
        if given_up():
            raise InfrastructureError("engines", len(pool), "did not start before the run ended or its cluster shrank", "Ask again then")
        if time.monotonic() - began > cfg.rollout.start_s:
            rule = "was not enough for the engines to start"
            raise ResourceError("rollout.start_s", cfg.rollout.start_s, rule, "Look into their lines above, or raise it")
    try:
        ray.get(starting)
    except RayError as problem:
        rule = f"did not start beside the trainer ({getattr(problem, 'cause', None) or type(problem).__name__})"
        raise ResourceError("rollout.engine", cfg.rollout.engine, rule, "Look into the cause, then run the command again") from problem
    log.info("%d engines started in %.0f s", len(pool), time.monotonic() - began)


def surplus(engines: Sequence[str], lost: Mapping[str, float], fit: int) -> tuple[str, ...]:
    """Engines to give up; one always stays.

    Args:
        engines: names, those made first before others.
        lost: seconds since each that has no place lost it.
        fit: engines that the cluster holds beside the trainer.
    """
    expired = [name for name in engines if lost.get(name, 0.0) > LOST_S]
    order = sorted(reversed(engines), key=lambda name: (name not in expired, name not in lost))
    return tuple(order[: min(max(len(expired), len(engines) - fit), len(engines) - 1)])


def holds(table: Table, engines: Collection[str], bundles: Sequence[Mapping[str, float]]) -> bool:
    """Whether a placement group with these bundles has its place, other than those of engines: Ray Train's, of the trainer's workers."""
    wanted = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    return any(
        entry["state"] == "CREATED"
        and group not in engines
        and entry.get("name") != ROOM
        and [{kind: amount for kind, amount in bundle.items() if amount} for bundle in entry["bundles"].values()] == wanted
        for group, entry in table.items()
    )


def _is_placed(table: Table, group: PlacementGroup) -> bool:
    return group.id.hex() in table and table[group.id.hex()]["state"] == "CREATED"
