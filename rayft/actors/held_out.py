"""Evaluation on held-out prompts, by the engines of the pool under the weights of one step."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from rayft.actors.dispatch import Dispatch
from rayft.config.schema import GrpoRun
from rayft.data.prompts import PromptSet
from rayft.errors import DataError, InfrastructureError
from rayft.experience.summary import of_evaluation
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
        total_steps: of the run; the last step is always evaluated.
        running: an evaluation is under way, so weights must stay.
        done: steps that were evaluated.
    """

    cfg: GrpoRun
    prompts: PromptSet | None
    dispatch: Dispatch
    total_steps: int
    running: bool = False
    done: set[int] = field(default_factory=set)

    def due(self, step: int) -> bool:
        """Whether the weights of that step are to be evaluated now."""
        wanted, every = self.cfg.eval, self.cfg.eval.every
        at_edge = step == self.total_steps or (step == 0 and wanted.at_start)
        return self.prompts is not None and step not in self.done and (at_edge or bool(step and every and step % every == 0))

    async def run(self, step: int) -> dict[str, float]:
        """The metrics of that step's weights; none when no prompt could be answered."""
        assert self.prompts is not None
        count = min(len(self.prompts), self.cfg.eval.max_prompts or len(self.prompts))
        found = await asyncio.gather(*(self._answer(self.prompts.prompt(place)) for place in range(count)))
        self.done.add(step)
        answered = [pair for pair in found if pair is not None]
        return of_evaluation(answered, self.cfg.eval.correct_from) if answered else {}

    async def _answer(self, prompt: Prompt) -> tuple[Scored, Scored] | None:
        """Scores of the sampled answers and of one without sampling; None when they cannot be had."""
        for _ in range(TRIES):
            try:
                sampled = await self.dispatch.ask(prompt, self.cfg.eval.samples, self.cfg.rollout.temperature)
                greedy = await self.dispatch.ask(prompt, 1, 0.0)
                return await self.dispatch.score(sampled), await self.dispatch.score(greedy)
            except (DataError, InfrastructureError) as problem:
                log.warning("held-out prompt %s: %s", prompt.key, problem)
                await asyncio.sleep(PAUSE_S)
        return None
