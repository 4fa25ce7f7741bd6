"""What an environment is: a conversation partner of the policy, in tokens.

A user's environment is a class of this shape; one object plays one trajectory. It answers in tokens, turn markup included, so that
nothing that the policy wrote is ever tokenised again.

    class Guess:
        async def reset(self, row): return ()
        async def step(self, text, tokens): return Observation(tokens=..., done=..., rewards={"solved": 1.0})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn of the policy.

    Attributes:
        tokens: what the policy reads next, up to where it writes again; unused when done.
        done: the trajectory is over.
        rewards: name -> what this turn earned; a trajectory's rewards are the sums over its turns.
    """

    tokens: tuple[int, ...] = ()
    done: bool = False
    rewards: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """One episode. Whatever it raises is a failure of the rollout, never a reward."""

    async def reset(self, row: Mapping[str, Any]) -> Sequence[int]:
        """Begin with the prompt's row; tokens that follow the prompt before the policy writes, often none."""

    async def step(self, text: str, tokens: Sequence[int]) -> Observation:
        """Take what the policy wrote in this turn, as text and as tokens with the one that ended it."""
