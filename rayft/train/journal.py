"""What rank 0 writes down of a run while it trains: metrics.jsonl, trackers, samples.jsonl, and which evaluation was the best."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from rayft.checkpoint.resume import BEST
from rayft.config.schema import AnyRun
from rayft.observe.log import MetricsLog, read
from rayft.observe.trackers import TrackerLog
from rayft.train.stopping import GOALS, Best, best_of
from rayft.types import Launch, Session

T = TypeVar("T")


class Journal:
    """The records of one run, cut back to the restored step. On other ranks than 0 it writes nothing.

    Args:
        launch: the run.
        session: of this rank.
        step: steps done so far.

    Attributes:
        best: the best evaluation so far; the same on every rank where all of them add evaluations.
        sampled, evaluated: steps that have their samples, and their evaluation.
    """

    def __init__(self, launch: Launch[Any], session: Session, step: int) -> None:
        cfg: AnyRun = launch.cfg
        self._folder, self._keep_best, self._min_delta = session.run_dir, cfg.checkpoint.keep_best, cfg.eval.min_delta
        self.goal = GOALS[cfg.method]
        self._metrics: MetricsLog | None = None
        self._trackers: TrackerLog | None = None
        best, sampled, evaluated = Best(), set[int](), set[int]()
        if session.rank == 0:
            self._metrics = MetricsLog(self._folder / "metrics.jsonl", step)
            records = read(self._folder / "metrics.jsonl")
            evaluated = {int(record["step"]) for record in records if self.goal.metric in record}
            best, sampled = best_of(records, self.goal, self._min_delta), cut_back(self._samples, step)
            self._trackers = _open_trackers(launch, self._folder, self._metrics.reached, records)
            self._metrics.start(launch.attempt, session.world_size)
            (self._folder / BEST).unlink(missing_ok=True)
        self.best, self.sampled, self.evaluated = from_rank_0((best, sampled, evaluated))
        self._note(self.best)

    @property
    def _samples(self) -> Path:
        return self._folder / "samples.jsonl"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A record of metrics."""
        if self._metrics is not None and self._trackers is not None:
            self._metrics.write(step, values)
            self._trackers.log(step, values)

    def add_evaluation(self, step: int, values: Mapping[str, float]) -> bool:
        """Record an evaluation that is not recorded yet; whether it is the best so far."""
        self.evaluated.add(step)
        self.write(step, values)
        self.best = self.best.after(step, self.goal.cost(values), self._min_delta)
        self._note(self.best)
        return self.best.step == step

    def add_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Record texts of the model, each with what is to be known of it."""
        self.sampled.add(step)
        if self._metrics is not None:
            with self._samples.open("a") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def close(self) -> None:
        """Finish what is on its way."""
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()

    def _note(self, best: Best) -> None:
        """Tell those who delete checkpoints which one to keep."""
        if self._metrics is not None and self._keep_best and best.cost < float("inf"):
            new = self._folder / f"{BEST}.new"
            new.write_text(json.dumps({"step": best.step, self.goal.metric: self.goal.sign * best.cost}) + "\n")
            new.replace(self._folder / BEST)


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def cut_back(path: Path, resume_step: int) -> set[int]:
    """Drop the lines of later steps, and half a line at the end, from a file of JSON lines; the steps that are left."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines]
    if len(steps) > 0:
        new = path.with_name(path.name + ".new")
        new.write_text("".join(f"{line}\n" for line, step in zip(lines, steps, strict=True) if step <= resume_step))
        new.replace(path)
    return {step for step in steps if step <= resume_step}


def _open_trackers(launch: Launch[Any], folder: Path, reached: Mapping[str, int], records: Sequence[Mapping[str, Any]]) -> TrackerLog:
    cfg = launch.cfg
    return TrackerLog(cfg.trackers, folder, cfg.run.name, cfg.model_dump(mode="json"), reached, records)
