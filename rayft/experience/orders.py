"""What the controller tells the trainer's ranks to do next, the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rayft.errors import RayftError
from rayft.experience.pack import Update
from rayft.types import Scored


@dataclass(frozen=True)
class Order:
    """One thing to do.

    Attributes:
        kind: push the weights to engines; train on a batch; end, because all steps are done; stop, because of an error.
        step: steps that the trainer has done.
        version: of the weights to push.
        engines: (life, name of the actor) of the engines to push to.
        ticket: names this making of the batch; ranks that hold different ones must ask again.
        groups: number in the batch -> reference to the group, of what a rank needs.
        scores: of all groups of the batch, in order.
        updates: what to compute; for a rank, with its own part alone.
        records: (step, metrics) to log; an evaluation may come more than once.
        error: why to stop.
    """

    kind: Literal["push", "batch", "end", "stop"]
    step: int
    version: str = ""
    engines: tuple[tuple[str, str], ...] = ()
    ticket: str = ""
    groups: Mapping[int, Any] = field(default_factory=dict)
    scores: tuple[Scored, ...] = ()
    updates: tuple[Update, ...] = ()
    records: tuple[tuple[int, dict[str, float]], ...] = ()
    error: RayftError | None = None

    def part(self, rank: int) -> Order:
        """The order as a rank needs it: its own answers and their groups."""
        updates = tuple(replace(update, micro=(update.micro[rank],)) for update in self.updates)
        needed = {answer.group for update in updates for micro in update.micro[0] for answer in micro}
        groups = {number: reference for number, reference in self.groups.items() if number in needed}
        return replace(self, updates=updates, groups=groups)
