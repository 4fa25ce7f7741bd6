"""What rank 0 writes down of a run while it trains: metrics.jsonl, trackers, samples.jsonl, and which evaluation was the best."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from rayft.checkpoint.resume import BEST
from rayft.config.schema import SftRun
from rayft.observe.log import MetricsLog, read
from rayft.observe.trackers import TrackerLog
from rayft.train.stopping import Best, best_of
from rayft.types import Launch, Session

log = logging.getLogger("rayft")

T = TypeVar("T")


class Journal:
    """The records of one run, cut back to the restored step. On other ranks than 0 it writes nothing.

    Args:
        launch: the run.
        session: of this rank.
        step: steps done so far.

    Attributes:
        best: the best evaluation so far, the same on every rank.
        sampled: steps that have their samples.
    """

    def __init__(self, launch: Launch[SftRun], session: Session, step: int) -> None:
        self._folder, self._keep_best = session.run_dir, launch.cfg.checkpoint.keep_best
        self._metrics: MetricsLog | None = None
        self._trackers: TrackerLog | None = None
        self._known: set[tuple[int, str]] = set()
        best, sampled = Best(), set[int]()
        if session.rank == 0:
            self._metrics = MetricsLog(self._folder / "metrics.jsonl", step)
            records = read(self._folder / "metrics.jsonl")
            self._known = {(record["step"], name) for record in records for name in record if name.startswith("eval/")}
            best, sampled = best_of(records, launch.cfg.eval.min_delta), cut_back(self._samples, step)
            self._trackers = _open_trackers(launch, self._folder, self._metrics.reached, records)
            self._metrics.start(launch.attempt, session.world_size)
            (self._folder / BEST).unlink(missing_ok=True)
        self.best, self.sampled = from_rank_0((best, sampled))
        self._note(self.best)

    @property
    def _samples(self) -> Path:
        return self._folder / "samples.jsonl"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A record of metrics."""
        if self._metrics is not None and self._trackers is not None:
            self._metrics.write(step, values)
            self._trackers.log(step, values)

    def evaluated(self, step: int) -> bool:
        """Whether the step's evaluation is recorded; every rank calls it."""
        return from_rank_0((step, "eval/loss") in self._known)

    def add_evaluation(self, step: int, values: Mapping[str, float], min_delta: float) -> bool:
        """Record an evaluation; whether its loss is the lowest so far."""
        self.write(step, values)
        self.best = self.best.after(step, values["eval/loss"], min_delta)
        self._note(self.best)
        return self.best.step == step

    def add_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Record texts of the model, and show them."""
        self.sampled.add(step)
        if self._metrics is not None:
            with self._samples.open("a") as file:
                for prompt, text in zip(prompts, texts, strict=True):
                    file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
                    log.info("sample at step %d: %r -> %r", step, prompt, text)

    def close(self) -> None:
        """Finish what is on its way."""
        if self._metrics is not None:
            self._metrics.close()
        if self._trackers is not None:
            self._trackers.close()

    def _note(self, best: Best) -> None:
        """Tell those who delete checkpoints which one to keep."""
        if self._metrics is not None and self._keep_best and best.loss < float("inf"):
            new = self._folder / f"{BEST}.new"
            new.write_text(json.dumps({"step": best.step, "loss": best.loss}) + "\n")
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


def _open_trackers(launch: Launch[SftRun], folder: Path, reached: Mapping[str, int], records: Sequence[Mapping[str, Any]]) -> TrackerLog:
    cfg = launch.cfg
    return TrackerLog(cfg.trackers, folder, cfg.run.name, cfg.model_dump(mode="json"), reached, records)
