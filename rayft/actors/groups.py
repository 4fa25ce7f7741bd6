"""Groups on their way from prompt to batch, and where their answers and scores are."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Container, Coroutine, Iterable
from dataclasses import replace
from typing import Any

from rayft.actors.dispatch import Dispatch
from rayft.actors.journal import Journal
from rayft.config.schema import GrpoRun
from rayft.data.prompts import PromptSet
from rayft.errors import DataError, InfrastructureError, RayftError, TrainingError
from rayft.experience.algorithm import filter_of
from rayft.experience.filters import FILTERS, signal
from rayft.rollout.env import EnvironmentFailed
from rayft.types import Scored

log = logging.getLogger("rayft")


class Groups:
    """Starts groups, sees them through, and holds references to their answers until no batch needs them any more.

    Args:
        cfg: the run.
        journal: every step of a group is an event of it.
        dispatch: to engines and judges.
        prompts: of the training split.
        wake: called when something changed.

    Attributes:
        answers: ordinal -> reference to the group.
        scores: ordinal -> its rewards.
        tokens: generated so far.
        fatal: why the run must stop.
    """

    def __init__(self, cfg: GrpoRun, journal: Journal, dispatch: Dispatch, prompts: PromptSet, wake: Callable[[], None]) -> None:
        self._cfg, self._journal, self._dispatch, self._prompts, self._wake = cfg, journal, dispatch, prompts, wake
        self._keeps = FILTERS[filter_of(cfg.algorithm)]
        self._filtered_in_a_row = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._starts: dict[int, int] = {}  # ordinal -> number of its newest start, by which answers to an earlier one are told
        self.answers: dict[int, Any] = {}
        self.scores: dict[int, Scored] = {}
        self.tokens = 0
        self.fatal: RayftError | None = None

    def start_all(self) -> None:
        """Start what may be started."""
        while (ordinal := self._journal.state.to_start()) is not None:
            self._journal.add("started", ordinal=ordinal)
            self._starts[ordinal] = next(self._numbers)
            self.spawn(self._produce(ordinal, self._starts[ordinal]))

    def forget(self, ordinals: Iterable[int]) -> None:
        """Let answers go."""
        for ordinal in ordinals:
            self.answers.pop(ordinal, None)
            self.scores.pop(ordinal, None)

    def tidy(self) -> None:
        """Let go of answers that no batch needs any more."""
        self.forget(self.answers.keys() - self._journal.state.needed())

    def oldest(self) -> str:
        """Keys of the prompts that were started first and are under way."""
        return ", ".join(self._prompts.prompt(ordinal).key for ordinal in self._journal.state.waits_for()[:3]) or "none"

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside; that it fails unexpectedly ends the run."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _produce(self, ordinal: int, start: int) -> None:
        """One group from prompt to score; every way that it can end is an event, unless it was started anew meanwhile."""
        state, prompt, rollout = self._journal.state, self._prompts.prompt(ordinal), self._cfg.rollout
        if roll := state.rolls[ordinal]:  # what is random about it is drawn from its key
            prompt = replace(prompt, key=f"{prompt.key}-roll-{roll}")
        try:
            engine, group = await self._dispatch.ask(prompt, rollout.group_size, rollout.temperature)
        except (DataError, EnvironmentFailed, InfrastructureError) as problem:
            if self._in(state.running, ordinal, start):
                self._fail(ordinal, {DataError: "data", EnvironmentFailed: "environment"}.get(type(problem), "process"), problem)
            return
        if self._in(state.running, ordinal, start):
            self._journal.add("finished", {"engine": engine}, ordinal=ordinal)
        while self._in(state.scoring, ordinal, start):
            try:
                scored = await self._dispatch.score(group)
            except (DataError, InfrastructureError) as problem:
                if self._in(state.scoring, ordinal, start):
                    self._fail(ordinal, "reward" if isinstance(problem, DataError) else "process", problem)
                continue
            if self._in(state.scoring, ordinal, start):
                self._take(ordinal, group, scored)
        self._wake()

    def _in(self, stage: Container[int], ordinal: int, start: int) -> bool:
        """Whether that start of the group is the one that the state has in this stage."""
        return ordinal in stage and self._starts[ordinal] == start

    def _take(self, ordinal: int, group: Any, scored: Scored) -> None:
        state, kept = self._journal.state, self._keeps(scored)
        wanted = kept or ordinal in state.missing
        note = {"tokens": sum(scored.lengths), "turns": sum(scored.turns)}
        self._journal.add("scored", note, ordinal=ordinal, kept=kept, signal=signal(scored))
        self.tokens += sum(scored.lengths)
        if wanted:
            self.answers[ordinal], self.scores[ordinal] = group, scored
        self._filtered_in_a_row = 0 if kept else self._filtered_in_a_row + 1
        limit = self._cfg.algorithm.max_filtered
        if self._filtered_in_a_row > limit * self._cfg.rollout.prompts_per_step:
            rule = f"the last {self._filtered_in_a_row} groups were all filtered: their answers have the same reward, so nothing is learnt"
            self.fatal = TrainingError("algorithm.max_filtered", limit, rule, "Take prompts that the policy solves sometimes")

    def _fail(self, ordinal: int, why: str, problem: RayftError) -> None:
        state = self._journal.state
        log.warning("prompt %s: %s", self._prompts.prompt(ordinal).key, problem)
        self._journal.add("failed", ordinal=ordinal, why=why)
        dropped, limit = state.counts["dropped"], self._cfg.reward.max_dropped
        good = len(state.batches) * state.limits.groups + len(state.accepted) + state.counts["filtered"]
        if dropped > max(limit * (good + dropped), state.limits.groups):
            rule = f"{dropped} prompts were given up against {good} groups that were scored; the last one because: {problem}"
            self.fatal = TrainingError("reward.max_dropped", limit, rule, "Mend the cause, then run the same command again")
        self._wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            self.fatal = InfrastructureError(
                "controller", None, f"failed ({problem!r})", "Report it; running the same command again resumes"
            )
            self._wake()
