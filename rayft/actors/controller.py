"""The controller of an online run: an asynchronous actor around `experience.admission`, which decides; this one carries out.

It holds keys, numbers and references, never tokens, and tells the trainer's ranks what to do next. Every wait in it has a deadline. It may
die at any time: Ray restarts it, the journal brings the state back, and what was in flight is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rayft.actors.dispatch import Dispatch
from rayft.actors.groups import Groups
from rayft.actors.held_out import HeldOut
from rayft.actors.journal import Journal
from rayft.actors.pool import Pool
from rayft.config.environment import Credentials
from rayft.config.schema import GrpoRun
from rayft.data.prompts import PromptSet
from rayft.experience import summary
from rayft.experience.admission import Admission, Limits
from rayft.experience.algorithm import weighing_of
from rayft.experience.orders import Order
from rayft.experience.pack import plan
from rayft.observe.console import show_messages

log = logging.getLogger("rayft")

POLL_S = 5.0
"""How long a rank's question is held before it is told to ask again."""


@dataclass(frozen=True)
class Setup:
    """What a controller is started with, and started anew with.

    Attributes:
        cfg: the run.
        run_dir: where its journal is.
        train_prompts, eval_prompts: folders of prompts.
        total_steps: of the run.
        driver: names the command.
        step: of the newest checkpoint when the command started.
        engines, judges: names of the actors that the command starts with; engines come and go later.
        secrets: of the command, for the store that prompts may be on.
    """

    cfg: GrpoRun
    run_dir: Path
    train_prompts: str
    eval_prompts: str | None
    total_steps: int
    driver: str
    step: int
    engines: tuple[str, ...]
    judges: tuple[str, ...]
    secrets: Credentials = field(default_factory=lambda: Credentials({}))


class Controller:
    """See the module. Methods are called by the trainer's ranks; all of them return soon."""

    def __init__(self, setup: Setup) -> None:
        show_messages()
        setup.secrets.adopt()
        cfg = setup.cfg
        self._cfg, self._total_steps = cfg, setup.total_steps
        limits = Limits(
            cfg.rollout.prompts_per_step,
            cfg.rollout.max_staleness,
            setup.total_steps,
            cfg.rollout.restarts,
            cfg.reward.retries,
            cfg.algorithm.rerolls,
            cfg.algorithm.replay,
        )
        self._journal = Journal(setup.run_dir / "journal.jsonl", limits, setup.driver, setup.step)
        self._pool = Pool(self._journal.engines or setup.engines, cfg.rollout, self._wake)
        self._pool.current = self._journal.serving
        dispatch = Dispatch(cfg, self._pool, setup.judges)
        prompts = PromptSet(setup.train_prompts, seed=cfg.run.seed, shuffle=cfg.data.shuffle)
        self._groups = Groups(cfg, self._journal, dispatch, prompts, self._wake)
        held_out = PromptSet(setup.eval_prompts, seed=0, shuffle=False) if setup.eval_prompts else None
        self._held_out = HeldOut(cfg, held_out, dispatch, self._pool, setup.total_steps)
        self._orders: dict[tuple[int, int, int], Order] = {}
        self._records = list(self._journal.evaluated.items())  # the trainer leaves out what it knows
        self._world = cfg.parallel.workers
        self._losing: tuple[int, int, int] | None = None  # question whose lost groups are made again; it may be asked often
        self._pushing: tuple[str, ...] = ()  # lives of the engines that a push was ordered to and is not known to have ended
        self._deciding, self._changed = asyncio.Lock(), asyncio.Event()
        self._rate = _Rate()

    async def join(self, attempt: int, step: int, world: int) -> None:
        """The trainer's workers of that attempt, so many, start from a checkpoint of `step`. Called before any of them asks for orders."""
        self._pool.watch()
        if attempt == self._journal.attempt:
            return
        state = self._journal.state
        if step > state.committed:
            await self.committed(step)
        if step < state.committed:
            self._groups.forget(list(self._groups.answers))
        for life in self._pushing:
            self._pool.end(life, "the trainer died in a push to it, so what it holds is undefined")
        self._pushing = ()
        self._journal.add("trainer_restarted", step=step)
        self._journal.joined(attempt)
        self._world, self._orders, self._records = world, {}, list(self._journal.evaluated.items())
        log.info("the trainer's attempt %d starts from step %d; engines serve step %d", attempt, step, state.version)
        self._wake()

    async def order(self, attempt: int, step: int, index: int, rank: int, lost: Sequence[int] = ()) -> Order | None:
        """What to do next; the same for every rank that asks with the same numbers. None: ask again.

        Args:
            attempt: of the asking workers.
            step: steps that they have done.
            index: orders that they had at this step already.
            rank: of the asking one.
            lost: numbers of groups of the step's batch that some rank could not fetch.
        """
        self._pool.watch()
        if attempt != self._journal.attempt:
            return None
        key, until = (attempt, step, index), time.monotonic() + POLL_S
        async with self._deciding:
            if lost and key not in self._orders and key != self._losing:
                self._losing = key
                if _lose(self._journal, self._groups, step, lost):
                    self._wake()
            while key not in self._orders and time.monotonic() < until:
                self._changed.clear()
                if (order := self._decide(step)) is not None:
                    self._orders = {asked: made for asked, made in self._orders.items() if asked[1] == step} | {key: order}
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), max(until - time.monotonic(), 0.0))
        return self._orders[key].part(rank) if key in self._orders else None

    async def pushed(self, attempt: int, step: int, reached: Sequence[str], lost: Mapping[str, str]) -> None:
        """The lives of engines that now have the weights of `step`, and those that were lost on the way, with the reason."""
        if attempt != self._journal.attempt:
            return
        self._pushing = ()
        for life, reason in lost.items():
            self._pool.end(life, reason)
        if reached:
            self._journal.serves(f"{attempt}.{step}")
            self._pool.has(reached, self._journal.serving)
            self._journal.add("pushed", step=step)
        self._wake()

    async def committed(self, step: int) -> None:
        """A checkpoint covers the steps before that one: their groups go, but those that later steps train again."""
        self._journal.add("committed", step=step)
        self._groups.tidy()

    async def journal(self) -> bytes:
        """All lines of the journal, for a run whose directory is no path."""
        return self._journal.content()

    async def engines(self, join: Sequence[str] = (), leave: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Change the pool; asked again, it changes nothing more.

        Args:
            join: names of engines that have started; they serve once a push has brought them to the current weights.
            leave: names of engines that get nothing more to do.

        Returns:
            The names of the pool's engines, those first that it would miss least; and of those that were to leave and are still at work,
            until when they must not be ended.
        """
        found, busy = self._pool.change(join, leave, self._pushing)
        self._pool.watch()
        self._journal.has_engines(found)
        return self._pool.idlest(), busy

    async def report(self) -> str:
        """Who waits for whom, in words."""
        state = self._journal.state
        which = "" if state.caught_up else " of an earlier attempt"
        return (
            f"engines serve step {state.version}{which}; {len(state.accepted)} groups are ready, {len(state.running)} are generated, "
            f"{len(state.scoring)} scored (oldest: {self._groups.oldest()}), {len(state.missing)} of earlier batches are made again; "
            f"{self._pool.in_words()}{self._held_out.in_words()}"
        )

    def _decide(self, step: int) -> Order | None:
        """The next order, or None while there is nothing to do."""
        state = self._journal.state
        if (problem := self._groups.fatal or self._pool.watches.problem) is not None:
            return Order("stop", step, error=problem)
        if step < state.version and (self._pool.serving() or not state.missing):
            return self._batch(step)  # an earlier attempt came further: its batches are trained again, and engines wait
        self._evaluate_if_due()
        if step == self._total_steps and self._held_out.prompts is None:
            return Order("end", step, records=_taken(self._records))
        version = f"{self._journal.attempt}.{step}"
        if behind := self._pool.behind(version):
            if self._held_out.running and version != self._pool.current:
                self._held_out.superseded = not self._pool.serving()
                return None
            self._pushing = tuple(member.life for member in behind)
            engines = tuple((member.life, member.name) for member in behind)
            return Order("push", step, version=version, engines=engines, records=_taken(self._records))
        if not state.caught_up or self._pool.current != version:
            return None
        if step < self._total_steps:
            return self._batch(step)
        return None if self._held_out.running else Order("end", step, records=_taken(self._records))

    def _batch(self, step: int) -> Order | None:
        """The step's batch, once all its groups are there."""
        state, cfg = self._journal.state, self._cfg
        batch = state.batch(step)
        if batch is None:
            return None
        if gone := [ordinal for ordinal in batch if ordinal not in self._groups.answers]:
            self._journal.add("lost", ordinals=gone)
            self._wake()
            return None
        replayed = state.replayed(step, batch)
        if step not in state.batches:
            self._journal.add("consumed", step=step, ordinals=list(batch), replayed=replayed)
            self._groups.tidy()
        scores = tuple(self._groups.scores[ordinal] for ordinal in batch)
        values = summary.of_batch(scores, step) | {"rollout/replayed": float(len(replayed))}
        self._records.append((step + 1, values | self._pool.figures() | self._rate(self._groups.tokens) | _counts(state)))
        return Order(
            "batch",
            step,
            ticket=uuid.uuid4().hex,
            groups={number: self._groups.answers[ordinal] for number, ordinal in enumerate(batch)},
            scores=tuple(replace(scored, advantages=()) for scored in scores),
            updates=tuple(plan(scores, weighing_of(cfg), budget=cfg.micro_tokens, world=self._world, updates=cfg.algorithm.updates)),
            records=_taken(self._records),
        )

    def _evaluate_if_due(self) -> None:
        """Evaluate the weights that engines serve, unless that is done or under way; a controller that died in it begins again."""

        async def evaluate(step: int) -> None:
            try:
                values = await self._held_out.run()
                self._journal.has_evaluated(step, values)
                if values:
                    self._records.append((step, values))
            finally:
                self._held_out.running = False
                self._wake()

        state = self._journal.state
        served = state.caught_up and self._journal.serving == f"{self._journal.attempt}.{state.version}"
        if served and not self._held_out.running and self._held_out.due(state.version, self._journal.evaluated):
            self._held_out.running = True
            self._groups.spawn(evaluate(state.version))

    def _wake(self) -> None:
        """Something changed: start what may be started, and look again at what ranks wait for."""
        if self._pool.serving():
            self._groups.start_all()
        self._changed.set()


def _lose(journal: Journal, groups: Groups, step: int, numbers: Sequence[int]) -> bool:
    """Groups of the step's batch cannot be fetched: they are made again. Whether there was one to lose."""
    batch = journal.state.batches.get(step, ())
    gone = [batch[number] for number in numbers if number < len(batch) and batch[number] in groups.answers]
    groups.forget(gone)
    if gone:
        journal.add("lost", ordinals=gone)
    return bool(gone)


class _Rate:
    """Tokens a second, from one batch to the next."""

    def __init__(self) -> None:
        self._since, self._tokens = time.monotonic(), 0

    def __call__(self, tokens: int) -> dict[str, float]:
        """The metric, from all tokens so far."""
        since, before, self._since, self._tokens = self._since, self._tokens, time.monotonic(), tokens
        return {"rollout/tokens_per_s": (tokens - before) / max(self._since - since, 1e-9)}


def _counts(state: Admission) -> dict[str, float]:
    """What became of groups so far."""
    return {f"rollout/{name}": float(state.counts[name]) for name in summary.COUNTS}


def _taken(records: list[tuple[int, dict[str, float]]]) -> tuple[tuple[int, dict[str, float]], ...]:
    """The records, which are nobody else's from now on."""
    taken = tuple(records)
    records.clear()
    return taken
