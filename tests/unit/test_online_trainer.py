"""The online trainer in one process, led by a scripted controller: events, records, requests, early stopping, the best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from rayft.checkpoint.resume import best, committed
from rayft.config.functions import resolve
from rayft.config.load import load
from rayft.config.schema import GrpoRun
from rayft.errors import TrainingError
from rayft.experience.algorithm import loss_of, weighing_of
from rayft.experience.orders import Order
from rayft.experience.pack import plan
from rayft.losses.policy import NEED, policy_loss
from rayft.models.tiny import write_tiny_model
from rayft.observe.log import read
from rayft.train.online import OnlineTrainer, _announcing, require_same_policy
from rayft.train.requests import SAVE_NOW, STOP_NOW
from rayft.train.step import forward_backward
from rayft.types import Group, Launch, Prompt, Scored, Session, Trajectory
from rayft.weight_sync.protocol import PushReport

HOOKS = """
import json

def note(event, state):
    with open(state["run_dir"] / "events.jsonl", "a") as file:
        facts = {name: state[name] for name in ("reward", "texts") if name in state}
        file.write(json.dumps([event, state["step"], facts]) + "\\n")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, hooks, and a process group of one."""
    folder = tmp_path_factory.mktemp("online")
    write_tiny_model(folder / "model", ["red green blue"], vocab_size=270, hidden_size=32, layers=1)
    (folder / "hooks.py").write_text(HOOKS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield folder
    dist.destroy_process_group()


class Script:
    """A controller, feed and sender of one prompt a step with two answers; the reward on held-out prompts is a function of the step."""

    def __init__(self, cfg: GrpoRun, rewards: Callable[[int], float], meanwhile: Callable[[int], object] = lambda step: None) -> None:
        self.cfg, self.rewards, self.meanwhile = cfg, rewards, meanwhile
        self.pushes: list[str] = []
        self.covered: list[int] = []
        self.joined: list[int] = []

    def join(self, step: int) -> None:
        self.joined.append(step)

    def order(self, step: int, index: int, lost: Sequence[int]) -> Order:
        self.meanwhile(step)
        if index == 0:
            return Order("push", step, version=f"1.{step}")
        every = self.cfg.eval.every
        known = tuple((done, {"eval/reward": self.rewards(done)}) for done in range(1, step + (step == 12)) if every and done % every == 0)
        if step == 12:
            return Order("end", step, records=known)
        scores = (Scored("0-0", {"r": (0.0, 1.0)}, (0.0, 1.0), (4, 4), (7, 7), (False, False), step, step),)
        updates = tuple(plan(scores, weighing_of(self.cfg), budget=self.cfg.micro_tokens, world=1, updates=1))
        records = ((step + 1, {"reward/mean": 0.5}), *known)
        return Order("batch", step, ticket=str(step), groups={0: step}, scores=scores, updates=updates, records=records).part(0)

    def fetch(self, order: Order) -> tuple[dict[int, Group], list[int]]:
        version = ((f"1.{order.step}", 0, 4),)
        answers = tuple(Trajectory((10, 11, 12 + place, 13), (True,) * 4, (-5.0,) * 4, version, "stop") for place in (0, 1))
        return {number: Group(Prompt("0-0", 0, (5, 6, 7), {}), answers) for number in order.groups}, []

    def engines(self, order: Order) -> list[Any]:
        return []

    def pushed(self, step: int, order: Order, report: PushReport) -> None:
        self.pushes.append(report.version)

    def journal(self) -> bytes:
        return b""

    def committed(self, step: int) -> None:
        self.covered.append(step)

    def push(self, module: Any, version: str, engines: Sequence[Any]) -> PushReport:
        return PushReport(version, 0.1, 1, True, (), {})

    def close(self) -> None: ...


def run(
    site: Path, name: str, *overrides: str, rewards: Callable[[int], float] = lambda step: 0.0, **script: Any
) -> tuple[Path, Script, bool]:
    """Train as the recipe does; (run's directory, the script, whether the run was stopped)."""
    base = ["method=grpo", f"run.name={name}", f"model.path={site / 'model'}", "model.init=random", "run.max_steps=12"]
    small = ["rollout.prompts_per_step=1", "rollout.max_prompt_tokens=8", "rollout.max_tokens=8", "rollout.group_size=2"]
    small.append("weight_sync.max_difference=null")  # the answers are made up
    more = ["data.train.a.path=x", "data.eval.a.path=x", "reward.functions.r.function=exact", "optim.lr=1e-3", "parallel.device=cpu"]
    cfg = load([], [*base, *small, *more, *overrides])
    assert isinstance(cfg, GrpoRun)
    folder = site / name
    folder.mkdir(exist_ok=True)
    controller: Any = Script(cfg, rewards, **script)
    session = Session(0, 1, 0, "cpu", folder, lambda metrics, directory, finish: finish(), 60.0)
    callbacks = (resolve(f"{site}/hooks.py:note"),)
    launch = Launch(cfg, folder, "", None, {"base weights": "none"}, 12, "cpu", True, callbacks, 1)
    loss = policy_loss(loss_of(cfg.algorithm))
    with OnlineTrainer(launch, session, controller, controller) as trainer:
        for step, updates in trainer.steps():
            for batches, divisor in updates:
                trainer.update(*forward_backward(trainer.parts, batches, loss, NEED, trainer.mesh, divisor))
            trainer.finish(step)
        return folder, controller, trainer.stopped


def events(folder: Path, name: str) -> list[int]:
    """Steps of an event."""
    return [step for event, step, _ in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if event == name]


def test_on_a_store_the_journal_is_there_before_a_checkpoint_counts(tmp_path: Path) -> None:
    told: list[object] = []

    class Feed:
        def journal(self) -> bytes:
            return b"lines\n"

        def committed(self, step: int) -> None:
            told.append(step)

    def report(metrics: dict[str, float], directory: str, finish: Callable[[], None]) -> None:
        told.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
        finish()

    session, feed = Session(0, 1, 0, "cpu", tmp_path, report, 60.0, "s3://b/run"), cast("Any", Feed())
    _announcing(session, feed).report({"step": 4.0}, "step-4", lambda: told.append("counts"))
    assert told == [{"journal.jsonl": b"lines\n"}, "counts", 4]


def test_every_event_is_told_and_every_record_written_once(site: Path) -> None:
    folder, script, stopped = run(site, "whole", "checkpoint.every=5", "eval.every=4", "checkpoint.keep=9", rewards=lambda step: step / 10)
    every = list(range(1, 13))
    assert not stopped and events(folder, "step_end") == events(folder, "logged") == events(folder, "sampled") == every
    assert events(folder, "train_start") == [0] and events(folder, "train_end") == [12]
    assert events(folder, "evaluated") == [4, 8, 12] and events(folder, "checkpoint_committing") == [5, 10, 12] == script.covered
    assert script.pushes == [f"1.{step}" for step in range(13)] and script.joined == [0]
    records = read(folder / "metrics.jsonl")
    assert [record["step"] for record in records if "train/loss" in record] == every
    assert [(record["step"], record["eval/reward"]) for record in records if "eval/reward" in record] == [(4, 0.4), (8, 0.8), (12, 1.2)]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in every for _ in (0, 1)]
    assert [sample["reward"] for sample in samples[:2]] == [0.0, 1.0] and samples[0]["versions"] == [["1.0", 0, 4]]


def test_files_ask_for_a_checkpoint_and_for_an_end(site: Path) -> None:
    """They are looked for once a second, so the controller takes its time at the steps where they appear."""
    import time

    folder = site / "asked"

    def ask(step: int) -> None:
        for at, name in ((3, SAVE_NOW), (6, STOP_NOW)):
            if step == at and not (folder / name).exists():
                (folder / name).touch()
                time.sleep(1.3)

    stop = folder / STOP_NOW
    _, _, stopped = run(site, "asked", "checkpoint.keep=9", meanwhile=ask)
    assert stopped and stop.exists() and not (folder / SAVE_NOW).exists()
    assert [found.step for found in committed(folder)] == [4, 7] and events(folder, "step_end")[-1] == 7
    stop.unlink()
    _, script, stopped = run(site, "asked", "checkpoint.keep=9")
    assert not stopped and script.joined == [7] and events(folder, "step_end") == list(range(1, 13))


def test_it_ends_when_the_reward_no_longer_rises_and_the_best_stays(site: Path) -> None:
    """Held-out rewards 1, 3, 2, 2 at steps 2, 4, 6, 8: the second is the best, and the last one is known at step 9."""
    control = ["eval.every=2", "eval.patience=2", "checkpoint.keep_best=true", "checkpoint.every=null"]
    rewards = {2: 1.0, 4: 3.0, 6: 2.0, 8: 2.0}
    folder, _, stopped = run(site, "early", *control, rewards=lambda step: rewards[step])
    assert not stopped and events(folder, "step_end")[-1] == 9 and events(folder, "evaluated") == [2, 4, 6, 8]
    found = best(folder)
    assert found is not None and found.step == 4 and json.loads((folder / "best.json").read_text()) == {"step": 4, "eval/reward": 3.0}
    assert [one.step for one in committed(folder)] == [2, 4, 6, 8, 9], "nothing prunes here"
    _, script, _ = run(site, "early", *control, rewards=lambda step: rewards[step])
    assert script.pushes == [] and events(folder, "step_end")[-1] == 9, "it ended once, so nothing runs again"


def test_what_is_not_finite_ends_the_run_before_it_is_saved(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(step: int) -> None:
        if step == 2:
            monkeypatch.setattr("rayft.train.online.update", lambda *_: torch.tensor(float("nan")))

    with pytest.raises(TrainingError, match=r"step 3: the loss is .* and the gradient norm nan"):
        run(site, "spoilt", "checkpoint.every=1", meanwhile=spoil)
    assert [found.step for found in committed(site / "spoilt")][-1] == 2


def test_an_evaluation_is_recorded_once_over_a_restart(site: Path) -> None:
    """What a controller tells again after a restart is known from the log."""
    folder, _, _ = run(site, "again", "eval.every=4", "run.stop_at=6", rewards=lambda step: 1.0)
    run(site, "again", "eval.every=4", rewards=lambda step: 1.0)
    assert [record["step"] for record in read(folder / "metrics.jsonl") if "eval/reward" in record] == [4, 8, 12]
    assert events(folder, "evaluated") == [4, 8, 12]


@pytest.mark.parametrize(("difference", "most", "stops"), [(0.24, 0.25, False), (0.26, 0.25, True), (3.0, None, False)])
def test_engines_that_disagree_with_the_trainer_stop_the_run(difference: float, most: float | None, stops: bool) -> None:
    with pytest.raises(TrainingError, match=r"step 1: .* differ by 0\.26 nats") if stops else nullcontext():
        require_same_policy(1, difference, most)
