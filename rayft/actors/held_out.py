"""Evaluation on held-out prompts, by the engines of the pool under the weights of one step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Container
from dataclasses import dataclass

from rayft.actors.dispatch import Dispatch
from rayft.actors.pool import Pool
from rayft.config.schema import GrpoRun
from rayft.data.prompts import PromptSet
from rayft.errors import DataError, InfrastructureError
from rayft.experience.summary import of_evaluation
from rayft.rollout.env import EnvironmentFailed
from rayft.types import Prompt, Scored

log = logging.getLogger("rayft")

TRIES, PAUSE_S = 5, 2.0


@dataclass
class HeldOut:
    """Evaluations of a run.

    Attributes:
        cfg: the run.
        prompts: held out; None for none.
        dispatch: to engines and judges.
        pool: of the engines.
        total_steps: of the run; the last step is always evaluated.
        running: an evaluation is under way, so weights must stay.
        asked, answered: prompts of the evaluation under way, and those that are done.
        superseded: the trainer has later weights and no engine has those under evaluation any more.
    """

    cfg: GrpoRun
    prompts: PromptSet | None
    dispatch: Dispatch
    pool: Pool
    total_steps: int
    running: bool = False
    asked: int = 0
    answered: int = 0
    superseded: bool = False

    def due(self, step: int, done: Container[int]) -> bool:
        """Whether the weights of that step are to be evaluated, and are not among the steps that were."""
        wanted, every = self.cfg.eval, self.cfg.eval.every
        at_edge = step == self.total_steps or (step == 0 and wanted.at_start)
        return self.prompts is not None and step not in done and (at_edge or bool(step and every and step % every == 0))

    async def run(self) -> dict[str, float]:
        """The metrics of the weights that engines serve; none when no prompt could be answered, or these weights went before all were."""
        assert self.prompts is not None
        self.superseded = False
        self.asked, self.answered = min(len(self.prompts), self.cfg.eval.max_prompts or len(self.prompts)), 0
        found = await asyncio.gather(*(self._answer(self.prompts.prompt(place)) for place in range(self.asked)))
        answered = [pair for pair in found if pair is not None]
        if self.superseded and len(answered) < self.asked:  # the quickest answers alone would say something else
            log.warning("evaluation given up after %d of %d prompts: no engine has its weights any more", len(answered), self.asked)
            return {}
        return of_evaluation(answered, self.cfg.eval.correct_from) if answered else {}

    def in_words(self) -> str:
        """How far the evaluation under way is; empty when there is none."""
        return f"; weights stay as they are until {self.asked - self.answered} of {self.asked} held-out prompts are answered" * self.running

    async def _answer(self, prompt: Prompt) -> tuple[Scored, Scored] | None:
        """Scores of the sampled answers and of one without sampling; None when they cannot be had."""
        for _ in range(TRIES):
            await self._until_served()
            try:
                _, sampled = await self.dispatch.ask(prompt, self.cfg.eval.samples, self.cfg.rollout.temperature)
                _, greedy = await self.dispatch.ask(prompt, 1, 0.0)
                pair = await self.dispatch.score(sampled), await self.dispatch.score(greedy)
                self.answered += 1
                return pair
            except (DataError, EnvironmentFailed, InfrastructureError) as problem:
                log.warning("held-out prompt %s: %s", prompt.key, problem)
                await asyncio.sleep(PAUSE_S)
        return None

    async def _until_served(self) -> None:
        """Wait for an engine with these weights: one that died is brought back to them as long as the trainer has them too."""
        until = time.monotonic() + self.cfg.rollout.start_s
        while not (self.pool.serving() or self.superseded or time.monotonic() > until):
            await asyncio.sleep(PAUSE_S)
