"""From a prompt to a group of trajectories: the loop of policy and environment, against any engine.

Only what the policy wrote is trained, each token with the log-probability and version that the engine gave it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rayft.errors import DataError, InfrastructureError
from rayft.models.load import seed_of
from rayft.rollout.env import REWARD, Episode, Observation
from rayft.rollout.stage import Stage
from rayft.types import Completion, Engine, Group, Prompt, Trajectory


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn.

    Attributes:
        max_tokens: most tokens that the policy writes in a trajectory, over all turns.
        context: most tokens of prompt and trajectory together.
        temperature, top_p: of every draw.
        seed: of the run.
    """

    max_tokens: int
    context: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


async def rollout(engine: Engine, prompt: Prompt, n: int, sampling: Sampling, stage: Stage | None = None) -> Group:
    """Draw n trajectories at once. Seeds come from (run seed, prompt, sample, turn), so another attempt draws the same.

    With an environment the group's prompt lacks the generation prompt: it is the first thing that each trajectory reads, after what its
    environment opens with.

    Args:
        engine: of this process.
        prompt: its tokens are the rendered prompt.
        n: trajectories of the group.
        sampling: how to draw.
        stage: for an environment; without it a trajectory is one turn.

    Raises:
        DataError: the prompt leaves no room for an answer, or the chat template refuses what an environment says.
        EnvironmentFailed: an environment raised or was too slow.
        InfrastructureError: the engine failed or gave up a request.
    """
    if len(prompt.tokens) >= sampling.context:
        rule = f"has {len(prompt.tokens)} tokens, which leave no room for an answer in a context of {sampling.context}"
        raise DataError(f"prompt {prompt.key}", None, rule, "Raise the context, or drop long prompts")
    if stage is None:
        draws = [_answer(engine, prompt, index, sampling) for index in range(n)]
    else:
        tokens, generation = stage.dialogue.without_generation(prompt.tokens)
        prompt = replace(prompt, tokens=tokens)
        draws = [_converse(engine, prompt, index, sampling, stage, generation) for index in range(n)]
    samples = [asyncio.ensure_future(draw) for draw in draws]
    try:
        return Group(prompt, tuple(await asyncio.gather(*samples)))
    finally:
        for sample in samples:
            sample.cancel()


@dataclass
class _Transcript:
    """A trajectory in the making."""

    tokens: list[int] = field(default_factory=list)
    by_policy: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int, int]] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    turns: int = 0

    def read(self, tokens: Sequence[int]) -> None:
        """Append what the policy reads."""
        self.tokens += tokens
        self.by_policy += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def write(self, completion: Completion) -> None:
        """Append what the policy wrote."""
        start = len(self.tokens)
        self.versions += [(version, start + first, start + end) for version, first, end in completion.versions]
        self.tokens += completion.tokens
        self.by_policy += [True] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.turns += 1

    def earn(self, observation: Observation) -> None:
        """Add a turn's reward."""
        self.rewards[REWARD] += float(observation.reward)

    def ended(self, reason: str) -> Trajectory:
        """The finished trajectory."""
        written = tuple(self.tokens), tuple(self.by_policy), tuple(self.logprobs), tuple(self.versions)
        return Trajectory(*written, reason, self.turns, self.rewards)


async def _answer(engine: Engine, prompt: Prompt, index: int, sampling: Sampling) -> Trajectory:
    """A trajectory of one turn."""
    transcript = _Transcript()
    return transcript.ended(await _turn(engine, prompt, index, sampling, transcript))


async def _converse(
    engine: Engine, prompt: Prompt, index: int, sampling: Sampling, stage: Stage, generation: tuple[int, ...]
) -> Trajectory:
    """A trajectory of turns, until the environment is done or there is no room for another turn."""
    transcript, dialogue = _Transcript(rewards={REWARD: 0.0}), stage.dialogue
    episode = Episode(stage.make, stage.deadline_s, prompt.key)
    try:
        opening = await episode.reset(prompt.row, seed_of(sampling.seed, "environment", prompt.key) % 2**31)
        reads = dialogue.opening(opening, generation)
        if len(reads) >= sampling.context - len(prompt.tokens):
            rule = f"opens with {len(reads)} tokens, which leave no room for an answer in a context of {sampling.context}"
            raise DataError("environment", None, f"prompt {prompt.key}: {rule}", "Let it say less, or raise rollout.max_tokens")
        while len(reads) < sampling.context - len(prompt.tokens) - len(transcript.tokens):
            transcript.read(reads)
            start = len(transcript.tokens)
            if await _turn(engine, prompt, index, sampling, transcript) == "length":
                break
            written = transcript.tokens[start:]
            observation = await episode.step(dialogue.text(written))
            transcript.earn(observation)
            if observation.done:
                return transcript.ended("stop")
            if transcript.turns == stage.max_turns or sum(transcript.by_policy) == sampling.max_tokens:
                break
            reads = dialogue.reply(observation.reply, written[-1])
        return transcript.ended("length")
    finally:
        await episode.close()


async def _turn(engine: Engine, prompt: Prompt, index: int, sampling: Sampling, transcript: _Transcript) -> str:
    """Let the policy write a turn; why it ended, "stop" or "length"."""
    completion = await engine.generate(
        f"{prompt.key}/{index}/{transcript.turns}/{uuid.uuid4().hex[:8]}",
        (*prompt.tokens, *transcript.tokens),
        max_tokens=_room(prompt, transcript, sampling),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed_of(sampling.seed, "rollout", prompt.key, index, transcript.turns),
    )
    if completion.finish_reason not in ("stop", "length"):
        rule = f"ended a request with {completion.finish_reason!r} after {len(completion.tokens)} tokens"
        raise InfrastructureError("rollout engine", prompt.key, rule, "The prompt is given to another engine")
    transcript.write(completion)
    return completion.finish_reason


def _room(prompt: Prompt, transcript: _Transcript, sampling: Sampling) -> int:
    """Tokens that the policy may still write."""
    in_context = sampling.context - len(prompt.tokens) - len(transcript.tokens)
    return min(in_context, sampling.max_tokens - sum(transcript.by_policy))
