"""The bookkeeping of the online flow under random schedules: finishing order, failures, and deaths of trainer, controller and driver."""

from __future__ import annotations

import json
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
    """

    limits: Limits
    every: int
    draw: Random
    kills: int
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
                self.tell(event="failed", ordinal=ordinal, why=self.draw.choice(["process", "environment", "data"]))
                self.left_out |= {ordinal} - {*self.state.again}
                return
            self.made[ordinal] = self.state.running[ordinal]
            self.tell(event="finished", ordinal=ordinal)
        elif self.state.scoring:
            ordinal = self.draw.choice(list(self.state.scoring))
            if self.draw.random() < 0.1:
                self.tell(event="failed", ordinal=ordinal, why="reward")
                self.left_out |= {ordinal} - self.state.scoring.keys()
                return
            kept, again = self.draw.random() < 0.8, ordinal in self.state.missing
            self.tell(event="scored", ordinal=ordinal, kept=kept)
            self.left_out = self.left_out - {ordinal} | (set() if kept or again else {ordinal})

    def train(self) -> None:
        """The trainer asks for its batch, and when it gets one takes a step, pushes and saves."""
        known = self.state.batches.get(self.step, ())
        if gone := [ordinal for ordinal in known if ordinal not in self.made and ordinal not in self.state.missing]:
            self.tell(event="lost", ordinals=gone)
        batch = self.state.batch(self.step)
        if batch is None:
            return
        if self.step not in self.state.batches:
            self.tell(event="consumed", step=self.step, ordinals=list(batch))
        assert all(self.step - self.made[ordinal] <= self.limits.staleness for ordinal in batch), "the bound holds for every token"
        assert len(batch) == self.limits.groups
        self.trained[self.step] = batch
        self.step += 1
        if self.step >= self.state.version:
            self.tell(event="pushed", step=self.step)
        if self.step % self.every == 0:
            self.saved = self.step
            self.tell(event="committed", step=self.step)

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


@settings(max_examples=600, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2)
)
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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2))
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
