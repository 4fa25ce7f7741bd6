"""The bookkeeping of the online flow under random schedules: finishing order, failures, and deaths of trainer, controller and driver."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.experience.admission import Admission, Event, Limits


@dataclass
class World:
    """A run with everything that can happen to it, its trainer at `step`, its disk holding checkpoints and the journal.

    Attributes:
        made: group -> version that its present answers were started under; what a real run has objects for.
        trained: step -> groups, of the trajectory that counts in the end.
        kills: deaths left to happen.
        keep: chance that a group has signal.
        replays: groups that were in batches of earlier steps too.
        spares: groups that took places of batches from what could not be made again.
        dull: groups whose present answers have no signal.
    """

    limits: Limits
    every: int
    draw: Random
    kills: int
    keep: float = 0.8
    replays: int = 0
    spares: int = 0
    dull: set[int] = field(default_factory=set)
    state: Admission = field(init=False)
    journal: list[str] = field(default_factory=list)
    step: int = 0
    saved: int = 0
    made: dict[int, int] = field(default_factory=dict)
    trained: dict[int, tuple[int, ...]] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.state = Admission(self.limits)
        self.tell(event="driver_restarted", step=0)

    def tell(self, **event: Event) -> None:
        self.journal.append(json.dumps(event))
        self.state.apply(event)
        assert len(self.state.accepted) + len(
            (self.state.running | self.state.scoring).keys() - self.state.missing
        ) <= self.limits.groups * (self.limits.staleness + 1)

    def start(self) -> None:
        while (ordinal := self.state.to_start()) is not None:
            self.tell(event="started", ordinal=ordinal)

    def finish(self) -> None:
        if self.state.running and self.draw.random() < 0.7:
            ordinal = self.draw.choice(list(self.state.running))
            if self.draw.random() < 0.1:
                self.fail(ordinal, self.draw.choice(["process", "environment", "data"]))
                return
            self.made[ordinal] = self.state.running[ordinal]
            self.tell(event="finished", ordinal=ordinal)
        elif self.state.scoring:
            ordinal = self.draw.choice(list(self.state.scoring))
            if self.draw.random() < 0.1:
                self.fail(ordinal, "reward")
                return
            kept, again = self.draw.random() < self.keep, ordinal in self.state.missing
            self.dull = self.dull - {ordinal} | (set() if kept else {ordinal})
            self.tell(event="scored", ordinal=ordinal, kept=kept, signal=self.draw.choice([0.1, 0.2, self.draw.random()]))
            self.left_out = self.left_out - {ordinal} | (set() if kept or again else {ordinal})

    def fail(self, ordinal: int, why: str) -> None:
        """Let a group fail, and note when it is given up; one that was trained before may be, when it is made again for another step."""
        dropped, made_again = self.state.counts["dropped"], ordinal in self.state.missing
        self.tell(event="failed", ordinal=ordinal, why=why)
        if self.state.counts["dropped"] > dropped:
            self.left_out |= {ordinal} - {trained for step in range(self.step) for trained in self.trained[step]}
            self.spares += made_again

    def tidy(self) -> None:
        """Let answers go as the controller does."""
        under_way = self.state.scoring.keys() | self.state.needed()
        self.made = {ordinal: version for ordinal, version in self.made.items() if ordinal in under_way}

    def train(self) -> None:
        """The trainer asks for its batch, and when it gets one takes a step, pushes and saves."""
        known = self.state.batches.get(self.step, ())
        if gone := [ordinal for ordinal in known if ordinal not in self.made and ordinal not in self.state.missing]:
            self.tell(event="lost", ordinals=gone)
        batch = self.state.batch(self.step)
        if batch is None:
            return
        replayed = self.state.replayed(self.step, batch)
        if self.step not in self.state.batches:
            places, best = self.state.vacant, [ordinal for ordinal in batch if ordinal in self.state.replayable]
            assert (
                replayed == best
                and len(best) <= min(self.limits.replay, places)
                and len(best) in (0, len(batch) - len(self.state.accepted))
            )
            assert all(ordinal in self.made for ordinal in batch) and not self.dull.intersection(batch), "what is chosen is there"
            self.tell(event="consumed", step=self.step, ordinals=list(batch), replayed=replayed)
        if self.draw.random() < 0.05:  # a rank cannot fetch some
            gone = self.draw.sample(batch, self.draw.randint(1, len(batch)))
            self.made = {ordinal: version for ordinal, version in self.made.items() if ordinal not in gone}
            self.tell(event="lost", ordinals=gone)
            return
        self.replays += len(replayed)
        assert all(self.step - self.made[ordinal] <= self.limits.staleness for ordinal in batch), "the bound holds for every token"
        assert len({*batch}) == len(batch) == self.limits.groups
        self.trained[self.step] = batch
        self.step += 1
        if self.step >= self.state.version:
            self.tell(event="pushed", step=self.step)
        if self.step % self.every == 0:
            self.saved = self.step
            self.tell(event="committed", step=self.step)
        self.tidy()

    def kill(self) -> None:
        self.kills -= 1
        what = self.draw.choice(["trainer", "controller", "driver"])
        if what != "trainer":
            again = Admission(self.limits)
            for line in self.journal:
                again.apply(json.loads(line))
            assert again == self.state, "the journal holds the whole state"
            self.state, self.made = again, {}
        if what == "controller":
            self.tell(event="controller_restarted")
            return
        self.step = self.saved if self.draw.random() < 0.8 else self.draw.randrange(self.saved + 1)  # or an older checkpoint
        self.saved = self.step
        self.tell(event="driver_restarted" if what == "driver" else "trainer_restarted", step=self.step)

    def run(self) -> None:
        for _ in range(400 * self.limits.steps * self.limits.groups):
            if self.step == self.limits.steps:
                return
            if not self.state.caught_up and self.step >= self.state.version:
                self.tell(event="pushed", step=self.step)
            self.start()
            if self.kills and self.draw.random() < 0.02:
                self.kill()
            self.train() if self.draw.random() < 0.2 else self.finish()
        raise AssertionError(f"stuck at step {self.step}: {self.state}")


SEEDS = st.integers(0, 2**32)
SHAPES = (st.integers(1, 4), st.integers(0, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
"""Groups, staleness, steps, steps from checkpoint to checkpoint, kills."""


@settings(max_examples=600, deadline=None)
@given(SEEDS, *SHAPES, st.integers(0, 2))
def test_any_schedule_ends_within_the_bound_and_trains_no_group_twice(
    seed: int, groups: int, staleness: int, steps: int, every: int, kills: int, rerolls: int
) -> None:
    world = World(Limits(groups, staleness, steps, restarts=3, rescores=1, rerolls=rerolls), every, Random(seed), kills)
    world.run()
    consumed = [ordinal for step in range(steps) for ordinal in world.trained[step]]
    assert len(set(consumed)) == len(consumed) == groups * steps
    assert not world.left_out & set(consumed), "what was filtered or dropped is not trained"
    if not kills:
        assert world.state.next_ordinal == len(consumed) + len(world.left_out), "no prompt is skipped"


@settings(max_examples=400, deadline=None)
@given(SEEDS, *SHAPES, st.integers(0, 2), st.integers(1, 4), st.sampled_from([0.3, 0.6, 0.9]))
def test_any_schedule_with_replay_ends_within_the_bound_and_trains_no_group_three_times(
    seed: int, groups: int, staleness: int, steps: int, every: int, kills: int, rerolls: int, replay: int, keep: float
) -> None:
    limits = Limits(groups, staleness, steps, restarts=3, rescores=1, rerolls=rerolls, replay=replay)
    world = World(limits, every, Random(seed), kills, keep)
    world.run()
    uses = Counter(ordinal for step in range(steps) for ordinal in world.trained[step])
    first = {ordinal: step for step in reversed(range(steps)) for ordinal in world.trained[step]}
    assert all(step - first[ordinal] <= staleness for step in range(steps) for ordinal in world.trained[step])
    assert max(uses.values()) <= (2 if staleness else 1)
    assert not world.left_out & uses.keys(), "what was filtered or dropped is not trained"
    if not kills:
        assert world.state.next_ordinal == len(uses) + len(world.left_out), "no prompt is skipped"
        assert world.replays <= world.state.counts["filtered"]
    if not kills and not world.spares:
        replayed = [world.state.replayed(step, world.trained[step]) for step in range(steps)]
        assert groups * steps - len(uses) == world.replays == sum(map(len, replayed))


def test_schedules_like_these_do_replay() -> None:
    worlds = [World(Limits(3, 2, 9, restarts=3, rescores=1, replay=2), 2, Random(seed), kills=2, keep=0.6) for seed in range(20)]
    for world in worlds:
        world.run()
    assert sum(world.replays for world in worlds) > 40


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(0, 2))
def test_a_restarted_trainer_gets_the_same_batches(seed: int, staleness: int) -> None:
    world = World(Limits(3, staleness, 6, restarts=3, rescores=1), every=4, draw=Random(seed), kills=0)
    while world.step < 6 and not (world.step == 3 and world.state.accepted):
        if not world.state.caught_up:
            world.tell(event="pushed", step=world.step)
        world.start()
        world.train() if world.draw.random() < 0.2 else world.finish()
    before = dict(world.trained)
    world.step = 0
    world.tell(event="trainer_restarted", step=0)
    assert world.state.to_start() is None, "nothing starts before the trainer has caught up"
    for step in range(3):
        assert world.state.batch(step) == before[step]


def test_a_slow_group_is_waited_for_when_it_is_due() -> None:
    state = Admission(Limits(groups=1, staleness=1, steps=9, restarts=0, rescores=0))
    state.apply({"event": "pushed", "step": 0})
    for ordinal in (0, 1):
        state.apply({"event": "started", "ordinal": ordinal})
    assert state.to_start() is None
    state.apply({"event": "finished", "ordinal": 1})
    state.apply({"event": "scored", "ordinal": 1, "kept": True})
    assert state.batch(0) == (1,), "group 0 may be overtaken once"
    state.apply({"event": "consumed", "step": 0, "ordinals": [1]})
    state.apply({"event": "pushed", "step": 1})
    state.apply({"event": "started", "ordinal": 2})
    state.apply({"event": "finished", "ordinal": 2})
    state.apply({"event": "scored", "ordinal": 2, "kept": True})
    assert state.batch(1) is None and state.waits_for() == (0,), "but not twice: it is due"


def test_a_filtered_group_is_rolled_again_under_later_weights_so_many_times() -> None:
    state = Admission(Limits(groups=1, staleness=0, steps=9, restarts=0, rescores=0, rerolls=1))

    def see(name: str, **fields: object) -> None:
        state.apply({"event": name, **fields})

    def roll(ordinal: int, kept: bool) -> None:
        assert state.to_start() == ordinal
        see("started", ordinal=ordinal)
        see("finished", ordinal=ordinal)
        see("scored", ordinal=ordinal, kept=kept)

    see("pushed", step=0)
    roll(0, kept=False)
    roll(1, kept=True)
    see("consumed", step=0, ordinals=[1])
    see("pushed", step=1)
    roll(0, kept=False)
    assert (state.rolls[0], state.later) == (1, {}), "once is enough"
    roll(2, kept=True)
    assert state.counts == {"filtered": 2, "rerolled": 1}


class Told:
    """A state that is told of whole groups at once."""

    def __init__(self, **limits: int) -> None:
        self.state = Admission(Limits(restarts=0, rescores=0, **limits))
        self.see("pushed", step=0)

    def see(self, name: str, **fields: object) -> None:
        self.state.apply({"event": name, **fields})

    def make(self, signal: float) -> int:
        """Start the next group and finish it; without signal it is filtered."""
        ordinal = self.state.to_start()
        assert ordinal is not None
        self.see("started", ordinal=ordinal)
        self.see("finished", ordinal=ordinal)
        self.see("scored", ordinal=ordinal, kept=signal > 0, signal=signal)
        return ordinal

    def step(self) -> tuple[int, ...]:
        """Take a step, and push its weights."""
        step = len(self.state.batches)
        batch = self.state.batch(step)
        assert batch is not None
        self.see("consumed", step=step, ordinals=list(batch), replayed=self.state.replayed(step, batch))
        self.see("pushed", step=step + 1)
        return batch


def test_the_place_of_a_filtered_group_goes_to_the_group_with_the_most_signal() -> None:
    told = Told(groups=3, staleness=1, steps=9, replay=1)
    assert [told.make(signal) for signal in (0.1, 0.3, 0.3, 0.2, 0.2, 0.2)] == [0, 1, 2, 3, 4, 5] and told.state.to_start() is None
    assert told.step() == (0, 1, 2) and told.state.replayable == {0: 0, 1: 0, 2: 0}
    told.make(0.0)
    assert (told.state.vacant, told.state.free()) == (1, 3)
    told.make(0.2), told.make(0.2)
    assert told.state.to_start() is None, "the third place is kept"
    assert told.step() == (3, 4, 5), "nothing is replayed while new groups are there"
    assert told.state.replayable == {}, "those of version 0 are too old for step 2"
    assert told.state.to_start() == 9, "so the place goes to a new group"


def test_a_group_is_replayed_once_and_stays_as_long_as_its_batch_is_pinned() -> None:
    told = Told(groups=2, staleness=2, steps=9, replay=1)
    for _ in range(6):
        told.make(0.5)
    told.state.signals[1] = 0.9
    assert [told.step(), told.step()] == [(0, 1), (2, 3)]
    told.state.accepted.clear()  # as if groups 4 and 5 had been dropped
    told.see("committed", step=2)
    assert told.state.needed() == {0, 1, 2, 3}
    told.make(0.0)
    assert told.make(0.1) == 7
    batch = told.step()
    assert batch == (7, 1), "one new group, and the best of those before"
    assert told.state.replayed(2, batch) == [1] and 1 not in told.state.replayable and 1 in told.state.needed()
    told.see("committed", step=3)
    assert 1 not in told.state.needed()
    told.see("trainer_restarted", step=3)
    told.see("driver_restarted", step=2)
    assert 1 not in told.state.again and 7 in told.state.again, "step 0 has trained it, and that is kept"


def test_what_is_dropped_when_it_is_made_again_is_replayed_no_more() -> None:
    told = Told(groups=2, staleness=2, steps=9, replay=1)
    for _ in range(6):
        told.make(0.5)
    told.step()
    told.see("lost", ordinals=[1])
    told.see("started", ordinal=1)
    told.see("failed", ordinal=1, why="data")
    assert told.state.batches[0] == (0, 6) and told.state.missing == {6} and told.state.replayable == {0: 0}
    told.see("committed", step=1)
    told.see("started", ordinal=6)
    told.see("failed", ordinal=6, why="data")
    assert told.state.batches[0] == (0, 6) and not told.state.missing, "what is covered needs no spare"
