"""Which groups of answers to start, which make up a step's batch, and what to do when something dies. A state machine without clock or I/O.

Groups are known by ordinal, their place in the endless order of prompts. The version is the number of steps behind the weights that
serving engines have. With B groups in a step and a bound of S steps:

    start    while accepted + running, consumed ones included, are fewer than B * (version + 1 + S)
    batch    step n takes B accepted groups, those that were started under the oldest version first, and only if afterwards every group
             left over can still be consumed in time: for each m, at most B * (m - n) of them are due by step m

A group is due by step v + S when it was started under version v. The first rule alone does not bound the age of a group that is slow while
others overtake it; with the second, no token of a batch of step n is older than version n - S, and a slow group is waited for, not dropped.
Groups that were filtered, dropped or restarted give their place back. A filtered one may be rolled again, under later weights than those
that it was started under: it counts as a new group then, whose answers are drawn anew.

With replay on, the place of a filtered group is kept free while a group of an earlier step could take it. A step that lacks accepted groups
takes as many of those instead: groups that were trained once, started under version n - S or later, with the most signal first, then by
ordinal. So a group is trained twice at most, never twice in a batch, and under the same bound as any other.

Batches stay pinned until a checkpoint that covers them is committed. A trainer that restarts from step k gets the batches k, k + 1, ...
again, and nothing is started before it has caught up and pushed its weights.

The state changes by events only, each one JSON line of a journal; applying a journal's events to a fresh state gives the same state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
"""{"event": name, ...}, JSON-able."""


@dataclass(frozen=True)
class Limits:
    """What a run allows.

    Attributes:
        groups: groups in a step (B).
        staleness: steps that a token may be behind the weights that are trained with it (S).
        steps: steps of the run; nothing is started for later ones.
        restarts: times that a group is started again after a process died under it, and after its environment failed.
        rescores: times that a group is scored again after its reward failed.
        rerolls: times that a filtered group is started again under later weights.
        replay: most groups of a step that earlier steps have trained already.
    """

    groups: int
    staleness: int
    steps: int
    restarts: int
    rescores: int
    rerolls: int = 0
    replay: int = 0


@dataclass
class Admission:
    """The state; EVENTS change it.

    Attributes:
        version: steps behind the weights that engines serve.
        caught_up: whether the trainer is at that version; nothing starts before.
        next_ordinal: first ordinal that was never started.
        again: ordinals to start again, before any new one.
        running, scoring, accepted: ordinal -> version that it was started under.
        batches: step -> its groups, of every step so far.
        missing: groups of batches whose answers were lost and are not back yet.
        committed: steps that a committed checkpoint covers.
        rolls: ordinal -> times that its answers were rolled again, or are to be.
        later: filtered groups to roll again -> version that they were started under.
        vacant: places of filtered groups that no other group was started for.
        signals: ordinal -> signal of its answers, of accepted and replayable groups at least.
        replayable: groups trained once that the next step's bound allows -> version that they were started under.
        counts: "filtered", "dropped", "restarted", "rescored" and "rerolled" groups so far.
        failures: (what, ordinal) -> times, of groups in flight.
    """

    limits: Limits
    version: int = 0
    caught_up: bool = False
    next_ordinal: int = 0
    again: list[int] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    scoring: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    batches: dict[int, tuple[int, ...]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    committed: int = 0
    rolls: Counter[int] = field(default_factory=Counter)
    later: dict[int, int] = field(default_factory=dict)
    vacant: int = 0
    signals: dict[int, float] = field(default_factory=dict)
    replayable: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, int]] = field(default_factory=Counter)

    def apply(self, event: Event) -> None:
        """Change the state by one event."""
        fields = dict(event)
        EVENTS[fields.pop("event")](self, **fields)

    def to_start(self) -> int | None:
        """The group to start next, or None while nothing may be."""
        for ordinal in self.again:
            if ordinal in self.missing:
                return ordinal
        if not self.caught_up or self.free() <= len(self._replays()):
            return None
        due = next((ordinal for ordinal, version in self.later.items() if version < self.version), self.next_ordinal)
        return self.again[0] if self.again else due

    def batch(self, step: int) -> tuple[int, ...] | None:
        """The groups of a step's batch: the ones it already has, or those that it may take now; None while that must wait."""
        if step in self.batches:
            return None if self.missing.intersection(self.batches[step]) else self.batches[step]
        if step != len(self.batches) or step > self.version:
            return None
        ready = [ordinal for _, ordinal in sorted((version, ordinal) for ordinal, version in self.accepted.items())]
        taken = (ready + self._replays())[: self.limits.groups]
        if len(taken) < self.limits.groups:
            return None
        chosen, due = {*taken}, Counter[int]()
        for ordinal, version in (self.accepted | self.running | self.scoring).items():
            if ordinal not in chosen and ordinal not in self.missing:
                due[version + self.limits.staleness] += 1
        left = 0
        for last in sorted(due):
            left += due[last]
            if left > self.limits.groups * (last - step):
                return None
        return tuple(taken)

    def free(self) -> int:
        """Groups that may be started under the present weights, replay aside."""
        in_flight = self.running.keys() | self.scoring.keys()
        taken = len(self.batches) * self.limits.groups + len(self.accepted) + len(in_flight - self.missing)
        return self.limits.groups * min(self.version + 1 + self.limits.staleness, self.limits.steps) - taken

    def replayed(self, step: int, batch: Iterable[int]) -> list[int]:
        """Those of a step's groups that an earlier step has trained already."""
        earlier = {ordinal for before in range(step - self.limits.staleness, step) for ordinal in self.batches.get(before, ())}
        return [ordinal for ordinal in batch if ordinal in earlier]

    def needed(self) -> set[int]:
        """Groups whose answers a batch is made of, or may be."""
        pinned = {ordinal for step in range(self.committed, len(self.batches)) for ordinal in self.batches[step]}
        return pinned | self.accepted.keys() | self.replayable.keys()

    def _replays(self) -> list[int]:
        """The groups of earlier steps that may fill places of the next one, those with the most signal first."""
        best = sorted(self.replayable, key=lambda ordinal: (-self.signals[ordinal], ordinal))
        return best[: min(self.limits.replay, self.vacant)]

    def waits_for(self) -> tuple[int, ...]:
        """Groups in flight, those started first before others."""
        return tuple(sorted(self.running | self.scoring, key=lambda ordinal: ((self.running | self.scoring)[ordinal], ordinal)))


def started(state: Admission, ordinal: int) -> None:
    """An engine was given the group."""
    if ordinal in state.again:
        state.again.remove(ordinal)
    if state.later.pop(ordinal, None) is not None:
        state.counts["rerolled"] += 1
    state.next_ordinal = max(state.next_ordinal, ordinal + 1)
    state.running[ordinal] = state.version
    state.vacant = min(state.vacant, max(state.free(), 0))


def finished(state: Admission, ordinal: int) -> None:
    """All answers are there; they are being scored."""
    state.scoring[ordinal] = state.running.pop(ordinal)


def scored(state: Admission, ordinal: int, kept: bool, signal: float = 0.0) -> None:
    """The rewards are there; a group that no filter keeps gives its place back, unless it is made again for a batch."""
    version = state.scoring.pop(ordinal)
    _clear_failures(state, ordinal)
    if kept and state.limits.replay:
        state.signals[ordinal] = signal
    if ordinal in state.missing:
        state.missing.remove(ordinal)
        if not kept:
            state.replayable.pop(ordinal, None)
    elif kept:
        state.accepted[ordinal] = version
    else:
        state.counts["filtered"] += 1
        state.vacant += bool(state.limits.replay)
        if state.rolls[ordinal] < state.limits.rerolls:
            state.rolls[ordinal] += 1
            state.later[ordinal] = version


def failed(state: Admission, ordinal: int, why: str) -> None:
    """A rollout died with its process ("process") or by its environment ("environment"), its reward failed ("reward"), or its row cannot be
    used ("data")."""
    budget = {"process": state.limits.restarts, "environment": state.limits.restarts, "reward": state.limits.rescores, "data": 0}[why]
    state.failures[why, ordinal] += 1
    if state.failures[why, ordinal] > budget:
        _drop(state, ordinal)
    elif why == "reward":
        state.counts["rescored"] += 1
    else:
        state.counts["restarted"] += 1
        _restart(state, ordinal)


def consumed(state: Admission, step: int, ordinals: Sequence[int], replayed: Sequence[int] = ()) -> None:
    """The step's batch is made of these, some of which an earlier step has trained already."""
    state.batches[step] = tuple(ordinals)
    state.vacant -= len(replayed)
    for ordinal in replayed:  # a journal of other limits may name groups that these do not keep
        state.replayable.pop(ordinal, None)
    once = {ordinal: state.accepted.pop(ordinal) for ordinal in ordinals if ordinal not in replayed}
    if state.limits.replay:
        state.replayable = {one: version for one, version in (state.replayable | once).items() if version > step - state.limits.staleness}
        state.signals = {one: state.signals[one] for one in state.accepted.keys() | state.replayable.keys()}


def lost(state: Admission, ordinals: list[int]) -> None:
    """The answers of these consumed groups cannot be read any more; they are made again under the same ordinals."""
    state.missing |= set(ordinals)
    state.again = sorted({*state.again, *ordinals} - state.running.keys() - state.scoring.keys())


def pushed(state: Admission, step: int) -> None:
    """Serving engines have the weights of that many steps."""
    state.version, state.caught_up = step, True


def committed(state: Admission, step: int) -> None:
    """A checkpoint covers the steps before that one; their batches are no longer needed."""
    state.committed = max(state.committed, step)


def trainer_restarted(state: Admission, step: int) -> None:
    """The trainer starts from a checkpoint of that step; from one older than the newest, the steps after it never happened."""
    state.caught_up = False
    if step < state.committed:
        _forget_steps_from(state, step)


def controller_restarted(state: Admission) -> None:
    """All answers in flight and all that were not consumed are lost; consumed ones are made again when the batch that they are in is asked
    for, and are not replayed in others."""
    for ordinal in [*state.running, *state.scoring, *state.accepted]:
        _restart(state, ordinal)
    state.again = sorted({*state.again, *state.missing})
    state.replayable.clear()


def driver_restarted(state: Admission, step: int) -> None:
    """A new command goes on from a checkpoint of that step (0: from the beginning), with nothing of the old processes left.

    Steps of which the journal knows nothing, because it is gone, are taken to have had the first prompts.
    """
    state.caught_up = False
    _forget_steps_from(state, step)
    for earlier in range(len(state.batches), step):
        state.batches[earlier] = ()
        state.next_ordinal = max(state.next_ordinal, (earlier + 1) * state.limits.groups)


EVENTS: dict[str, Callable[..., None]] = {
    event.__name__: event
    for event in (
        started, finished, scored, failed, consumed, lost, pushed, committed, trainer_restarted, controller_restarted, driver_restarted
    )
}  # fmt: skip
"""Name -> what it changes; called with the state and the event's fields by name."""


def _drop(state: Admission, ordinal: int) -> None:
    state.running.pop(ordinal, None)
    state.scoring.pop(ordinal, None)
    state.replayable.pop(ordinal, None)
    state.counts["dropped"] += 1
    _clear_failures(state, ordinal)
    pinned = [step for step in range(state.committed, len(state.batches)) if ordinal in state.batches[step]]
    state.missing.discard(ordinal)
    if pinned:  # it was made again, and its batches take a spare, the next group to start
        spare = next((one for one in state.again if one not in state.missing), state.next_ordinal)
        state.next_ordinal = max(state.next_ordinal, spare + 1)
        state.missing.add(spare)
        state.again = sorted({*state.again, spare})
        for step in pinned:
            state.batches[step] = tuple(spare if one == ordinal else one for one in state.batches[step])


def _restart(state: Admission, ordinal: int) -> None:
    for place in (state.running, state.scoring, state.accepted):
        place.pop(ordinal, None)
    state.again = sorted({*state.again, ordinal})


def _clear_failures(state: Admission, ordinal: int) -> None:
    for why in ("process", "environment", "reward", "data"):
        state.failures.pop((why, ordinal), None)


def _forget_steps_from(state: Admission, step: int) -> None:
    """Whatever came of the weights after that step is made again under the weights of the steps to come."""
    forgotten = {ordinal for later in [one for one in state.batches if one >= step] for ordinal in state.batches.pop(later)}
    for ordinal in [*state.running, *state.scoring, *state.accepted]:
        _restart(state, ordinal)
    trained = {ordinal for batch in state.batches.values() for ordinal in batch}  # by a step that stays
    state.again = sorted({*state.again, *forgotten} - trained)
    state.missing.clear()
    state.replayable.clear()
    state.vacant = 0
    state.version = state.committed = step
