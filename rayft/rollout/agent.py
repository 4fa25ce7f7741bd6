"""From a prompt to a group of trajectories: the loop of policy and environment, against any engine.

Only what the policy wrote is trained, each token with the log-probability and version that the engine gave it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rayft.errors import DataError, InfrastructureError
from rayft.models.load import seed_of
from rayft.rollout.env import Environment, Observation
from rayft.types import Completion, Engine, Group, Prompt, Trajectory

Decode = Callable[[Sequence[int]], str]
MakeEnvironment = Callable[[], Environment]


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn.

    Attributes:
        max_tokens: most tokens that the policy writes in a trajectory, over all turns.
        context: most tokens of prompt and trajectory together.
        temperature, top_p: of every draw.
        seed: of the run.
        max_turns: most turns of the policy; an environment that is not done by then leaves a truncated trajectory.
    """

    max_tokens: int
    context: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_turns: int = 16


async def rollout(
    engine: Engine,
    prompt: Prompt,
    n: int,
    sampling: Sampling,
    environment: MakeEnvironment | None = None,
    decode: Decode | None = None,
) -> Group:
    """Draw n trajectories at once. Seeds come from (run seed, prompt, sample, turn), so another attempt draws the same.

    Args:
        engine: of this process.
        prompt: its tokens are the rendered prompt.
        n: trajectories of the group.
        sampling: how to draw.
        environment: makes one environment per trajectory; without it a trajectory is one turn.
        decode: the tokenizer's, for environments.

    Raises:
        DataError: the prompt leaves no room for an answer.
        InfrastructureError: the engine failed or gave up a request. Whatever the environment raises passes through.
    """
    if len(prompt.tokens) >= sampling.context:
        rule = f"has {len(prompt.tokens)} tokens, which leave no room for an answer in a context of {sampling.context}"
        raise DataError(f"prompt {prompt.key}", None, rule, "Raise the context, or drop long prompts")
    samples = [
        asyncio.ensure_future(_trajectory(engine, prompt, index, sampling, environment() if environment else None, decode))
        for index in range(n)
    ]
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
        """Add a turn's rewards."""
        for name, reward in observation.rewards.items():
            self.rewards[name] = self.rewards.get(name, 0.0) + reward

    def ended(self, reason: str) -> Trajectory:
        """The finished trajectory."""
        written = tuple(self.tokens), tuple(self.by_policy), tuple(self.logprobs), tuple(self.versions)
        return Trajectory(*written, reason, self.turns, self.rewards)


async def _trajectory(
    engine: Engine, prompt: Prompt, index: int, sampling: Sampling, environment: Environment | None, decode: Decode | None
) -> Trajectory:
    transcript = _Transcript()
    if environment is not None:
        transcript.read(await environment.reset(prompt.row))
    while (room := _room(prompt, transcript, sampling)) > 0 and transcript.turns < sampling.max_turns:
        completion = await engine.generate(
            f"{prompt.key}/{index}/{transcript.turns}/{uuid.uuid4().hex[:8]}",
            (*prompt.tokens, *transcript.tokens),
            max_tokens=room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(sampling.seed, "rollout", prompt.key, index, transcript.turns),
        )
        if completion.finish_reason not in ("stop", "length"):
            rule = f"ended a request with {completion.finish_reason!r} after {len(completion.tokens)} tokens"
            raise InfrastructureError("rollout engine", prompt.key, rule, "The prompt is given to another engine")
        transcript.write(completion)
        if environment is None or completion.finish_reason == "length":
            return transcript.ended(completion.finish_reason)
        assert decode is not None, "an environment needs decode"
        observation = await environment.step(decode(completion.tokens), completion.tokens)
        transcript.earn(observation)
        if observation.done:
            return transcript.ended("stop")
        if len(observation.tokens) >= sampling.context - len(prompt.tokens) - len(transcript.tokens):
            break
        transcript.read(observation.tokens)
    return transcript.ended("length")


def _room(prompt: Prompt, transcript: _Transcript, sampling: Sampling) -> int:
    """Tokens that the policy may still write."""
    in_context = sampling.context - len(prompt.tokens) - len(transcript.tokens)
    return min(in_context, sampling.max_tokens - sum(transcript.by_policy))
